"""Statistics of tokens straight from hidden states, with what the same pass tells about sampled and stop tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import (
    check_heads,
    check_per_token,
    choose,
    refuse_nan,
    refused_together,
    require_tensors,
    whole_shape,
)
from megatron_sead.distillation.heads import logit_chunks
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.partial_sums import (
    PartialSums,
    VocabularyShard,
    pair_sums,
    start_maxima,
    start_sums,
    vocabulary_shard,
)
from megatron_sead.distillation.statistics import TokenStatistics, has_no_distribution, statistics_of

# Shapes: V vocabulary padded; tp ranks of `group`; n tokens; r of a chunk; h hidden size


@dataclass
class TokenScores:
    """Statistics of sampled tokens, with what the same pass tells about the sampled token and about stopping."""

    statistics: TokenStatistics
    student_log_prob: torch.Tensor  # [n] of the sampled token
    teacher_log_prob: torch.Tensor  # [n]
    student_stop_probability: torch.Tensor  # [n] summed over the stop tokens
    teacher_stop_probability: torch.Tensor  # [n]

    def select(self, index: torch.Tensor) -> TokenScores:
        """Of the tokens `index` alone."""
        statistics = TokenStatistics(**{name: value[index] for name, value in vars(self.statistics).items()})
        others = {name: value[index] for name, value in vars(self).items() if name != "statistics"}
        return TokenScores(statistics, **others)

    def columns(self) -> list[torch.Tensor]:
        """Every field, [n] each."""
        return [*vars(self.statistics).values(), *(v for name, v in vars(self).items() if name != "statistics")]

    def of_columns(self, columns: Sequence[torch.Tensor]) -> TokenScores:
        """Of other tokens, whose `columns` these are, in any type."""
        of_type = [new.to(old.dtype) for new, old in zip(columns, self.columns(), strict=True)]
        count = len(vars(self.statistics))
        return TokenScores(TokenStatistics(*of_type[:count]), *of_type[count:])


@torch.compiler.disable
@torch.no_grad()
def linear_token_scores(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    *,
    student_stop_token_ids: tuple[int, ...],
    teacher_stop_token_ids: tuple[int, ...],
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    scratch_bytes: int | None = None,
    sequence_parallel: bool = False,
) -> TokenScores:
    """Statistics and log-probabilities of the tokens `targets` [n], straight from hidden states. No gradient.

    Hidden states [n, h] are replicated over the group (the two h may differ) and taken in the type of their heads
    [V/tp, h]. Logits exist for as many tokens at a time as fit `scratch_bytes` (None: 512). Three collectives a
    call.

    Args:
        targets: [n] what each hidden state was followed by; below zero: not scored, its fields are zero.
        sequence_parallel: hidden states are this rank's part [n/tp, h], in rank order; gathered chunk by chunk.

    Raises:
        ValueError: sizes, types or devices do not fit, a target or stop token is not in the vocabulary, vocab_size is
            beyond the shards, or a token's logits are NaN; on every rank, whichever of them is at fault.
    """
    stops = student_stop_token_ids, teacher_stop_token_ids
    require_tensors(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )
    with refused_together(group, student_hidden.device):
        check_heads(student_hidden, student_head, teacher_hidden, teacher_head)
        if student_hidden.dim() != 2:
            raise ValueError(f"student_hidden has shape {list(student_hidden.shape)}: must be [n, h]")
        shard = vocabulary_shard(len(student_head), group, vocab_size)
        sequence_group = shard.group if sequence_parallel else None
        check_per_token(whole_shape(student_hidden, sequence_group), student_hidden.device, targets=targets)
        size = 1 if shard.group is None else shard.group.size()
        limit = len(student_head) * size if vocab_size is None else vocab_size
        _check_tokens(targets, (*stops[0], *stops[1]), limit)
    dtype = accumulation_dtype(torch.promote_types(student_head.dtype, teacher_head.dtype))
    chosen = choose(
        targets >= 0,
        shard.group,
        parts=1 if sequence_group is None else sequence_group.size(),
        problem=((targets >= limit).any(), lambda: _outside(int(targets.max()), limit)),
    )
    own = PartialSums.empty(len(targets), dtype, targets.device, with_columns=True)
    extras = torch.zeros(len(targets), 4, dtype=dtype, device=targets.device)
    for chunk, _, student, teacher in logit_chunks(
        (student_hidden, student_head),
        (teacher_hidden, teacher_head),
        chosen,
        shard.real,
        scratch_bytes=scratch_bytes,
        buffers=1,
        sequence_group=sequence_group,
    ):
        part = pair_sums(student, teacher, shard, with_columns=True)
        own.store(chunk.tokens, part)
        for model, logits in enumerate((student, teacher)):
            extras[chunk.tokens, model] = _target_logit(logits, targets[chunk.tokens], shard)
            extras[chunk.tokens, 2 + model] = _stop_sum(logits, part.maxima[:, model], stops[model], shard)
    return _scores(own, extras, targets >= 0, shard.group)


def _scores(own: PartialSums, extras: torch.Tensor, scored: torch.Tensor, group: ProcessGroup | None) -> TokenScores:
    """From this rank's sums and, for both models, the targets' logits and the stop tokens' sums [n, 4]."""
    moved = start_maxima(own, group)()
    scale = (own.maxima - moved.maxima).exp()
    extras[:, 2:] = torch.where(scale == 0, 0.0, extras[:, 2:] * scale)
    total = start_sums(moved, group, extras)()
    refuse_nan(has_no_distribution(total) & scored, own.sums[:, :2], group)
    # of tokens that are not scored: one possible token, in both models
    unscored = ~scored[:, None]
    total.sums[:, :2].masked_fill_(unscored, 1.0)
    total.sums[:, 2:].masked_fill_(unscored, 0.0)
    total.maxima.masked_fill_(unscored, 0.0)
    extras.masked_fill_(unscored, 0.0)
    normalizers = total.sums[:, :2]
    log_probs = (extras[:, :2] - total.maxima - normalizers.log()).float()
    stops = (extras[:, 2:] / normalizers).float()
    return TokenScores(statistics_of(total, own.maxima.shape[:1]), *log_probs.unbind(-1), *stops.unbind(-1))


def _target_logit(logits: torch.Tensor, targets: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """[r] the target's logit where this rank holds it, else zero, so that the sum over ranks is the logit."""
    column = targets - shard.first
    mine = (column >= 0) & (column < shard.real)
    if shard.real == 0:
        return logits.new_zeros(len(targets))
    return torch.where(mine, logits.gather(1, column.clamp(0, shard.real - 1)[:, None]).squeeze(1), 0.0)


def _stop_sum(
    logits: torch.Tensor, maximum: torch.Tensor, tokens: tuple[int, ...], shard: VocabularyShard
) -> torch.Tensor:
    """[r] sum of exp(logit - maximum) over the stop tokens that this rank holds."""
    columns = [token - shard.first for token in set(tokens) if 0 <= token - shard.first < shard.real]
    if not columns:
        return torch.zeros_like(maximum)
    stops = torch.stack([logits[:, column] for column in columns], dim=-1)  # a list as index is copied to a GPU
    return (stops - maximum.masked_fill(maximum == -torch.inf, 0.0)[:, None]).exp().sum(-1)


def _check_tokens(targets: torch.Tensor, stops: tuple[int, ...], limit: int) -> None:
    if targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}: must be token ids, integers")
    if outside := [token for token in stops if not 0 <= token < limit]:
        raise ValueError(_outside(outside[0], limit))


def _outside(token: int, limit: int) -> str:
    return f"token {token} among targets or stop tokens: must be from 0 to {limit - 1}"
