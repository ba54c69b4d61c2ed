"""The loss fused with both LM heads: hidden states in, loss out, logits of a few tokens at a time.

A chunk's gradients are formed in the forward pass, while its logits exist, for an upstream gradient of one. When the
upstream turns out to be the same number for every token, as it is after a sum or a mean, the backward pass only scales
them; otherwise it forms them again with the upstream inside the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import (
    check_heads,
    choose,
    refuse_nan,
    refused_together,
    require_tensors,
    weights_per_token,
    whole_shape,
)
from megatron_sead.distillation.chunks import Chunk
from megatron_sead.distillation.divergence import weighted_loss, write_gradient
from megatron_sead.distillation.heads import (
    add_head_gradient,
    gradient_of,
    hidden_gradient,
    logit_chunks,
)
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.partial_sums import (
    PartialSums,
    VocabularyShard,
    pair_sums,
    reduce_over,
    start_maxima,
    start_sums,
    vocabulary_shard,
)
from megatron_sead.distillation.scratch import large_empty_like

# Shapes: [...] any leading dimensions; n tokens; k of them with a weight; r of a chunk; h hidden size; V columns of
# this rank


@torch.compiler.disable
def linear_weighted_divergence(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    forward_weight: torch.Tensor | float,
    reverse_weight: torch.Tensor | float,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    scratch_bytes: int | None = None,
    sequence_parallel: bool = False,
) -> torch.Tensor:
    """`weighted_divergence` of the logits hidden @ head transposed, of which only a chunk exists at a time. fp32.

    Differentiable in `student_hidden` (the full gradient, already summed over the group) and `student_head`, whose
    gradient is summed over chunks in fp32 and, where Megatron gave the parameter a `main_grad`, added to that in fp32.
    Tokens whose weights are both zero take part in nothing.

    Args:
        student_hidden: [..., h], replicated over the group; taken in its head's type, its gradient comes in its own.
        student_head: [V/tp, h], this rank's contiguous rows.
        teacher_hidden: [..., h of the teacher], the same tokens.
        teacher_head: [V/tp, h of the teacher].
        forward_weight: [...], or a number for all tokens; the same on every rank of the group. So is reverse_weight.
        group: ranks over which the vocabulary is split; None: it is not.
        vocab_size: true size; head rows beyond it are padding, never read, gradient zero. None: all are tokens.
        scratch_bytes: memory for a chunk's logits, whatever the number of tokens; one token's are the least. None: as
            much as 512 tokens need.
        sequence_parallel: both hidden states hold this rank's part [s/tp, ..., h] of the first dimension, in rank
            order, and so does the gradient; weights and loss are whole, [s, ...].

    Raises:
        TypeError: hidden states or heads that are no tensors.
        ValueError: sizes, types or devices do not fit, vocab_size is beyond the shards, ranks have other weights, or
            the logits of a token with a weight are NaN; on every rank of the group, whichever of them is at fault.
    """
    return linear_loss(
        fused_pass,
        (student_hidden, student_head, teacher_hidden, teacher_head),
        (forward_weight, reverse_weight),
        group=group,
        vocab_size=vocab_size,
        scratch_bytes=scratch_bytes,
        sequence_parallel=sequence_parallel,
    )


def linear_loss(
    make: Make,
    models: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    both_weights: tuple[torch.Tensor | float, torch.Tensor | float],
    *,
    group: ProcessGroup | None,
    vocab_size: int | None,
    scratch_bytes: int | None,
    sequence_parallel: bool,
) -> torch.Tensor:
    """What `make` computes, differentiable; arguments, errors and result as in `linear_weighted_divergence`."""
    student_hidden, student_head, teacher_hidden, teacher_head = models
    require_tensors(
        student_hidden=student_hidden,
        student_head=student_head,
        teacher_hidden=teacher_hidden,
        teacher_head=teacher_head,
    )
    with refused_together(group, student_hidden.device):
        check_heads(student_hidden, student_head, teacher_hidden, teacher_head)
        shard = vocabulary_shard(len(student_head), group, vocab_size)
        sequence_group = shard.group if sequence_parallel else None
        device, shape = student_hidden.device, whole_shape(student_hidden, sequence_group)
        weights = weights_per_token(shape, device, forward_weight=both_weights[0], reverse_weight=both_weights[1])
        if scratch_bytes is not None and scratch_bytes < 1:
            raise ValueError(f"scratch_bytes={scratch_bytes}: must be positive")
    needs_gradient = torch.is_grad_enabled() and (student_hidden.requires_grad or student_head.requires_grad)
    setting = LinearSetting(shard, sequence_group, scratch_bytes, needs_gradient, make)
    loss: torch.Tensor = _LinearLoss.apply(*models, *weights, setting)
    return loss


@dataclass(frozen=True)
class LinearSetting:
    """Of one call."""

    shard: VocabularyShard
    sequence_group: ProcessGroup | None  # ranks over which the hidden states' tokens are split
    scratch_bytes: int | None
    needs_gradient: bool
    make: Make

    @property
    def parts(self) -> int:
        """Into which the sequence is split."""
        return 1 if self.sequence_group is None else self.sequence_group.size()


@dataclass
class LinearOutcome:
    """Of one call: its loss, and the gradients of the loss's sum that are wanted."""

    loss: torch.Tensor  # [n]
    hidden: torch.Tensor | None  # [n or n/tp, h] gradient, summed over the group
    head: torch.Tensor | None  # [V, h] gradient of this rank's rows

    def scale(self, upstream: torch.Tensor) -> None:
        """Gradients of an upstream gradient of one, made those of another."""
        if upstream.device.type == "cpu" and upstream == 1:  # on a GPU, asking would wait for it
            return
        for gradient in (self.hidden, self.head):
            if gradient is not None:
                gradient.mul_(upstream)


