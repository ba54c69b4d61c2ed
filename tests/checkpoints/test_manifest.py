"""A manifest is a file that anybody can write: what a run does not write is no manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


def manifest(**changes: Any) -> Any:
    from megatron_sead.checkpoints.manifest import Manifest  # imports Megatron: not to be collected

    known: dict[str, Any] = {"step": 1, "megatron_core": "0.16.1", "layout": {}, "files": {"__0_0.distcp": (1, 2)}}
    return Manifest(**(known | changes))


@pytest.mark.parametrize("version", ["0.16.1", "0.19.0rc0", "0.17.0+abc.d1"])
def test_what_a_run_writes_is_read(tmp_path: Path, version: str) -> None:
    from megatron_sead.checkpoints.manifest import read_manifest, write_manifest

    write_manifest(tmp_path, manifest(megatron_core=version, files={".metadata": (3, 4), "common.pt": (1, 2)}))
    assert read_manifest(tmp_path).files == {".metadata": (3, 4), "common.pt": (1, 2)}


@pytest.mark.parametrize(
    "changes",
    [
        *({"files": {name: (1, 2)}} for name in ("../config.yaml", "..", "", "a/b", "/etc/passwd", "a\0b", "a\ud800")),
        *({"files": {"a": pair}} for pair in (("x", 2), (1,), 5, (None, 2))),
        *({"megatron_core": version} for version in (5, "9" * 5000 + ".1", "")),
    ],
    ids=repr,
)
def test_what_no_run_writes_is_damage(tmp_path: Path, changes: dict[str, Any]) -> None:
    from megatron_sead.checkpoints.manifest import Damage, read_manifest, write_manifest

    write_manifest(tmp_path, manifest(**changes))
    with pytest.raises(Damage, match="is not as it was written"):
        read_manifest(tmp_path)


def test_a_nested_file_is_damage(tmp_path: Path) -> None:
    from megatron_sead.checkpoints.manifest import Damage, read_manifest

    (tmp_path / "manifest.json").write_text("[" * 100_000)
    with pytest.raises(Damage, match="is not as it was written"):
        read_manifest(tmp_path)
