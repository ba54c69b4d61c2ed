"""A method is a function from token statistics to two weights a token: (w_forward, w_reverse)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.gather import gather_tokens
from megatron_sead.distillation.statistics import TokenStatistics
from megatron_sead.distillation.zones import ZONE_B, ZONE_C

ZONE_C_LOSSES = ("mix", "eq4")


@dataclass
class PolicyInput:
    """All response tokens of this rank's share of the step, each [n]."""

    statistics: TokenStatistics
    zones: torch.Tensor  # int8: 0 A, 1 B, 2 C, -1 not valid
    rollout_index: torch.Tensor  # int64, of the global step
    position: torch.Tensor  # int64, in the response
    alpha: float
    seed: int  # of (run, step): the only source of randomness, so that no layout changes a draw


@dataclass
class TokenWeights:
    """[n] fp32 each, zero where the token does not teach."""

    forward: torch.Tensor
    reverse: torch.Tensor


Policy = Callable[[PolicyInput], TokenWeights]


def make_policy(
    name: str,
    *,
    zone_c: str = "mix",
    zone_c_scale: float = 1.0,
    entropy_gate: float = 0.8,
    keep_share: float = 0.5,
    groups: Sequence[ProcessGroup] = (),
) -> Policy:
    """The preset `name`, one of `POLICIES`.

    Args:
        zone_c: sead: "mix" gives zone C alpha * scale * FKL + (1 - alpha) * RKL, "eq4" (the paper's) the first term.
        zone_c_scale: sead, zones: lambda, the weight of forward KL in zone C.
        entropy_gate: eopd: nats of teacher entropy from which forward KL joins.
        keep_share: tip_entropy, random_half: share of each rollout's tokens that teach, all of which must be in one
            call; tip_soft_or: share of the step's tokens. Exact to one token.
        groups: tip_soft_or: process groups over which the step's tokens are distributed.

    Raises:
        ValueError: an unknown name, or a value out of range. The policy raises it too, for alpha or statistics of a
            valid token that are NaN.
    """
    if name not in POLICIES:
        raise ValueError(f"policy {name!r}: must be one of {', '.join(POLICIES)}")
    if zone_c not in ZONE_C_LOSSES:
        raise ValueError(f"zone_c={zone_c!r}: must be one of {', '.join(ZONE_C_LOSSES)}")
    if not 0 < keep_share <= 1:
        raise ValueError(f"keep_share={keep_share}: must be over 0 and at most 1")
    for what, value in (("zone_c_scale", zone_c_scale), ("entropy_gate", entropy_gate)):
        if not math.isfinite(value):
            raise ValueError(f"{what}={value}: must be a finite number")
    weights: dict[str, Policy] = {
        "sead": lambda step: _sead(step, zone_c, zone_c_scale),
        "opd": lambda step: _weights(step, forward=0.0, reverse=1.0),
        "forward_kl": lambda step: _weights(step, forward=1.0, reverse=0.0),
        "annealing": lambda step: _weights(step, forward=step.alpha, reverse=1 - step.alpha),
        "zones": lambda step: _weights(
            step, forward=zone_c_scale * (step.zones == ZONE_C), reverse=step.zones == ZONE_B
        ),
        "eopd": lambda step: _weights(step, forward=step.statistics.teacher_entropy >= entropy_gate, reverse=1.0),
        "tip_entropy": lambda step: _weights(
            step, forward=0.0, reverse=_sampled(step, step.statistics.student_entropy, keep_share)
        ),
        "tip_soft_or": lambda step: _weights(step, forward=0.0, reverse=_soft_or(step, keep_share, groups)),
        "random_half": lambda step: _weights(
            step, forward=0.0, reverse=_sampled(step, torch.ones_like(step.statistics.reverse_kl), keep_share)
        ),
    }
    return lambda step: weights[name](_require_numbers(step))


POLICIES = (
    "sead",
    "opd",
    "forward_kl",
    "annealing",
    "zones",
    "eopd",
    "tip_entropy",
    "tip_soft_or",
    "random_half",
)


def _require_numbers(step: PolicyInput) -> PolicyInput:
    if math.isnan(step.alpha):
        raise ValueError("alpha is NaN")
    for name in ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl"):
        bad = getattr(step.statistics, name).isnan() & (step.zones >= 0)
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            raise ValueError(f"{name} of {int(bad.sum())} valid tokens is NaN, the first is token {first}")
    return step


def _weights(step: PolicyInput, *, forward: torch.Tensor | float, reverse: torch.Tensor | float) -> TokenWeights:
    """Weights as given on valid tokens, zero on the others."""
    valid = (step.zones >= 0).float()
    return TokenWeights(valid * forward, valid * reverse)


