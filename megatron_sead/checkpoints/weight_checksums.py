"""What tells whether the weights in a Hugging Face directory are still the same: a checksum of every tensor."""

from __future__ import annotations

import math
import zlib
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_sead.checkpoints.manifest import BLOCK, from_all_ranks
from megatron_sead.errors import UserError
from megatron_sead.models.tensor_files import TensorFiles


def weight_checksums(hf_dir: Path, group: dist.ProcessGroup) -> dict[str, str]:
    """CRC-32, type and shape of every tensor, as text by name. Collective; the ranks share the reading.

    Every byte is read: log-probabilities of a text do not see a weight that the text does not need, and dates change
    when files are copied. One core checks 2 GB a second, so that eight ranks need 4 s for a model of 64 GB, beside
    what reading takes, which spares the loading after it the disk. Names of files and how tensors are shared out
    among them do not count. An edit that was made to fit the checksum goes unseen.

    Raises:
        UserError: on every rank alike; what `TensorFiles` refuses.
    """
    mine: dict[str, str] | UserError
    try:
        mine = _share(hf_dir, dist.get_rank(group), dist.get_world_size(group))
    except UserError as error:
        mine = error
    checksums: dict[str, str] = {}
    for share in from_all_ranks(mine, group):
        if isinstance(share, UserError):
            raise share
        checksums |= share
    return dict(sorted(checksums.items()))


def _share(hf_dir: Path, rank: int, ranks: int) -> dict[str, str]:
    with TensorFiles(hf_dir) as files:
        names = sorted(files.file_of.keys() - files.ignored())
        sizes = {name: math.prod(files.slice(name).get_shape()) for name in names}
        largest_first = sorted(names, key=lambda name: -sizes[name])  # so that ranks have like work
        return {name: _checksum(files, name) for name in largest_first[rank::ranks]}


def _checksum(files: TensorFiles, name: str) -> str:
    shape, dtype = list(files.slice(name).get_shape()), files.dtype(name)
    row = max(1, math.prod(shape[1:]) * dtype.itemsize)
    crc = 0
    for first in range(0, shape[0] if shape else 0, max(1, BLOCK // row)):
        rows = min(max(1, BLOCK // row), shape[0] - first)
        part = torch.empty([rows, *shape[1:]], dtype=dtype)
        files.read_rows(name, first, part)
        crc = zlib.crc32(memoryview(part.reshape(-1).view(torch.uint8).numpy().data), crc)
    return f"crc32 {crc:08x} {str(dtype).removeprefix('torch.')} {shape}"
