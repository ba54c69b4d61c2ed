"""Seconds of a step, term by term: rollouts, weight update, teacher, scores, training, optimizer, saves. No torch.

A term is a product of what the configuration, the shapes and the lengths say, divided by a rate of the machine; its
formula says so in words. Nothing is fitted here: `calibration` changes rates, not formulas.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_sead.config.checks import data_parallel_size, needs_scores_of_whole_step, weighted_share
from megatron_sead.config.run import RunConfig
from megatron_sead.planning.decoding import Decoding, decoding
from megatron_sead.planning.lengths import Lengths
from megatron_sead.planning.micro_batches import Batches, micro_batches
from megatron_sead.planning.rates import Rates
from megatron_sead.planning.remembered import RememberedShape
from megatron_sead.planning.work import (
    FORWARD_KERNELS,
    FP32,
    Cost,
    Passes,
    Setting,
    head_costs,
    launches,
    layer_costs,
)

PHASES = ("rollouts", "update", "teacher", "scores", "training", "optimizer", "saves")
# What metrics.jsonl measures, and the phases in it
MEASURED = {
    "rollout_seconds": ("rollouts",),
    "sync_seconds": ("update",),
    "score_seconds": ("teacher", "scores"),
    "train_seconds": ("training", "optimizer"),
}
BOUND = {  # what binds, by the rate
    "bf16_tflops": "products",
    "fp32_tflops": "products",
    "memory_gb": "GPU memory's bandwidth",
    "kernel_microseconds": "launches of kernels",
    "node_link_gb": "links within nodes",
    "network_gb": "links between nodes",
    "collective_microseconds": "latency of collectives",
    "host_link_gb": "the host's link",
    "disk_gb": "disks",
    "decode_calls": "decoding",
    "decode_work": "decoding",
    "update": "the weight update",
}
BUBBLE = "pipeline bubble"
ZONE_CALLS = 25  # two selections by 11 histograms each, of the tokens' entropies and keys; their range and number
METRIC_CALLS = 14
PROBE = 65  # tokens that are scored after an update
TENSOR_KERNELS = 12  # of the optimizer, a tensor
ADAM_BYTES = 84  # a parameter of the share: lists of tensors, an operation after the other, as traces count them
SAVED_WIDTHS = 12  # main weight and two moments


@dataclass(frozen=True)
class Term:
    """Seconds of a step on the rank that has most to do."""

    phase: str
    name: str
    seconds: float
    formula: str
    binds: str
    parts: dict[str, float] = field(default_factory=dict)  # seconds by the field of `Rates` that they follow


@dataclass(frozen=True)
class Prediction:
    """A step's seconds."""

    terms: list[Term]
    micro_batches: int  # of a rank and step, by the lengths
    rollouts_at_once: int  # of one copy of the engine's model; 0: none are written

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    def of_phase(self, phase: str) -> float:
        return sum(term.seconds for term in self.terms if term.phase == phase)

    @property
    def bubble(self) -> float:
        """Share of the training pass in which a stage waits for others."""
        bubble = sum(t.seconds for t in self.terms if t.phase == "training" and t.binds == BUBBLE)
        return bubble / whole if (whole := self.of_phase("training")) else 0.0

    @property
    def binds(self) -> tuple[str, float]:
        """What most seconds go to, and which share of the step."""
        shares: defaultdict[str, float] = defaultdict(float)
        for term in self.terms:
            shares[term.binds] += term.seconds
        name, seconds = max(shares.items(), key=lambda item: item[1])
        return name, seconds / self.seconds


def predict(
    config: RunConfig,
    world: int,
    student: RememberedShape,
    teacher: RememberedShape,
    rates: Rates,
    lengths: Lengths,
    cache: float | None = None,
) -> Prediction:
    """Seconds of a step.

    Args:
        cache: bytes of a rank's KV cache while the engine writes; None: as much as it needs.
    """
    where = setting_of(config, world, rates)
    written = None if config.rollouts.recorded else decoding(where, student, lengths, cache)
    batch = micro_batches(config, where.replicas, lengths)
    return joined(where, written, training_terms(where, student, teacher, batch), batch)


