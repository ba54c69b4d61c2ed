"""Bytes of a rank's host memory: pinned pieces, and a checkpoint on its way to the disk. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sead.models.slabs import aligned, slabs

FP32 = 4
BUCKET, BUCKET_A_REPLICA = 40_000_000, 1_000_000  # elements; Megatron's, where gradients are reduced as they come


def pinned(size: int) -> int:
    """torch rounds pinned memory up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def pinned_slabs(sizes: Sequence[int]) -> int:
    """Of tensors that share pieces of pinned memory."""
    return sum(pinned(sum(aligned(sizes[number]) for number in slab)) for slab in slabs(sizes))


@dataclass(frozen=True)
class Saving:
    """A checkpoint on its way to the disk: what it adds on the GPU, and on the host of a rank that writes, the first of
    its data-parallel replicas, and of the others."""

    gpu: int
    writer: int
    others: int


def saving(
    chunks: Sequence[Sequence[int]], width: int, replicas: int, *, distributed: bool, in_buckets: bool
) -> Saving:
    """
    Args:
        chunks: elements of each parameter, by the rank's chunks of the model.
        width: bytes of a weight.
        replicas: data-parallel ranks, over which the optimizer's state is `distributed`.
        in_buckets: gradients of the first chunk are reduced piece by piece.
    """
    count = sum(map(sum, chunks))
    weights = width * count
    if not distributed:  # tensors go to the host as they are
        return Saving(0, weights + FP32 * (3 if width < FP32 else 2) * count, 0)
    first, *others = chunks
    largest = max(_largest_bucket(first, replicas) if in_buckets else sum(first), *map(sum, others), 0)
    share = -(-largest // replicas)
    # Main parameters and both moments, whole on every rank; gathered on the GPU a bucket at a time, and concatenated
    whole, gathering = 3 * FP32 * count, FP32 * (3 * share + 2 * largest)
    return Saving(FP32 * (largest + share), whole + max(gathering, whole + weights), whole + gathering)


def _largest_bucket(elements: Sequence[int], replicas: int) -> int:
    """As Megatron's DistributedDataParallel fills them, from the last parameter on."""
    least = max(BUCKET, BUCKET_A_REPLICA * replicas)
    largest = filled = 0
    for size in reversed(elements):
        filled += size
        largest = max(largest, filled)
        filled = 0 if filled >= least else filled
    return largest
