"""Directories that appear under their name only when whole, and stay when the machine loses power."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sead.checkpoints.manifest import flush_directory
from megatron_sead.errors import UserError

ROOM_FOR_REST = 64 * 2**20  # bytes, for tokenizer files and headers


@contextmanager
def whole_directory(directory: Path, *, overwrite: bool, weight_bytes: int) -> Iterator[Path]:
    """A directory to fill, beside `directory`, which takes its name when the body ends, and vanishes when it fails.

    What a killed process left is deleted first.

    Args:
        overwrite: `directory` may exist, and is replaced at the end.
        weight_bytes: that the body will write; there must be room for them.

    Raises:
        UserError: `directory` exists; there is no room; the disk refuses.
    """
    directory = directory.absolute()
    if directory.exists() and not overwrite:
        raise UserError(f"{directory}: exists; give --overwrite to replace it, or choose another directory")
    try:
        with _cleared(directory) as temporary:
            _require_room(temporary, directory, weight_bytes + ROOM_FOR_REST)
            yield temporary
            take_name(directory, temporary)
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from error


@contextmanager
def _cleared(directory: Path) -> Iterator[Path]:
    temporary = clear_way(directory)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def clear_way(directory: Path) -> Path:
    """An empty directory beside `directory`, for `take_name`.

    Raises:
        UserError: `directory` holds something else than a model or a checkpoint.
        OSError: the disk refuses.
    """
    temporary, aside = _neighbours(directory)
    if aside.exists() and not directory.exists():  # killed between the two renames of take_name
        aside.rename(directory)
    if directory.exists() and not _is_replaceable(directory):
        raise UserError(f"{directory}: exists and holds no model; move it away, or choose another directory")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    return temporary


def take_name(directory: Path, temporary: Path) -> None:
    """Flush `temporary` and make it `directory`, in place of what has that name. A kill loses neither."""
    for folder, _, files in os.walk(temporary):
        for name in files:
            flush_file(Path(folder) / name)
        flush_directory(Path(folder))
    _, aside = _neighbours(directory)
    shutil.rmtree(aside, ignore_errors=True)
    if directory.exists():
        directory.rename(aside)
    temporary.rename(directory)
    flush_directory(directory.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _neighbours(directory: Path) -> tuple[Path, Path]:
    return directory.with_name(f".{directory.name}.tmp"), directory.with_name(f".{directory.name}.old")


def _is_replaceable(directory: Path) -> bool:
    """A model or a checkpoint: never somebody's other files."""
    return (directory / "config.json").exists()


def _require_room(temporary: Path, directory: Path, needed: int) -> None:
    free = shutil.disk_usage(temporary).free
    if free < needed:
        raise UserError(
            f"{directory}: needs {needed / 1e9:,.1f} GB and {free / 1e9:,.1f} GB are free there; "
            "free some, or choose a directory on another disk"
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Indented, and on the disk when it returns."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    flush_file(path)


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