def setting_of(config: RunConfig, world: int, rates: Rates) -> Setting:
    """Of a layout that the ranks make whole."""
    return Setting(config, world, data_parallel_size(config.parallel, world), rates)


def training_terms(where: Setting, student: RememberedShape, teacher: RememberedShape, batch: Batches) -> list[Term]:
    """All but the rollouts."""
    return [*shared_terms(where, student, teacher, batch), *own_terms(where, student, teacher, batch)]


def shared_terms(where: Setting, student: RememberedShape, teacher: RememberedShape, batch: Batches) -> list[Term]:
    """Those that neither recomputation nor offload changes."""
    return [
        *_update(where, student),
        *_teacher(where, teacher, batch),
        *_scores(where, student, teacher, batch),
        *_optimizer(where, student, batch),
        *_saves(where, student),
    ]


def own_terms(where: Setting, student: RememberedShape, teacher: RememberedShape, batch: Batches) -> list[Term]:
    """Those that recomputation and offload change."""
    return [*_arrival(where, teacher), *_training(where, student, teacher, batch)]


def joined(where: Setting, written: Decoding | None, trained: list[Term], batch: Batches) -> Prediction:
    """A step from its parts.

    Args:
        written: None: the rollouts are recorded ones.
    """
    terms = [*rollout_terms(where, written), *trained] if written is not None else trained
    if where.config.rollouts.overlap and written is not None:
        terms += _done_meanwhile([term for term in trained if term.phase == "teacher"], written)
    at_once = written.at_once if written is not None else 0
    in_order = sorted((term for term in terms if term.seconds), key=lambda term: PHASES.index(term.phase))
    return Prediction(in_order, batch.count, at_once)


# --- Rollouts and weights ---------------------------------------------------------------------------------------------


def rollout_terms(where: Setting, found: Decoding) -> list[Term]:
    """Of rollouts that are written as `decoding` says."""
    calls, work = where.rates.decode_calls, where.rates.decode_work

    def term(name: str, fixed: float, moving: float, formula: str, binds: str) -> Term:
        parts = {"decode_calls": calls * fixed, "decode_work": work * moving}
        return Term("rollouts", name, sum(parts.values()), formula, binds, parts)

    body = found.calls - found.tail_calls, found.work - found.tail_work
    return [
        term("prompts", 0.0, found.prompts, f"read by the copy with the longest: {found.told['share']}", "decoding"),
        term(
            "decoding",
            *body,
            f"{found.steps:,} steps of the copy with the longest, {found.told['share']}; a step: {found.told['step']}",
            "decoding",
        ),
        term(
            "tail",
            found.tail_calls,
            found.tail_work,
            "steps in which its last tenth, or its last one, is being written",
            "the tail of rollouts",
        ),
    ]


def _update(where: Setting, student: RememberedShape) -> Iterator[Term]:
    if where.config.rollouts.recorded is not None:
        return
    rates, tp, stages = where.rates, where.tp, where.stages
    size, latency = where.width * student.parameters, rates.collective_microseconds / 1e6
    gathered = size * (tp - 1) / tp / where.at(where.link(tp)) + (tp > 1) * student.tensors * latency
    sent = (stages > 1) * (size / where.at(where.link(where.world)) + student.tensors * latency)
    copied = 2 * size / where.at("memory_gb") + student.tensors * rates.kernel_microseconds / 1e6
    kernels = (stages + 1) * student.layers / stages * FORWARD_KERNELS + student.layers * FORWARD_KERNELS
    probe = kernels * rates.kernel_microseconds / 1e6
    for name, seconds, formula in (
        ("gathered", gathered, f"{size:.3g} B x {tp - 1}/{tp}, {student.tensors} tensors"),
        ("sent between stages", sent, f"{size:.3g} B, {student.tensors} tensors"),
        ("taken by the engine", copied, f"2 x {size:.3g} B at {rates.memory_gb:g} GB/s, {student.tensors} copies"),
        ("checked", probe, f"{PROBE} tokens by student and engine: {kernels:,.0f} launches"),
    ):
        seconds *= rates.update
        yield Term("update", name, seconds, formula, BOUND["update"], {"update": seconds})


# --- Passes of the models ---------------------------------------------------------------------------------------------


