"""Few large pieces of pinned memory for many tensors: torch rounds each piece up to a power of two. No torch here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

SLAB_BYTES = 2**30
ALIGNMENT = 256  # bytes, as torch's own allocators align: which kernel a product takes depends on it


def aligned(size: int) -> int:
    """Bytes that a tensor takes up in a slab."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def slabs(sizes: Sequence[int], slab_bytes: int = SLAB_BYTES) -> Iterator[list[int]]:
    """Numbers of the tensors in each slab: in order, as many as it holds; a larger one has its own."""
    slab: list[int] = []
    taken = 0
    for number, size in enumerate(map(aligned, sizes)):
        if slab and taken + size > slab_bytes:
            yield slab
            slab, taken = [], 0
        slab.append(number)
        taken += size
    if slab:
        yield slab
