"""Files of a folder that a command writes anew each time, as long as nobody has changed them since."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_sead.errors import UserError
from megatron_sead.files.durable import replace_text

RECORD = ".written.json"  # in the folder: each file's checksum as it is, and as it will be after a kill meanwhile


def require_replaceable(folder: Path, names: Iterable[str]) -> None:
    """None of these files is there, or each is as `replace_files` wrote it.

    Raises:
        UserError: names the file.
    """
    recorded = _recorded(folder)
    for name in names:
        path = folder / name
        if os.path.lexists(path) and (path.is_symlink() or _checksum(path) not in recorded.get(name, [])):
            raise UserError(f"{path}: was not written by this command, or was changed since; move it away")


def replace_files(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write each file, whole or not at all, in place of what an earlier call wrote. A kill between them loses nothing.

    Raises:
        UserError: as `require_replaceable`.
    """
    require_replaceable(folder, contents)
    recorded = _recorded(folder)
    unfinished: dict[str, Path] = {}
    for name, content in contents.items():
        unfinished[name] = folder / f".{name}.{os.getpid()}.writing"
        with unfinished[name].open("xb") as file:
            file.write(content)
        there = _checksum(folder / name)
        recorded[name] = [*([there] if there else []), str(_checksum(unfinished[name]))]
    # Before the files: one whose checksum is not recorded could never be replaced
    replace_text(folder / RECORD, json.dumps({"written_by": "megatron_sead", "files": recorded}, indent=1) + "\n")
    for name, path in unfinished.items():
        os.replace(path, folder / name)


def _recorded(folder: Path) -> dict[str, list[str]]:
    record = folder / RECORD
    if not os.path.lexists(record):
        return {}
    try:
        return {name: list(sums) for name, sums in json.loads(record.read_text(encoding="utf-8"))["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{record}: was not written by this command, or is damaged; move it away") from None


def _checksum(path: Path) -> str | None:
    if not path.is_file():
        return None
    content = path.read_bytes()
    return f"{len(content)} bytes, crc32 {zlib.crc32(content):08x}"
