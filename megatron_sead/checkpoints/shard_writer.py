"""Writes a model as sharded safetensors, tensor by tensor: names and shapes come first, so no shard waits in memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from megatron_sead.checkpoints.durable import flush_file, write_json
from megatron_sead.models.tensor_files import DTYPES, INDEX

SHARD_BYTES = 5 * 10**9  # the size that transformers and the hub use
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
        self._left: dict[Path, int] = {}  # tensors that are still to come
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
        if name not in self._places or tuple(tensor.shape) != self.shapes[name]:
            raise ValueError(f"{name} {list(tensor.shape)} was not announced, or came before, or has another shape")
        path, offset = self._places.pop(name)
        tensor = tensor.detach().to("cpu", self.dtype).contiguous()
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
        self._left[path] -= 1
        if not self._left[path]:  # in the background, while the next file fills
            self._flushes.append(self._flusher.submit(flush_file, path))

    def finish(self) -> None:
        """Returns when all is on the disk."""
        if self._places:
            raise ValueError(f"{len(self._places)} tensors never came, among them {next(iter(self._places))}")
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
        self._left[path] = len(names)
