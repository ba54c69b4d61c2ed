"""Results are written anew each time, and never over what somebody else wrote or changed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_sead.errors import UserError
from megatron_sead.files.replaceable import RECORD, replace_files, require_replaceable


def test_own_files_are_replaced_until_somebody_changes_them(tmp_path: Path) -> None:
    replace_files(tmp_path, {"a": b"1", "b": b"1"})
    replace_files(tmp_path, {"a": b"2", "b": b"1"})
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"2", b"1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [RECORD, "a", "b"]
    (tmp_path / "b").write_bytes(b"my notes")
    with pytest.raises(UserError, match="b: was not written by this command, or was changed since"):
        replace_files(tmp_path, {"a": b"3", "b": b"3"})
    assert ((tmp_path / "a").read_bytes(), (tmp_path / "b").read_bytes()) == (b"2", b"my notes")
    (tmp_path / "b").unlink()
    replace_files(tmp_path, {"a": b"3", "b": b"3"})
    assert (tmp_path / "b").read_bytes() == b"3"


def test_files_of_others_stay(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "folder").mkdir()
    for name in ("a", "link", "folder"):
        with pytest.raises(UserError, match=f"{name}: was not written"):
            require_replaceable(tmp_path, [name])
    (tmp_path / RECORD).write_text("[1]")
    with pytest.raises(UserError, match=RECORD):
        replace_files(tmp_path, {"b": b""})
    assert (tmp_path / RECORD).read_text() == "[1]"


def test_a_kill_between_two_files_leaves_both_replaceable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_files(tmp_path, {"a": b"1", "b": b"1"})
    rename = os.replace

    def killed(source: Path, target: Path) -> None:
        if target.name == "b":
            raise KeyboardInterrupt
        rename(source, target)

    for content in (b"2", b"3"):
        monkeypatch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            replace_files(tmp_path, {"a": content, "b": content})
        for left in tmp_path.glob("*.writing"):  # of another process
            left.unlink()
    monkeypatch.setattr(os, "replace", rename)
    replace_files(tmp_path, {"a": b"4", "b": b"4"})
    assert (tmp_path / "b").read_bytes() == b"4"
