"""An output takes the place of nothing but what was written here, and of that only when it is whole."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_sead.errors import UserError
from megatron_sead.files import outputs
from megatron_sead.files.outputs import RECORD, Output, require_apart, whole_directory


def write(directory: Path, text: str = "new", *, overwrite: bool = False, inputs: tuple[Path, ...] = ()) -> None:
    with whole_directory(directory, inputs=inputs, overwrite=overwrite) as temporary:
        (temporary / "config.json").write_text(text)
        (temporary / "templates").mkdir()
        (temporary / "templates" / "default.jinja").write_text(text)


def refused(directory: Path, **options: bool) -> str:
    """The line that refuses to replace a directory, of which nothing has changed."""
    before = snapshot(directory)
    with pytest.raises(UserError) as caught:
        write(directory, **({"overwrite": True} | options))
    assert snapshot(directory) == before
    return str(caught.value)


def snapshot(directory: Path) -> dict[str, str]:
    return {str(path): path.read_text() if path.is_file() else "" for path in directory.parent.rglob("*")}


def content(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


OURS = [RECORD, "config.json", "templates/default.jinja"]


def test_an_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", "old")
    assert "exists; choose another directory" in refused(tmp_path / "out", overwrite=False)
    write(tmp_path / "out", "new", overwrite=True)
    assert content(tmp_path / "out") == OURS and (tmp_path / "out/config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_directory_may_be_the_output(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    assert content(tmp_path / "out") == OURS


def file_beside(out: Path) -> None:
    (out / "results.json").write_text("mine")


def folder_beside(out: Path) -> None:
    (out / "checkpoint-100").mkdir()


def file_in_our_folder(out: Path) -> None:
    (out / "templates" / "mine.jinja").write_text("mine")


def edited(out: Path) -> None:
    (out / "config.json").write_text("mine")


def link_beside(out: Path) -> None:
    (out / "data").symlink_to("/")


def link_for_ours(out: Path) -> None:
    (out.parent / "mine").write_text("mine")
    (out / "config.json").unlink()
    (out / "config.json").symlink_to(out.parent / "mine")


def no_record(out: Path) -> None:
    (out / RECORD).unlink()


def broken_record(out: Path) -> None:
    (out / RECORD).write_text("[]")


def file_instead(out: Path) -> None:
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    out.rmdir()
    out.write_text("mine")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (file_beside, "holds results.json"),
        (folder_beside, "holds checkpoint-100"),
        (file_in_our_folder, "holds templates/mine.jinja"),
        (edited, "config.json is not as this tool wrote it"),
        (link_beside, "holds data"),
        (link_for_ours, "config.json is not as this tool wrote it"),
        (no_record, "was not written by this tool"),
        (broken_record, "was not written by this tool"),
        (file_instead, "is a file"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_is_not_ours_is_named_and_stays(tmp_path: Path, change: Callable[[Path], None], told: str) -> None:
    write(tmp_path / "out", "old")
    change(tmp_path / "out")
    assert told in refused(tmp_path / "out")


def test_other_weights_of_the_same_size_are_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "READ_WHOLE", 2)  # so that no file is small enough to be read
    write(tmp_path / "out", "old")
    write(tmp_path / "out", "new", overwrite=True)
    (tmp_path / "out/config.json").write_text("own")
    assert "config.json has another date than when this tool wrote it" in refused(tmp_path / "out")


def test_somebody_else_s_directory_is_never_an_output(tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project/config.json").write_text("{}")
    assert "was not written by this tool" in refused(tmp_path / "project")


def test_what_appears_while_we_write_stays(tmp_path: Path) -> None:
    def interrupted(overwrite: bool) -> None:
        with whole_directory(tmp_path / "out", inputs=(), overwrite=overwrite) as temporary:
            (temporary / "config.json").write_text("new")
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out/mine").write_text("mine")

    with pytest.raises(UserError, match="exists; choose another directory"):
        interrupted(overwrite=False)
    (tmp_path / "out/mine").unlink()
    (tmp_path / "out").rmdir()
    write(tmp_path / "out", "old")
    with pytest.raises(UserError, match="holds mine, which this tool did not write"):
        interrupted(overwrite=True)
    assert content(tmp_path / "out") == [RECORD, "config.json", "mine", "templates/default.jinja"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_stays_a_link_twice(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "real")  # to nothing yet
    write(tmp_path / "out", "old")
    for text in ("new", "newer"):
        write(tmp_path / "out", text, overwrite=True)
        assert (tmp_path / "out").is_symlink() and (tmp_path / "disk/real/config.json").read_text() == text
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real"]
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with pytest.raises(UserError, match="circle"):
        write(tmp_path / "circle")


def test_neighbours_that_are_not_ours_stay(tmp_path: Path) -> None:
    for name in (".out.tmp", ".out.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis").write_text("mine")
        assert name in refused(tmp_path / "out")
        (tmp_path / name).rename(tmp_path / f"kept{name}")
    write(tmp_path / "out")


def test_what_somebody_put_into_unfinished_work_stays(tmp_path: Path) -> None:
    killed = Output(tmp_path / "out", inputs=(), overwrite=False)
    (killed.temporary / "config.json").write_text("half")
    (killed.temporary / "thesis").write_text("mine")
    killed._record.close()  # as the kernel closes it
    assert ".out.tmp: is needed to write" in (line := refused(tmp_path / "out")) and "holds thesis" in line
    (tmp_path / ".out.tmp/thesis").rename(tmp_path / "thesis")
    write(tmp_path / "out")
    failed = Output(tmp_path / "new", inputs=(), overwrite=False)
    (failed.temporary / "config.json").write_text("half")
    (failed.temporary / "thesis").write_text("mine")
    failed.discard()
    assert content(tmp_path) == [".new.tmp/thesis", *(f"out/{name}" for name in OURS), "thesis"]


def test_a_record_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    """Anybody can write one."""
    write(tmp_path / "out", "old")
    (tmp_path / "mine").write_text("mine")
    record = json.loads((tmp_path / "out" / RECORD).read_text())
    record["files"] |= {name: [4, 0] for name in ("../mine", str(tmp_path / "mine"))}
    (tmp_path / "out" / RECORD).write_text(json.dumps(record))
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "mine").read_text() == "mine"


@pytest.mark.parametrize("name", [".out.tmp", ".out.old"])
@pytest.mark.parametrize("there", [True, False])
def test_what_a_killed_process_left_may_be_an_input(tmp_path: Path, name: str, there: bool) -> None:
    """Then it is not cleared away, nor given its name back."""
    if there:
        write(tmp_path / "out", "old")
    write(tmp_path / "model")
    (tmp_path / "model").rename(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: is needed to write .*out and is read; give it another name"):
        write(tmp_path / "out", overwrite=True, inputs=(tmp_path / name,))
    assert sorted(path.name for path in tmp_path.iterdir()) == [name, "out"][: 1 + there]


@pytest.mark.parametrize("name", [".out.tmp", ".out.old"])
def test_a_link_at_a_neighbour_s_place_is_not_followed(tmp_path: Path, name: str) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / name).symlink_to(tmp_path / "mine")
    assert f"{name}: is needed" in refused(tmp_path / "out")


@pytest.mark.parametrize("moment", ["before the old one is aside", "between the renames", "after them"])
def test_a_kill_loses_neither_the_old_nor_the_new(tmp_path: Path, moment: str) -> None:
    out, aside = tmp_path / "out", tmp_path / ".out.old"
    write(out, "old")
    killed = Output(out, inputs=(), overwrite=True)
    (killed.temporary / "config.json").write_text("half")
    killed._record.close()  # as the kernel closes it
    if moment == "between the renames":
        out.rename(aside)
    if moment == "after them":
        out.rename(aside)
        write(tmp_path / "other", "new")
        (tmp_path / "other").rename(out)
    write(out, "newer", overwrite=True)
    assert (out / "config.json").read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    first = Output(tmp_path / "out", inputs=(), overwrite=False)
    (first.temporary / "config.json").write_text("first")
    assert "is being written by another process" in refused(tmp_path / "out")
    first.take_name()
    first.discard()
    assert (tmp_path / "out/config.json").read_text() == "first"


def test_a_file_system_without_locks_is_written_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_locks(*arguments: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", without_locks)
    write(tmp_path / "out")
    assert content(tmp_path / "out") == OURS


@pytest.mark.parametrize("place", ["model", "model/sub/deep", ".", "link", "link/sub", "blobs", "up/../model", "MODEL"])
def test_an_output_that_overlaps_an_input_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "blobs").mkdir()
    (tmp_path / "up").mkdir()
    (tmp_path / "blobs/weights").write_text("weights")
    (tmp_path / "model/config.json").write_text("{}")
    (tmp_path / "model/weights").symlink_to(tmp_path / "blobs/weights")  # as the hub's cache has it
    (tmp_path / "link").symlink_to(tmp_path / "model")
    if place == "MODEL" and not (tmp_path / "MODEL").exists():
        pytest.skip("needs a file system that does not tell upper case from lower")
    with pytest.raises(UserError, match="overlaps"):
        write(tmp_path / place, overwrite=True, inputs=(tmp_path / "model",))
    with pytest.raises(UserError, match="overlaps"):
        require_apart(tmp_path / place, [tmp_path / "link"])
    require_apart(tmp_path / "model-2", [tmp_path / "model", tmp_path / "not there"])


def test_places_that_cannot_be_written_are_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "out", Path("/proc/out")):
        with pytest.raises(UserError, match="cannot be written"):
            write(place)
    for disk in (os.sep, "/proc"):
        with pytest.raises(UserError, match="whole disk"):
            write(Path(disk))
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for place in (tmp_path / "circle", tmp_path / "file" / "out"):
        with pytest.raises(UserError, match=r"circle|overlaps"):
            require_apart(place, [tmp_path / "file"])
