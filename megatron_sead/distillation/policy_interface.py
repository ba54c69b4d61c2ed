"""What a policy is given, what it returns, and the record that names it. No torch here, since settings read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from megatron_sead.distillation.statistics import TokenStatistics

ZoneCLoss = Literal["mix", "eq4"]
Tail = Literal["renormalize", "bucket"]


@dataclass(frozen=True)
class PolicyOptions:
    """What a run may choose about its policy."""

    # sead, zone C: mix: alpha * scale * FKL + (1 - alpha) * RKL; eq4, the paper's: the first term alone
    zone_c: ZoneCLoss = "mix"
    zone_c_scale: float = 1.0  # sead, zones: lambda, the weight of forward KL in zone C
    entropy_gate: float = 0.8  # eopd: nats of teacher entropy from which forward KL joins
    # tip_entropy, random_half: share of each rollout's tokens that teach; a call must have all tokens of a rollout.
    # tip_soft_or: share of the step's tokens
    keep_share: float = 0.5
    beta: float = 0.5  # gkd: the teacher's share of the mixture
    clip: float = 0.2  # opd_sampled: how far from 1 the importance ratio may count
    top_k: int = 64  # top_k: tokens of the teacher that the divergence is taken over
    top_k_tail: Tail = "bucket"  # top_k: all other tokens as one more, or both models renormalized over the k
    groups: Sequence[ProcessGroup] = ()  # over which the step's tokens are distributed

    def __post_init__(self) -> None:
        if self.zone_c not in get_args(ZoneCLoss):
            raise ValueError(f"zone_c={self.zone_c!r}: must be one of {', '.join(get_args(ZoneCLoss))}")
        if not 0 < self.keep_share <= 1:
            raise ValueError(f"keep_share={self.keep_share}: must be over 0 and at most 1")
        for name in ("beta", "clip"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be between 0 and 1")
        if self.top_k < 1 or self.top_k_tail not in get_args(Tail):
            raise ValueError(f"top_k={self.top_k}, top_k_tail={self.top_k_tail!r}: must be at least 1, and a tail")
        for name in ("zone_c_scale", "entropy_gate"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)}: must be a finite number")


@dataclass
class PolicyInput:
    """All response tokens of this rank's share of the step, or of a micro-batch, each [n]."""

    statistics: TokenStatistics
    zones: torch.Tensor  # int8: 0 A, 1 B, 2 C, -1 not valid; no token is in B or C where the policy reads no zones
    rollout_index: torch.Tensor  # int64, of the global step
    position: torch.Tensor  # int64, in the response
    alpha: float
    seed: int  # of (run, step): the only source of randomness, so that no layout changes a draw
    options: PolicyOptions = field(default_factory=PolicyOptions)

    @property
    def valid(self) -> torch.Tensor:
        """bool: the others never teach."""
        return self.zones >= 0


@dataclass
class TokenWeights:
    """[n] fp32 each, zero where the token does not teach."""

    forward: torch.Tensor
    reverse: torch.Tensor
    active: torch.Tensor | None = None  # [n] bool: tokens that training.normalizer=active counts; None: with a weight


class WrongWeightsError(ValueError):
    """What a policy returned is not two weights a token."""


Weigh = Callable[[PolicyInput], TokenWeights]


@dataclass
class LossInput:
    """What a policy's own loss is given: tokens [r] whose loss is no weighted sum of the exact divergences."""

    student_logits: torch.Tensor  # [r, V/tp] of this rank's columns, padding included; so are the teacher's
    teacher_logits: torch.Tensor
    forward_weight: torch.Tensor  # [r]
    reverse_weight: torch.Tensor
    targets: torch.Tensor  # [r] the sampled tokens
    old_log_probs: torch.Tensor  # [r] the student's, of the targets, in nats
    group: ProcessGroup | None  # over which the vocabulary is split
    vocab_size: int | None
    options: PolicyOptions = field(default_factory=PolicyOptions)


TokenLoss = Callable[[LossInput], "torch.Tensor"]  # [r], differentiable in the student's logits, weights included


@dataclass(frozen=True)
class Policy:
    """A method, and what a run must do for it."""

    name: str
    weigh: Weigh
    summary: str
    reads_zones: bool = False  # else they are computed for the metrics alone
    needs_whole_step: bool = False  # all tokens of the step in one call; else micro-batches, of whole rollouts
    loss: TokenLoss | None = None  # of tokens with a weight; None: w_forward * FKL + w_reverse * RKL, exact
