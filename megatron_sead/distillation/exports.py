"""What `megatron_sead.distillation` exports."""

from megatron_sead.distillation.annealing import CompetenceTracker, annealing_coefficient
from megatron_sead.distillation.baselines.linear_token_loss import linear_token_loss
from megatron_sead.distillation.checks import NotFiniteError
from megatron_sead.distillation.curriculum import Curriculum
from megatron_sead.distillation.divergence import weighted_divergence
from megatron_sead.distillation.likeliest_tokens import LikeliestTokens, linear_likeliest_tokens
from megatron_sead.distillation.linear_divergence import linear_weighted_divergence
from megatron_sead.distillation.linear_scores import TokenScores, linear_token_scores
from megatron_sead.distillation.policies import POLICIES, find_policy, make_policy
from megatron_sead.distillation.policy_interface import (
    LossInput,
    Policy,
    PolicyInput,
    PolicyOptions,
    TokenLoss,
    TokenWeights,
    Weigh,
)
from megatron_sead.distillation.statistics import (
    TokenStatistics,
    token_statistics,
    vocab_parallel_entropy,
)
from megatron_sead.distillation.zones import (
    RunningThresholds,
    Thresholds,
    assign_zones,
    assign_zones_by_threshold,
    assign_zones_per_sequence,
    rescue_confident_errors,
    zones_and_thresholds,
)

__all__ = [
    "POLICIES",
    "CompetenceTracker",
    "Curriculum",
    "LikeliestTokens",
    "LossInput",
    "NotFiniteError",
    "Policy",
    "PolicyInput",
    "PolicyOptions",
    "RunningThresholds",
    "Thresholds",
    "TokenLoss",
    "TokenScores",
    "TokenStatistics",
    "TokenWeights",
    "Weigh",
    "annealing_coefficient",
    "assign_zones",
    "assign_zones_by_threshold",
    "assign_zones_per_sequence",
    "find_policy",
    "linear_likeliest_tokens",
    "linear_token_loss",
    "linear_token_scores",
    "linear_weighted_divergence",
    "make_policy",
    "rescue_confident_errors",
    "token_statistics",
    "vocab_parallel_entropy",
    "weighted_divergence",
    "zones_and_thresholds",
]