def _arrival(where: Setting, teacher: RememberedShape) -> Iterator[Term]:
    if where.config.teacher.offload and where.config.device == "cuda":
        fullest = max(teacher.rank_parameters(s, where.config.parallel) for s in {0, where.stages - 1})
        size = where.width * fullest
        yield _term("teacher", _to_gpu(where, "weights to the GPU", size, f"{fullest:,} x {where.width} B"))


def _teacher(where: Setting, teacher: RememberedShape, batch: Batches) -> Iterator[Term]:
    yield from _pass_terms("teacher", where, teacher, batch, Passes(), [])
    if where.config.device == "cuda":
        size = batch.count * where.width * batch.responses / where.split * teacher.hidden
        told = f"{batch.count} x {batch.responses / where.split:,.0f} tokens x {teacher.hidden} x {where.width} B"
        yield _term("teacher", _to_gpu(where, "hidden states to the host", size, told))


def _done_meanwhile(terms: Sequence[Term], written: Decoding) -> list[Term]:
    """With rollouts.overlap the teacher scores while other copies still write."""
    waiting, whole = max(0.0, written.total - written.mean), sum(term.seconds for term in terms)
    if not whole or not waiting:
        return []
    share = min(waiting, whole) / whole
    parts: defaultdict[str, float] = defaultdict(float)
    for term in terms:
        for rate, seconds in term.parts.items():
            parts[rate] -= share * seconds
    told = (
        f"at most {waiting:.3g} s: the longest copy's {written.total:.3g} s less the mean copy's {written.mean:.3g} s"
    )
    return [Term("teacher", "while others write", -share * whole, told, "products", dict(parts))]


def _scores(where: Setting, student: RememberedShape, teacher: RememberedShape, batch: Batches) -> Iterator[Term]:
    if not needs_scores_of_whole_step(where.config) or batch.count == 1:
        return
    heads = head_costs(where, student, teacher, batch, score=True, active=0.0)
    yield from _pass_terms("scores", where, student, batch, Passes(), heads)


def _training(where: Setting, student: RememberedShape, teacher: RememberedShape, batch: Batches) -> Iterator[Term]:
    config = where.config
    if config.device == "cuda":
        size = batch.count * where.width * batch.responses / where.split * teacher.hidden
        yield _term("training", _to_gpu(where, "hidden states to the GPU", size, f"{size:.3g} B"))
    scored = needs_scores_of_whole_step(config) and batch.count > 1
    heads = head_costs(where, student, teacher, batch, score=not scored, active=weighted_share(config))
    passes = Passes(backward=True, recompute=config.training.recompute_granularity)
    yield from _pass_terms("training", where, student, batch, passes, heads)
    if where.replicas > 1:
        yield _term("scores" if scored else "training", where.calls("zones, calls", ZONE_CALLS))
        yield _term("training", where.calls("metrics, calls", METRIC_CALLS))


def _pass_terms(
    phase: str, where: Setting, shape: RememberedShape, batch: Batches, passes: Passes, heads: list[Cost]
) -> Iterator[Term]:
    """All micro-batches through all stages: the slowest stage's work for each, and the others' once, to fill and drain.

    Args:
        heads: work of the last stage beside its layers.
    """
    stages = shape.layers_by_window(where.config.parallel)
    kinds = {frozenset(layers.items()): layers for layers in stages}  # most stages have the same layers
    known = {kind: layer_costs(where, shape, layers, batch, passes) for kind, layers in kinds.items()}
    by_stage = [known[frozenset(layers.items())] for layers in stages]
    by_stage[-1] = by_stage[-1] + heads
    totals = [sum(cost.seconds for cost in costs) for costs in by_stage]
    slowest = max(range(len(totals)), key=lambda stage: totals[stage])
    for cost in by_stage[slowest]:
        yield _term(phase, cost, batch.count, f"{batch.count} micro-batches: {cost.formula}")
    if where.stages == 1:
        return
    chunks = shape.split(where.config.parallel).chunks
    directions, messages = 1 + passes.backward, batch.count * chunks
    size = directions * messages * where.width * batch.tokens / where.split * shape.hidden
    told = f"{messages} x {where.width} B x {batch.tokens / where.split:,.0f} tokens x {shape.hidden} x {directions}"
    for cost in where.messages("between stages", size, directions * messages, where.link(where.world), told):
        yield _term(phase, cost)
    waits: defaultdict[str, float] = defaultdict(float)
    for stage, costs in enumerate(by_stage):
        for cost in costs:
            if stage != slowest:
                waits[cost.rate] += cost.seconds / chunks
    seconds = float(sum(waits.values()))
    told = f"{where.stages - 1} other stages' {seconds * chunks:.3g} s a micro-batch / {chunks} chunks"
    yield Term(phase, BUBBLE, seconds, told, BUBBLE, dict(waits))


