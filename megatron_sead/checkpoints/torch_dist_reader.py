"""Reads tensors out of Megatron-Core's ``torch_dist`` checkpoints in one process, without Megatron, whoever wrote them.

The table of the files, ``.metadata``, is a pickle, and a pickle can run any program: only the handful of classes that
the format needs are let through. The pieces themselves go through torch.load's own restricted unpickler. Conversion
reads here; so does a resume, before and while Megatron reads the same files (`restricted_loading`). ``common.pt``
holds nothing about weights, and conversion does not open it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path, PosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.distributed.checkpoint import filesystem, planner
from torch.distributed.checkpoint import metadata as format_classes
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_sead.errors import UserError

_METADATA = "torch.distributed.checkpoint.metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_NAMES: dict[str, tuple[Any, ...]] = {
    _METADATA: (format_classes, "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
                "TensorProperties", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
    _PLANNER: (planner, "SavePlan", "WriteItem", "WriteItemType", "TensorWriteData", "BytesIOWriteData"),
    "torch.distributed.checkpoint.filesystem": (filesystem, "_StorageInfo", "_StoragePrefix"),
}  # fmt: skip

FORCE, LIFT = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"  # torch.load's, which knows both


class _Inert:
    """Takes the place of objects that Megatron keeps beside the table and that no reading needs."""


ALLOWED: dict[tuple[str, str], Any] = {
    (module, name): getattr(source, name)
    for module, (source, *names) in _NAMES.items()
    for name in names
    if hasattr(source, name)  # not every torch release has each
}
ALLOWED |= {
    ("torch", "Size"): torch.Size,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,
    ("collections", "OrderedDict"): OrderedDict,
    ("pathlib", "PosixPath"): PosixPath,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Inert,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlan"): _Inert,
}


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED:
            return ALLOWED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it calls for {module}.{name}, which no checkpoint needs")


class _Piece(NamedTuple):
    """Part of a tensor in a file."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    begin: int
    length: int


