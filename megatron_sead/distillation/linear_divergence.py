"""The loss fused with both LM heads: hidden states in, loss out, logits of a few tokens at a time.

A chunk's gradients are formed in the forward pass, while its logits exist, for an upstream gradient of one. When the
upstream turns out to be the same number for every token, as it is after a sum or a mean, the backward pass only scales
them; otherwise it forms them again with the upstream inside the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import check_heads, check_per_token
from megatron_sead.distillation.divergence import weighted_loss, write_gradient
from megatron_sead.distillation.heads import add_head_gradient, hidden_gradient, logit_chunks
from megatron_sead.distillation.partial_sums import (
    PartialSums,
    VocabularyShard,
    accumulation_dtype,
    add_sums,
    pair_sums,
    reduce_maxima,
    vocabulary_shard,
)

# Shapes: [...] any leading dimensions; n tokens; k of them with a weight; h hidden size; V columns of this rank


def linear_weighted_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    forward_weight: torch.Tensor,
    reverse_weight: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    scratch_bytes: int = 256 * 2**20,
) -> torch.Tensor:
    """`weighted_divergence` of the logits hidden @ head transposed, of which only a chunk exists at a time. fp32.

    Differentiable in `student_hidden` (the full gradient, already summed over the group) and `student_head`, whose
    gradient is summed over chunks in fp32. Tokens whose weights are both zero take part in nothing.

    Args:
        student_hidden: [..., h], replicated over the group; taken in its head's type, its gradient comes in its own.
        student_head: [V/tp, h], this rank's contiguous rows.
        teacher_hidden: [..., h of the teacher], the same tokens.
        teacher_head: [V/tp, h of the teacher].
        forward_weight: [...], the same on every rank of the group; so is reverse_weight.
        group: ranks over which the vocabulary is split; None: it is not.
        vocab_size: true size; head rows beyond it are padding, never read, gradient zero. None: all are tokens.
        scratch_bytes: memory for a chunk's logits; one token's are the least.

    Raises:
        ValueError: sizes, types or devices do not fit, or vocab_size is beyond the shards.
    """
    check_heads(student_hidden, student_head, teacher_hidden, teacher_head)
    check_per_token(
        student_hidden.shape[:-1],
        student_hidden.device,
        forward_weight=forward_weight,
        reverse_weight=reverse_weight,
    )
    if scratch_bytes < 1:
        raise ValueError(f"scratch_bytes={scratch_bytes}: must be positive")
    shard = vocabulary_shard(len(student_head), group, vocab_size)
    needs_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    loss: torch.Tensor = _LinearWeightedDivergence.apply(
        student_hidden,
        student_head,
        teacher_hidden,
        teacher_head,
        forward_weight,
        reverse_weight,
        shard,
        scratch_bytes,
        needs_gradient,
    )
    return loss


@dataclass
class _Outcome:
    loss: torch.Tensor  # [n]
    hidden: torch.Tensor | None  # [n, h] gradient, summed over the group
    head: torch.Tensor | None  # [V, h] gradient of this rank's rows


class _LinearWeightedDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: torch.Tensor,
        student_head: torch.Tensor,
        teacher_hidden: torch.Tensor,
        teacher_head: torch.Tensor,
        forward_weight: torch.Tensor,
        reverse_weight: torch.Tensor,
        shard: VocabularyShard,
        scratch_bytes: int,
        needs_gradient: bool,
    ) -> torch.Tensor:
        inputs = (student_hidden, student_head, teacher_hidden, teacher_head, forward_weight, reverse_weight)
        ctx.shard, ctx.scratch_bytes = shard, scratch_bytes
        ctx.wanted = tuple(needs_gradient and needed for needed in ctx.needs_input_grad[:2])
        ctx.save_for_backward(*inputs)
        ctx.outcome = fused_pass(inputs, shard, scratch_bytes, ctx.wanted)
        return ctx.outcome.loss.float().view(forward_weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *models, forward_weight, reverse_weight = ctx.saved_tensors
        # taken away, so that it may be scaled in place; a second backward pass forms it anew
        outcome, ctx.outcome = ctx.outcome, None
        scale = _common_scale(upstream, forward_weight, reverse_weight)
        if outcome is None or scale is None:
            scaled = (*models, forward_weight * upstream, reverse_weight * upstream)
            outcome = fused_pass(scaled, ctx.shard, ctx.scratch_bytes, ctx.wanted)
            scale = None
        gradients = []
        for gradient, of in ((outcome.hidden, models[0]), (outcome.head, models[1])):
            if gradient is not None:
                gradient = (gradient if scale is None else gradient.mul_(scale)).to(of.dtype).view(of.shape)
            gradients.append(gradient)
        return (*gradients, *[None] * 7)


def _common_scale(
    upstream: torch.Tensor, forward_weight: torch.Tensor, reverse_weight: torch.Tensor
) -> torch.Tensor | None:
    """The one number that the upstream gradient is for every token with a weight; None: it differs."""
    if all(stride == 0 for stride in upstream.stride()):  # expanded by sum() or mean(), or a single token
        return upstream.flatten()[0] if upstream.numel() else None
    active = upstream[(forward_weight != 0) | (reverse_weight != 0)]
    if len(active) == 0 or not bool((active == active[0]).all()):
        return None
    return active[0]


def fused_pass(
    inputs: tuple[torch.Tensor, ...],
    shard: VocabularyShard,
    scratch_bytes: int,
    wanted: tuple[bool, ...],
) -> _Outcome:
    """Loss of all tokens, and the gradients of its sum with respect to the student's hidden states and head.

    Args:
        inputs: the six tensors of `linear_weighted_divergence`.
        wanted: which of the two gradients.

    Collectives: two in all without gradients; with them two a chunk, since a chunk's gradient needs the whole
    vocabulary's sums while its logits exist, and one over the hidden states' gradient.
    """
    student_hidden, student_head, teacher_hidden, teacher_head, forward_weight, reverse_weight = inputs
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    dtype = accumulation_dtype(torch.promote_types(student_head.dtype, teacher_head.dtype))
    weights = torch.stack([forward_weight.reshape(-1), reverse_weight.reshape(-1)]).to(dtype)
    rows = weights.any(0).nonzero().squeeze(1)
    weights = weights[:, rows]
    outcome = _Outcome(
        hidden.new_zeros(len(hidden), dtype=dtype),
        hidden.new_zeros(hidden.shape, dtype=dtype) if wanted[0] else None,
        student_head.new_zeros(student_head.shape, dtype=dtype) if wanted[1] else None,
    )
    if len(rows) == 0:
        return outcome
    total = PartialSums.empty(len(rows), dtype, hidden.device, with_columns=False)
    for place, states, student, teacher in logit_chunks(
        hidden,
        student_head,
        teacher_hidden.reshape(-1, teacher_hidden.shape[-1]),
        teacher_head,
        rows,
        shard.real,
        scratch_bytes,
    ):
        part = pair_sums(student, teacher, shard)
        if any(wanted):
            part = add_sums(reduce_maxima(part, shard.group), shard.group)
            write_gradient(student, student, teacher, part, weights[0, place], weights[1, place], shard)
            if outcome.hidden is not None:
                outcome.hidden[rows[place]] = hidden_gradient(student, student_head[: shard.real])
            if outcome.head is not None:
                add_head_gradient(outcome.head[: shard.real], student, states)
        total.store(place, part)
    if not any(wanted):
        total = add_sums(reduce_maxima(total, shard.group), shard.group)
    outcome.loss[rows] = weighted_loss(total.sums, *weights)
    if outcome.hidden is not None and shard.group is not None:
        dist.all_reduce(outcome.hidden, group=shard.group)
    return outcome
