"""The generalized Jensen-Shannon divergence of GKD (Agarwal et al. 2024, arXiv 2306.13649, section 2).

With p, q student and teacher, m = β q + (1 - β) p, and d = log q - log p,

    JSD = β KL(q || m) + (1 - β) KL(p || m) = -Σ (1 - β) p u + β q v

    u = log m/p = log1p(β (eᵈ - 1))      v = log m/q = log1p((1 - β) (e⁻ᵈ - 1))

    ∂JSD/∂z = -(1 - β) p (u - Σ p u)

log1p keeps the digits of u and v for a β near its ends and for models that nearly agree.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sead.distillation.baselines.normalizers import (
    gather_ranks,
    join_normalizers,
    own_normalizer,
    token_blocks,
)
from megatron_sead.distillation.checks import agree, check_logits, refuse_nan_loss, refused_together, require_tensors
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.partial_sums import VocabularyShard, vocabulary_shard

# Shapes: [...] any leading dimensions; V columns of this rank, padding included; c real ones; n tokens; r rows

LOG_2 = math.log(2)
LARGEST_LOG_RATIO = (
    80.0  # beyond it eᵈ may overflow, and the probability that it meets is below e⁻⁸⁰: no part of the sum
)


def generalized_jsd(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    beta: float,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """JSD(β) of teacher and student of every token [...], in nats, fp32; from 0 to H(β), the entropy of a coin.

    β is no schedule between the two KLs: JSD(β) is β KL(teacher || student) near β = 0 and
    (1 - β) KL(student || teacher) near β = 1, so it vanishes at both ends together with its gradient, and the ends are
    refused. To go from one KL to the other, mix them with `weighted_divergence`.

    Differentiable in `student_logits`. Three collectives forward, none backward.

    Args:
        student_logits: [..., V/tp], this rank's contiguous columns of the vocabulary.
        teacher_logits: the same shape and type.
        beta: the teacher's share of the mixture, between 0 and 1, neither included.
        group: ranks over which the vocabulary is split; None: it is not.
        vocab_size: true size; columns beyond it are padding, never read, gradient zero. None: all are tokens.

    Raises:
        ValueError: shapes, types or devices do not fit, beta is out of range, vocab_size is beyond the shards, or
            logits are NaN; on every rank of the group.
    """
    require_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    with refused_together(group, student_logits.device):
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        shard = vocabulary_shard(student_logits.shape[-1], group, vocab_size)
        if not 0 < beta < 1:
            raise ValueError(
                f"beta={beta}: must be between 0 and 1, where JSD is zero whatever the models; "
                "for forward or reverse KL take weighted_divergence"
            )
    agree(group, student_logits.device, tokens=student_logits.shape[:-1].numel())
    loss: torch.Tensor = _GeneralizedJSD.apply(student_logits, teacher_logits, beta, shard)
    refuse_nan_loss(loss, shard.real, group, student_logits=student_logits, teacher_logits=teacher_logits)
    return loss


class _GeneralizedJSD(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: torch.Tensor, teacher: torch.Tensor, beta: float, shard: VocabularyShard
    ) -> torch.Tensor:
        rows = [logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher)]
        tokens, dtype = len(rows[0]), accumulation_dtype(student.dtype)
        own = torch.empty(tokens, 4, dtype=dtype, device=student.device)
        for place in token_blocks(rows[0], shard.real):
            for model in (0, 1):
                own[place, 2 * model : 2 * model + 2] = own_normalizer(rows[model][place, : shard.real].to(dtype))
        parts = gather_ranks(own, shard.group)
        normalizers = torch.cat([*join_normalizers(parts[..., :2]), *join_normalizers(parts[..., 2:])], dim=-1)
        sums = torch.empty(tokens, 2, dtype=dtype, device=student.device)
        for place in token_blocks(rows[0], shard.real):
            p, q, d = _probabilities(rows[0][place], rows[1][place], normalizers[place], shard)
            pu = p * _log_mixture_ratio(d, beta, 1 - beta)
            qv = q * _log_mixture_ratio(-d, 1 - beta, beta)
            # the two terms of a token nearly cancel: add them before the sum over the vocabulary
            sums[place] = torch.stack([pu.sum(-1), pu.mul_(1 - beta).add_(qv, alpha=beta).sum(-1)], dim=-1)
        if shard.group is not None:
            dist.all_reduce(sums, group=shard.group)
        ctx.save_for_backward(student, teacher, normalizers, sums[:, :1])
        ctx.beta, ctx.shard = beta, shard
        return (-sums[:, 1]).clamp(min=0).float().view(student.shape[:-1])  # below zero only by rounding

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, teacher, normalizers, mean_u = ctx.saved_tensors
        shard: VocabularyShard = ctx.shard
        scale = (ctx.beta - 1) * upstream.reshape(-1, 1).to(normalizers.dtype)
        gradient = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
        rows = [tensor.reshape(-1, student.shape[-1]) for tensor in (student, teacher, gradient)]
        for place in token_blocks(rows[0], shard.real):
            z, w, out = (tensor[place] for tensor in rows)
            p, _, d = _probabilities(z, w, normalizers[place], shard)
            out[:, : shard.real] = scale[place] * p * (_log_mixture_ratio(d, ctx.beta, 1 - ctx.beta) - mean_u[place])
        return gradient, None, None, None


def _probabilities(
    student: torch.Tensor, teacher: torch.Tensor, normalizers: torch.Tensor, shard: VocabularyShard
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """p, q and d = log q - log p, each [r, c], of logits [r, V] and their normalizers [r, 4]."""
    maximum_z, log_sum_z, maximum_w, log_sum_w = normalizers.unsqueeze(-1).unbind(1)
    log_p = student[:, : shard.real].to(normalizers.dtype) - maximum_z - log_sum_z
    log_q = teacher[:, : shard.real].to(normalizers.dtype) - maximum_w - log_sum_w
    d = (log_q - log_p).nan_to_num_(nan=0.0)  # a token that both models mask
    return log_p.exp_(), log_q.exp_(), d.clamp_(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)


def _log_mixture_ratio(d: torch.Tensor, share: float, rest: float) -> torch.Tensor:
    """log(rest + share eᵈ), share + rest = 1."""
    ratio = d.expm1().mul_(share).log1p_()
    if share > 0.5:
        # log1p loses the digits of `rest` where eᵈ is small; the sum of two positive numbers does not
        ratio = torch.where(d < -LOG_2, d.exp().mul_(share).add_(rest).log_(), ratio)
    return ratio
