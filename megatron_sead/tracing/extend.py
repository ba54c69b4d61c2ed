"""Few layers and micro-batches are traced, and the numbers of all of them follow: each more adds the same.

Layers are taken away in whole patterns (three with a window, one without) and from student and teacher in one
proportion, so that what a stage holds grows by the same amount with each pattern that comes back.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from megatron_sead.config.run import RunConfig
from megatron_sead.planning.plan import Plan
from megatron_sead.tracing.collectives import disagreements
from megatron_sead.tracing.costs import Rates
from megatron_sead.tracing.memory import DEVICE
from megatron_sead.tracing.step import RankTrace, Rollouts, trace_rank
from megatron_sead.tracing.world import Told


class Messages(NamedTuple):
    """What a table of collectives has a line for."""

    phase: str
    group: str
    name: str


@dataclass
class Summary:
    """One rank's step, as numbers that grow with layers and micro-batches."""

    rank: int
    stage: int
    numbers: dict[Hashable, float] = field(default_factory=dict)  # by kind and what it is of

    def of(self, kind: str) -> dict[Any, float]:
        """All of one kind: peak (by phase and place), holder (by phase and line), flops, seconds, waiting (by phase),
        calls, sent (by `Messages`), copied, copies (by phase, direction and line), reads (by phase and line),
        parameters (by role)."""
        return {key[1]: value for key, value in self.numbers.items() if isinstance(key, tuple) and key[0] == kind}


@dataclass
class Traced:
    """What a trace of a run has found."""

    ranks: list[Summary]
    disagreements: list[str]
    shared_calls: int  # in which more than one traced rank takes part
    layers: list[int]  # of the student, in the traces
    micro_batches: list[int]


