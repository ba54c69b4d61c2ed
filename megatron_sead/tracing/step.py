"""A run's models as one rank of its world, and two steps of training on them."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from megatron_sead.config.micro_batches import count_multiple, length_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.models.decoder import Decoder
from megatron_sead.models.huggingface import iterate_huggingface_weights
from megatron_sead.models.token_ids import stop_token_ids
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.planning.plan import together
from megatron_sead.prompts.packing import MicroBatch, pack
from megatron_sead.reporting.timing import PhaseTimer
from megatron_sead.tracing import shadows
from megatron_sead.tracing.collectives import Call
from megatron_sead.tracing.costs import Costs, Rates
from megatron_sead.tracing.device import install_device
from megatron_sead.tracing.kernels import install_kernels, restart_sums
from megatron_sead.tracing.memory import PhaseMemory
from megatron_sead.tracing.watch import Copies, Watch
from megatron_sead.tracing.weights import DeclaredWeights
from megatron_sead.tracing.world import Told, world_of
from megatron_sead.training.engines import UPDATE_PROBE
from megatron_sead.training.parity import student_log_probs
from megatron_sead.training.setup import build_learner
from megatron_sead.training.step import Learner, train_step

TOKEN = 7  # of all prompts and responses


@dataclass(frozen=True)
class Rollouts:
    """Of one step: all alike."""

    micro_batches: int  # a data-parallel rank
    prompt_tokens: int
    response_tokens: int

    def of_a_rank(self, config: RunConfig) -> int:
        """How many a data-parallel rank has."""
        return self.micro_batches * together(config, self.prompt_tokens + self.response_tokens)

    def tokens(self, config: RunConfig, replicas: int) -> int:
        """Of all replicas, prompts included."""
        return replicas * self.of_a_rank(config) * (self.prompt_tokens + self.response_tokens)


@dataclass
class RankTrace:
    """What one rank has done. Memory, copies, reads and costs are those of the last step: the second is as all later
    ones, the first has no optimizer state yet."""

    rank: int
    stage: int
    parameters: int
    teacher_parameters: int
    memory: dict[str, PhaseMemory] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)  # from the first one on
    calls_before: int = 0  # the last step, and what follows it
    copies: dict[tuple[str, str, str], Copies] = field(default_factory=dict)
    reads: dict[tuple[str, str], int] = field(default_factory=dict)
    costs: Costs | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    unknown: dict[str, int] = field(default_factory=dict)


class TracedParts(PhaseTimer):
    """Tells the watch which part of a step runs."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def part(self, name: str) -> AbstractContextManager[None]:
        return self._watch.during(name)


def trace_rank(
    config: RunConfig,
    rank: int,
    world_size: int,
    rollouts: Rollouts,
    rates: Rates,
    told: Told | None = None,
    steps: int = 2,
) -> RankTrace:
    """Build the run's models as this rank and take two steps. In a process that has done nothing else with torch.

    Args:
        rollouts: of each step.
        told: what other ranks have broadcast; a rank of the last pipeline stage is traced before those of others.

    Raises:
        UserError: as a run's start does; no C++ compiler.
        RuntimeError: whatever a rank of a real run would fail with.
    """
    with traced_learner(config, rank, world_size, rates, told or Told()) as (watch, learner, chunks, trace):
        shadows.expect_tokens(rollouts.tokens(config, learner.parallel.dp_size))
        with watch.during("rollouts"):
            batches = synthetic_batches(config, learner.parallel, rollouts)
        for step in range(steps):
            trace.calls_before = len(watch.collectives.calls)
            if step > 0:
                _forget_earlier_steps(watch)
            with watch.during("step"):
                trace.metrics = train_step(learner, batches, 0.5, step, timer=TracedParts(watch)).metrics
        _hand_over(config, chunks, learner, watch, rollouts)
        trace.memory |= watch.memory.phases
        trace.calls = watch.collectives.calls
        trace.copies, trace.reads, trace.costs = watch.copies, dict(watch.reads), watch.costs
        trace.unknown = dict(watch.unknown)
        del learner, chunks, batches
    return trace


@contextmanager
def traced_learner(
    config: RunConfig, rank: int, world_size: int, rates: Rates, told: Told
) -> Iterator[tuple[Watch, Learner, list[Decoder], RankTrace]]:
    """A run's models as one rank has them, under a watch; when the body ends they are gone."""
    install_device()
    install_kernels()
    restart_sums()
    watch = Watch(rates)
    with watch.entered(), world_of(config.parallel, rank, world_size, told, watch) as parallel:
        watch.collectives.name_groups(parallel)
        with watch.during("loading"):
            stops = _stop_tokens(config)
            learner, chunks = build_learner(config, stops, parallel, DeclaredWeights)
        trace = RankTrace(rank, parallel.pp_rank, _count(chunks), _count(learner.teacher.chunks))
        trace.memory["loading"] = watch.memory.phases["loading"]
        yield watch, learner, chunks, trace
        del learner, chunks
        gc.collect()  # modules and their optimizer refer to each other


def _hand_over(config: RunConfig, chunks: list[Decoder], learner: Learner, watch: Watch, rollouts: Rollouts) -> None:
    """What follows a step: the engine gets the weights, and both are compared on a text."""
    with watch.during("weights to the engine"):
        for _ in iterate_huggingface_weights(chunks, learner.parallel):
            pass
    multiple = length_multiple(config.parallel)
    seen: Any = SimpleNamespace(config=config, parallel=learner.parallel, learner=learner, length_multiple=multiple)
    with watch.during("parity check"):
        student_log_probs(seen, [TOKEN] * min(UPDATE_PROBE, rollouts.prompt_tokens + rollouts.response_tokens))


def synthetic_batches(config: RunConfig, parallel: ParallelContext, rollouts: Rollouts) -> list[MicroBatch]:
    """A step's rollouts, as a run packs them."""
    count = rollouts.of_a_rank(config) * parallel.dp_size
    prompt = (TOKEN,) * rollouts.prompt_tokens
    return pack(
        [prompt] * count,
        [prompt] * count,
        [(TOKEN,) * rollouts.response_tokens] * count,
        [True] * count,
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=parallel.dp_rank,
        data_parallel_size=parallel.dp_size,
        length_multiple=length_multiple(config.parallel),
        pad_token_id=0,
        device=parallel.device,
        log_probs=[(-1.0,) * rollouts.response_tokens] * count,
        micro_batch_tokens=config.training.micro_batch_tokens,
        count_multiple=count_multiple(config.parallel),
    )


def _forget_earlier_steps(watch: Watch) -> None:
    watch.memory.phases.clear()
    watch.copies.clear()
    watch.reads.clear()
    watch.costs = Costs(watch.costs.rates)


def _stop_tokens(config: RunConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = (stop_token_ids(model, role) for model, role in ((config.student, "student"), (config.teacher, "teacher")))
    student, teacher = (((0,), "") if ids is None else ids for ids in found)
    return student[0], teacher[0]


def _count(chunks: list[Any]) -> int:
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
