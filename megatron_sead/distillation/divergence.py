"""The loss on logits: a token's w_forward * FKL + w_reverse * RKL, and its gradient.

With p, q student and teacher, x, y centered logits and the sums A, B, E of `partial_sums`, the gradient with respect
to the student's logits is

    w_forward (p - q) + w_reverse p (log p - log q - RKL) = eˣ (α - β (y - x)) - γ eʸ

    α = (w_forward + w_reverse E/A) / A    β = w_reverse / A    γ = w_forward / B

since log A - log B + RKL = -E/A: three numbers a token, after which it is elementwise and needs no collective.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import check_logits, refuse, refuse_nan, require_tensors, weights_per_token
from megatron_sead.distillation.kernels import row_kernels
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.partial_sums import (
    PartialSums,
    VocabularyShard,
    matrices,
    pair_sums,
    reduce_over,
    vocabulary_shard,
)
from megatron_sead.distillation.scratch import large_empty_like
from megatron_sead.distillation.statistics import divergences

# Shapes: [...] any leading dimensions; V columns of this rank, padding included; c real ones; n tokens; r rows


@torch.compiler.disable
def weighted_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    forward_weight: torch.Tensor | float,
    reverse_weight: torch.Tensor | float,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    reuse_student_logits: bool = False,
) -> torch.Tensor:
    """w_forward * KL(teacher || student) + w_reverse * KL(student || teacher) of every token, in nats, fp32.

    Differentiable in `student_logits`. Two collectives forward, none backward; memory beyond the inputs is the
    gradient and a few rows.

    Args:
        student_logits: [..., V/tp], this rank's contiguous columns of the vocabulary.
        teacher_logits: the same shape and type.
        forward_weight: [...], or a number for all tokens; the same on every rank of the group. A divergence of weight
            zero counts as zero.
        reverse_weight: [...], likewise.
        group: ranks over which the vocabulary is split; None: it is not.
        vocab_size: true size; columns beyond it are padding, never read, gradient zero. None: all are tokens.
        reuse_student_logits: the backward pass writes the gradient over the logits, whose values are then gone.

    Raises:
        TypeError: logits that are no tensors.
        ValueError: shapes, types or devices do not fit, vocab_size is beyond the shards, or the logits of a token
            with a weight are NaN; on every rank of the group, whichever of them is at fault.
    """
    require_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    tokens = student_logits.shape[:-1]
    try:
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        weights = weights_per_token(
            tokens, student_logits.device, forward_weight=forward_weight, reverse_weight=reverse_weight
        )
        shard = vocabulary_shard(student_logits.shape[-1], group, vocab_size)
    except ValueError as problem:
        refuse(problem, student_logits, tokens.numel(), group)
    loss: torch.Tensor = _WeightedDivergence.apply(
        student_logits, teacher_logits, *weights, shard, reuse_student_logits
    )
    return loss


class _WeightedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        forward_weight: torch.Tensor,
        reverse_weight: torch.Tensor,
        shard: VocabularyShard,
        reuse: bool,
    ) -> torch.Tensor:
        dtype = accumulation_dtype(student.dtype)
        weights = [weight.reshape(-1).to(dtype) for weight in (forward_weight, reverse_weight)]
        own = pair_sums(student, teacher, shard, needed=(weights[0] != 0) | (weights[1] != 0))
        total = reduce_over(own, shard.group)
        loss = weighted_loss(total.sums, *weights)
        refuse_nan(loss.isnan(), own.sums[:, :2], shard.group)
        ctx.save_for_backward(student, teacher, total.maxima, total.sums, *weights)
        ctx.shard, ctx.reuse = shard, reuse
        return loss.float().view(forward_weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, maxima, sums, forward_weight, reverse_weight = ctx.saved_tensors
        scale = upstream.reshape(-1).to(sums.dtype)
        total = PartialSums(maxima, sums, None)
        # detached, for an in-place write to a leaf; it shares its version counter, so autograd still notices
        gradient = student.detach() if ctx.reuse else large_empty_like(student, student.dtype)
        write_gradient(gradient, student, teacher, total, forward_weight * scale, reverse_weight * scale, ctx.shard)
        return gradient, None, None, None, None, None


def weighted_loss(sums: torch.Tensor, forward_weight: torch.Tensor, reverse_weight: torch.Tensor) -> torch.Tensor:
    """Loss [n] from sums over the whole vocabulary; an infinite divergence without weight does not count."""
    forward, reverse = divergences(sums)
    return torch.where(forward_weight == 0, 0.0, forward_weight * forward) + torch.where(
        reverse_weight == 0, 0.0, reverse_weight * reverse
    )


def write_gradient(
    out: torch.Tensor,
    student: torch.Tensor,
    teacher: torch.Tensor,
    total: PartialSums,
    forward_weight: torch.Tensor,
    reverse_weight: torch.Tensor,
    shard: VocabularyShard,
) -> None:
    """Gradient of the weighted loss with respect to the student's logits [..., V]; zero in padded columns.

    Args:
        out: [..., V]; may be `student` itself.
        total: maxima and sums over the whole vocabulary.
        forward_weight: [n], times the upstream gradient; so is reverse_weight.
    """
    coefficients = _coefficients(total, forward_weight, reverse_weight)
    for place, (result, z, w) in matrices(out, student, teacher):
        result[:, shard.real :] = 0
        if shard.real > 0:
            kernels = row_kernels(len(z), shard.real, result, z, w)
            kernels.write_gradient(result, z, w, coefficients[place], shard.real)


def _coefficients(total: PartialSums, forward_weight: torch.Tensor, reverse_weight: torch.Tensor) -> torch.Tensor:
    """[n, 5]: α, -β, -γ, and both maxima."""
    a, b, _, _, e, _ = total.sums.unbind(-1)
    # a weight of zero wins over an infinite divergence, and over sums of a token that was never read
    own = torch.where(reverse_weight == 0, 0.0, reverse_weight * (e / a))
    alpha = torch.where((forward_weight == 0) & (reverse_weight == 0), 0.0, (forward_weight + own) / a)
    minus_beta = torch.where(reverse_weight == 0, 0.0, -reverse_weight / a)
    minus_gamma = torch.where(forward_weight == 0, 0.0, -forward_weight / b)
    return torch.stack([alpha, minus_beta, minus_gamma, *total.maxima.unbind(-1)], dim=-1)