def trace_run(config: RunConfig, plan: Plan, ranks: list[int], rates: Rates) -> Traced:
    """Trace a run's ranks, by few layers and micro-batches where that is enough.

    Raises:
        UserError: as `trace_rank`.
        RuntimeError: as `trace_rank`.
    """
    parts = few_parts(config, plan)
    batches = few_micro_batches(config, plan)
    samples: dict[tuple[int, int], dict[int, Summary]] = {}
    found, shared, layers = list[str](), 0, list[int]()
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            smaller = with_layers(config, plan, part, Path(folder, str(part)))
            layers.append(plan.student.layers * part // parts_in_all(config, plan))
            for count in batches:
                traces = trace_ranks(smaller, plan, ranks, rates, count)
                samples[part, count] = {rank: summarize(trace) for rank, trace in traces.items()}
                found += disagreements({rank: trace.calls for rank, trace in traces.items()})
                shared = max(shared, _shared(traces))
    whole = parts_in_all(config, plan), plan.micro_batches
    summaries = [
        Summary(rank, samples[parts[0], batches[0]][rank].stage, extended(samples, rank, parts, batches, whole))
        for rank in ranks
    ]
    return Traced(summaries, list(dict.fromkeys(found)), shared, layers, batches)


def parts_in_all(config: RunConfig, plan: Plan) -> int:
    """Into how many equal parts both models' layers can be cut, each with whole patterns on every stage."""
    patterns = []
    for shape in (plan.student, plan.teacher):
        counts = [count for stage in shape.stage_layers(config.parallel) for count in stage]
        period = _period(_layer_types(config, shape is plan.student))
        whole = len(set(counts)) == 1 and counts[0] % period == 0
        patterns.append(counts[0] // period if whole else 1)
    return math.gcd(*patterns)


def few_parts(config: RunConfig, plan: Plan) -> list[int]:
    parts = parts_in_all(config, plan)
    return [1, 2] if parts > 2 else [parts]


def few_micro_batches(config: RunConfig, plan: Plan) -> list[int]:
    """As many as fill the pipeline, and a few more; all, where those are not more."""
    stages = config.parallel.pipeline_model_parallel_size
    virtual = config.parallel.virtual_pipeline_model_parallel_size
    least = max(2, stages)
    more = least + (stages if virtual else 1)
    return [least, more] if more < plan.micro_batches else [plan.micro_batches]


def with_layers(config: RunConfig, plan: Plan, part: int, folder: Path) -> RunConfig:
    """The run with so many parts of both models' layers."""
    changed = config.model_copy(deep=True)
    for model, shape, role in ((changed.student, plan.student, "student"), (changed.teacher, plan.teacher, "teacher")):
        count = shape.layers * part // parts_in_all(config, plan)
        fields = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
        cut = {n: v[:count] for n, v in fields.items() if isinstance(v, list) and len(v) == shape.layers > 1}
        (folder / role).mkdir(parents=True)
        text = json.dumps(fields | cut | {"num_hidden_layers": count})
        (folder / role / "config.json").write_text(text, encoding="utf-8")
        model.path = folder / role
    return changed


def summarize(trace: RankTrace) -> Summary:
    """A trace's numbers."""
    assert trace.costs is not None
    numbers: defaultdict[Hashable, float] = defaultdict(float)
    numbers["parameters", "student"] = trace.parameters
    numbers["parameters", "teacher"] = trace.teacher_parameters
    for phase, memory in trace.memory.items():
        for place, size in memory.peak.items():
            numbers["peak", (phase, place)] = size
        for line, size in memory.holders.get(DEVICE, {}).items():
            numbers["holder", (phase, line)] = size
        numbers["flops", phase] = trace.costs.flops[phase]
        numbers["seconds", phase] = trace.costs.seconds[phase]
    for call in trace.calls[trace.calls_before :]:
        kind = Messages(call.phase, call.group, call.name)
        numbers["calls", kind] += 1
        numbers["sent", kind] += call.bytes
        numbers["waiting", call.phase] += trace.costs.collective_seconds(call)
    for copied, copies in trace.copies.items():
        numbers["copies", copied] = copies.number
        numbers["copied", copied] = copies.bytes
    for read, count in trace.reads.items():
        numbers["reads", read] = count
    return Summary(trace.rank, trace.stage, dict(numbers))


def trace_ranks(config: RunConfig, plan: Plan, ranks: list[int], rates: Rates, count: int) -> dict[int, RankTrace]:
    """The last stage's first rank goes first: it tells the others what it has found."""
    world, stages = plan.world_size, config.parallel.pipeline_model_parallel_size
    first_of_last = world - world // stages
    told, prompt = Told(), plan.sequence_length - config.rollouts.max_new_tokens
    rollouts = Rollouts(count, prompt, config.rollouts.max_new_tokens)
    order = sorted({*ranks, first_of_last} if stages > 1 else {*ranks}, key=lambda rank: (rank != first_of_last, rank))
    return {rank: trace_rank(config, rank, world, rollouts, rates, told) for rank in order}


def _shared(traces: dict[int, RankTrace]) -> int:
    ranks = set(traces)
    return sum(len(ranks & set(call.ranks)) > 1 for call in next(iter(traces.values())).calls)


def extended(
    samples: dict[tuple[int, int], dict[int, Summary]],
    rank: int,
    parts: list[int],
    batches: list[int],
    whole: tuple[int, int],
) -> dict[Hashable, float]:
    """Numbers at `whole` parts and micro-batches, on the plane through the samples of a rank."""
    keys = {key: None for sample in samples.values() for key in sample[rank].numbers}

    def line(low: float, high: float, places: list[int], at: int) -> float:
        return low + (high - low) * (at - places[0]) / (places[1] - places[0]) if len(places) > 1 else low

    def value(key: Hashable) -> float:
        by_part = []
        for part in parts:
            low, high = (samples[part, count][rank].numbers.get(key, 0.0) for count in (batches[0], batches[-1]))
            by_part.append(line(low, high, batches, whole[1]))
        return max(0.0, line(by_part[0], by_part[-1], parts, whole[0]))

    return {key: value(key) for key in keys}


def _layer_types(config: RunConfig, student: bool) -> list[str]:
    model = config.student if student else config.teacher
    fields = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    return fields.get("layer_types") or []


def _period(kinds: list[str]) -> int:
    """After how many layers their kinds repeat."""
    return next((n for n in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))), 1)
