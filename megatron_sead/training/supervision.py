"""Which tokens of a step teach, with which divergence: zones, then the policy, then the normalizer.

Quantile zones need both entropies of the whole step before the first backward pass, so they cost the student an extra
forward pass. Everything else is decided a micro-batch at a time, inside the training pass.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch.distributed import ProcessGroup

from megatron_sead.config.run import RunConfig
from megatron_sead.distillation import (
    Policy,
    PolicyInput,
    PolicyOptions,
    RunningThresholds,
    Thresholds,
    TokenScores,
    TokenStatistics,
    TokenWeights,
    assign_zones_by_threshold,
    assign_zones_per_sequence,
    find_policy,
    make_policy,
    rescue_confident_errors,
    zones_and_thresholds,
)
from megatron_sead.distillation.policies import with_options
from megatron_sead.distillation.policy_interface import WrongWeightsError
from megatron_sead.distillation.selection import token_key
from megatron_sead.errors import UserError
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.training.mismatch import importance_weights

log = logging.getLogger(__name__)

# Shapes: n response tokens, of a micro-batch or of all of this rank's micro-batches


@dataclass
class Supervision:
    """What the response tokens of one micro-batch teach."""

    weights: TokenWeights  # [n], divided by what the normaliser wants besides `count`
    zones: torch.Tensor  # [n] int8
    count: torch.Tensor  # int: this micro-batch's part of what the summed loss is divided by
    thresholds: Thresholds | None = None  # of the whole step's quantiles, where the zones are by them


@dataclass
class StepTokens:
    """The response tokens of this rank's micro-batches, concatenated in order."""

    statistics: TokenStatistics
    rollout_index: torch.Tensor  # [n]
    position: torch.Tensor  # [n]
    valid: torch.Tensor  # [n]

    @property
    def token_index(self) -> torch.Tensor:
        """[n] a key of the token that no layout changes; breaks ties between equal entropies."""
        return token_key(self.rollout_index, self.position)

    @staticmethod
    def of(scores: list[TokenScores], micro_batches: list[MicroBatch]) -> StepTokens:
        """Concatenate what is known of the tokens of each micro-batch."""
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


def policy_of(config: RunConfig) -> Policy:
    """The record of the run's policy.

    Raises:
        UserError: policy.name is that of a function, and there is none.
    """
    try:
        return find_policy(config.policy.name)
    except ValueError as error:
        raise UserError(f"policy.name={config.policy.name}: {str(error).partition(': ')[2]}") from None


