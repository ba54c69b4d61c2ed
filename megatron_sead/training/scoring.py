"""Both heads, which turn hidden states into statistics and into the loss; the student's forward-only pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation import (
    LikeliestTokens,
    NotFiniteError,
    TokenLoss,
    TokenScores,
    TokenWeights,
    linear_likeliest_tokens,
    linear_token_loss,
    linear_token_scores,
    linear_weighted_divergence,
)
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.training.pipeline import run_schedule
from megatron_sead.training.response_positions import ResponsePositions

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
    sequence_parallel: bool  # the student's hidden states are this rank's shard [s/tp * b, h] of all positions
    context: ProcessGroup | None = None  # context parallel: of the n tokens this rank predicts m, `TokenView.own`

    def own_rows(self, micro_batch: MicroBatch, teacher_hidden: torch.Tensor) -> torch.Tensor:
        """Of the teacher's hidden states at the response tokens that it predicts on this rank, [n, h], those that the
        student's are compared with here: under sequence parallelism its shard's. Under context parallelism, where the
        two views are split differently, the others come from their ranks."""
        if micro_batch.teacher is not micro_batch.student:
            return self.rows_of_whole(micro_batch, self.whole_rows(micro_batch, teacher_hidden))
        return self._shard(micro_batch, teacher_hidden)

    def whole_rows(self, micro_batch: MicroBatch, teacher_hidden: torch.Tensor) -> torch.Tensor:
        """[n, h] of all response tokens, whichever context-parallel rank has them. Collective over those."""
        return _joined(teacher_hidden, micro_batch.teacher.own, len(micro_batch.targets), self.context)

    def rows_of_whole(self, micro_batch: MicroBatch, teacher_hidden: torch.Tensor) -> torch.Tensor:
        """What `own_rows` is, from `whole_rows`."""
        return self._shard(micro_batch, *_own(micro_batch, teacher_hidden))

    def score(self, student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, micro_batch: MicroBatch) -> TokenScores:
        """Statistics of the response tokens [n] from both final hidden states, of the teacher `own_rows`. Collective
        over tensor- and context-parallel ranks.

        Raises:
            NotFiniteError: logits that are not; on every context-parallel rank, whichever has found them.
        """
        if self.context is None:
            return self._own_scores(student_hidden, teacher_hidden, micro_batch)
        scores, problem = None, None
        try:
            scores = self._own_scores(student_hidden, teacher_hidden, micro_batch)
        except NotFiniteError as error:
            problem = error
        bad = torch.tensor(float(problem is not None), device=student_hidden.device)
        dist.all_reduce(bad, dist.ReduceOp.MAX, group=self.context)
        if bad:
            raise problem or NotFiniteError("logits of another context-parallel rank are not finite")
        assert scores is not None
        own, count = micro_batch.student.own, len(micro_batch.targets)
        columns = torch.stack([column.to(scores.student_log_prob.dtype) for column in scores.columns()], dim=1)
        return scores.of_columns(_joined(columns, own, count, self.context).unbind(1))

    def _own_scores(
        self, student_hidden: torch.Tensor, teacher_hidden: torch.Tensor, micro_batch: MicroBatch
    ) -> TokenScores:
        assert self.student is not None and self.teacher is not None
        positions, (targets,) = self._positions(micro_batch), _own(micro_batch, micro_batch.targets)
        if positions is not None:
            targets, teacher_hidden = positions.scatter(targets, -1), positions.spread(teacher_hidden)
        scores = linear_token_scores(
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
            sequence_parallel=self.sequence_parallel,
        )
        return scores if positions is None else scores.select(positions.index_on(targets.device))

    def likeliest(
        self,
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        micro_batch: MicroBatch,
        wanted: torch.Tensor,
        k: int,
    ) -> LikeliestTokens:
        """Both models' k likeliest tokens where `wanted` [n] is true; arguments and collectives as in `score`."""
        assert self.student is not None and self.teacher is not None
        positions, (wanted,) = self._positions(micro_batch), _own(micro_batch, wanted)
        if positions is not None:
            wanted, teacher_hidden = positions.scatter(wanted, 0), positions.spread(teacher_hidden)
        rows = linear_likeliest_tokens(
            (student_hidden.detach(), self.student.detach()),
            (teacher_hidden, self.teacher.detach()),
            wanted,
            min(k, self.vocab_size),
            group=self.group,
            vocab_size=self.vocab_size,
            scratch_bytes=self.scratch_bytes,
            sequence_parallel=self.sequence_parallel,
        ).rows()
        if positions is not None:
            rows = rows[positions.index_on(rows.device)]
        own, count = micro_batch.student.own, len(micro_batch.targets)
        return LikeliestTokens.of_rows(_joined(rows, own, count, self.context))

    def loss(
        self,
        student_hidden: torch.Tensor,
        teacher_hidden: torch.Tensor,
        weights: TokenWeights,
        micro_batch: MicroBatch,
        token_loss: TokenLoss | None,
        student_log_prob: torch.Tensor,
    ) -> torch.Tensor:
        """Sum of the response tokens' losses, differentiable in the student's states and head; under context
        parallelism of those that this rank predicts.

        Args:
            teacher_hidden: its `own_rows`.
            token_loss: None: the weighted divergences.
            student_log_prob: [n] of the response tokens, before this update.
        """
        assert self.student is not None and self.teacher is not None
        forward, reverse, targets, student_log_prob = _own(
            micro_batch, weights.forward, weights.reverse, micro_batch.targets, student_log_prob
        )
        positions = self._positions(micro_batch)
        if positions is not None:
            forward, reverse = positions.scatter(forward, 0), positions.scatter(reverse, 0)
            targets, student_log_prob = positions.scatter(targets, 0), positions.scatter(student_log_prob, 0)
            teacher_hidden = positions.spread(teacher_hidden)
        models = (student_hidden, self.student, teacher_hidden, self.teacher)
        where = {"vocab_size": self.vocab_size, "scratch_bytes": self.scratch_bytes}
        if token_loss is None:
            losses = linear_weighted_divergence(
                *models, forward, reverse, group=self.group, sequence_parallel=self.sequence_parallel, **where
            )
        else:
            losses = linear_token_loss(
                token_loss,
                models,
                (forward, reverse),
                targets,
                student_log_prob,
                group=self.group,
                sequence_parallel=self.sequence_parallel,
                **where,
            )
        return losses.sum()

    def _shard(self, micro_batch: MicroBatch, teacher_hidden: torch.Tensor) -> torch.Tensor:
        positions = self._positions(micro_batch)
        return teacher_hidden if positions is None else positions.own(teacher_hidden)

    def _positions(self, micro_batch: MicroBatch) -> ResponsePositions | None:
        if not self.sequence_parallel or self.group is None:
            return None
        return ResponsePositions.of(micro_batch.student, self.group)


