"""Where the response positions are in a sequence that is sharded over the tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.prompts.packing import TokenView

# Shapes: b rollouts in a micro-batch, s padded length, n response tokens, h hidden size, tp tensor-parallel ranks


@dataclass(frozen=True)
class ResponsePositions:
    """The positions that predict the response tokens, among all s * b of a micro-batch, sequence first.

    Each rank holds an equal shard of the s * b positions, as sequence parallelism in Megatron has it.
    """

    index: torch.Tensor  # [n] into the s * b positions, in host memory
    total: int  # s * b
    shard: slice  # this rank's positions

    @staticmethod
    def of(view: TokenView, group: ProcessGroup) -> ResponsePositions:
        """From a view's predictors, whose flattened positions count batch first."""
        b, s = view.tokens.shape
        size = b * s // dist.get_world_size(group)
        first = size * dist.get_rank(group)
        return ResponsePositions(view.predictors % s * b + view.predictors // s, b * s, slice(first, first + size))

    def scatter(self, values: torch.Tensor, fill: float) -> torch.Tensor:
        """[s * b] with one value [n] at each response position, and `fill` at all others."""
        return values.new_full((self.total,), fill).index_copy(0, self.index_on(values.device), values)

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """[m, h] of the m response positions in this rank's shard, from one row [n, h] a response position, wherever
        they are."""
        return rows.index_select(0, self._mine.to(rows.device, non_blocking=True))

    def spread(self, own: torch.Tensor) -> torch.Tensor:
        """[s * b / tp, h] of this rank's shard, from what `own` returned; zero at all other positions."""
        result = own.new_zeros(self.shard.stop - self.shard.start, own.shape[1])
        places = self.index[self._mine] - self.shard.start
        return result.index_copy_(0, places.to(own.device, non_blocking=True), own)

    def index_on(self, device: torch.device) -> torch.Tensor:
        """`index`, on a device."""
        return self.index.to(device, non_blocking=True)

    @property
    def _mine(self) -> torch.Tensor:
        """[m] which of the response tokens are in this rank's shard."""
        return ((self.index >= self.shard.start) & (self.index < self.shard.stop)).nonzero().squeeze(1)