class Supervisor:
    """Turns statistics into weights, as the config's policy, zones and normaliser say.

    Args:
        config: the run's settings.
        group: data-parallel ranks, which share the tokens of a step.
    """

    def __init__(self, config: RunConfig, group: ProcessGroup | None) -> None:
        self._groups = () if group is None else (group,)
        self._name, self._policy = config.policy.name, policy_of(config)
        options = config.policy.model_dump(exclude={"name"}) | {"groups": self._groups}
        self._weigh = make_policy(self._name, **options)
        self.token_loss = with_options(self._policy.loss, PolicyOptions(**options))
        self._zones = config.zones
        self._normalizer, self._importance_cap = config.training.normalizer, config.training.importance_cap
        self._seed = config.seed
        self._running = RunningThresholds(decay=config.zones.running_decay)
        self._told_of_floor = False

    @property
    def reads_zones(self) -> bool:
        """Does the policy look at zones? If not, they are computed for the metrics alone."""
        return self._policy.reads_zones

    def needs_whole_step(self) -> bool:
        """Must both entropies of every token of the step be known before the first backward pass?"""
        return self._policy.needs_whole_step or (self.reads_zones and self._by_quantiles_of_the_step())

    def _by_quantiles_of_the_step(self) -> bool:
        if self._zones.thresholds == "running":
            return self._running.value is None
        return self._zones.scope == "global" and self._zones.thresholds == "global_step"

    def supervise_step(
        self, scores: list[TokenScores], micro_batches: list[MicroBatch], alpha: float, step: int
    ) -> list[Supervision]:
        """Weights of a whole step. Collective over the data-parallel group."""
        tokens = StepTokens.of(scores, micro_batches)
        thresholds = None
        if not self.reads_zones or self._by_quantiles_of_the_step():
            zones, thresholds = self.quantile_zones(tokens)
        else:
            zones = self._local_zones(tokens)
        weights = self._weights(tokens, zones, alpha, step)
        parts, start = [], 0
        for score, micro_batch in zip(scores, micro_batches, strict=True):
            place = slice(start, start + len(micro_batch.targets))
            parts.append(self._normalized(weights, zones, score, micro_batch, thresholds, place))
            start = place.stop
        return parts

    def supervise_micro_batch(
        self, scores: TokenScores, micro_batch: MicroBatch, alpha: float, step: int
    ) -> Supervision:
        """Weights of one micro-batch, from what is known without the others."""
        if not len(micro_batch.targets):  # packed, without rollouts: policies need not know of such
            nothing = scores.student_log_prob
            return Supervision(TokenWeights(nothing, nothing), nothing.to(torch.int8), torch.zeros_like(nothing).sum())
        tokens = StepTokens.of([scores], [micro_batch])
        zones = self._local_zones(tokens)
        return self._normalized(self._weights(tokens, zones, alpha, step), zones, scores, micro_batch)

    def quantile_zones(self, tokens: StepTokens) -> tuple[torch.Tensor, Thresholds]:
        """Zones [n] int8 by the quantiles of all tokens of the step, and tau_t and tau_s in nats.

        Confident errors are moved to zone B where zones.rescue_threshold asks for it. Collective over the data-parallel
        group.
        """
        statistics = tokens.statistics
        zones, thresholds = zones_and_thresholds(
            statistics.student_entropy,
            statistics.teacher_entropy,
            tokens.valid,
            shares=self._zones.shares,
            groups=self._groups,
            token_index=tokens.token_index,
        )
        return self._rescued(zones, statistics), thresholds

    def remember(self, thresholds: Thresholds) -> None:
        """Let the running average follow the step just done."""
        self._running.update(thresholds)

    def warn_of_floor(self, thresholds: Thresholds, step: int) -> None:
        """Warn, once, when the teacher is so sure everywhere that it is arbitrary which tokens are in zone C."""
        floor = self._zones.teacher_entropy_floor
        if self.reads_zones and thresholds.teacher < floor and not self._told_of_floor:
            self._told_of_floor = True
            log.warning(
                "step %d: zone C begins at %.2g nats of teacher entropy, under zones.teacher_entropy_floor=%g: the "
                "teacher is about as sure of its tokens as of the others (told once)",
                step,
                thresholds.teacher,
                floor,
            )

    def state_dict(self) -> dict[str, Any]:
        """What the next step needs from the earlier ones."""
        return self._running.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._running.load_state_dict(state)

    def _local_zones(self, tokens: StepTokens) -> torch.Tensor:
        statistics = tokens.statistics
        entropies = (statistics.student_entropy, statistics.teacher_entropy, tokens.valid)
        if not self.reads_zones:
            return tokens.valid.to(torch.int8) - 1
        if self._zones.scope == "sequence":
            zones = assign_zones_per_sequence(*entropies, tokens.rollout_index, shares=self._zones.shares)
        else:
            absolute = Thresholds(self._zones.teacher_threshold, self._zones.student_threshold)
            limits = absolute if self._zones.thresholds == "absolute" else self._running.value
            assert limits is not None  # needs_whole_step says True until there is a running average
            zones = assign_zones_by_threshold(*entropies, limits)
        return self._rescued(zones, statistics)

    def _rescued(self, zones: torch.Tensor, statistics: TokenStatistics) -> torch.Tensor:
        if self._zones.rescue_threshold is None:
            return zones
        return rescue_confident_errors(zones, statistics.reverse_kl, self._zones.rescue_threshold)

    def _weights(self, tokens: StepTokens, zones: torch.Tensor, alpha: float, step: int) -> TokenWeights:
        seed = self._seed * 1_000_003 + step
        try:
            return self._weigh(
                PolicyInput(tokens.statistics, zones, tokens.rollout_index, tokens.position, alpha, seed)
            )
        except WrongWeightsError as error:
            raise UserError(f"policy.name={self._policy.name}: {error}") from None

    def _normalized(
        self,
        weights: TokenWeights,
        zones: torch.Tensor,
        scores: TokenScores,
        micro_batch: MicroBatch,
        thresholds: Thresholds | None = None,
        place: slice = slice(None),
    ) -> Supervision:
        """Divide the micro-batch's weights, which are those at `place`, by what the normalizer says; and weigh tokens
        by their importance, where that is asked for."""
        forward, reverse, zones = weights.forward[place], weights.reverse[place], zones[place]
        active = (forward != 0) | (reverse != 0) if weights.active is None else weights.active[place]
        count = micro_batch.valid.sum() if self._normalizer == "valid" else active.sum()
        if self._normalizer == "sequence":  # each rollout's active tokens count as one
            rollouts, where = micro_batch.rollout_index.unique(return_inverse=True)
            size = torch.zeros(len(rollouts), device=active.device).index_add_(0, where, active.float())
            share = 1.0 / size.clamp(min=1)[where]
            forward, reverse, count = forward * share, reverse * share, (size > 0).sum()
        if self._importance_cap is not None and micro_batch.sampled_log_prob is not None:
            importance = importance_weights(scores.student_log_prob, micro_batch.sampled_log_prob, self._importance_cap)
            forward, reverse = forward * importance, reverse * importance
        return Supervision(TokenWeights(forward, reverse), zones, count, thresholds)
