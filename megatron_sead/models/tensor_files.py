"""The safetensors files of a Hugging Face directory: tensors by name, checked against what its config.json calls for.

Two ways to read: `slice` maps the file, for a rank that wants its share; `read` fills memory of its own, so that a
program which visits every tensor once holds one of them, not the pages of the whole file.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open

from megatron_sead.errors import UserError
from megatron_sead.models.weight_files import IGNORED_SUFFIX, locate_tensors
from megatron_sead.models.weight_tables import Weight
from megatron_sead.wording import first_of

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
PIECE_ROWS = 4096  # that are compared at once


class WeightWithNames(Protocol):
    """What `TensorFiles.check` needs to know of a weight."""

    @property
    def weight(self) -> Weight: ...
    @property
    def names(self) -> tuple[str, ...]: ...


class TensorFiles:
    """The safetensors files of a directory, opened once, by tensor name. A context manager.

    Raises:
        UserError: (when made or entered) there are none, it is ambiguous which they are, the index is damaged, a file
            is missing or truncated, a tensor is of no floating dtype.
    """

    def __init__(self, hf_dir: Path) -> None:
        self.hf_dir = hf_dir
        self._places = locate_tensors(hf_dir)
        self.file_of = {name: place.file for name, place in self._places.items()}
        self._open: dict[Path, Any] = {}
        self._raw: dict[Path, FileIO] = {}
        self._again: dict[str, str] = {}  # tensors that are there under two names, by the second; known from `check`

    def __enter__(self) -> TensorFiles:
        for path in sorted(set(self.file_of.values())):
            try:
                self._open[path] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise _damaged(path, error) from None
        return self

    def __exit__(self, *exc: object) -> None:
        self._open.clear()
        for file in self._raw.values():
            file.close()
        self._raw.clear()

    def check(self, weights: Collection[WeightWithNames]) -> None:
        """Every tensor is there, none is unknown, all have the right shape. Reads no tensor.

        Raises:
            UserError: names those that are wrong.
        """
        shapes = {
            name: shape for named in weights for name, shape in zip(named.names, named.weight.shapes, strict=True)
        }
        again = {named.weight.again: named.names[0] for named in weights if named.weight.again is not None}
        self._again = {second: first for second, first in again.items() if second in self.file_of}
        if missing := sorted(shapes.keys() - self.file_of.keys()):
            raise UserError(f"{self.hf_dir}: tensors are missing: {first_of(missing)}")
        if unknown := sorted(self.file_of.keys() - self.ignored() - shapes.keys()):
            raise UserError(f"{self.hf_dir}: tensors that its config.json does not call for: {first_of(unknown)}")
        for name, expected in shapes.items():
            found = self._places[name].shape
            if found != expected:
                raise UserError(
                    f"{self.file_of[name]}: {name} has shape {list(found)}; its config.json calls for {list(expected)}"
                )

    def ignored(self) -> set[str]:
        """Names of tensors that the directory holds and no model needs."""
        return {name for name in self.file_of if name.endswith(IGNORED_SUFFIX) or name in self._again}

    def check_repeated(self) -> None:
        """A tensor that is there under two names, as a tied head may be, is the same under both. After `check`.

        Raises:
            UserError: it is not, and versions of transformers differ in which one they take.
        """
        for second, first in self._again.items():
            places = [self._places[name] for name in (first, second)]
            if (places[0].dtype, places[0].shape) != (places[1].dtype, places[1].shape) or any(
                not torch.equal(a, b) for a, b in zip(self._pieces(first), self._pieces(second), strict=True)
            ):
                raise UserError(
                    f"{self.file_of[second]}: {second} differs from {first}, which its config.json ties it to "
                    "(tie_word_embeddings); take one of the two out, or untie them"
                )

    def _pieces(self, name: str) -> Iterator[torch.Tensor]:
        """A tensor's rows, a few at a time, as bits: a NaN equals itself."""
        shape = self._places[name].shape
        for row in range(0, shape[0], PIECE_ROWS):
            piece = torch.empty(min(PIECE_ROWS, shape[0] - row), *shape[1:], dtype=self.dtype(name))
            self.read_rows(name, row, piece)
            yield piece.view(torch.uint8)

    def slice(self, name: str) -> Any:
        """A safetensors slice: ``get_shape()``, and ``[...]`` for a part of the tensor."""
        return self._open[self.file_of[name]].get_slice(name)

    def dtype(self, name: str) -> torch.dtype:
        return DTYPES[self._places[name].dtype]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, in memory of its own.

        Raises:
            UserError: the file ends before the tensor does, or cannot be read.
        """
        tensor = torch.empty(self._places[name].shape, dtype=self.dtype(name))
        self.read_rows(name, 0, tensor)
        return tensor

    def read_rows(self, name: str, row: int, into: torch.Tensor) -> None:
        """Fill `into`, contiguous and of the tensor's dtype, with as many rows as it has, from `row` on.

        Raises:
            UserError: the file ends before the tensor does, or cannot be read.
        """
        place, dtype = self._places[name], self.dtype(name)
        path = place.file
        assert into.dtype == dtype and tuple(into.shape[1:]) == place.shape[1:]
        offset = place.offset + row * math.prod(place.shape[1:]) * dtype.itemsize
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


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}: not a whole safetensors file ({error}); copy or download it again")
