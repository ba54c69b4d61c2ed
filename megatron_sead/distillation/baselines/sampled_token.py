"""On-policy distillation from the sampled token alone: the paper's "RKL k=1".

With p, q student and teacher, y the sampled token and p_old its probability when it was sampled,

    A = log q_y - log p_y (a constant)      ρ = p_y / p_old      loss = -min(ρ A, clip(ρ, 1 - ε, 1 + ε) A)

    ∂loss/∂z_v = -ρ A (1[v = y] - p_v), or zero where the clipped term is the smaller one

While nothing is clipped, its gradient is that of the exact reverse KL in the mean over samples; of one sample it is
mostly noise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sead.distillation.baselines.normalizers import (
    gather_ranks,
    join_normalizers,
    own_normalizer,
    token_blocks,
    vocabulary_total,
)
from megatron_sead.distillation.checks import (
    agree,
    check_logits,
    check_per_token,
    refuse_nan_loss,
    refused_together,
    require_tensors,
)
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.partial_sums import VocabularyShard, vocabulary_shard

# Shapes: [...] any leading dimensions; V columns of this rank, padding included; c real ones; n tokens; r rows


def sampled_token_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    targets: torch.Tensor,
    old_log_probs: torch.Tensor,
    *,
    clip: float = 0.2,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Clipped policy-gradient loss of every sampled token [...], fp32; its value is not a divergence.

    The advantage is of the student as it is now, not as it was when it sampled, so that ρ A stays an unbiased
    estimate after the student has moved. Differentiable in `student_logits`. Two collectives forward, none backward.

    Args:
        student_logits: [..., V/tp], this rank's contiguous columns of the vocabulary.
        teacher_logits: the same shape and type.
        targets: [...] token ids, integers, the same on every rank of the group.
        old_log_probs: [...] log p_old, in nats, at the temperature of the logits.
        clip: ε. The paper's run has 0.2.
        group: ranks over which the vocabulary is split; None: it is not.
        vocab_size: true size; columns beyond it are padding, never read, gradient zero. None: all are tokens.

    Raises:
        ValueError: shapes, types or devices do not fit, a target is not in the vocabulary, clip is not between 0
            and 1, vocab_size is beyond the shards, or logits are NaN; on every rank of the group.
    """
    require_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    with refused_together(group, student_logits.device):
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        shape, device, width = student_logits.shape[:-1], student_logits.device, student_logits.shape[-1]
        check_per_token(shape, device, targets=targets, old_log_probs=old_log_probs)
        shard = vocabulary_shard(width, group, vocab_size)
        _check_targets(targets, vocabulary_total(width, group, vocab_size))
        if not 0 < clip < 1:
            raise ValueError(f"clip={clip}: must be between 0 and 1")
    agree(group, student_logits.device, tokens=student_logits.shape[:-1].numel())
    loss: torch.Tensor = _SampledToken.apply(student_logits, teacher_logits, targets, old_log_probs, clip, shard)
    refuse_nan_loss(loss, shard.real, group, student_logits=student_logits, teacher_logits=teacher_logits)
    return loss


class _SampledToken(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        targets: torch.Tensor,
        old: torch.Tensor,
        clip: float,
        shard: VocabularyShard,
    ) -> torch.Tensor:
        columns = targets.reshape(-1, 1).long() - shard.first
        own = torch.cat([_own_part(student, columns, shard), _own_part(teacher, columns, shard)], dim=-1)
        parts = gather_ranks(own, shard.group)
        log_p, maximum, log_sum = _log_prob(parts[..., :3])
        log_q, _, _ = _log_prob(parts[..., 3:])
        advantage = log_q - log_p
        ratio = (log_p - old.reshape(-1, 1).to(own.dtype)).exp()
        free, clipped = ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage
        slope = torch.where(free > clipped, 0.0, -free)  # of the loss in log p_y
        ctx.save_for_backward(student, columns, maximum, log_sum, slope)
        ctx.shard = shard
        return -torch.minimum(free, clipped).float().view(targets.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, columns, maximum, log_sum, slope = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        slope = slope * upstream.reshape(-1, 1).to(slope.dtype)
        gradient = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
        rows, out = student.reshape(-1, student.shape[-1]), gradient.view(-1, student.shape[-1])
        tokens = torch.arange(shard.real, device=student.device)
        for place in token_blocks(rows, shard.real):
            x = rows[place, : shard.real].to(slope.dtype)
            probability = (x - maximum[place] - log_sum[place]).exp_()
            out[place, : shard.real] = slope[place] * ((tokens == columns[place]).to(slope.dtype) - probability)
        return gradient, None, None, None, None, None


def _own_part(logits: torch.Tensor, columns: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """[n, 3] maximum and sum of this rank's columns, and the target's logit where it is among them, else 0."""
    rows = logits.reshape(-1, logits.shape[-1])
    own = torch.zeros(len(rows), 3, dtype=accumulation_dtype(logits.dtype), device=logits.device)
    for place in token_blocks(rows, shard.real):
        x = rows[place, : shard.real].to(own.dtype)
        own[place, :2] = own_normalizer(x)
        if shard.real > 0:
            column = columns[place]
            mine = (column >= 0) & (column < shard.real)
            own[place, 2:] = torch.where(mine, x.gather(1, column.clamp(0, shard.real - 1)), 0.0)
    return own


def _log_prob(parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of the target, and the normalizer, each [n, 1], from all ranks' [tp, n, 3]."""
    maximum, log_sum = join_normalizers(parts[..., :2])
    return parts[..., 2:].sum(0) - maximum - log_sum, maximum, log_sum


def _check_targets(targets: torch.Tensor, total: int) -> None:
    if targets.is_floating_point():
        raise ValueError(f"targets are {targets.dtype}: must be token ids, integers")
    if targets.numel() > 0:
        outside = [int(token) for token in targets.aminmax() if not 0 <= token < total]
        if outside:
            raise ValueError(f"token {outside[0]} among targets: must be from 0 to {total - 1}")
