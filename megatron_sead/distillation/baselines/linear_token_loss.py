"""Any loss of logits, straight from hidden states: logits and their gradient exist for a chunk of tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import choose
from megatron_sead.distillation.heads import add_head_gradient, gradient_of, hidden_gradient, logit_chunks
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.linear_divergence import LinearOutcome, LinearSetting, linear_loss
from megatron_sead.distillation.policy_interface import LossInput, TokenLoss

# Shapes: n tokens; k of them with a weight; r of a chunk; h hidden size; V columns of this rank, c of them real


def linear_token_loss(
    token_loss: TokenLoss,
    models: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    weights: tuple[torch.Tensor, torch.Tensor],
    targets: torch.Tensor,
    old_log_probs: torch.Tensor,
    *,
    group: ProcessGroup | None,
    vocab_size: int | None,
    scratch_bytes: int | None,
    sequence_parallel: bool,
) -> torch.Tensor:
    """The loss [n] of every token, zero where both weights are; fp32, differentiable as `linear_weighted_divergence`.

    Args:
        token_loss: of a chunk's tokens, with their weights in it; may be collective over the group.
        models: the student's hidden states [n, h] and head [V, h], then the teacher's.
        weights: forward and reverse, [n] each.
        targets: [n] the sampled tokens.
        old_log_probs: [n] of the targets when they were sampled, in nats.
        group: and what follows, errors included, as in `linear_weighted_divergence`.
    """

    def make(inputs: Sequence[torch.Tensor], setting: LinearSetting, wanted: tuple[bool, ...]) -> LinearOutcome:
        def of_chunk(tokens: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
            forward, reverse = (weight.reshape(-1)[tokens] for weight in inputs[4:])
            sampled = targets[tokens], old_log_probs[tokens]
            return token_loss(LossInput(student, teacher, forward, reverse, *sampled, group, vocab_size))

        return _pass(inputs, setting, wanted, of_chunk)

    return linear_loss(
        make,
        models,
        weights,
        group=group,
        vocab_size=vocab_size,
        scratch_bytes=scratch_bytes,
        sequence_parallel=sequence_parallel,
    )


def _pass(
    inputs: Sequence[torch.Tensor],
    setting: LinearSetting,
    wanted: tuple[bool, ...],
    of_chunk: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
) -> LinearOutcome:
    student_hidden, student_head, teacher_hidden, teacher_head, forward_weight, reverse_weight = inputs
    group, real = setting.shard.group, setting.shard.real
    hidden = student_hidden.reshape(-1, student_hidden.shape[-1])
    dtype = accumulation_dtype(torch.promote_types(student_head.dtype, teacher_head.dtype))
    chosen = choose(((forward_weight != 0) | (reverse_weight != 0)).reshape(-1), group, parts=setting.parts)
    outcome = LinearOutcome(
        hidden.new_zeros(forward_weight.numel(), dtype=dtype),
        hidden.new_zeros(hidden.shape, dtype=dtype) if wanted[0] else None,
        student_head.new_zeros(student_head.shape, dtype=dtype) if wanted[1] else None,
    )
    for chunk, states, student, teacher in logit_chunks(
        (hidden, student_head),
        (teacher_hidden.reshape(-1, teacher_hidden.shape[-1]), teacher_head),
        chosen,
        real,
        scratch_bytes=setting.scratch_bytes,
        buffers=1,
        sequence_group=setting.sequence_group,
    ):
        with torch.enable_grad():
            logits = _whole_width(student, len(student_head)).requires_grad_(any(wanted))
            loss = of_chunk(chunk.tokens, logits, _whole_width(teacher, len(teacher_head)))
        outcome.loss[chunk.tokens] = loss.detach().to(dtype)
        if any(wanted):
            (of_logits,) = torch.autograd.grad(loss, logits, torch.ones_like(loss))
            true = of_logits[:, :real].contiguous()
            written = gradient_of(true, student_head)
            if written is not true:
                written[:, :real], written[:, real:] = true, 0
        if outcome.hidden is not None:
            of_hidden = hidden_gradient(written[:, :real], student_head[:real], dtype)
            chunk.start_return(of_hidden, outcome.hidden, group)()
        if outcome.head is not None:
            add_head_gradient(outcome.head[: written.shape[1]], written, states, first=False)
    return outcome


def _whole_width(logits: torch.Tensor, width: int) -> torch.Tensor:
    """[r, V] of [r, c]: the losses find their rank's place by the width of its shard, and do not read padding."""
    whole = logits.new_zeros(len(logits), width)
    whole[:, : logits.shape[1]] = logits
    return whole