class SavedTensor(NamedTuple):
    """What a checkpoint says of one key."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: list[_Piece]


class TorchDistCheckpoint:
    """The tensors of one checkpoint, by Megatron's keys.

    Raises:
        UserError: not such a checkpoint, of another format, or its table cannot be read or is refused.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        _require_format(directory)
        table = _read_table(directory / ".metadata")
        self.tensors: dict[str, SavedTensor] = _tensors(table)
        self.objects: dict[str, tuple[str, int, int]] = {  # of what is no tensor: file, offset, bytes
            index.fqn: (info.relative_path, info.offset, info.length)
            for index, info in table.storage_data.items()
            if isinstance(table.state_dict_metadata.get(index.fqn), format_classes.BytesStorageMetadata)
        }

    def read(self, key: str, layer: int | None = None) -> torch.Tensor:
        """A whole tensor, assembled from the pieces that the ranks wrote.

        Args:
            layer: index along the leading axis, along which Megatron stacks a model's layers.

        Raises:
            UserError: a file is missing, truncated or damaged; pieces do not cover the tensor.
        """
        saved = self.tensors[key]
        whole = None
        for offsets, part in self.pieces(key, layer):
            if whole is None:
                shape = saved.shape if layer is None else saved.shape[1:]
                if part.shape == shape:
                    return part
                whole = torch.empty(shape, dtype=saved.dtype)
            whole[tuple(slice(first, first + n) for first, n in zip(offsets, part.shape, strict=True))] = part
        assert whole is not None
        return whole

    def pieces(self, key: str, layer: int | None = None) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
        """(Offsets, part) of a tensor, as the ranks wrote it, one at a time. Arguments and errors as `read` has."""
        saved = self.tensors[key]
        if sum(math.prod(piece.sizes) for piece in saved.pieces) != math.prod(saved.shape):
            raise UserError(f"{self.directory}: pieces of {key} are missing: the checkpoint is not whole")
        for piece in saved.pieces:
            if layer is None:
                yield piece.offsets, self._load(key, piece, saved.dtype)
            elif piece.offsets[0] <= layer < piece.offsets[0] + piece.sizes[0]:
                yield piece.offsets[1:], self._load(key, piece, saved.dtype)[layer - piece.offsets[0]]

    def check_objects(self) -> None:
        """Read everything that is no tensor, through torch's restricted unpickler, and let go of it.

        Megatron keeps ``_extra_state`` of Transformer Engine's modules there, which unpickle whatever they are given.
        Without fp8, which nothing here trains in, it is empty, and must be.

        Raises:
            UserError: a class that plain values do not need, a state that is not empty, or damage.
        """
        for key, (file, begin, length) in self.objects.items():
            path = self.directory / _plain_name(file)
            try:
                with open(path, "rb") as stream:
                    view = _create_file_view(stream, begin, length)
                    value = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
            except Exception as error:  # as in _load
                raise UserError(f"{path}: {key} is refused, or damaged ({_one_line(error)})") from None
            if "_extra_state" in key and not _is_empty(value):
                raise UserError(f"{path}: {key} is refused: it is not empty, and could run any program")

    def _load(self, key: str, piece: _Piece, dtype: torch.dtype) -> torch.Tensor:
        path = self.directory / piece.file
        try:
            with open(path, "rb") as file:
                view = _create_file_view(file, piece.begin, piece.length)
                tensor = torch.load(view, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
        except FileNotFoundError:
            raise UserError(f"{path}: missing, but the checkpoint's table places {key} there") from None
        except Exception as error:  # whatever torch's reader raises on bytes that are not what they were
            raise UserError(
                f"{path}: {key} cannot be read, the file is truncated or damaged ({_one_line(error)})"
            ) from None
        if not isinstance(tensor, torch.Tensor) or (tensor.dtype, tuple(tensor.shape)) != (dtype, piece.sizes):
            raise UserError(f"{path}: holds something else than the piece of {key} that the checkpoint's table names")
        return tensor


def _require_format(directory: Path) -> None:
    path = directory / "metadata.json"
    try:
        found = json.loads(path.read_text())
        backend, version = found["sharded_backend"], found["sharded_backend_version"]
    except FileNotFoundError:
        raise UserError(f"{directory}: holds no metadata.json: not a Megatron-Core distributed checkpoint") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{path}: does not name a format: not a Megatron-Core distributed checkpoint") from None
    if (backend, version) != ("torch_dist", 1):
        raise UserError(f"{path}: the format is {backend} {version}; only torch_dist 1 can be read")


def _read_table(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            table = _RestrictedUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path}: missing: the checkpoint was not written to the end") from None
    except pickle.UnpicklingError as error:
        raise UserError(f"{path}: refused: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{path}: damaged ({type(error).__name__}: {error})") from None
    if not isinstance(table, format_classes.Metadata) or not isinstance(table.storage_data, dict):
        raise UserError(f"{path}: is not the table of a distributed checkpoint")
    return table


@contextmanager
def restricted_loading() -> Iterator[None]:
    """Around Megatron's own loading: it reads what this module reads, and may run as little.

    torch.distributed.checkpoint unpickles ``.metadata`` and every object without any restriction. Inside of this, the
    table goes through the unpickler above, and torch.load through its own, whatever its callers ask for.
    """
    pickled, forced, lifted = filesystem.pickle, os.environ.get(FORCE), os.environ.pop(LIFT, None)
    filesystem.pickle = SimpleNamespace(load=lambda file: _RestrictedUnpickler(file).load())  # type: ignore[assignment]
    os.environ[FORCE] = "1"
    try:
        yield
    finally:
        filesystem.pickle = pickled
        for name, value in ((FORCE, forced), (LIFT, lifted)):
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def plain_values(path: Path) -> Any:
    """What torch.save wrote of numbers, strings and tensors.

    Raises:
        UserError: damaged, or it calls for something else.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever torch's reader raises on bytes that are not what they were
        raise UserError(f"{path}: refused, or damaged ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    """torch.load's refusals begin with advice to lift them."""
    text = " ".join(str(error).split())
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it calls for {found[1]}, which no checkpoint needs"
    return text.rpartition("trusted source. ")[2].partition(" Check the documentation")[0][:200]


def _is_empty(value: Any) -> bool:
    if isinstance(value, list):  # Megatron wraps an object in one
        return all(map(_is_empty, value))
    if isinstance(value, torch.Tensor):
        return value.numel() == 0
    return value is None or (isinstance(value, BytesIO) and not value.getbuffer().nbytes)


def _tensors(table: Any) -> dict[str, SavedTensor]:
    pieces: dict[str, list[_Piece]] = defaultdict(list)
    sizes = {
        (key, tuple(chunk.offsets)): tuple(chunk.sizes)
        for key, entry in table.state_dict_metadata.items()
        if isinstance(entry, format_classes.TensorStorageMetadata)
        for chunk in entry.chunks
    }
    for index, info in table.storage_data.items():
        if index.offset is not None and (size := sizes.get((index.fqn, tuple(index.offset)))) is not None:
            file = _plain_name(info.relative_path)
            pieces[index.fqn].append(_Piece(tuple(index.offset), size, file, info.offset, info.length))
    return {
        key: SavedTensor(entry.properties.dtype, tuple(entry.size), pieces[key])
        for key, entry in table.state_dict_metadata.items()
        if isinstance(entry, format_classes.TensorStorageMetadata)
    }


def _plain_name(file: str) -> str:
    """Refuse a name that leaves the checkpoint's directory."""
    if not re.fullmatch(r"[\w.-]+", file):
        raise UserError(f".metadata: refused: it names the file {file!r}, which is not within the checkpoint")
    return file
