"""Both heads, which turn hidden states into statistics and into the loss; the student's forward-only pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_sead.distillation import TokenScores, TokenWeights, linear_token_scores, linear_weighted_divergence
from megatron_sead.models import ParallelContext
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.training.pipeline import run_schedule

# Shapes: n response tokens of a micro-batch, h hidden size, V padded vocabulary, tp ranks of the tensor-parallel group


@dataclass
class Heads:
    """What turns hidden states into distributions on the last stage; None on the others."""

    student: torch.Tensor | None  # [V/tp, h_student]
    teacher: torch.Tensor | None  # [V/tp, h_teacher]
    student_stop_token_ids: tuple[int, ...]
    teacher_stop_token_ids: tuple[int, ...]
    vocab_size: int  # true vocabulary, padding excluded
    scratch_bytes: int
    group: ProcessGroup | None  # tensor parallel

    def score(self, student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, targets: torch.Tensor) -> TokenScores:
        """Statistics of the tokens `targets` [n] from both final hidden states [n, h]; no gradient."""
        assert self.student is not None and self.teacher is not None
        return linear_token_scores(
            student_hidden.detach(),
            self.student.detach(),
            teacher_hidden,
            self.teacher.detach(),
            targets,
            student_stop_token_ids=self.student_stop_token_ids,
            teacher_stop_token_ids=self.teacher_stop_token_ids,
            group=self.group,
            vocab_size=self.vocab_size,
            scratch_bytes=self.scratch_bytes,
        )

    def divergence(
        self, student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, weights: TokenWeights
    ) -> torch.Tensor:
        """The loss of each token [n], weighted, differentiable in the student's hidden states and head."""
        assert self.student is not None and self.teacher is not None
        return linear_weighted_divergence(
            student_hidden,
            self.student,
            teacher_hidden,
            self.teacher,
            weights.forward,
            weights.reverse,
            group=self.group,
            vocab_size=self.vocab_size,
            scratch_bytes=self.scratch_bytes,
        )


def score_student(
    chunks: list[torch.nn.Module],
    micro_batches: list[MicroBatch],
    teacher_hidden: list[torch.Tensor],
    heads: Heads,
    parallel: ParallelContext,
) -> list[TokenScores]:
    """The student's forward-only pass, compared with the teacher's hidden states. Empty before the last stage."""

    def score(index: int, hidden: torch.Tensor) -> TokenScores:
        return heads.score(hidden, teacher_hidden[index].to(hidden.device), micro_batches[index].targets)

    return run_schedule(chunks, micro_batches, "student", score, parallel=parallel, forward_only=True)
