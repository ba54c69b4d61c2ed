"""A run's models as one rank of its world, and two steps of training on them."""

from __future__ import annotations

import gc
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_sead.config.micro_batches import count_multiple, length_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.models.decoder import Decoder
from megatron_sead.models.huggingface import iterate_huggingface_weights
from megatron_sead.models.token_ids import stop_token_ids
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.planning.plan import left_of_budget, together
from megatron_sead.planning.rates import Rates
from megatron_sead.prompts.packing import MicroBatch, pack
from megatron_sead.reporting.timing import PhaseTimer
from megatron_sead.tracing import shadows
from megatron_sead.tracing.calls import Call
from megatron_sead.tracing.checkpoint import STEP, nothing_written, store_of
from megatron_sead.tracing.device import install_device
from megatron_sead.tracing.kernels import install_kernels, restart_sums
from megatron_sead.tracing.memory import PhaseMemory
from megatron_sead.tracing.watch import Record, Watch
from megatron_sead.tracing.weights import DeclaredWeights
from megatron_sead.tracing.world import Told, world_of
from megatron_sead.training.engines import UPDATE_PROBE
from megatron_sead.training.parity import student_log_probs
from megatron_sead.training.record import save
from megatron_sead.training.setup import build_learner
from megatron_sead.training.step import Learner, train_step

TOKEN = 7  # of all prompts and responses


@dataclass(frozen=True)
class Rollouts:
    """Of one step: all alike, but that what they leave of a budget of tokens is filled by shorter ones."""

    micro_batches: int  # a data-parallel rank
    prompt_tokens: int
    response_tokens: int

    def of_a_step(self, config: RunConfig, replicas: int) -> list[tuple[int, int]]:
        """Tokens of prompts and of responses, of all replicas."""
        length = self.prompt_tokens + self.response_tokens
        count, left = together(config, length), left_of_budget(config, length)
        prompt = max(1, left * self.prompt_tokens // length)
        shorter = [(prompt, left - prompt)] if left > prompt else []
        micro_batch = [(self.prompt_tokens, self.response_tokens)] * count + shorter
        return micro_batch * (self.micro_batches * replicas)

    def tokens(self, config: RunConfig, replicas: int) -> int:
        """Of all replicas, prompts included."""
        return sum(map(sum, self.of_a_step(config, replicas)))


@dataclass
class RankTrace:
    """What one rank has done."""

    rank: int
    stage: int
    parameters: int
    teacher_parameters: int
    teacher_sizes: list[list[int]] = field(default_factory=list)  # bytes of each chunk's tensors that are offloaded
    loading: Record | None = None
    steps: list[Record] = field(default_factory=list)
    after: Record | None = None  # weights to the engine, the check of parity, saving and resuming
    metrics: dict[str, float] = field(default_factory=dict)  # of the last step
    calls: list[Call] = field(default_factory=list)  # all of them
    unknown: dict[str, int] = field(default_factory=dict)

    def parts(self, step: int = -1) -> list[Record]:
        """A step, and what comes before and after all."""
        assert self.loading is not None and self.after is not None
        return [self.loading, self.steps[step], self.after]

    @property
    def memory(self) -> dict[str, PhaseMemory]:
        """By phase, with the last step's."""
        return {name: memory for part in self.parts() for name, memory in part.memory.items()}


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
    rollouts: Sequence[Rollouts],
    rates: Rates,
    told: Told | None = None,
) -> RankTrace:
    """Build the run's models as this rank, take steps, and save and resume. In a process that has done nothing else
    with torch.

    Args:
        rollouts: of each step. The first has no optimizer state yet; the second is as all later ones.
        told: what other ranks have broadcast; a rank of the last pipeline stage is traced before those of others.

    Raises:
        UserError: as a run's start does; no C++ compiler.
        RuntimeError: whatever a rank of a real run would fail with.
    """
    with traced_learner(config, rank, world_size, rates, told or Told()) as (watch, learner, chunks, trace):
        shadows.expect_tokens(max(of_step.tokens(config, learner.parallel.dp_size) for of_step in rollouts))
        for step, of_step in enumerate(rollouts):
            with watch.recording() as record:
                with watch.during("rollouts"):
                    batches = synthetic_batches(config, learner.parallel, of_step)
                with watch.during("step"):
                    trace.metrics = train_step(learner, batches, 0.5, step, timer=TracedParts(watch)).metrics
            trace.steps.append(record)
            del batches
        with watch.recording() as trace.after:
            _hand_over(config, chunks, learner, watch, rollouts[-1])
        trace.calls, trace.unknown = watch.collectives.calls, dict(watch.unknown)
        del learner, chunks
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
        with watch.recording() as loading, watch.during("loading"):
            stops = _stop_tokens(config)
            learner, chunks = build_learner(config, stops, parallel, DeclaredWeights)
        trace = RankTrace(rank, parallel.pp_rank, _count(chunks), _count(learner.teacher.chunks), loading=loading)
        head = learner.teacher.chunks[-1].head_weight
        trace.teacher_sizes = [[p.nbytes for p in c.parameters() if p is not head] for c in learner.teacher.chunks]
        yield watch, learner, chunks, trace
        del learner, chunks, head
        gc.collect()  # modules and their optimizer refer to each other


def _hand_over(config: RunConfig, chunks: list[Decoder], learner: Learner, watch: Watch, rollouts: Rollouts) -> None:
    """What follows a step: the engine gets the weights, and both are compared on a text; the run is saved, and goes on
    from there."""
    with watch.during("weights to the engine"):
        deque(iterate_huggingface_weights(chunks, learner.parallel), maxlen=0)  # nothing keeps the last one
    probe = [TOKEN] * min(UPDATE_PROBE, rollouts.prompt_tokens + rollouts.response_tokens)
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder, "checkpoints"), learner.parallel)
        run: Any = SimpleNamespace(
            config=config,
            parallel=learner.parallel,
            learner=learner,
            student_chunks=chunks,
            length_multiple=length_multiple(config.parallel),
            probe=probe,
            store=store,
            state=SimpleNamespace(step=STEP),
            inputs=SimpleNamespace(record={}),
            started=0.0,
            seconds=lambda: 0.0,
            state_dict=dict,
        )
        with watch.during("parity check"):
            student_log_probs(run, probe)
        with watch.during("saving"), nothing_written():
            save(run)
        with watch.during("resuming"):
            store.fill(Path(folder), chunks, learner.optimizer)


def synthetic_batches(config: RunConfig, parallel: ParallelContext, rollouts: Rollouts) -> list[MicroBatch]:
    """A step's rollouts, as a run packs them."""
    sizes = rollouts.of_a_step(config, parallel.dp_size)
    prompts = [(TOKEN,) * prompt for prompt, _ in sizes]
    return pack(
        prompts,
        prompts,
        [(TOKEN,) * response for _, response in sizes],
        [True] * len(sizes),
        micro_batch_size=config.training.micro_batch_size,
        data_parallel_rank=parallel.dp_rank,
        data_parallel_size=parallel.dp_size,
        length_multiple=length_multiple(config.parallel),
        pad_token_id=0,
        device=parallel.device,
        log_probs=[(-1.0,) * response for _, response in sizes],
        micro_batch_tokens=config.training.micro_batch_tokens,
        count_multiple=count_multiple(config.parallel),
        share=parallel.share,
    )


def _stop_tokens(config: RunConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    found = (stop_token_ids(model, role) for model, role in ((config.student, "student"), (config.teacher, "teacher")))
    student, teacher = (((0,), "") if ids is None else ids for ids in found)
    return student[0], teacher[0]


def _count(chunks: list[Any]) -> int:
    return sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters())
