"""Where response tokens are in a sequence that tensor-parallel ranks share, as sequence parallelism has them do."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.prompts.packing import TokenView

# Shapes: b rollouts in a micro-batch, s padded length, n response tokens; positions are s * b, sequence first


@dataclass(frozen=True)
class SequencePlaces:
    """Places [n] of the positions that predict the response tokens, among all s * b that ranks share in equal parts."""

    places: torch.Tensor  # [n]
    positions: int  # s * b
    own: slice  # of this rank

    @staticmethod
    def of(view: TokenView, group: ProcessGroup) -> SequencePlaces:
        """The view's predictors, which count batch first."""
        b, s = view.tokens.shape
        share = b * s // dist.get_world_size(group)
        first = share * dist.get_rank(group)
        return SequencePlaces(view.predictors % s * b + view.predictors // s, b * s, slice(first, first + share))

    def spread(self, values: torch.Tensor, elsewhere: float) -> torch.Tensor:
        """[s * b] from one value a response token [n]."""
        return values.new_full((self.positions,), elsewhere).index_copy(0, self.places, values)

    def own_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """[s * b / tp, h] this rank's positions, of rows a response token [n, h]; zero where there is none."""
        mine = (self.places >= self.own.start) & (self.places < self.own.stop)
        result = rows.new_zeros(self.own.stop - self.own.start, rows.shape[1])
        return result.index_copy_(0, self.places[mine] - self.own.start, rows[mine])
