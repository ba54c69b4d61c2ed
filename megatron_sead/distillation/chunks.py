"""Chosen tokens a chunk at a time, and their hidden states: whole on every rank, or sequence-parallel.

Under sequence parallelism a chunk takes tokens of every rank that has some left: their states are gathered for the
chunk alone, and its gradients go back to their ranks, so that no rank ever holds the states of the whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import Chosen

# Shapes: n tokens in all; r of a chunk; m the most that one rank has of them; h hidden size


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through the heads together.

    Attributes:
        tokens: [r] their indices among all tokens; under sequence parallelism one rank's after another's.
        own: [r] the rows of this rank's hidden states that are in the chunk, fewer under sequence parallelism.
        counts: how many tokens each rank has in the chunk; None where each has all.
    """

    tokens: torch.Tensor
    own: torch.Tensor
    counts: list[int] | None

    def start_gather(self, hidden: torch.Tensor, group: ProcessGroup | None) -> Callable[[], torch.Tensor]:
        """Start to collect the chunk's hidden states from this rank's [n or n/tp, h]; what it returns gives [r, h]."""
        if self.counts is None or group is None:
            return lambda: hidden[self.own]
        most = max(self.counts)
        mine = hidden.new_zeros(most, hidden.shape[1])
        mine[: len(self.own)] = hidden[self.own]
        gathered = hidden.new_empty(most * len(self.counts), hidden.shape[1])
        work = dist.all_gather_into_tensor(gathered, mine, group=group, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return self._without_gaps(gathered, most)

        return finish

    def start_return(
        self, gradient: torch.Tensor, into: torch.Tensor, group: ProcessGroup | None
    ) -> Callable[[], None]:
        """Start to sum gradients [r, h] over the ranks; what it returns puts them in place in `into` [n or n/tp, h]."""
        if group is None:
            into[self.own] = gradient
            return lambda: None
        if self.counts is None:
            mine = gradient
            work = dist.all_reduce(mine, group=group, async_op=True)
        else:
            most = max(self.counts)
            mine = gradient.new_empty(most, gradient.shape[1])
            work = dist.reduce_scatter_tensor(mine, self._with_gaps(gradient, most), group=group, async_op=True)

        def finish() -> None:
            work.wait()
            into[self.own] = mine[: len(self.own)]

        return finish

    def _without_gaps(self, gathered: torch.Tensor, most: int) -> torch.Tensor:
        """[ranks * m, h] -> [r, h]"""
        assert self.counts is not None
        if min(self.counts) == most:
            return gathered
        parts = gathered.split(most)
        return torch.cat([part[:count] for part, count in zip(parts, self.counts, strict=True)])

    def _with_gaps(self, gradient: torch.Tensor, most: int) -> torch.Tensor:
        """[r, h] -> [ranks * m, h]"""
        assert self.counts is not None
        if min(self.counts) == most:
            return gradient
        padded = gradient.new_zeros(len(self.counts), most, gradient.shape[1])
        for slot, part in zip(padded, gradient.split(self.counts), strict=True):
            slot[: len(part)] = part
        return padded.flatten(0, 1)


def token_chunks(chosen: Chosen, size: int, sequence_group: ProcessGroup | None, local: int) -> Iterator[Chunk]:
    """Cut chosen tokens into chunks of at most `size` (or of one token a rank).

    Args:
        chosen: whose parts are the ranks'.
        sequence_group: ranks over which the sequence is split, each with `local` tokens; None: each rank has all.
    """
    if sequence_group is None:
        yield from (Chunk(part, part, None) for part in chosen.tokens.split(size) if len(part))
        return
    rank, left = dist.get_rank(sequence_group), chosen.counts
    of_rank = chosen.tokens.split(left)
    while any(left):
        most = max(1, size // sum(count > 0 for count in left))
        counts = [min(count, most) for count in left]
        taken = [len(mine) - count for mine, count in zip(of_rank, left, strict=True)]
        parts = [mine[t : t + count] for mine, t, count in zip(of_rank, taken, counts, strict=True)]
        yield Chunk(torch.cat(parts), parts[rank] - rank * local, counts)
        left = [count - now for count, now in zip(left, counts, strict=True)]
