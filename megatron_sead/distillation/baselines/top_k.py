"""Divergences and entropy over the teacher's top-k: what systems that ship k log-probabilities a token compute.

Over the buckets i of `top_k_support`, with p, q student and teacher,

    FKL = Σ q (log q - log p)      RKL = Σ p (log p - log q)

    G_i = w_forward (p_i - q_i) + w_reverse p_i (log p_i - log q_i - RKL)

G is the gradient with respect to a top-k token's logit; every other token v has its share of the last bucket's,
G_rest p_v / p_rest. Merging tokens loses information, so the divergences over k + 1 buckets are at most the exact
ones, and never negative. Renormalized over k, they bound nothing, and the other tokens get no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_sead.distillation.baselines.normalizers import token_blocks, vocabulary_total
from megatron_sead.distillation.baselines.top_k_support import Tail, check_top_k, top_k_buckets
from megatron_sead.distillation.checks import (
    agree,
    check_logits,
    refuse_nan_loss,
    refused_together,
    require_tensors,
    weights_per_token,
)
from megatron_sead.distillation.partial_sums import VocabularyShard, vocabulary_shard

# Shapes: [...] any leading dimensions; V columns of this rank, padding included; c real ones; n tokens; b buckets


def top_k_divergence(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    forward_weight: torch.Tensor | float,
    reverse_weight: torch.Tensor | float,
    *,
    k: int,
    tail: Tail = "bucket",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """w_forward * FKL + w_reverse * RKL of every token over the teacher's top-k [...], in nats, fp32.

    Differentiable in `student_logits`. Two collectives forward, one of 2 (k + 2) numbers a token; none backward.

    Args:
        student_logits: [..., V/tp], this rank's contiguous columns of the vocabulary.
        teacher_logits: the same shape and type.
        forward_weight: [...], or a number for all tokens; the same on every rank of the group. A divergence of weight
            zero counts as zero.
        reverse_weight: [...], likewise.
        k: tokens of the whole vocabulary, not of a shard; of equal teacher logits the lowest token is taken first.
        tail: "bucket": all other tokens are one more bucket; "renormalize": both models are renormalized over the k.
        group: ranks over which the vocabulary is split; None: it is not.
        vocab_size: true size; columns beyond it are padding, never read, gradient zero. None: all are tokens.

    Raises:
        ValueError: shapes, types or devices do not fit, k is not from 1 to the size of the vocabulary, the tail is
            neither, vocab_size is beyond the shards, or logits are NaN; on every rank of the group.
    """
    require_tensors(student_logits=student_logits, teacher_logits=teacher_logits)
    with refused_together(group, student_logits.device):
        check_logits(student_logits=student_logits, teacher_logits=teacher_logits)
        shape, device, width = student_logits.shape[:-1], student_logits.device, student_logits.shape[-1]
        weights = weights_per_token(shape, device, forward_weight=forward_weight, reverse_weight=reverse_weight)
        shard = vocabulary_shard(width, group, vocab_size)
        check_top_k(k, tail, vocabulary_total(width, group, vocab_size))
    agree(group, student_logits.device, tokens=student_logits.shape[:-1].numel())
    loss: torch.Tensor = _TopKDivergence.apply(student_logits, teacher_logits, *weights, k, tail, shard)
    refuse_nan_loss(loss, shard.real, group, student_logits=student_logits, teacher_logits=teacher_logits)
    return loss


@torch.no_grad()
def top_k_entropy(
    logits: torch.Tensor,
    *,
    k: int,
    tail: Tail = "bucket",
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> torch.Tensor:
    """Entropy [...] in nats, fp32, of a model's own top-k, as the paper approximates H_t. No gradient.

    With the tail as a bucket it is at most the exact entropy; renormalized it bounds nothing. Two collectives.
    Arguments and errors as in `top_k_divergence`.
    """
    require_tensors(logits=logits)
    with refused_together(group, logits.device):
        check_logits(logits=logits)
        width = logits.shape[-1]
        shard = vocabulary_shard(width, group, vocab_size)
        check_top_k(k, tail, vocabulary_total(width, group, vocab_size))
    agree(group, logits.device, tokens=logits.shape[:-1].numel())
    found = top_k_buckets([logits.reshape(-1, width)], k, tail, shard)
    log_q = found.buckets[0].log_softmax(-1)
    entropy = -_expectation(log_q.exp(), log_q).float().view(logits.shape[:-1])
    refuse_nan_loss(entropy, shard.real, group, logits=logits)
    return entropy


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor,
        forward_weight: torch.Tensor,
        reverse_weight: torch.Tensor,
        k: int,
        tail: Tail,
        shard: VocabularyShard,
    ) -> torch.Tensor:
        found = top_k_buckets([logits.reshape(-1, logits.shape[-1]) for logits in (teacher, student)], k, tail, shard)
        log_q, log_p = (buckets.log_softmax(-1) for buckets in found.buckets)
        p, q, log_ratio = log_p.exp(), log_q.exp(), log_p - log_q
        # below zero only by rounding; the gradient does not come from here
        forward, reverse = -_expectation(q, log_ratio).clamp(max=0), _expectation(p, log_ratio).clamp(min=0)
        weights = [weight.reshape(-1).to(p.dtype) for weight in (forward_weight, reverse_weight)]
        slopes = _bucket_gradient(p, q, log_ratio, reverse, *weights)
        rest = found.rests[1] if tail == "bucket" else ()
        ctx.save_for_backward(student, found.columns, slopes, *rest)
        ctx.shard = shard
        loss = _weigh(weights[0], forward) + _weigh(weights[1], reverse)
        return loss.float().view(forward_weight.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        student, columns, slopes, *rest = ctx.saved_tensors
        real, k = ctx.shard.real, columns.shape[1]
        slopes = slopes * upstream.reshape(-1, 1).to(slopes.dtype)
        gradient = torch.zeros(student.shape, dtype=student.dtype, device=student.device)
        rows, out = student.reshape(-1, student.shape[-1]), gradient.view(-1, student.shape[-1])
        for place in token_blocks(rows, real):
            # its last column takes what belongs to other ranks
            block = slopes.new_zeros(place.stop - place.start, real + 1)
            if rest:
                x = rows[place, :real].to(slopes.dtype)
                block[:, :real] = _weigh(slopes[place, k:], _share_of_rest(x, *(value[place] for value in rest)))
            block.scatter_(1, columns[place], slopes[place, :k])
            out[place, :real] = block[:, :real]
        return gradient, None, None, None, None, None, None


def _bucket_gradient(
    p: torch.Tensor,
    q: torch.Tensor,
    log_ratio: torch.Tensor,
    reverse: torch.Tensor,
    forward_weight: torch.Tensor,
    reverse_weight: torch.Tensor,
) -> torch.Tensor:
    """G [n, b]."""
    w_forward, w_reverse = forward_weight.unsqueeze(-1), reverse_weight.unsqueeze(-1)
    own = _weigh(p, log_ratio - reverse.unsqueeze(-1))
    return _weigh(w_forward, p - q) + _weigh(w_reverse, own)


def _weigh(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """weight * value; a weight of zero wins over whatever is infinite or not a number."""
    return torch.where(weight == 0, 0.0, weight * value)


def _share_of_rest(x: torch.Tensor, maximum: torch.Tensor, log_sum: torch.Tensor) -> torch.Tensor:
    """p_v / p_rest [r, c] from logits; meaningless for top-k tokens, zero where the rest has no probability."""
    empty = maximum == -torch.inf
    return (x - maximum.masked_fill(empty, 0.0) - log_sum.masked_fill(empty, torch.inf)).exp_()


def _expectation(probability: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[n] Σ probability * value over the buckets; where the first is zero its limit is zero, whatever the second."""
    return _weigh(probability, value).sum(-1)
