"""Writes Megatron-Core's ``torch_dist`` format from one process, a piece of a tensor at a time.

The files are those of Megatron-Core 0.16, which 0.19 reads as well (0.16 reads nothing of 0.19's): ``metadata.json``
names the format, ``common.pt`` is the part that is not sharded (empty), ``__0_N.distcp`` hold what torch.save makes
of each piece, one after another, and ``.metadata`` is torch.distributed.checkpoint's pickled table of them. torch's
own writer is not used: it keeps a reference to every tensor until a file ends.
"""

from __future__ import annotations

import io
import json
import pickle
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from megatron_sead.files.durable import flush_file

FORMAT_VERSION = "0.16.1"  # of Megatron-Core, whose format this is
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
FORMAT |= {"common_backend_version": 1}
FILE_BYTES = 2**29  # each is flushed, and leaves memory, when it ends


class TorchDistWriter:
    """Use `announce` and `add_rows`, and `add_object`, then `finish`.

    Raises:
        OSError: the disk refuses, in any method.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files: dict[str, tuple[int, int]] = {}  # name -> (bytes, CRC-32), of those that are closed
        self._table: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
        self._places: dict[MetadataIndex, _StorageInfo] = {}
        self._file: _CountedFile | None = None
        self._flusher = ThreadPoolExecutor(1, thread_name_prefix="flush")
        self._flushes: list[Future[None]] = []

    def announce(self, key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """A tensor whose rows will come; with a leading axis if the tensors of all layers are stacked under one key."""
        self._table[key] = TensorStorageMetadata(TensorProperties(dtype=dtype), torch.Size(shape), [])

    def add_rows(self, key: str, row: int, tensor: torch.Tensor, *, layer: int | None = None) -> None:
        """Write rows of an announced tensor, or of one layer's, from `row` on. Contiguous, on the CPU."""
        entry = self._table[key]
        assert isinstance(entry, TensorStorageMetadata) and entry.properties.dtype == tensor.dtype
        offsets = [row, *(0 for _ in tensor.shape[1:])]
        if layer is not None:
            offsets, tensor = [layer, *offsets], tensor.unsqueeze(0)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(offsets), tensor.shape))
        self._write(MetadataIndex(key, offsets), tensor)

    def add_object(self, key: str, value: Any, *, layer: tuple[int, int] | None = None) -> None:
        """Write what Megatron calls a sharded object; of one layer, or of the model."""
        which, count = layer or (0, 1)
        name = f"{key}/shard_{which}_{count}"
        self._table[name] = BytesStorageMetadata()
        self._write(MetadataIndex(name), [value])

    def finish(self) -> None:
        """Returns when all is on the disk."""
        self._close()
        for flush in self._flushes:
            flush.result()
        self._flusher.shutdown()
        metadata = Metadata(self._table, storage_data=self._places, storage_meta=StorageMeta())
        self._write_whole(".metadata", pickle.dumps(metadata, protocol=4))
        common = io.BytesIO()
        torch.save({}, common)
        self._write_whole("common.pt", common.getvalue())
        self._write_whole("metadata.json", json.dumps(FORMAT).encode())  # last: it says that this is a checkpoint

    def _write(self, index: MetadataIndex, value: Any) -> None:
        if self._file is None or self._file.size > FILE_BYTES:
            self._close()
            self._file = _CountedFile(self.directory / f"__0_{len(self.files)}.distcp")
        begin = self._file.size
        with _no_checksums_of_torch():  # the manifest has those of whole files; nobody looks at these
            torch.save(value, self._file)  # type: ignore[arg-type]
        self._places[index] = _StorageInfo(self._file.path.name, begin, self._file.size - begin)

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self.files[self._file.path.name] = (self._file.size, self._file.crc)
            self._flushes.append(self._flusher.submit(flush_file, self._file.path, forget=True))
            self._file = None

    def _write_whole(self, name: str, content: bytes) -> None:
        (self.directory / name).write_bytes(content)
        flush_file(self.directory / name)
        self.files[name] = (len(content), zlib.crc32(content))


class _CountedFile(io.RawIOBase):
    """A file that knows its size and checksum as it grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.crc = 0
        self._file: BinaryIO = open(path, "wb")  # noqa: SIM115 (closed by close)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._file.write(data)
        count = memoryview(data).nbytes
        self.size += count
        self.crc = zlib.crc32(data, self.crc)
        return count

    def close(self) -> None:
        if not self._file.closed:
            self._file.close()
        super().close()


@contextmanager
def _no_checksums_of_torch() -> Iterator[None]:
    before = get_crc32_options()
    set_crc32_options(False)
    try:
        yield
    finally:
        set_crc32_options(before)