def _own(micro_batch: MicroBatch, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Of one value or row a response token, n each, those that this rank predicts."""
    own = micro_batch.student.own
    if own is None:
        return values
    return tuple(value.index_select(0, own.to(value.device, non_blocking=True)) for value in values)


def _joined(rows: torch.Tensor, own: torch.Tensor | None, count: int, group: ProcessGroup | None) -> torch.Tensor:
    """[count, k] of all response tokens, from the rows [m, k] of those that each rank of the group predicts."""
    if own is None or group is None:
        return rows
    whole = rows.new_zeros(count, rows.shape[1])
    whole.index_copy_(0, own.to(rows.device, non_blocking=True), rows)  # each token is on one rank alone
    dist.all_reduce(whole, group=group)
    return whole


def score_student(
    chunks: list[torch.nn.Module],
    micro_batches: list[MicroBatch],
    teacher_hidden: list[torch.Tensor],
    heads: Heads,
    parallel: ParallelContext,
    problems: list[str],
) -> list[TokenScores]:
    """The student's forward-only pass, compared with the teacher's hidden states. Empty before the last stage.

    Logits that are not finite are told in `problems`, on the ranks that see them; an exception would leave the other
    stages waiting. The scores are then of no use.
    """

    def score(index: int, hidden: torch.Tensor) -> TokenScores | None:
        try:
            return heads.score(hidden, teacher_hidden[index].to(hidden.device, non_blocking=True), micro_batches[index])
        except NotFiniteError as error:
            problems.append(str(error))
            return None

    return run_schedule(chunks, micro_batches, "student", score, parallel=parallel, forward_only=True)
