"""The teacher's k most probable tokens over a sharded vocabulary, and both models on them, in one collective.

Every rank sends the logits of its own k best tokens and the sum of its others. The k best of all ranks are among those
that were sent, and what was sent but not chosen belongs to the rest, so each rank finds the same buckets by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
import torch.distributed as dist

from megatron_sead.distillation.baselines.normalizers import (
    gather_ranks,
    join_normalizers,
    own_normalizer,
    token_blocks,
)
from megatron_sead.distillation.kernels.formulas import accumulation_dtype
from megatron_sead.distillation.partial_sums import VocabularyShard
from megatron_sead.distillation.policy_interface import Tail

# Shapes: n tokens; V columns of this rank, padding included; c real ones; r rows of a block; s = min(k, V), sent


@dataclass
class TopK:
    """The buckets of each token: the teacher's top-k, then, with the tail as a bucket, all other tokens together.

    For every model [n, k] or [n, k + 1], the logarithm of the bucket's mass, but for a constant a row; and with the
    tail, maximum and log-sum [n, 1] of the other tokens, kept apart.
    """

    buckets: list[torch.Tensor]
    rests: list[tuple[torch.Tensor, torch.Tensor]]
    columns: torch.Tensor  # [n, k] this rank's column of each top-k token; c, one beyond, where another rank holds it


def check_top_k(k: int, tail: str, total: int) -> None:
    """Raises ValueError unless k tokens can be chosen of `total` and the tail is one that we know."""
    if not 0 < k <= total:
        raise ValueError(f"k={k}: must be from 1 to {total}, the tokens of the vocabulary")
    if tail not in get_args(Tail):
        raise ValueError(f'tail="{tail}": must be "renormalize" or "bucket"')


def top_k_buckets(models: list[torch.Tensor], k: int, tail: Tail, shard: VocabularyShard) -> TopK:
    """Buckets of the models' logits [n, V], of which the first chooses the tokens. One collective.

    Of equal logits the lowest token is chosen first. Sent: [n, s + 2] numbers a model in its accumulation type.
    """
    own, candidates = _own_candidates(models, k, shard)
    parts = gather_ranks(own.flatten(1), shard.group).unflatten(-1, own.shape[1:])  # [tp, n, models, s + 2]
    sent = parts[..., :-2].permute(2, 1, 0, 3).flatten(2)  # [models, n, tp * s]
    # shards hold ascending token ids and send equal logits in that order: a stable sort keeps the lowest first
    order = sent[0].sort(dim=-1, descending=True, stable=True).indices
    chosen, unchosen = order[:, :k], order[:, k:]
    result = TopK([], [], _own_columns(chosen, candidates, shard))
    for model in range(len(models)):
        logits, others = sent[model].gather(1, chosen), sent[model].gather(1, unchosen)
        shift = logits.amax(-1, keepdim=True)
        if tail == "bucket":
            unsent = parts[:, :, model, -2:]
            maximum, log_sum = join_normalizers(torch.cat([unsent, own_normalizer(others).unsqueeze(0)]))
            result.rests.append((maximum, log_sum))
            shift = torch.maximum(shift, maximum)
            logits = torch.cat([logits - shift, (maximum - shift) + log_sum], dim=-1)
        else:
            logits = logits - shift
        result.buckets.append(logits)
    return result


def _own_candidates(models: list[torch.Tensor], k: int, shard: VocabularyShard) -> tuple[torch.Tensor, torch.Tensor]:
    """[n, models, s + 2] logits of this rank's best columns, then the normalizer of its others; and [n, s] columns.

    Fewer than s columns are filled up with tokens of no probability, in a column one beyond the real ones.
    """
    tokens, width = models[0].shape
    dtype, device = accumulation_dtype(models[0].dtype), models[0].device
    sent, best = min(k, width), min(k, shard.real)
    own = torch.full((tokens, len(models), sent + 2), -torch.inf, dtype=dtype, device=device)
    candidates = torch.full((tokens, sent), shard.real, dtype=torch.int64, device=device)
    for place in token_blocks(models[0], shard.real):
        columns = _largest(models[0][place, : shard.real], best)
        candidates[place, :best] = columns
        for model, logits in enumerate(models):
            x = logits[place, : shard.real].to(dtype, copy=True)
            own[place, model, :best] = x.gather(1, columns)
            own[place, model, sent:] = own_normalizer(x.scatter_(1, columns, -torch.inf))
    return own, candidates


def _largest(logits: torch.Tensor, k: int) -> torch.Tensor:
    """[r, k] columns of the largest logits [r, c] in descending order, the lowest of equals first.

    By integers that order like (logit, -column): the fp32 bits of the logit above, the column below, counted down.
    torch.topk says nothing of equals, and bf16 logits have many.
    """
    bits = (logits.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 equals 0.0
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    columns = torch.arange(logits.shape[1], device=logits.device)
    keys = (ordered.long() << 32) | (0xFFFFFFFF - columns)
    return 0xFFFFFFFF - (keys.topk(k).values & 0xFFFFFFFF)


def _own_columns(chosen: torch.Tensor, candidates: torch.Tensor, shard: VocabularyShard) -> torch.Tensor:
    """[n, k] this rank's columns of the slots `chosen` among those of all ranks; `candidates` are its own."""
    sent = candidates.shape[1]
    slot = chosen - sent * (0 if shard.group is None else dist.get_rank(shard.group))
    mine = (slot >= 0) & (slot < sent)
    return torch.where(mine, candidates.gather(1, slot.clamp(0, sent - 1)), shard.real)
