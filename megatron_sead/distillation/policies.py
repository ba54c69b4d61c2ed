"""A method is a function from token statistics to two weights a token: (w_forward, w_reverse)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from megatron_sead.distillation.statistics import TokenStatistics


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
    name: str, *, zone_c: str = "mix", zone_c_scale: float = 1.0, entropy_gate: float = 0.8, keep_share: float = 0.5
) -> Policy:
    raise NotImplementedError
