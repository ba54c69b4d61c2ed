"""Files are replaced whole, and nothing that a link names is written to."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megatron_sead.errors import UserError
from megatron_sead.files.durable import refused_by_the_disk, replace_text
from megatron_sead.reporting.metrics import MetricsWriter


def test_a_link_is_replaced_and_what_it_names_stays(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    (tmp_path / "file").symlink_to(theirs)
    replace_text(tmp_path / "file", "new")
    assert theirs.read_text() == "precious"
    assert (tmp_path / "file").read_text() == "new"
    assert not (tmp_path / "file").is_symlink()


@pytest.mark.parametrize("name", ["file.tmp", ".file.PROCESS-0.tmp"])
def test_no_file_is_taken_for_the_temporary_one(tmp_path: Path, name: str) -> None:
    name = name.replace("PROCESS", str(os.getpid()))
    (tmp_path / name).write_text("precious")
    replace_text(tmp_path / "file", "new")
    assert (tmp_path / name).read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["file", name])


def test_a_text_that_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path: Path) -> None:
    replace_text(tmp_path / "file", "old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "file", "\ud800")
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_file_stays_as_it_was_until_the_new_one_is_whole(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(UnicodeEncodeError):
        replace_text(tmp_path / "file", "new" * 10_000 + "\udcff")
    assert (tmp_path / "file").read_text() == "old"


def test_metrics_continue_whatever_stands_between_their_lines(tmp_path: Path) -> None:
    odd = b'null\n[1]\n{"step": "a"}\n{"loss": 1}\n\xff\xfe\x00\n' + b"[" * 100_000 + b'\n{"step": 1, "lo'
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 0}\n' + odd)
    writer = MetricsWriter(tmp_path, first_step=1)
    writer.write({"step": 1})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n{"step": 1}\n'


def test_metrics_are_not_written_where_a_link_leads(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "theirs")
    MetricsWriter(tmp_path, first_step=0).close()
    assert not (tmp_path / "theirs").exists()


def test_what_the_disk_refuses_is_a_users_error_and_what_the_program_does_wrong_is_none(tmp_path: Path) -> None:
    for place in (tmp_path / ("x" * 300), tmp_path):
        with pytest.raises(UserError, match=r"^output=o: cannot be written \(\S+\): \w"), refused_by_the_disk(told):
            place.write_text("text")
    full = pytest.raises(UserError, match=r"^output=o: cannot be written: No space left on device$")
    with full, refused_by_the_disk(told):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), refused_by_the_disk(told):
        (tmp_path / "none").read_text()
    missing = pytest.raises(UserError, match=r"^output=o: cannot be written \(\S+none/file\): No such file")
    with missing, refused_by_the_disk(told, writes_alone=True):
        (tmp_path / "none" / "file").write_text("text")


def told(reason: str) -> UserError:
    return UserError(f"output=o: {reason}")
