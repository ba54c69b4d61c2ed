"""All-gather of rows, of which each rank may hold another number."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup


def all_gather_rows(values: torch.Tensor, groups: Sequence[ProcessGroup]) -> tuple[torch.Tensor, slice]:
    """Rows of `values` [n, k] of all ranks of `groups`, in rank order, and the place of this rank's own among them.

    Over one group after another: with groups (a, b) each rank has the rows of every rank of a, then of b. Ranks may
    hold different numbers of rows, or none. Two collectives a group; padded to the group's longest.
    """
    place = slice(0, len(values))
    for group in groups:
        size, rank = dist.get_world_size(group), dist.get_rank(group)
        count = torch.full((1,), len(values), device=values.device)
        counts = [torch.empty_like(count) for _ in range(size)]
        dist.all_gather(counts, count, group=group)
        lengths = torch.cat(counts).tolist()
        padded = values.new_zeros(max(lengths), values.shape[1])
        padded[: len(values)] = values
        parts = [torch.empty_like(padded) for _ in range(size)]
        dist.all_gather(parts, padded, group=group)
        before = sum(lengths[:rank])
        place = slice(before + place.start, before + place.stop)
        values = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return values, place
