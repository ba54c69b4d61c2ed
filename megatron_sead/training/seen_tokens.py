"""What a rank saw of a step's tokens while it trained on them, kept until the step is written down."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

from megatron_sead.distillation import LikeliestTokens, TokenScores, TokenStatistics
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.training.scoring import Heads
from megatron_sead.training.supervision import StepTokens, Supervision

# Shapes: n response tokens of a micro-batch, or of all of this rank's micro-batches

LIKELIEST = 3  # of each model's tokens at a position


@dataclass(frozen=True)
class Watch:
    """Rollouts of the step that somebody will look at token by token."""

    rollouts: tuple[int, ...] = ()  # their numbers in the global step
    most_tokens: int = 0  # of a response; of what comes later nothing is kept

    def sees(self, rollout_index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
        """[n] bool, of the tokens of those rollouts."""
        numbers = torch.tensor(self.rollouts, dtype=rollout_index.dtype, device=rollout_index.device)
        return torch.isin(rollout_index, numbers) & (position < self.most_tokens)

    def likeliest(
        self, heads: Heads, hidden: torch.Tensor, from_teacher: torch.Tensor, micro_batch: MicroBatch
    ) -> LikeliestTokens | None:
        """Of a micro-batch's tokens; None where nobody looks. Collective as `Heads.likeliest`."""
        if not self.rollouts:
            return None
        wanted = self.sees(micro_batch.rollout_index, micro_batch.position)
        return heads.likeliest(hidden, from_teacher, micro_batch, wanted, LIKELIEST)


NOBODY = Watch()


@dataclass
class Outcome:
    """Of a micro-batch's training pass, on the last pipeline stage."""

    loss: torch.Tensor
    score: TokenScores
    supervision: Supervision
    likeliest: LikeliestTokens | None


@dataclass
class SeenTokens:
    """All response tokens of this rank's micro-batches, in their order. What a record alone reads is joined when one is
    written."""

    tokens: StepTokens
    zones: torch.Tensor  # [n] int8
    outcomes: list[Outcome]

    def numbers(self) -> dict[str, torch.Tensor]:
        """[n] each, by the names of records: nats, and weights as the loss had them."""
        found = {
            field.name: getattr(self.tokens.statistics, field.name)
            for field in fields(TokenStatistics)
            if field.name != "same_argmax"
        }
        for name in ("student_log_prob", "teacher_log_prob"):
            found[name] = torch.cat([getattr(outcome.score, name) for outcome in self.outcomes])
        for name in ("forward", "reverse"):
            found[f"{name}_weight"] = torch.cat([getattr(o.supervision.weights, name) for o in self.outcomes])
        return found

    def likeliest(self) -> LikeliestTokens | None:
        """[n, ...] tokens; None where nobody looked."""
        if self.outcomes[0].likeliest is None:
            return None
        rows = [outcome.likeliest.rows() for outcome in self.outcomes if outcome.likeliest is not None]
        return LikeliestTokens.of_rows(torch.cat(rows))
