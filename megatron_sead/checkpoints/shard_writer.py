"""Writes a model as sharded safetensors, tensor by tensor: names and shapes come first, so no shard waits in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from io import FileIO
from pathlib import Path

import torch

from megatron_sead.files.durable import flush_file, write_json
from megatron_sead.files.names import INDEX
from megatron_sead.models.tensor_files import DTYPES

SHARD_BYTES = 5 * 10**9  # the size that transformers and the hub use
FLUSH_BYTES = 2**29  # a disk that waits for whole files idles until the first is there
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class ShardWriter:
    """Writes ``model.safetensors``, or several files with an index. Tensors may come in any order, each once.

    Args:
        directory: is there, and empty of weights.
        shapes: of every tensor that will come, in the order in which they fill the files.
        dtype: of all of them in the files; `add` converts.
        max_shard_bytes: of a file's tensors; a larger tensor has a file of its own.

    Raises:
        OSError: the disk refuses, here or in any method.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
    ) -> None:
        self.directory = directory
        self.shapes = dict(shapes)
        self.dtype = dtype
        self._places: dict[str, tuple[Path, int]] = {}  # file, offset of the first byte
        self._tensors_left: dict[Path, int] = {}
        self._rows_left = {name: shape[0] for name, shape in self.shapes.items()}  # of tensors that are not whole
        self._not_flushed = 0
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushes: list[Future[None]] = []
        shards = self._plan(max_shard_bytes)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(shards, 1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            self._begin(directory / file, names)
            weight_map |= dict.fromkeys(names, file)
        if len(shards) > 1:
            total = sum(self._bytes(name) for name in self.shapes)
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, of the shape that was announced."""
        self.add_rows(name, 0, tensor)
        if name in self._rows_left:
            raise ValueError(f"{name} {list(tensor.shape)} was announced with {self.shapes[name][0]} rows")

    def add_rows(self, name: str, row: int, tensor: torch.Tensor) -> None:
        """Write some rows of a tensor, from `row` on; each row once, in any order."""
        left = self._rows_left.pop(name, 0) - tensor.shape[0]
        if left < 0 or tuple(tensor.shape[1:]) != self.shapes[name][1:]:
            raise ValueError(f"{name} {list(tensor.shape)} was not announced, or came before, or has another shape")
        path, offset = self._places[name]
        tensor = tensor.detach().to("cpu", self.dtype).contiguous()
        with open(path, "r+b", buffering=0) as file:
            file.seek(offset + row * self._bytes(name) // self.shapes[name][0])
            _write_all(file, tensor)
        if left:
            self._rows_left[name] = left
        else:
            self._tensors_left[path] -= 1
        self._not_flushed += tensor.nbytes
        if not self._tensors_left[path] or self._not_flushed > FLUSH_BYTES:  # in the background, while more is written
            self._not_flushed = 0
            self._flushes.append(self._flusher.submit(flush_file, path, forget=True))

    def finish(self) -> None:
        """Returns when all is on the disk."""
        if self._rows_left:
            raise ValueError(f"{len(self._rows_left)} tensors are not whole, among them {next(iter(self._rows_left))}")
        for flush in self._flushes:
            flush.result()
        self._flusher.shutdown()

    def _plan(self, max_bytes: int) -> list[list[str]]:
        shards: list[list[str]] = []
        filled = math.inf
        for name in self.shapes:
            if filled + self._bytes(name) > max_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += self._bytes(name)
        return shards

    def _bytes(self, name: str) -> int:
        return math.prod(self.shapes[name]) * self.dtype.itemsize

    def _begin(self, path: Path, names: list[str]) -> None:
        """Write the header: 8 bytes with its length, then JSON, padded so that the tensors are aligned."""
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            begin, end = end, end + self._bytes(name)
            entry = {"dtype": NAMES[self.dtype], "shape": self.shapes[name], "data_offsets": [begin, end]}
            header[name] = entry
            self._places[name] = (path, begin)
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        for name in names:
            self._places[name] = (path, 8 + len(text) + self._places[name][1])
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
        self._tensors_left[path] = len(names)


def _write_all(file: FileIO, tensor: torch.Tensor) -> None:
    rest = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
    while rest:
        rest = rest[file.write(rest) :]
