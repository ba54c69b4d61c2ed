"""Which tokens of a step teach, with which divergence: zones, then the policy, then the normaliser.

Quantile zones need both entropies of the whole step before the first backward pass, so they cost the student an
extra forward pass. Everything else is decided a micro-batch at a time, inside the training pass.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_sead.config.run import ZONE_POLICIES, RunConfig
from megatron_sead.distillation import (
    PolicyInput,
    RunningThresholds,
    Thresholds,
    TokenScores,
    TokenStatistics,
    TokenWeights,
    assign_zones,
    assign_zones_by_threshold,
    assign_zones_per_sequence,
    make_policy,
    rescue_confident_errors,
    zone_thresholds,
)
from megatron_sead.prompts.packing import MicroBatch

# Shapes: n response tokens, of a micro-batch or of all of this rank's micro-batches


@dataclass
class Supervision:
    """What the response tokens of one micro-batch teach."""

    weights: TokenWeights  # [n], divided by what the normaliser wants besides `count`
    zones: torch.Tensor  # [n] int8
    count: torch.Tensor  # int: this micro-batch's part of what the summed loss is divided by


@dataclass
class StepTokens:
    """The response tokens of several micro-batches, side by side."""

    statistics: TokenStatistics
    rollout_index: torch.Tensor  # [n]
    position: torch.Tensor  # [n]
    valid: torch.Tensor  # [n]

    @property
    def token_index(self) -> torch.Tensor:
        """[n] a key of the token that no layout changes; breaks ties between equal entropies."""
        return self.rollout_index * (1 << 32) + self.position


def gather_tokens(scores: list[TokenScores], micro_batches: list[MicroBatch]) -> StepTokens:
    """Concatenate micro-batches, in order."""
    statistics = TokenStatistics(
        **{
            field.name: torch.cat([getattr(s.statistics, field.name) for s in scores])
            for field in fields(TokenStatistics)
        }
    )
    return StepTokens(
        statistics,
        torch.cat([m.rollout_index for m in micro_batches]),
        torch.cat([m.position for m in micro_batches]),
        torch.cat([m.valid for m in micro_batches]),
    )


class Supervisor:
    """Turns statistics into weights, as the config's policy, zones and normaliser say.

    Args:
        config: the run's settings.
        group: data-parallel ranks, over which the tokens of a step are spread.
    """

    _POLICIES_OVER_THE_STEP = ("tip_soft_or",)

    def __init__(self, config: RunConfig, group: ProcessGroup | None) -> None:
        policy = config.policy
        self._groups = () if group is None else (group,)
        self._policy = make_policy(
            policy.name,
            zone_c=policy.zone_c,
            zone_c_scale=policy.zone_c_scale,
            entropy_gate=policy.entropy_gate,
            keep_share=policy.keep_share,
            groups=self._groups,
        )
        self._policy_name = policy.name
        self._zones = config.zones
        self._normalizer = config.training.normalizer
        self._seed = config.seed
        self._running = RunningThresholds(decay=config.zones.running_decay)

    @property
    def uses_zones(self) -> bool:
        """Does the policy look at zones? If not, they are computed for the metrics alone."""
        return self._policy_name in ZONE_POLICIES

    def needs_whole_step(self) -> bool:
        """Must both entropies of every token of the step be known before the first backward pass?"""
        if self._policy_name in self._POLICIES_OVER_THE_STEP:
            return True
        if not self.uses_zones or self._zones.scope == "sequence":
            return False
        if self._zones.thresholds == "running":
            return self._running.value is None
        return self._zones.thresholds == "global_step"

    def supervise_step(
        self, scores: list[TokenScores], micro_batches: list[MicroBatch], alpha: float, step: int
    ) -> list[Supervision]:
        """Weights of a whole step. Collective over the data-parallel group."""
        tokens = gather_tokens(scores, micro_batches)
        zones = self.global_zones(tokens)
        weights = self._weights(tokens, zones, alpha, step)
        sizes = [len(m.targets) for m in micro_batches]
        return [
            self._normalized(TokenWeights(f, r), z, m)
            for f, r, z, m in zip(
                weights.forward.split(sizes),
                weights.reverse.split(sizes),
                zones.split(sizes),
                micro_batches,
                strict=True,
            )
        ]

    def supervise_micro_batch(
        self, scores: TokenScores, micro_batch: MicroBatch, alpha: float, step: int
    ) -> Supervision:
        """Weights of one micro-batch, from what is known without the others."""
        tokens = gather_tokens([scores], [micro_batch])
        zones = self._local_zones(tokens)
        return self._normalized(self._weights(tokens, zones, alpha, step), zones, micro_batch)

    def global_zones(self, tokens: StepTokens) -> torch.Tensor:
        """[n] int8 by the quantiles of all tokens of the step, confident errors rescued where asked for."""
        statistics = tokens.statistics
        zones = assign_zones(
            statistics.student_entropy,
            statistics.teacher_entropy,
            tokens.valid,
            shares=self._zones.shares,
            groups=self._groups,
            token_index=tokens.token_index,
        )
        return self._rescued(zones, statistics)

    def thresholds(self, tokens: StepTokens) -> Thresholds:
        """The step's own tau_t and tau_s in nats, by global quantiles. Collective over the data-parallel group."""
        statistics = tokens.statistics
        return zone_thresholds(
            statistics.student_entropy,
            statistics.teacher_entropy,
            tokens.valid,
            shares=self._zones.shares,
            groups=self._groups,
            token_index=tokens.token_index,
        )

    def remember(self, thresholds: Thresholds) -> None:
        """Let the running average follow the step just done."""
        self._running.update(thresholds)

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs from the earlier ones."""
        return self._running.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._running.load_state_dict(state)

    def _local_zones(self, tokens: StepTokens) -> torch.Tensor:
        statistics = tokens.statistics
        entropies = (statistics.student_entropy, statistics.teacher_entropy, tokens.valid)
        if self._zones.scope == "sequence":
            zones = assign_zones_per_sequence(*entropies, tokens.rollout_index, shares=self._zones.shares)
        elif self._zones.thresholds == "absolute":
            limits = Thresholds(self._zones.teacher_threshold, self._zones.student_threshold)
            zones = assign_zones_by_threshold(*entropies, limits)
        elif self._zones.thresholds == "running" and self._running.value is not None:
            zones = assign_zones_by_threshold(*entropies, self._running.value)
        else:  # a policy that does not look at zones
            zones = tokens.valid.to(torch.int8) - 1
        return self._rescued(zones, statistics)

    def _rescued(self, zones: torch.Tensor, statistics: TokenStatistics) -> torch.Tensor:
        if self._zones.rescue_threshold is None:
            return zones
        return rescue_confident_errors(zones, statistics.reverse_kl, self._zones.rescue_threshold)

    def _weights(self, tokens: StepTokens, zones: torch.Tensor, alpha: float, step: int) -> TokenWeights:
        seed = self._seed * 1_000_003 + step
        return self._policy(PolicyInput(tokens.statistics, zones, tokens.rollout_index, tokens.position, alpha, seed))

    def _normalized(self, weights: TokenWeights, zones: torch.Tensor, micro_batch: MicroBatch) -> Supervision:
        if self.uses_zones:
            active = zones > 0  # |B u C|, even where alpha = 0 leaves zone C of eq. 4 without weight
        else:
            active = (weights.forward != 0) | (weights.reverse != 0)
        if self._normalizer == "active":
            return Supervision(weights, zones, active.sum())
        if self._normalizer == "valid":
            return Supervision(weights, zones, micro_batch.valid.sum())
        # each rollout's active tokens count as one
        rollouts, where = micro_batch.rollout_index.unique(return_inverse=True)
        size = torch.zeros(len(rollouts), device=active.device).index_add_(0, where, active.float())
        share = 1.0 / size.clamp(min=1)[where]
        return Supervision(TokenWeights(weights.forward * share, weights.reverse * share), zones, (size > 0).sum())
