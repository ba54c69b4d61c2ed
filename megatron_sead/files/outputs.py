"""Directories that get their name only when they are whole, and that replace only what was written here.

Each holds `RECORD`, the list of its files. A directory is replaced only if it has one and holds nothing else: no file
that somebody put beside ours or changed since is ever deleted. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from megatron_sead.errors import UserError
from megatron_sead.files.durable import flush_tree, rename_directory
from megatron_sead.files.names import INDEX, TOKENIZER_FILES

RECORD = ".megatron_sead.json"
READ_WHOLE = 2**24  # bytes of a file up to which its content is recorded, not its age: all but weights
ROOM_FOR_REST = 64 * 2**20  # bytes, for tokenizer files and headers
# Files of a directory that is not whole yet, which has no list of them
WRITTEN = {RECORD, "config.json", "generation_config.json", "manifest.json", "inputs.json", "recipe.json"}
WRITTEN |= {"prompts.jsonl", "heldout.jsonl", ".metadata", "metadata.json", "common.pt", "run_state.pt"}
WRITTEN |= {*TOKENIZER_FILES, INDEX}
WRITTEN_LIKE = re.compile(r"model(-\d+-of-\d+)?\.safetensors|__\d+_\d+\.distcp|.+\.jinja")


@contextmanager
def whole_directory(
    directory: Path, *, inputs: Iterable[Path], overwrite: bool, weight_bytes: int = 0
) -> Iterator[Path]:
    """A directory to fill, beside `directory`, which takes its name when the body ends, and vanishes when it fails.

    What a killed process left is deleted first.

    Args:
        directory: a symbolic link stays one; what it points to is written.
        inputs: directories and files that are read for it.
        overwrite: `directory` may be an earlier output, and is replaced at the end.
        weight_bytes: that the body will write; there must be room for them.

    Raises:
        UserError: as `Output` has; there is no room; the disk refuses.
    """
    try:
        output = Output(directory, inputs=inputs, overwrite=overwrite)
        try:
            _require_room(output.temporary, directory, weight_bytes + ROOM_FOR_REST)
            yield output.temporary
            output.take_name()
        finally:
            output.discard()
    except OSError as error:
        raise _not_writable(directory, error) from error


class Output:
    """A directory being written: `temporary`, beside the place that it takes with `take_name`.

    Raises:
        UserError: the place overlaps an input, holds what was not written here, or is being written by another process.
        OSError: the disk refuses.
    """

    def __init__(self, directory: Path, *, inputs: Iterable[Path], overwrite: bool) -> None:
        inputs = list(inputs)
        require_apart(directory, inputs)
        self.place = directory.resolve()
        if self.place.is_mount():
            raise UserError(f"{directory}: is the whole disk; choose a directory in it")
        self.overwrite = overwrite
        self.temporary = self.place.with_name(f".{self.place.name}.tmp")
        self._aside = self.place.with_name(f".{self.place.name}.old")
        self._named = False
        for neighbour in (self.temporary, self._aside):
            for given in inputs:
                if overlap(neighbour, given):
                    raise UserError(f"{given}: is needed to write {self.place} and is read; give it another name")
            if neighbour.is_symlink():
                raise UserError(f"{neighbour}: is needed to write {self.place} and is not ours; move it away")
        self._require_replaceable()
        self._record = self._begin()
        try:  # locked: no other process is between two renames
            self._clear_aside()
            self._require_replaceable()
        except BaseException:
            self.discard()
            raise

    def take_name(self) -> None:
        """Flush all files and make them `place`, in place of the earlier output there. A kill loses neither.

        Raises:
            UserError: something of somebody else's is there meanwhile.
        """
        _write(self._record, {"files": _describe(self.temporary)})
        flush_tree(self.temporary)
        self._require_replaceable()
        if _is_empty(self.place):
            self.place.rmdir()
        elif self.place.exists():
            self.place.rename(self._aside)
        rename_directory(self.temporary, self.place)
        self._clear_aside()
        self._named = True

    def discard(self) -> None:
        """Delete what has not taken its name, and let others write there."""
        if not self._named:
            with suppress(OSError):
                delete_unfinished(self.temporary)
        self._record.close()

    def _require_replaceable(self) -> None:
        if not self.place.exists() or _is_empty(self.place):
            return
        if self.place.is_dir() and not self.overwrite:
            raise UserError(f"{self.place}: exists; choose another directory", remedy="overwrite")
        require_written_here(self.place)

    def _clear_aside(self) -> None:
        """What a process that was killed between the renames of `take_name`, or after them, left."""
        if not self._aside.exists():
            return
        require_written_here(self._aside)
        if self.place.exists():
            _delete(self._aside)
        else:
            self._aside.rename(self.place)

    def _begin(self) -> IO[str]:
        """Make `temporary`, with its record, open and locked for as long as this process lives."""
        self.place.parent.mkdir(parents=True, exist_ok=True)
        record = self.temporary / RECORD
        if self.temporary.exists() and not _is_empty(self.temporary):
            if not record.is_file():
                raise UserError(f"{self.temporary}: is needed to write {self.place} and is not ours; move it away")
            with open(record, "r+", encoding="utf-8") as left:
                _lock(left, self.place)
                if unknown := unknown_files(self.temporary):
                    raise UserError(
                        f"{self.temporary}: is needed to write {self.place} and holds {unknown[0].name}, which this "
                        "tool did not write; move it away"
                    )
                delete_unfinished(self.temporary)
        self.temporary.mkdir(exist_ok=True)
        file = open(record, "x", encoding="utf-8")  # noqa: SIM115 (stays open)
        _lock(file, self.place)
        _write(file, {"files": None})
        return file


def require_free(path: Path, own: str | None = None) -> None:
    """Where a file is to be written nothing stands, not even a link to nowhere; or `own`, which would be written again.

    Raises:
        UserError: something else does.
    """
    if os.path.lexists(path) and (own is None or not path.is_file() or path.read_bytes() != own.encode()):
        raise UserError(f"{path}: exists already; choose another output, or move it away")


def require_apart(directory: Path, inputs: Iterable[Path]) -> None:
    """Refuse to write into, above or below what is read, whatever links lead there.

    Raises:
        UserError: names both; or `directory` is no place that the system can name.
    """
    try:
        for given in inputs:
            if overlap(directory, given):
                raise UserError(
                    f"{directory}: overlaps {given}, which is read; choose one that is neither in it nor around it"
                )
        directory.resolve()
    except OSError as error:
        raise _not_writable(directory, error) from error
    except RuntimeError as error:
        if "Symlink loop" not in str(error):  # how pathlib before Python 3.13 tells it
            raise
        raise UserError(f"{directory}: cannot be written (its symbolic links lead in a circle)") from None


def overlap(directory: Path, given: Path) -> bool:
    """Is one in the other, or something that `given` links to in `directory`? Neither need exist."""
    if not given.exists():
        return False
    linked = [file for file in (given.iterdir() if given.is_dir() else ()) if file.is_symlink() and file.exists()]
    return is_within(directory, given) or (
        directory.exists() and any(is_within(read, directory) for read in (given, *linked))
    )


def is_within(path: Path, folder: Path) -> bool:
    """Compared as the file system does, which may not tell upper case from lower."""
    path = path.resolve()
    return any(place.exists() and place.samefile(folder) for place in (path, *path.parents))


def require_written_here(directory: Path) -> None:
    """Refuse a directory that holds anything but what was written here, as it was written.

    Raises:
        UserError: names the first file that is not ours.
    """
    advice = "move it away, or choose another directory"
    if not directory.is_dir():
        raise UserError(f"{directory}: is a file; {advice}")
    recorded = _recorded(directory)
    if recorded is None:
        raise UserError(f"{directory}: exists and was not written by this tool (it has no {RECORD}); {advice}")
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if name == RECORD or (path.is_dir() and not path.is_symlink() and _holds(recorded, name)):
            continue
        if name not in recorded:
            raise UserError(f"{directory}: holds {name}, which this tool did not write; {advice}")
        if recorded[name] != _description(path):
            raise UserError(f"{directory}: {name} {_change(recorded[name], path)}; {advice}")


def _holds(recorded: dict[str, Any], folder: str) -> bool:
    return any(name.startswith(f"{folder}{os.sep}") for name in recorded)


def _recorded(directory: Path) -> dict[str, Any] | None:
    with suppress(OSError, ValueError, AttributeError, RecursionError):
        files = json.loads((directory / RECORD).read_text(encoding="utf-8")).get("files")
        return files if isinstance(files, dict) else None
    return None


def _describe(directory: Path) -> dict[str, Any]:
    files = (path for path in _files(directory) if path.name != RECORD and not path.is_symlink())
    return {str(path.relative_to(directory)): _description(path) for path in files}


def _description(path: Path) -> list[int]:
    """[bytes, CRC-32]; of weights, which would take long to read, [bytes, time of the last change in ns]."""
    if path.is_symlink() or not path.is_file():  # we write none
        return []
    found = path.stat()
    return [found.st_size, zlib.crc32(path.read_bytes()) if found.st_size <= READ_WHOLE else found.st_mtime_ns]


def _change(recorded: object, path: Path) -> str:
    """How a file differs from what the record says of it."""
    found = _description(path)
    if not found or not isinstance(recorded, list) or len(recorded) != 2:
        return "is not as this tool wrote it: not a file of its own"
    if found[0] != recorded[0]:
        return f"is not as this tool wrote it: {found[0]:,} bytes, and {recorded[0]:,} then"
    if found[0] <= READ_WHOLE:
        return "is not as this tool wrote it: other content"
    return "has another date than when this tool wrote it, as a copy of it has, and may be another file"


def _delete(directory: Path) -> None:
    """The recorded files, then the folders that are empty without them."""
    recorded = _recorded(directory) or {}
    _delete_files(directory, lambda path: path.name == RECORD or str(path.relative_to(directory)) in recorded)


def unknown_files(directory: Path) -> list[Path]:
    """Files of an unfinished directory that have none of the names that are written here."""
    return [path for path in _files(directory) if not _is_known(path)]


def delete_unfinished(directory: Path) -> None:
    """Delete what was being written when its process ended, and the folder, unless there are `unknown_files`."""
    _delete_files(directory, _is_known)


def _is_known(path: Path) -> bool:
    return not path.is_symlink() and (path.name in WRITTEN or WRITTEN_LIKE.fullmatch(path.name) is not None)


def _files(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.rglob("*")) if path.is_symlink() or not path.is_dir()]


def _delete_files(directory: Path, is_ours: Callable[[Path], bool]) -> None:
    """Delete those files that `is_ours` accepts, then the folders that are empty without them."""
    for path in filter(is_ours, _files(directory)):
        path.unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        with suppress(OSError):  # not empty: somebody has put something there
            os.rmdir(folder)


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and not any(directory.iterdir())


def _lock(file: IO[str], place: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # not every network file system has locks
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"{place}: is being written by another process; wait for it, or end it") from None


def _write(file: IO[str], content: dict[str, Any]) -> None:
    file.seek(0)
    file.truncate()
    json.dump({"written_by": "megatron_sead"} | content, file, indent=1)
    file.flush()


def _require_room(temporary: Path, directory: Path, needed: int) -> None:
    free = shutil.disk_usage(temporary).free
    if free < needed:
        raise UserError(
            f"{directory}: needs {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free there; "
            "free some, or choose a directory on another disk"
        )


def _not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(f"{directory}: cannot be written ({error.strerror or error})")