def _sead(step: PolicyInput, zone_c: str, scale: float) -> TokenWeights:
    in_b, in_c = (step.zones == ZONE_B).float(), (step.zones == ZONE_C).float()
    mixed = 1 - step.alpha if zone_c == "mix" else 0.0
    return TokenWeights(step.alpha * scale * in_c, in_b + mixed * in_c)


def _sampled(step: PolicyInput, weight: torch.Tensor, share: float) -> torch.Tensor:
    """[n] bool: of each rollout's valid tokens `share`, drawn without replacement in proportion to `weight`.

    Gumbel top-k: the k greatest of log weight + Gumbel noise are such a draw (Kool et al. 2019). Tokens without
    weight come last, in random order.
    """
    kept = torch.zeros_like(step.zones, dtype=torch.bool)
    valid = (step.zones >= 0).nonzero().squeeze(1)
    rollout = step.rollout_index[valid]
    uniform = uniform_noise(step.seed, rollout, step.position[valid])
    score = weight[valid].double().log() - (-uniform.log()).log()
    order = uniform.argsort(descending=True, stable=True)
    order = order[score[order].argsort(descending=True, stable=True)]
    order = order[rollout[order].argsort(stable=True)]
    _, sizes = rollout[order].unique_consecutive(return_counts=True)
    starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    quota = (share * sizes + 0.5).floor().repeat_interleave(sizes)  # half a token is one: short rollouts teach too
    kept[valid[order]] = torch.arange(len(order), device=order.device) - starts < quota
    return kept


def _soft_or(step: PolicyInput, share: float, groups: Sequence[ProcessGroup]) -> torch.Tensor:
    """[n] bool: of all ranks' valid tokens the top `share` by h + d - h*d.

    h and d are student entropy and reverse KL, cut at zero from below and scaled to [0, 1] by their least and greatest
    over all ranks' valid tokens. Of equal scores the lower (rollout, position) is kept.
    """
    chosen = step.zones >= 0
    values = torch.stack([step.statistics.student_entropy[chosen], step.statistics.reverse_kl[chosen]], dim=-1)
    h, d = _scaled(values.clamp(min=0), groups).unbind(-1)
    score = (h + d - h * d).double().view(torch.int64)  # bits of numbers >= 0 sort as integers
    rows = torch.stack([score, step.rollout_index[chosen], step.position[chosen]], dim=-1)
    everyone, place = gather_tokens(rows, groups)
    order = everyone[:, 2].argsort(stable=True)
    order = order[everyone[order, 1].argsort(stable=True)]
    order = order[everyone[order, 0].argsort(descending=True, stable=True)]
    kept = torch.zeros(len(everyone), dtype=torch.bool, device=everyone.device)
    kept[order[: round(share * len(everyone))]] = True
    result = torch.zeros_like(chosen)
    result[chosen] = kept[place]
    return result


def _scaled(values: torch.Tensor, groups: Sequence[ProcessGroup]) -> torch.Tensor:
    """[n, k] scaled so that the least of all ranks is 0 and the greatest 1; 0 where all are the same."""
    limits = values.new_full((2, values.shape[1]), -torch.inf)  # greatest of -values, greatest of values
    if len(values):
        limits = torch.stack([(-values).amax(0), values.amax(0)])
    for group in groups:
        dist.all_reduce(limits, dist.ReduceOp.MAX, group=group)
    least, greatest = -limits[0], limits[1]
    span = greatest - least
    return torch.where(span > 0, (values - least) / span, 0.0)


def uniform_noise(seed: int, rollout_index: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """[n] fp64 in (0, 1): a hash of (seed, rollout, position) alone, whatever rank or micro-batch asks."""
    state = torch.full_like(rollout_index, seed % 2**63)
    for value in (rollout_index, position):
        state = _mix(state) ^ value
    bits = _logical_shift(_mix(state), 11)  # 53 of them, as many as fp64 holds
    return (bits.double() + 0.5) * 2.0**-53


def _mix(state: torch.Tensor) -> torch.Tensor:
    """SplitMix64 (Steele et al. 2014): one increment and its finalizer; int64 products wrap."""
    state = state - 0x61C8864680B583EB  # 0x9E3779B97F4A7C15 as a signed number
    state = (state ^ _logical_shift(state, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    state = (state ^ _logical_shift(state, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return state ^ _logical_shift(state, 31)


def _logical_shift(state: torch.Tensor, bits: int) -> torch.Tensor:
    """Unsigned shift to the right; torch's own keeps the sign."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)
