"""The greatest of all ranks' tokens, exactly, by histograms of fixed size.

Nothing that is sent or sorted grows with the ranks, or with the tokens that others hold; the host waits for nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

# Shapes: n tokens of this rank

DIGIT = 10  # bits that a histogram tells apart: 8 KB a collective
KEY_BITS = 63


def greatest(
    values: torch.Tensor,
    among: torch.Tensor,
    count: int | torch.Tensor,
    key: torch.Tensor,
    groups: Sequence[ProcessGroup] = (),
) -> torch.Tensor:
    """[n] bool: of all ranks' tokens in `among`, those with the `count` greatest values. Collective over the groups.

    A radix selection: each round narrows the place of the least value that is in to its next `DIGIT` bits, and, of
    tokens with just this value, that of the highest key that is in.

    Args:
        values: [n] fp32, or fp64 that are not negative; not NaN in `among`.
        among: [n] bool; they are at least `count` in all.
        count: the same on all ranks.
        key: [n] int64 from 0, different for each token of all ranks; of equal values the lower ones are in.
    """
    order, bits = _as_integers(values)
    taken, alive = torch.zeros_like(among), among
    left = count if isinstance(count, torch.Tensor) else torch.full((), count, device=values.device)
    for word, width in ((order, bits), (2**KEY_BITS - 1 - key, KEY_BITS)):
        for shift in reversed(range(0, width, DIGIT)):
            digit = (word >> shift) & (2**DIGIT - 1)
            held = torch.zeros(2**DIGIT, dtype=torch.int64, device=values.device)
            held.index_add_(0, digit, alive.long())
            for group in groups:
                dist.all_reduce(held, group=group)
            at_least = held.flip(0).cumsum(0).flip(0)
            last = ((at_least >= left).sum() - 1).clamp(min=0)  # the digit of the last that is in
            taken = taken | (alive & (digit > last))
            left = left - (at_least - held).gather(0, last[None])[0]
            alive = alive & (digit == last)
    return taken | (alive & (left > 0))


def token_key(rollout_index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[n] int64 by which tokens of a step are told apart and ordered, whatever the layout."""
    return rollout_index * (1 << 32) + position


def _as_integers(values: torch.Tensor) -> tuple[torch.Tensor, int]:
    """[n] int64 from 0, in the same order, and how many bits they have. -0 is 0."""
    values = values + 0.0
    if values.dtype == torch.float64:
        return values.view(torch.int64), KEY_BITS
    signed = values.float().view(torch.int32).long()
    return torch.where(signed < 0, signed ^ 0x7FFFFFFF, signed) + 2**31, 32
