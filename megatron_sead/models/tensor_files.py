"""The safetensors files of a Hugging Face directory: tensors by name, checked against what its config.json calls for.

Two ways to read: `slice` maps the file, for a rank that wants its share; `read` fills memory of its own, so that a
program which visits every tensor once holds one of them, not the pages of the whole file.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_sead.errors import UserError
from megatron_sead.models.olmo3.weights import Weight

INDEX = "model.safetensors.index.json"
IGNORED_SUFFIX = "rotary_emb.inv_freq"  # buffers that old transformers saved
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightWithNames(Protocol):
    """What `TensorFiles.check` needs to know of a weight."""

    @property
    def weight(self) -> Weight: ...
    @property
    def names(self) -> tuple[str, ...]: ...


class _Place(NamedTuple):
    """Of a tensor in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # of its first byte


class TensorFiles:
    """The safetensors files of a directory, opened once, by tensor name. A context manager.

    Raises:
        UserError: (when made or entered) there are none, the index is damaged, a file is missing or truncated.
    """

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = hf_dir
        self.file_of = self._locate()
        self._open: dict[Path, Any] = {}
        self._raw: dict[Path, FileIO] = {}
        self._places: dict[Path, dict[str, _Place]] = {}

    def __enter__(self) -> TensorFiles:
        for path in sorted(set(self.file_of.values())):
            try:
                self._open[path] = safe_open(path, framework="pt")
            except FileNotFoundError:
                raise UserError(f"{path}: missing, but {self.hf_dir / INDEX} names it") from None
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.clear()
        for file in self._raw.values():
            file.close()
        self._raw.clear()

    def _locate(self) -> dict[str, Path]:
        index, single = self.hf_dir / INDEX, self.hf_dir / "model.safetensors"
        if index.exists():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
                return {name: self.hf_dir / file for name, file in weight_map.items()}
            except (ValueError, KeyError, AttributeError, TypeError):
                raise UserError(f"{index}: not a safetensors index; copy or download it again") from None
        if not single.exists():
            raise UserError(f"{self.hf_dir}: holds neither model.safetensors nor {INDEX}{self._pickled()}")
        try:
            with safe_open(single, framework="pt") as file:
                return dict.fromkeys(file.keys(), single)
        except (SafetensorError, OSError) as error:
            raise _damaged(single, error) from None

    def _pickled(self) -> str:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self.hf_dir.glob(pattern))
        if not pickles:
            return ""
        return (
            f"; {pickles[0]} is not read: it is a pickle, which runs whatever code is in it when it is opened; "
            "save the model again with save_pretrained(safe_serialization=True)"
        )

    def check(self, weights: Iterable[WeightWithNames]) -> None:
        """Every tensor is there, none is unknown, all have the right shape. Reads no tensor.

        Raises:
            UserError: names those that are wrong.
        """
        shapes = {
            name: shape for named in weights for name, shape in zip(named.names, named.weight.shapes, strict=True)
        }
        if missing := sorted(shapes.keys() - self.file_of.keys()):
            raise UserError(f"{self.hf_dir}: tensors are missing: {_some(missing)}")
        if unknown := sorted(self.file_of.keys() - self.ignored() - shapes.keys()):
            raise UserError(f"{self.hf_dir}: tensors that its config.json does not call for: {_some(unknown)}")
        for name, expected in shapes.items():
            found = tuple(self.slice(name).get_shape())
            if found != expected:
                raise UserError(
                    f"{self.file_of[name]}: {name} has shape {list(found)}; its config.json calls for {list(expected)}"
                )

    def ignored(self) -> set[str]:
        """Tensors that the directory holds and no model needs."""
        return {name for name in self.file_of if name.endswith(IGNORED_SUFFIX)}

    def slice(self, name: str) -> Any:
        """A safetensors slice: ``get_shape()``, and ``[...]`` for a part of the tensor.

        Raises:
            UserError: the index places the tensor in a file that does not hold it.
        """
        path = self.file_of[name]
        try:
            return self._open[path].get_slice(name)
        except SafetensorError:
            raise UserError(f"{path}: tensor {name} is missing, but the index places it there") from None

    def dtype(self, name: str) -> torch.dtype:
        """
        Raises:
            UserError: not a floating dtype.
        """
        return self._place(name).dtype

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own.

        Raises:
            UserError: the file ends before the tensor does, or cannot be read.
        """
        place = self._place(name)
        tensor = torch.empty(place.shape, dtype=place.dtype)
        self.read_rows(name, 0, tensor)
        return tensor

    def read_rows(self, name: str, row: int, into: torch.Tensor) -> None:
        """Fill `into`, contiguous and of the tensor's dtype, with as many rows as it has, from `row` on.

        Raises:
            UserError: the file ends before the tensor does, or cannot be read.
        """
        place, path = self._place(name), self.file_of[name]
        assert into.dtype == place.dtype and tuple(into.shape[1:]) == place.shape[1:]
        offset = place.offset + row * math.prod(place.shape[1:]) * place.dtype.itemsize
        rest = memoryview(into.reshape(-1).view(torch.uint8).numpy().data)
        try:
            if path not in self._raw:
                self._raw[path] = open(path, "rb", buffering=0)  # noqa: SIM115 (closed on leaving)
            while rest:
                count = os.preadv(self._raw[path].fileno(), [rest], offset)
                if not count:
                    raise UserError(f"{path}: ends within tensor {name}; copy or download it again")
                rest, offset = rest[count:], offset + count
        except OSError as error:
            raise UserError(f"{path}: tensor {name} cannot be read ({error.strerror})") from None

    def _place(self, name: str) -> _Place:
        path = self.file_of[name]
        if path not in self._places:
            self._places[path] = _read_header(path)
        return self._places[path][name]


def _read_header(path: Path) -> dict[str, _Place]:
    """The format: 8 bytes with the length of a JSON header, the header, the tensors. safe_open has checked it."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        if name.endswith(IGNORED_SUFFIX):
            continue
        if entry["dtype"] not in DTYPES:
            raise UserError(f"{path}: {name} is {entry['dtype']}; weights must be {', '.join(DTYPES)}")
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if end - begin != math.prod(shape) * dtype.itemsize:
            raise UserError(f"{path}: {name} has {end - begin} bytes, which its shape {list(shape)} does not explain")
        places[name] = _Place(dtype, shape, 8 + length + begin)
    return places


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again")


def _some(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
