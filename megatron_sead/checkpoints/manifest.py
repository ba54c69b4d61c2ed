"""What makes a checkpoint whole: a list of its files with sizes and checksums, written after all of them."""

from __future__ import annotations

import json
import os
import re
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sead.files.durable import flush_directory

FILE_NAME = "manifest.json"
STEP = re.compile(r"step-(\d{8,})")  # a run's checkpoints, by folder name
BLOCK = 16 * 2**20  # bytes read at once


class Damage(Exception):
    """Why a checkpoint is not whole, in words."""


@dataclass
class Manifest:
    """Of one checkpoint. Its presence says that the checkpoint was written to the end."""

    step: int
    megatron_core: str  # version that wrote it
    layout: dict[str, int]  # sizes: tensor, pipeline, context where it is not 1, virtual (chunks a rank), data
    files: dict[str, tuple[int, int]]  # name -> (bytes, CRC-32)
    dtype: str | None = None  # of a converted model's weights: bf16 or fp32
    parameters: int | None = None  # of a converted model, without padding


def describe_files(directory: Path, group: dist.ProcessGroup) -> dict[str, tuple[int, int]]:
    """Size and checksum of every file of `directory`, each flushed to disk. Collective; the ranks share the reading.

    Returns:
        On every rank: file name -> (bytes, CRC-32).
    """
    names = from_first_rank(sorted(entry.name for entry in directory.iterdir()), group)
    mine = {}
    for name in names[dist.get_rank(group) :: dist.get_world_size(group)]:
        with open(directory / name, "rb") as file:
            os.fsync(file.fileno())
        mine[name] = checksum(directory / name)
    shares = from_all_ranks(mine, group)
    return {name: entry for share in shares for name, entry in share.items()}


def find_damage(directory: Path, manifest: Manifest, group: dist.ProcessGroup) -> str | None:
    """The first file of `directory` that is not as the manifest says; None: all are. Collective, the same answer on
    every rank; the ranks share the reading."""
    mine = None
    for name in sorted(manifest.files)[dist.get_rank(group) :: dist.get_world_size(group)]:
        mine = mine or compare_file(directory / name, *manifest.files[name])
    return next((problem for problem in from_all_ranks(mine, group) if problem), None)


def compare_file(path: Path, size: int, crc: int) -> str | None:
    """Why a file is not the one of this size and checksum, in words; None: it is."""
    try:
        found = path.stat().st_size
        if found != size:
            return f"{path.name} has {found} bytes, not {size}"
        if checksum(path)[1] != crc:
            return f"{path.name} has been altered: its checksum differs"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def checksum(path: Path) -> tuple[int, int]:
    """(bytes, CRC-32) of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint, flushed to disk, and the directory with it."""
    body = asdict(manifest)
    with open(directory / FILE_NAME, "w", encoding="utf-8") as file:
        json.dump(body | {"crc32": _crc_of(body)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    flush_directory(directory)


def read_manifest(directory: Path) -> Manifest:
    """
    Raises:
        Damage: there is none, or it is not as it was written.
    """
    try:
        body = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        crc = body.pop("crc32")
        if crc != _crc_of(body):
            raise ValueError
        files = {_plain_name(name): (int(size), int(crc)) for name, (size, crc) in body.pop("files").items()}
        if not re.fullmatch(r"\d{1,4}\.\d{1,4}[\w.+-]{0,40}", body["megatron_core"]):
            raise ValueError
        return Manifest(**body, files=files)
    except FileNotFoundError:
        raise Damage(f"{FILE_NAME} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        raise Damage(f"{FILE_NAME} is not as it was written") from None


def _plain_name(file: str) -> str:
    """Refuse a name that leaves the checkpoint's folder: anybody can write a manifest."""
    if not re.fullmatch(r"[\w.-]+", file, re.ASCII) or not file.strip("."):
        raise ValueError
    return file


def _crc_of(body: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(body, sort_keys=True).encode())


def from_first_rank(value: Any, group: dist.ProcessGroup) -> Any:
    """The first rank's value, on every rank. Collective."""
    box = [value]
    dist.broadcast_object_list(box, group_src=0, group=group)
    return box[0]


def from_all_ranks(value: Any, group: dist.ProcessGroup) -> list[Any]:
    """Every rank's value, on every rank. Collective."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