def _term(phase: str, cost: Cost, times: float = 1, formula: str | None = None) -> Term:
    seconds = times * cost.seconds
    return Term(phase, cost.name, seconds, formula or cost.formula, BOUND[cost.rate], {cost.rate: seconds})


def _to_gpu(where: Setting, name: str, size: float, told: str) -> Cost:
    rate = where.rates.host_link_gb
    return Cost(name, "host_link_gb", size / where.at("host_link_gb"), f"{told} at {rate:g} GB/s")


# --- The update of the student ----------------------------------------------------------------------------------------


def _optimizer(where: Setting, student: RememberedShape, batch: Batches) -> Iterator[Term]:
    config, parallel = where.config, where.config.parallel
    stage = max((0, where.stages - 1), key=lambda s: student.rank_parameters(s, parallel))
    count, replicas = student.rank_parameters(stage, parallel), where.replicas * where.cp
    distributed = config.training.use_distributed_optimizer
    if replicas > 1:
        yield from _reduction(where, count, _backward_seconds(where, student, batch))
    shard = count / replicas if distributed else count
    size = ADAM_BYTES * shard + (FP32 + FP32) * count  # gradients are emptied, and their norm taken
    told = f"{ADAM_BYTES} B x {shard:,.0f} and 8 B x {count:,} parameters at {where.rates.memory_gb:g} GB/s"
    adam = Cost("Adam", "memory_gb", size / where.at("memory_gb"), told)
    yield _term("optimizer", adam)
    kernels = student.tensors / where.stages * TENSOR_KERNELS
    yield _term("optimizer", launches(where, kernels, [adam], f"{kernels:,.0f} kernels"))


def _backward_seconds(where: Setting, student: RememberedShape, batch: Batches) -> float:
    """Of the last micro-batch on a stage, behind which gradients are reduced."""
    if where.config.device != "cuda":
        return 0.0
    layers = student.layers_by_window(where.config.parallel)[0]
    return 2 * sum(cost.seconds for cost in layer_costs(where, student, layers, batch, Passes())[:2])


def _reduction(where: Setting, count: int, hidden: float) -> Iterator[Term]:
    replicas, rates = where.replicas * where.cp, where.rates
    link = where.link(where.tp * replicas)
    share, rate = (replicas - 1) / replicas, getattr(rates, link)
    back = where.width if where.config.training.use_distributed_optimizer else FP32
    summed, gathered = (size * count * share / where.at(link) for size in (FP32, back))
    exposed = max(0.0, summed - hidden)
    told = f"{FP32} B x {count:,} x {replicas - 1}/{replicas} at {rate:g} GB/s"
    if hidden:
        told += f", less {hidden:.3g} s of the last micro-batch's backward pass"
    for cost in (
        Cost("gradients summed", link, exposed, told),
        Cost("weights gathered", link, gathered, f"{back} B x {count:,} x {replicas - 1}/{replicas} at {rate:g} GB/s"),
        where.calls("data-parallel calls", 4),
    ):
        yield _term("optimizer", cost)


def _saves(where: Setting, student: RememberedShape) -> Iterator[Term]:
    interval = where.config.checkpoints.interval
    if not interval:
        return
    nodes = -(-where.world // where.rates.gpus_per_node)
    a_parameter = SAVED_WIDTHS + (where.width if where.width < FP32 else 0)
    size = a_parameter * student.parameters
    seconds = size / nodes / where.at("disk_gb") / interval
    told = f"{a_parameter} B x {student.parameters:,} / {nodes} nodes at {where.rates.disk_gb:g} GB/s"
    told += f", every {interval} steps"
    yield _term("saves", Cost("checkpoint", "disk_gb", seconds, told))
