"""The tokens that student and teacher hold likeliest, straight from hidden states, for people who look at a rollout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.baselines.top_k_support import top_k_buckets
from megatron_sead.distillation.checks import choose
from megatron_sead.distillation.heads import logit_chunks
from megatron_sead.distillation.partial_sums import VocabularyShard, vocabulary_shard

# Shapes: V vocabulary padded; tp ranks of `group`; n tokens; r of a chunk; h hidden size; c columns of this rank

COLUMNS = 6  # of a token and place: id, both log-probabilities; the student's likeliest, then the teacher's


@dataclass
class LikeliestTokens:
    """Of each of n tokens the k that a model holds likeliest, in descending order; zero of tokens not asked for."""

    ids: torch.Tensor  # [n, 2, k] int64: the student's, then the teacher's
    student_log_prob: torch.Tensor  # [n, 2, k] fp32, nats
    teacher_log_prob: torch.Tensor  # [n, 2, k]

    def rows(self) -> torch.Tensor:
        """[n, COLUMNS * k] fp32, in which ids up to 2^24 are exact."""
        return (
            torch.stack([self.ids.float(), self.student_log_prob, self.teacher_log_prob]).permute(1, 0, 2, 3).flatten(1)
        )

    @staticmethod
    def of_rows(rows: torch.Tensor) -> LikeliestTokens:
        """What `rows` returned."""
        ids, student, teacher = rows.unflatten(1, (3, 2, -1)).unbind(1)
        return LikeliestTokens(ids.long(), student, teacher)


@torch.compiler.disable
@torch.no_grad()
def linear_likeliest_tokens(
    student: tuple[torch.Tensor, torch.Tensor],
    teacher: tuple[torch.Tensor, torch.Tensor],
    wanted: torch.Tensor,
    k: int,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    scratch_bytes: int | None = None,
    sequence_parallel: bool = False,
) -> LikeliestTokens:
    """Both models' k likeliest tokens, and what both give them, where `wanted` [n] is true. No gradient.

    Log-probabilities are exact, over the whole vocabulary. Of equal logits the lowest token comes first. Two
    collectives a model and chunk.

    Args:
        student: hidden states [n, h] and head [V/tp, h]; so is teacher. With sequence_parallel states are this rank's
            part [n/tp, h], in rank order.
        wanted: the same on every rank of the group.
        k: at most as many as the vocabulary has.
    """
    shard = vocabulary_shard(len(student[1]), group, vocab_size)
    sequence_group = shard.group if sequence_parallel else None
    chosen = choose(wanted, shard.group, parts=1 if sequence_group is None else sequence_group.size())
    rows = torch.zeros(len(wanted), COLUMNS * k, device=wanted.device)
    for chunk, _, *logits in logit_chunks(
        student, teacher, chosen, shard.real, scratch_bytes=scratch_bytes, buffers=1, sequence_group=sequence_group
    ):
        rows[chunk.tokens] = _likeliest(logits, k, shard).rows()
    return LikeliestTokens.of_rows(rows)


def _likeliest(logits: Sequence[torch.Tensor], k: int, shard: VocabularyShard) -> LikeliestTokens:
    """From both models' logits [r, c]."""
    found = [_likeliest_of(logits[model], logits[1 - model], k, shard) for model in (0, 1)]
    (ids, own, others), (teachers_ids, teachers_own, students) = found
    return LikeliestTokens(
        torch.stack([ids, teachers_ids], dim=1),
        torch.stack([own, students], dim=1),
        torch.stack([others, teachers_own], dim=1),
    )


def _likeliest_of(
    chooses: torch.Tensor, other: torch.Tensor, k: int, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[r, k] ids of the first model's likeliest tokens, and both models' log-probabilities of them."""
    found = top_k_buckets([_at_least(chooses, k), _at_least(other, k)], k, "bucket", shard)
    here = found.columns < shard.real
    ids = torch.where(here, found.columns + shard.first, 0)
    if shard.group is not None:
        dist.all_reduce(ids, group=shard.group)
    # The last bucket is all other tokens: over the k and this one a softmax is that over the vocabulary
    own, others = (buckets.log_softmax(-1)[:, :k].float() for buckets in found.buckets)
    return ids, own, others


def _at_least(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[r, k or more]: every rank sends as many, one with hardly a real column too. Added ones are never read."""
    return logits if logits.shape[1] >= k else torch.nn.functional.pad(logits, (0, k - logits.shape[1]))
