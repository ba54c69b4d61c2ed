"""Which tokens teach where a policy keeps a share of them; draws that no layout changes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.policy_interface import PolicyInput
from megatron_sead.distillation.selection import greatest, token_key

# Shapes: n response tokens of this rank


def sampled_share(step: PolicyInput, weight: torch.Tensor, share: float) -> torch.Tensor:
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


def top_share_by_soft_or(step: PolicyInput, share: float, groups: Sequence[ProcessGroup]) -> torch.Tensor:
    """[n] bool: of all ranks' valid tokens the top `share` by h + d - h*d.

    h and d are student entropy and reverse KL, cut at zero from below and scaled to [0, 1] by their least and greatest
    over all ranks' valid tokens. Of equal scores the lower (rollout, position) is kept.
    """
    chosen = step.zones >= 0
    values = torch.stack([step.statistics.student_entropy[chosen], step.statistics.reverse_kl[chosen]], dim=-1)
    h, d = _scaled(values.clamp(min=0), groups).unbind(-1)
    key = token_key(step.rollout_index[chosen], step.position[chosen])
    count = torch.full((), len(key), device=key.device)
    for group in groups:
        dist.all_reduce(count, group=group)
    among = torch.ones_like(key, dtype=torch.bool)
    result = torch.zeros_like(chosen)
    result[chosen] = greatest((h + d - h * d).double(), among, round(share * int(count)), key, groups)
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
