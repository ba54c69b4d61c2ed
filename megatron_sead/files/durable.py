"""Writing files so that they are on the disk when a call returns, and whole even if power or the process is lost."""

from __future__ import annotations

import errno
import itertools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sead.errors import UserError

# errno of an OSError that is the disk's or its owner's doing, not a fault of the program
_DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR}
_DISK_REFUSES |= {errno.EEXIST, errno.ENAMETOOLONG}


@contextmanager
def refused_by_the_disk(told: Callable[[str], UserError], *, writes_alone: bool = False) -> Iterator[None]:
    """A full or unwritable disk is no fault of the program.

    Args:
        told: makes the error from "cannot be written (FILE): No space left on device".
        writes_alone: the body does nothing else, so that whatever the system refuses is told.

    Raises:
        UserError: the disk refuses what the body writes.
    """
    try:
        yield
    except OSError as error:
        if not writes_alone and error.errno not in _DISK_REFUSES:
            raise
        place = "" if error.filename is None else f" ({error.filename})"
        raise told(f"cannot be written{place}: {error.strerror}") from error


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, and on the disk when it returns."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush_file(path)


def replace_text(path: Path, text: str, *, errors: str = "strict") -> None:
    """Write a file whole or not at all: a full disk must not cut the one that is there.

    A symbolic link in its place is replaced, and what it points to stays as it is, for directories come from others.
    The temporary file beside it has a name that nothing has yet.

    Args:
        errors: as ``str.encode`` has it, for what UTF-8 has not.
    """
    names = (f".{path.name}.{os.getpid()}-{number}.tmp" for number in itertools.count())
    temporary = next(place for place in map(path.with_name, names) if not os.path.lexists(place))
    file = open(temporary, "x", encoding="utf-8", errors=errors)  # noqa: SIM115 (closed below; from here on it is ours)
    try:
        with file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def rename_directory(temporary: Path, place: Path) -> None:
    """Give a directory that was written and flushed its final name, on the disk too. Nothing is in the place."""
    temporary.rename(place)
    flush_directory(place.parent)


def flush_file(path: Path, *, forget: bool = False) -> None:
    """Returns when the file's content is on the disk.

    Args:
        forget: free the pages of memory that hold it too; whoever reads it then reads the disk. Weights that stay there
            push everything else out, and each page that they take costs time: where memory was scarce, writing 5 GB
            took two to three times as long.
    """
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        if forget and hasattr(os, "posix_fadvise"):  # macOS has none
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def flush_directory(directory: Path) -> None:
    """Put the names in a directory on the disk: flushing a file does so for its content alone."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_tree(directory: Path) -> None:
    """Every file and folder of a directory."""
    for folder, _, files in os.walk(directory):
        for name in files:
            flush_file(Path(folder) / name)
        flush_directory(Path(folder))
