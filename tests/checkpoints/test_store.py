"""Which checkpoint a run continues from, when some were damaged; and which ones stay on disk."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoints.training import Trained, train
from tests.distributed.ranks import RankPool
from tests.models.parity import Layout

OLD, NEW = "step-00000001", "step-00000002"


@pytest.fixture(scope="module")
def two_checkpoints(ranks: RankPool, hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    ranks.run(train, hf_dir, Layout(), directory, steps=2, save_after=(1, 2))
    return directory


@pytest.fixture
def directory(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


def load(ranks: RankPool, hf_dir: Path, directory: Path) -> Trained:
    """What a resumed run finds, the same on both ranks; the first rank's."""
    first, second = ranks.run(train, hf_dir, Layout(), directory, steps=0, resume=True)
    assert (first.first_step, first.state) == (second.first_step, second.state)
    assert second.log == []  # one line, not one a rank
    return first


def truncate(path: Path) -> str:
    with open(largest_file(path), "r+b") as file:
        file.truncate(1000)
    return "has 1000 bytes, not"


def flip_a_bit(path: Path) -> str:
    with open(largest_file(path), "r+b") as file:
        file.seek(5000)
        byte = file.read(1)[0]
        file.seek(5000)
        file.write(bytes([byte ^ 1]))
    return "has been altered"


def delete_a_file(path: Path) -> str:
    largest_file(path).unlink()
    return "is missing"


def delete_the_manifest(path: Path) -> str:
    (path / "manifest.json").unlink()
    return "manifest.json is missing"


def cut_the_manifest(path: Path) -> str:
    (path / "manifest.json").write_text((path / "manifest.json").read_text()[:-20])
    return "manifest.json is not as it was written"


def edit_the_manifest(path: Path) -> str:
    content = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(content | {"step": 7}))
    return "manifest.json is not as it was written"


def empty_the_folder(path: Path) -> str:
    shutil.rmtree(path)
    path.mkdir()
    return "manifest.json is missing"


def largest_file(path: Path) -> Path:
    return max(path.iterdir(), key=lambda file: file.stat().st_size)


DAMAGE = [
    truncate,
    flip_a_bit,
    delete_a_file,
    delete_the_manifest,
    cut_the_manifest,
    edit_the_manifest,
    empty_the_folder,
]


def test_the_newest_is_loaded(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    found = load(ranks, hf_dir, directory)
    assert found.first_step == 2
    assert found.log == [f"loaded checkpoint {directory / NEW}"]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_one_is_passed_over(
    ranks: RankPool, hf_dir: Path, directory: Path, damage: Callable[[Path], str]
) -> None:
    reason = damage(directory / NEW)
    found = load(ranks, hf_dir, directory)
    assert found.first_step == 1
    assert found.log[0].startswith(f"checkpoint {directory / NEW} is damaged (") and reason in found.log[0]
    assert found.log[1:] == [f"loaded checkpoint {directory / OLD}"]


def test_a_save_that_was_killed_is_ignored_and_cleared_away(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    (directory / NEW).rename(directory / f".{NEW}")
    found = load(ranks, hf_dir, directory)
    assert found.first_step == 1
    assert found.log[0] == f"checkpoint {directory / f'.{NEW}'}: was not written to the end; ignored"
    ranks.run(train, hf_dir, Layout(), directory, steps=3, resume=True, save_after=(3,))
    assert names(directory) == [OLD, "step-00000003"]


def test_without_a_whole_one_the_run_does_not_start_over(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    truncate(directory / NEW)
    delete_the_manifest(directory / OLD)
    with pytest.raises(AssertionError, match=r"UserError: .*of 2 checkpoints none is whole .*manifest.json is missing"):
        load(ranks, hf_dir, directory)


@pytest.mark.parametrize("made", [True, False])
def test_a_new_run_has_nothing_to_load(ranks: RankPool, hf_dir: Path, tmp_path: Path, made: bool) -> None:
    directory = tmp_path / "checkpoints"
    if made:
        directory.mkdir()
    found = load(ranks, hf_dir, directory)
    assert (found.state, found.log) == (None, [])


@pytest.mark.mcore_lane
def test_a_newer_megatron_core_is_named(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    ranks.run(pretend_newer, directory / NEW)
    with pytest.raises(AssertionError, match=r"UserError: .*megatron-core 99.0.1, which .* cannot read"):
        load(ranks, hf_dir, directory)


def pretend_newer(path: Path) -> None:
    from megatron_sead.checkpoints.manifest import read_manifest, write_manifest

    if os.environ["RANK"] == "0":
        manifest = read_manifest(path)
        manifest.megatron_core = "99.0.1"
        write_manifest(path, manifest)


def test_keep(ranks: RankPool, hf_dir: Path, tmp_path: Path) -> None:
    ranks.run(train, hf_dir, Layout(), tmp_path, steps=4, save_after=(1, 2, 3, 4), keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


def test_a_damaged_one_does_not_count_as_kept(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    """With keep=1: neither is the newest whole one deleted for it, nor is it in the way when its step comes again."""
    truncate(directory / NEW)
    ranks.run(train, hf_dir, Layout(), directory, steps=2, resume=True, save_after=(2,), keep=1)
    assert names(directory) == [NEW]
    assert load(ranks, hf_dir, directory).first_step == 2


def test_a_damaged_later_one_takes_no_place(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    later = (directory / NEW).rename(directory / "step-00000003")
    truncate(later)
    ranks.run(train, hf_dir, Layout(), directory, steps=2, resume=True, save_after=(2,), keep=2)
    assert names(directory) == [OLD, NEW]


def test_what_others_put_into_checkpoints_stays(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    (directory / OLD / "evaluation.json").write_text("mine")
    (directory / "step-00000009").mkdir()
    (directory / "step-00000009" / "notes").write_text("mine")
    (directory / NEW / "manifest.json").unlink()
    ranks.run(train, hf_dir, Layout(), directory, steps=3, resume=True, save_after=(2, 3), keep=1)
    assert names(directory) == [OLD, f"{NEW}.kept", "step-00000003", "step-00000009"]
    assert [path.name for path in (directory / OLD).iterdir()] == ["evaluation.json"]
    assert (directory / "step-00000009/notes").read_text() == "mine"


def names(directory: Path) -> list[str]:
    return sorted(entry.name for entry in directory.iterdir())