# Six tensors as of `fused_pass`, the setting, and which gradients are wanted
Make = Callable[[Sequence[torch.Tensor], LinearSetting, tuple[bool, ...]], LinearOutcome]


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> torch.Tensor:
        *inputs, setting = arguments
        ctx.setting = setting
        ctx.wanted = tuple(setting.needs_gradient and needed for needed in ctx.needs_input_grad[:2])
        ctx.head = inputs[1]  # itself, for the attributes that Megatron gave the parameter
        ctx.save_for_backward(*inputs)
        ctx.outcome = setting.make(inputs, setting, ctx.wanted)
        return ctx.outcome.loss.float().view(inputs[4].shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *models, forward_weight, reverse_weight = ctx.saved_tensors
        # taken away, so that it may be scaled in place; a second backward pass forms it anew
        outcome, ctx.outcome = ctx.outcome, None
        scale = _common_scale(upstream, forward_weight, reverse_weight)
        if outcome is None or scale is None:
            scaled = (*models, forward_weight * upstream, reverse_weight * upstream)
            outcome = ctx.setting.make(scaled, ctx.setting, ctx.wanted)
        else:
            outcome.scale(scale)
        hidden = None if outcome.hidden is None else outcome.hidden.to(models[0].dtype).view(models[0].shape)
        head = None if outcome.head is None else _hand_over(outcome.head, ctx.head)
        return hidden, head, *[None] * 5


def _hand_over(gradient: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """Give the head's gradient to autograd, or add it to Megatron's `main_grad` in fp32.

    In the second case Megatron's DistributedDataParallel expects a gradient from autograd, as from its own linear
    layers: it ignores it, or adds it too where the weight is tied to the embedding's.
    """
    main_grad = getattr(head, "main_grad", None)
    if main_grad is None or not hasattr(head, "grad_added_to_main_grad"):
        return gradient.to(head.dtype)
    main_grad.add_(gradient)
    head.grad_added_to_main_grad = True
    return torch.zeros_like(head) if getattr(head, "zero_out_wgrad", False) else torch.empty_like(head)


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


@dataclass
class _InFlight:
    """A chunk whose sums are being reduced over the ranks while the next chunk's logits are computed."""

    chunk: Chunk
    states: torch.Tensor  # [r, h] the student's
    student: torch.Tensor  # [r, c] logits; so is teacher
    teacher: torch.Tensor
    sums: Callable[[], PartialSums]


def fused_pass(inputs: Sequence[torch.Tensor], setting: LinearSetting, wanted: tuple[bool, ...]) -> LinearOutcome:
    """Loss of all tokens, and the gradients of its sum with respect to the student's hidden states and head.

    Args:
        inputs: the six tensors of `linear_weighted_divergence`.
        wanted: which of the two gradients.

    Collectives: a small one first. Without gradients two more in all. With them three a chunk, since a chunk's
    gradient needs the whole vocabulary's sums while its logits exist: maxima and sums, which travel while the next
    chunk is computed, and the hidden states' gradient. Under sequence parallelism two gathers a chunk besides.
    """
    student_hidden, student_head, teacher_hidden, teacher_head, forward_weight, reverse_weight = inputs
    shard, group = setting.shard, setting.shard.group
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    dtype = accumulation_dtype(torch.promote_types(student_head.dtype, teacher_head.dtype))
    weights = torch.stack([forward_weight.reshape(-1), reverse_weight.reshape(-1)]).to(dtype)
    chosen = choose(weights.any(0), group, parts=setting.parts)
    outcome = LinearOutcome(
        weights.new_zeros(weights.shape[1]),
        hidden.new_zeros(hidden.shape, dtype=dtype) if wanted[0] else None,
        large_empty_like(student_head, dtype) if wanted[1] else None,
    )
    backward = _ChunkBackward(student_head, weights, shard, outcome)
    own = PartialSums.empty(len(weights[0]), dtype, hidden.device, with_columns=False)
    total = PartialSums.empty(len(weights[0]), dtype, hidden.device, with_columns=False)
    overlaps = any(wanted) and _overlaps(group, hidden.device)
    chunks = logit_chunks(
        (hidden, student_head),
        (teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_head),
        chosen,
        shard.real,
        scratch_bytes=setting.scratch_bytes,
        buffers=2 if overlaps else 1,
        sequence_group=setting.sequence_group,
    )
    flying: list[_InFlight] = []
    for chunk, states, student, teacher in chunks:
        part = pair_sums(student, teacher, shard)
        own.store(chunk.tokens, part)
        if any(wanted):
            maxima = start_maxima(part, group)
            if flying:
                backward(flying.pop(), total)
            flying.append(_InFlight(chunk, states, student, teacher, start_sums(maxima(), group)))
            if not overlaps:
                backward(flying.pop(), total)
    for last in flying:
        backward(last, total)
    backward.finish()
    if not any(wanted):
        total = reduce_over(own, group)
    tokens = chosen.tokens
    outcome.loss[tokens] = weighted_loss(total.sums[tokens], *weights[:, tokens])
    refuse_nan(outcome.loss.isnan(), own.sums[:, :2], group)
    return outcome


def _overlaps(group: ProcessGroup | None, device: torch.device) -> bool:
    """May a chunk's sums travel while the next is computed? Chunks are then half as large, so only on GPUs."""
    return group is not None and device.type == "cuda"


class _ChunkBackward:
    """A chunk's gradients, into the outcome."""

    def __init__(
        self, head: torch.Tensor, weights: torch.Tensor, shard: VocabularyShard, outcome: LinearOutcome
    ) -> None:
        self._head, self._weights, self._shard, self._outcome = head, weights, shard, outcome
        self._first = True
        self._returning: Callable[[], None] = lambda: None  # the last chunk's hidden gradient, on its way

    def __call__(self, flying: _InFlight, total: PartialSums) -> None:
        chunk, real, outcome = flying.chunk, self._shard.real, self._outcome
        sums = flying.sums()
        total.store(chunk.tokens, sums)
        written = gradient_of(flying.student, self._head)
        gradient = written[:, :real]
        forward, reverse = self._weights[:, chunk.tokens]
        write_gradient(gradient, flying.student, flying.teacher, sums, forward, reverse, self._shard)
        if outcome.hidden is not None:
            of_hidden = hidden_gradient(gradient, self._head[:real], flying.student.dtype)
            self._returning()
            self._returning = chunk.start_return(of_hidden, outcome.hidden, self._shard.group)
        if outcome.head is not None:
            add_head_gradient(outcome.head[: written.shape[1]], written, flying.states, first=self._first)
            self._first = False

    def finish(self) -> None:
        """Wait for what is on its way, and clear what no chunk wrote."""
        self._returning()
        if self._outcome.head is not None:
            self._outcome.head[0 if self._first else self._shard.real :] = 0
