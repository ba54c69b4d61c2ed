"""Both entropies and both divergences of a token, in one pass over a vocabulary shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import check_heads, check_logits, check_per_token
from megatron_sead.distillation.heads import logit_chunks
from megatron_sead.distillation.partial_sums import (
    PartialSums,
    VocabularyShard,
    add_sums,
    pair_sums,
    reduce_maxima,
    single_sums,
    vocabulary_shard,
)

# Shapes: [...] any leading dimensions; V vocabulary padded; tp ranks of `group`; n tokens; h hidden size


@dataclass
class TokenStatistics:
    """What SEAD knows about a token, all [...] fp32 (nats), same_argmax bool.

    A divergence is infinite where a token that one model holds possible has a logit of -inf in the other.
    """

    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    same_argmax: torch.Tensor


@dataclass
class TokenScores:
    """Statistics of sampled tokens, with what the same pass tells about the sampled token and about stopping."""

    statistics: TokenStatistics
    student_log_prob: torch.Tensor  # [n] of the sampled token
    teacher_log_prob: torch.Tensor  # [n]
    student_stop_probability: torch.Tensor  # [n] summed over the stop tokens
    teacher_stop_probability: torch.Tensor  # [n]


@torch.no_grad()
def token_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> TokenStatistics:
    """Statistics of every token from logits [..., V/tp], this rank's contiguous columns. Two collectives.

    Args:
        group: ranks over which the vocabulary is split; None: it is not.
        vocab_size: true size; columns beyond it are padding and never read. None: all columns are tokens.

    Returns:
        fields [...], the same on every rank of the group. Of equal logits the lowest token is the argmax.

    Raises:
        ValueError: shapes, types or devices differ, or vocab_size is beyond the shards.
    """
    check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
    shard = vocabulary_shard(student_logits.shape[-1], group, vocab_size)
    part = pair_sums(student_logits, teacher_logits, shard, with_columns=True)
    total = add_sums(reduce_maxima(part, group), group)
    return statistics_of(total, student_logits.shape[:-1])


@torch.no_grad()
def vocab_parallel_entropy(
    logits: torch.Tensor, *, group: ProcessGroup | None = None, vocab_size: int | None = None
) -> torch.Tensor:
    """Entropy [...] in nats of logits [..., V/tp]; arguments and errors as in `token_statistics`. No gradient."""
    check_logits(logits=logits)
    shard = vocabulary_shard(logits.shape[-1], group, vocab_size)
    own, sums = single_sums(logits, shard)
    if group is not None and len(own) > 0:
        maxima = own.clone()
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=group)
        shift = own - maxima
        scale = shift.exp()
        a, c = sums.unbind(-1)
        sums = torch.stack([scale * a, scale * (c + shift * a)], dim=-1).masked_fill_((scale == 0)[:, None], 0.0)
        dist.all_reduce(sums, group=group)
    a, c = sums.unbind(-1)
    return _entropy(a, c).view(logits.shape[:-1])


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
    scratch_bytes: int = 256 * 2**20,
) -> TokenScores:
    """Statistics and log-probabilities of the tokens `targets` [n], straight from hidden states. No gradient.

    Hidden states [n, h] are replicated over the group (the two h may differ) and taken in the type of their heads
    [V/tp, h]. Logits exist for as many tokens at a time as fit `scratch_bytes`. Two collectives a call.

    Raises:
        ValueError: sizes, types or devices do not fit, a target or stop token is not in the vocabulary, or
            vocab_size is beyond the shards.
    """
    check_heads(student_hidden, student_head, teacher_hidden, teacher_head)
    if student_hidden.dim() != 2:
        raise ValueError(f"student_hidden has shape {list(student_hidden.shape)}: must be [n, h]")
    check_per_token(student_hidden.shape[:-1], student_hidden.device, targets=targets)
    shard = vocabulary_shard(len(student_head), group, vocab_size)
    _check_tokens(targets, (*student_stop_token_ids, *teacher_stop_token_ids), shard, len(student_head), vocab_size)
    tokens, device = len(student_hidden), student_hidden.device
    own: PartialSums | None = None
    for place, _, student, teacher in logit_chunks(
        student_hidden, student_head, teacher_hidden, teacher_head, None, shard.real, scratch_bytes
    ):
        if own is None:
            own = PartialSums.empty(tokens, student.dtype, device, with_columns=True)
            extras = torch.zeros(tokens, 4, dtype=student.dtype, device=device)
        part = pair_sums(student, teacher, shard, with_columns=True)
        own.store(place, part)
        for model, (logits, stops) in enumerate(((student, student_stop_token_ids), (teacher, teacher_stop_token_ids))):
            extras[place, model] = _target_logit(logits, targets[place], shard)
            extras[place, 2 + model] = _stop_sum(logits, part.maxima[:, model], stops, shard)
    if own is None:
        own = PartialSums.empty(0, torch.float32, device, with_columns=True)
        extras = own.sums[:, :4]
    return _scores(own, extras, group)


def statistics_of(total: PartialSums, shape: torch.Size) -> TokenStatistics:
    """Statistics [...] from sums over the whole vocabulary."""
    a, b, c, d, _, _ = total.sums.unbind(-1)
    assert total.columns is not None
    same = total.columns[:, 0] == total.columns[:, 1]
    # below zero only by rounding
    forward, reverse = (divergence.clamp(min=0) for divergence in divergences(total.sums))
    return TokenStatistics(
        student_entropy=_entropy(a, c).view(shape),
        teacher_entropy=_entropy(b, d).view(shape),
        forward_kl=forward.float().view(shape),
        reverse_kl=reverse.float().view(shape),
        same_argmax=same.view(shape),
    )


def divergences(sums: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Forward and reverse KL [n] from the six sums [n, 6] over the whole vocabulary."""
    a, b, _, _, e, f = sums.unbind(-1)
    log_ratio = a.log() - b.log()
    return f / b + log_ratio, -(e / a) - log_ratio


def _entropy(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return (a.log() - c / a).clamp(min=0).float()


def _scores(own: PartialSums, extras: torch.Tensor, group: ProcessGroup | None) -> TokenScores:
    """From this rank's sums and, for both models, the targets' logits and the stop tokens' sums [n, 4]."""
    moved = reduce_maxima(own, group)
    scale = (own.maxima - moved.maxima).exp()
    extras[:, 2:] = torch.where(scale == 0, 0.0, extras[:, 2:] * scale)
    total = add_sums(moved, group, extras)
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
    return (logits[:, columns] - maximum.masked_fill(maximum == -torch.inf, 0.0)[:, None]).exp().sum(-1)


def _check_tokens(
    targets: torch.Tensor, stops: tuple[int, ...], shard: VocabularyShard, width: int, vocab_size: int | None
) -> None:
    size = 1 if shard.group is None else dist.get_world_size(shard.group)
    limit = width * size if vocab_size is None else vocab_size
    if targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}: must be token ids, integers")
    found = [*stops, *(targets.aminmax() if len(targets) else ())]
    outside = [int(token) for token in found if not 0 <= token < limit]
    if outside:
        raise ValueError(f"token {outside[0]} among targets or stop tokens: must be from 0 to {limit - 1}")
