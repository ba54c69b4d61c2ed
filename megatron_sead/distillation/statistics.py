"""Both entropies and both divergences of a token, in one pass over a vocabulary shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import check_logits, refuse, refuse_nan, require_tensors
from megatron_sead.distillation.kernels.formulas import move_single_sums
from megatron_sead.distillation.partial_sums import (
    PartialSums,
    pair_sums,
    reduce_over,
    single_sums,
    vocabulary_shard,
)

# Shapes: [...] any leading dimensions; V vocabulary padded; tp ranks of `group`; n tokens


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


@torch.compiler.disable
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
        ValueError: shapes, types or devices differ, vocab_size is beyond the shards, or a token's logits are NaN; on
            every rank of the group, whichever of them is at fault.
    """
    require_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    tokens = student_logits.shape[:-1].numel()
    try:
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        shard = vocabulary_shard(student_logits.shape[-1], group, vocab_size)
    except ValueError as problem:
        refuse(problem, student_logits, tokens, group, with_columns=True)
    own = pair_sums(student_logits, teacher_logits, shard, with_columns=True)
    total = reduce_over(own, shard.group)
    refuse_nan(has_no_distribution(total), own.sums[:, :2], shard.group)
    return statistics_of(total, student_logits.shape[:-1])


@torch.compiler.disable
@torch.no_grad()
def vocab_parallel_entropy(
    logits: torch.Tensor, *, group: ProcessGroup | None = None, vocab_size: int | None = None
) -> torch.Tensor:
    """Entropy [...] in nats of logits [..., V/tp]; arguments and errors as in `token_statistics`. No gradient."""
    require_tensors(logits=logits)
    try:
        check_logits(logits=logits)
        shard = vocabulary_shard(logits.shape[-1], group, vocab_size)
    except ValueError as problem:
        refuse(problem, logits, logits.shape[:-1].numel(), group, models=1, sums=2)
    own, sums = single_sums(logits, shard)
    own_normalizers = sums[:, :1]
    if shard.group is not None and len(own) > 0:
        maxima = own.clone()
        dist.all_reduce(maxima, dist.ReduceOp.MAX, group=shard.group)
        sums = move_single_sums(sums, own, maxima)
        dist.all_reduce(sums, group=shard.group)
    a, c = sums.unbind(-1)
    refuse_nan(c.isnan() | (a == 0), own_normalizers, shard.group)
    return _entropy(a, c).view(logits.shape[:-1])


def has_no_distribution(total: PartialSums) -> torch.Tensor:
    """[n] bool: NaN among the token's sums, or no token possible."""
    return total.sums.isnan().any(-1) | (total.sums[:, :2] == 0).any(-1)


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
    log_ratio = (a / b).log()  # the difference of the logarithms, ln V each, would round eight times as coarsely
    return f / b + log_ratio, -(e / a) - log_ratio


def _entropy(a: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    return (a.log() - c / a).clamp(min=0).float()
