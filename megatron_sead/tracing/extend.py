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

from megatron_sead.config.micro_batches import count_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.models.slabs import aligned, slabs
from megatron_sead.planning.plan import Plan
from megatron_sead.planning.rates import Rates
from megatron_sead.tracing.calls import disagreements, shared
from megatron_sead.tracing.memory import DEVICE, PINNED, rounded
from megatron_sead.tracing.step import RankTrace, Rollouts, trace_rank
from megatron_sead.tracing.watch import Record
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
        calls, sent (by `Messages`), copied, copies, waited (by phase, direction and line), reads (by phase and line),
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
    parts, batches = few_parts(config, plan), few_micro_batches(config, plan)
    samples: dict[tuple[int, int], dict[int, Summary]] = {}
    sizes: dict[int, dict[int, list[list[int]]]] = {rank: {} for rank in ranks}
    found, meet = list[str](), 0
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            traces = trace_ranks(with_layers(config, plan, part, Path(folder, str(part))), plan, ranks, rates, *batches)
            for number, count in enumerate(batches, 1):
                samples[part, count] = {rank: summarize(traces[rank], number) for rank in ranks}
            for rank in ranks:
                sizes[rank][part] = traces[rank].teacher_sizes
            calls = {rank: traces[rank].calls for rank in ranks}
            found += disagreements(calls)
            meet = max(meet, shared(calls))
    whole = parts_in_all(config, plan), plan.micro_batches
    pinned = config.teacher.offload
    summaries = [
        Summary(
            rank,
            samples[parts[0], batches[0]][rank].stage,
            extended(samples, rank, parts, batches, whole, sizes[rank] if pinned else {}),
        )
        for rank in ranks
    ]
    layers = [plan.student.layers * part // whole[0] for part in parts]
    return Traced(summaries, list(dict.fromkeys(found)), meet, layers, batches)


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


def summarize(trace: RankTrace, step: int) -> Summary:
    """A trace's numbers, with those of one of its steps."""
    numbers: defaultdict[Hashable, float] = defaultdict(float)
    numbers["parameters", "student"] = trace.parameters
    numbers["parameters", "teacher"] = trace.teacher_parameters
    for part in trace.parts(step):
        _add(numbers, part)
    return Summary(trace.rank, trace.stage, dict(numbers))


def _add(numbers: defaultdict[Hashable, float], part: Record) -> None:
    for phase, memory in part.memory.items():
        for place, size in memory.peak.items():
            numbers["peak", (phase, place)] = size
        for line, size in memory.holders.get(DEVICE, {}).items():
            numbers["holder", (phase, line)] = size
        numbers["flops", phase] = part.costs.flops[phase]
        numbers["seconds", phase] = part.costs.seconds[phase]
    for call in part.calls:
        kind = Messages(call.phase, call.group, call.name)
        numbers["calls", kind] += 1
        numbers["sent", kind] += call.bytes
        numbers["waiting", call.phase] += part.costs.collective_seconds(call)
    for copied, copies in part.copies.items():
        numbers["copies", copied] = copies.number
        numbers["copied", copied] = copies.bytes
        numbers["waited", copied] = copies.waited_for
    for read, count in part.reads.items():
        numbers["reads", read] = count


def trace_ranks(config: RunConfig, plan: Plan, ranks: list[int], rates: Rates, *counts: int) -> dict[int, RankTrace]:
    """Steps of so many micro-batches, after a first one of as few as can be. The last stage's first rank goes first:
    it tells the others what it has found."""
    world, stages = plan.world_size, config.parallel.pipeline_model_parallel_size
    first_of_last = world - world // stages
    told, prompt = Told(), plan.sequence_length - config.rollouts.max_new_tokens
    rollouts = [
        Rollouts(count, prompt, config.rollouts.max_new_tokens) for count in (count_multiple(config.parallel), *counts)
    ]
    order = sorted({*ranks, first_of_last} if stages > 1 else {*ranks}, key=lambda rank: (rank != first_of_last, rank))
    return {rank: trace_rank(config, rank, world, rollouts, rates, told) for rank in order}


def extended(
    samples: dict[tuple[int, int], dict[int, Summary]],
    rank: int,
    parts: list[int],
    batches: list[int],
    whole: tuple[int, int],
    teacher: dict[int, list[list[int]]],
) -> dict[Hashable, float]:
    """Numbers at `whole` parts and micro-batches, on the plane through the samples of a rank.

    Args:
        teacher: by part, sizes of the tensors that lie in pinned slabs: their rounding is no line, and follows from all
            layers' sizes.
    """
    keys = {key: None for sample in samples.values() for key in sample[rank].numbers}
    slabs_of = {part: pinned_bytes(sizes) for part, sizes in teacher.items()}
    slabs_of_all = pinned_bytes(all_sizes(teacher, whole[0])) if teacher else 0

    def line(low: float, high: float, places: list[int], at: int) -> float:
        return low + (high - low) * (at - places[0]) / (places[1] - places[0]) if len(places) > 1 else low

    def value(key: Any) -> float:
        is_rounded = bool(teacher) and key[0] == "peak" and key[1][1] == PINNED
        by_part = []
        for part in parts:
            low, high = (samples[part, count][rank].numbers.get(key, 0.0) for count in (batches[0], batches[-1]))
            by_part.append(line(low, high, batches, whole[1]) - (slabs_of[part] if is_rounded else 0))
        return max(0.0, line(by_part[0], by_part[-1], parts, whole[0]) + (slabs_of_all if is_rounded else 0))

    return {key: value(key) for key in keys}


def pinned_bytes(chunks: list[list[int]]) -> int:
    """Of the slabs that tensors of these sizes take."""
    sizes = [size for chunk in chunks for size in chunk]
    return sum(rounded(sum(aligned(sizes[number]) for number in slab), PINNED) for slab in slabs(sizes))


def all_sizes(by_part: dict[int, list[list[int]]], parts: int) -> list[list[int]]:
    """Each chunk's sizes in a model of so many parts, from those of one and two parts: one more part comes in where
    the two differ."""
    if parts in by_part:
        return by_part[parts]
    found = []
    for one, two in zip(by_part[1], by_part[2], strict=True):
        more = len(two) - len(one)
        place = next(n for n in range(len(one) + 1) if one[n:] == two[n + more :] and one[:n] == two[:n])
        found.append(one[:place] + two[place : place + more] * (parts - 1) + one[place:])
    return found


def _layer_types(config: RunConfig, student: bool) -> list[str]:
    model = config.student if student else config.teacher
    fields = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    return fields.get("layer_types") or []


def _period(kinds: list[str]) -> int:
    """After how many layers their kinds repeat."""
    return next((n for n in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[n:], strict=False))), 1)
