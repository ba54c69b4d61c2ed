"""Seconds of one micro-batch on one rank, of each kind of work: products, attention, elementwise work, launches of
kernels, messages between tensor-parallel ranks. No torch: what a trace counts is written out here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sead.config.micro_batches import sequence_shards
from megatron_sead.config.run import RunConfig
from megatron_sead.planning.micro_batches import Batches
from megatron_sead.planning.rates import Rates
from megatron_sead.planning.remembered import RememberedShape

# Shapes: t tokens of a micro-batch; u of them between the tensor-parallel parts of a layer; n response tokens; h hidden
# size, q and k query and key width, f feed-forward width, V padded vocabulary, of the whole model

FP32 = 4
# Bytes that a layer's elementwise work reads and writes, in widths of an activation a token: as traces of steps at
# true widths count them
FORWARD_HIDDEN, FORWARD_HEADS, FORWARD_FFN = 36.0, 20.0, 5.0
BACKWARD_HIDDEN, BACKWARD_HEADS, BACKWARD_FFN = 20.0, 15.0, 25.0
FORWARD_KERNELS, BACKWARD_KERNELS = 50, 100  # of a layer
ADDED_BYTES = 22  # a weight and micro-batch: its gradient is made, and added to the sum in fp32
HEAD_KERNELS, LOSS_KERNELS = 60, 120  # of a chunk of tokens
LOGIT_PASSES = 5  # reads and writes of a chunk's fp32 logits
GRADIENT_BYTES = 12  # of the head's gradient, by each chunk of the loss
GATHERS_FORWARD, GATHERS_BACKWARD = 4, 6  # and scatters, of a layer with sequence parallelism
REDUCES = 2  # of a layer without
BACKWARD_ATTENTION = 2.5  # five products beside two


@dataclass(frozen=True)
class Cost:
    """Seconds of one kind of work."""

    name: str
    rate: str  # the field of `Rates` that they follow
    seconds: float
    formula: str


@dataclass(frozen=True)
class Setting:
    """A run on so many ranks of a machine."""

    config: RunConfig
    world: int
    replicas: int
    rates: Rates

    @property
    def tp(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def cp(self) -> int:
        return self.config.parallel.context_parallel_size

    @property
    def stages(self) -> int:
        return self.config.parallel.pipeline_model_parallel_size

    @property
    def split(self) -> int:
        """Parts of the tokens between a layer's tensor-parallel parts."""
        return sequence_shards(self.config.parallel)

    @property
    def width(self) -> int:
        return 2 if self.config.training.precision == "bf16" else FP32

    @property
    def flops(self) -> str:
        """The rate of products."""
        return "bf16_tflops" if self.width == 2 else "fp32_tflops"

    def link(self, span: int) -> str:
        """The rate between ranks the first and last of which are `span` apart."""
        return self.rates.link(within=span <= self.rates.gpus_per_node)

    def at(self, rate: str) -> float:
        """A second's work: FLOP, bytes."""
        return float(getattr(self.rates, rate)) * (1e12 if rate.endswith("tflops") else 1e9)

    def messages(self, name: str, size: float, calls: float, link: str, formula: str) -> Iterator[Cost]:
        """So many bytes through each rank, in so many calls."""
        rate = getattr(self.rates, link)
        yield Cost(name, link, size / self.at(link), f"{formula} at {rate:g} GB/s")
        yield self.calls(f"{name}, calls", calls)

    def calls(self, name: str, count: float) -> Cost:
        """What so many collectives take at least, however little they send."""
        least = self.rates.collective_microseconds
        return Cost(name, "collective_microseconds", count * least / 1e6, f"{count:,.0f} calls x {least:g} us")


@dataclass(frozen=True)
class Passes:
    """How often a stage's layers run."""

    backward: bool = False
    recompute: str | None = None

    @property
    def forward(self) -> int:
        return 2 if self.recompute == "full" else 1

    @property
    def products(self) -> int:
        return self.forward + 2 * self.backward

    @property
    def attention(self) -> float:
        return 1 + (self.recompute is not None) + BACKWARD_ATTENTION * self.backward


def layer_costs(
    where: Setting, shape: RememberedShape, layers: Counter[int | None], batch: Batches, passes: Passes
) -> list[Cost]:
    """Of one micro-batch in a stage's layers.

    Args:
        layers: how many the stage has of each window; None: without.
    """
    busy = [*_products(where, shape, layers, batch, passes), _elementwise(where, shape, layers, batch, passes)]
    count = layers.total()
    if passes.backward:
        busy.append(_added_gradients(where, shape, count))
    kernels = count * (FORWARD_KERNELS * passes.forward + BACKWARD_KERNELS * passes.backward)
    told = f"{count} layers x {kernels // max(1, count)} kernels"
    messages = [*_between_ranks(where, shape, count, batch, passes), *_keys(where, shape, layers, batch, passes)]
    return [*busy, launches(where, kernels, busy, told), *messages]


def launches(where: Setting, kernels: float, busy: list[Cost], told: str) -> Cost:
    """What launching kernels takes beside their work: on a GPU, which is told ahead, what the work does not hide."""
    least = where.rates.kernel_microseconds
    seconds = kernels * least / 1e6
    if where.config.device == "cuda":
        seconds = max(0.0, seconds - sum(cost.seconds for cost in busy))
        told += ", beyond the work itself"
    return Cost("launches", "kernel_microseconds", seconds, f"{told} x {least:g} us")


def _products(
    where: Setting, shape: RememberedShape, layers: Counter[int | None], batch: Batches, passes: Passes
) -> Iterator[Cost]:
    t, tp, rate = batch.tokens, where.tp, where.flops
    matrices, count = _matrices(shape), layers.total()
    told = f"at {getattr(where.rates, rate):g} TFLOP/s"
    yield Cost(
        "products",
        rate,
        count * passes.products * 2 * t * matrices / tp / where.at(rate),
        f"{passes.products} x {count} layers x 2 x {t:,.0f} tokens x {matrices:,} weights / {tp} {told}",
    )
    seen = sum(number * batch.span(window) for window, number in layers.items())
    yield Cost(
        "attention",
        rate,
        passes.attention * 4 * t * seen * shape.query_width / tp / where.at(rate),
        f"{passes.attention:g} x 4 x {t:,.0f} tokens x {seen:,.0f} keys seen, of {count} layers, x "
        f"{shape.query_width} / {tp} {told}",
    )


def _matrices(shape: RememberedShape) -> int:
    """Weights of a layer's products."""
    return shape.hidden * (2 * shape.query_width + 2 * shape.key_width + 3 * shape.ffn)


def _added_gradients(where: Setting, shape: RememberedShape, count: int) -> Cost:
    size = ADDED_BYTES * count * _matrices(shape) / where.tp
    told = f"{ADDED_BYTES} B x {count} layers x {_matrices(shape):,} weights / {where.tp}"
    return Cost(
        "gradients added", "memory_gb", size / where.at("memory_gb"), f"{told} at {where.rates.memory_gb:g} GB/s"
    )


def _elementwise(
    where: Setting, shape: RememberedShape, layers: Counter[int | None], batch: Batches, passes: Passes
) -> Cost:
    """Norms, rotary angles, SwiGLU and residuals."""
    heads, t, count = shape.query_width + 2 * shape.key_width, batch.tokens, layers.total()

    def widths(hidden: float, of_heads: float, ffn: float) -> float:
        return hidden * shape.hidden / where.split + (of_heads * heads + ffn * shape.ffn) / where.tp

    moved = passes.forward * widths(FORWARD_HIDDEN, FORWARD_HEADS, FORWARD_FFN)
    if passes.backward:
        moved += widths(BACKWARD_HIDDEN, BACKWARD_HEADS, BACKWARD_FFN)
    size = count * where.width * t * moved
    told = f"{count} layers x {where.width} B x {t:,.0f} tokens x {moved:,.0f} elements"
    return Cost("elementwise", "memory_gb", size / where.at("memory_gb"), f"{told} at {where.rates.memory_gb:g} GB/s")


def _between_ranks(
    where: Setting, shape: RememberedShape, count: int, batch: Batches, passes: Passes
) -> Iterator[Cost]:
    tp, t = where.tp, batch.tokens
    if tp == 1:
        return
    if where.split > 1:
        calls = rounds = passes.forward * GATHERS_FORWARD + passes.backward * GATHERS_BACKWARD
    else:  # an all-reduce moves as much as a scatter and a gather
        calls = REDUCES * (passes.forward + passes.backward)
        rounds = 2 * calls
    if shape.norm == "width":  # of queries and keys: sums over all heads
        calls += 2 * (passes.forward + passes.backward)
    size = count * rounds * where.width * t * shape.hidden * (tp - 1) / tp
    told = f"{count} layers x {rounds} x {where.width} B x {t:,.0f} tokens x {shape.hidden} x {tp - 1}/{tp}"
    yield from where.messages("tensor-parallel messages", size, count * calls, where.link(tp), told)


def _keys(
    where: Setting, shape: RememberedShape, layers: Counter[int | None], batch: Batches, passes: Passes
) -> Iterator[Cost]:
    """Keys and values that context-parallel ranks have for each other: all, or those inside a window. Backward they
    are gathered again, and their gradients summed."""
    cp = where.cp
    if cp == 1:
        return
    rounds, whole = passes.forward + 2 * passes.backward, cp * batch.tokens
    moved = sum(count * min(whole * (cp - 1) / cp, 2 * (window or whole)) for window, count in layers.items())
    size = rounds * 2 * where.width * moved * shape.key_width / where.tp
    told = f"{rounds} x 2 x {where.width} B x {moved:,.0f} tokens of {layers.total()} layers x {shape.key_width} / "
    told += f"{where.tp}"
    yield from where.messages("keys and values", size, rounds * layers.total(), where.link(where.tp * cp), told)


def head_costs(
    where: Setting, student: RememberedShape, teacher: RememberedShape, batch: Batches, *, score: bool, active: float
) -> list[Cost]:
    """Of the last stage: statistics of the response tokens, and the loss of those with a weight.

    Args:
        score: are statistics taken in this pass?
        active: share of the response tokens that the loss is of; 0: there is none.
    """
    vocabulary, h, both = student.padded_vocabulary, student.hidden, student.hidden + teacher.hidden
    n, tp, rate, memory = batch.responses, where.tp, where.flops, where.at("memory_gb")
    taught = n * active
    rows = max(1.0, where.config.training.scratch_bytes / (FP32 * (2 * vocabulary / tp + 4 * both)))
    chunks = (max(1.0, n / rows) if score else 0.0) + (max(1.0, taught / rows) if active else 0.0)
    of_loss = max(1.0, taught / rows) if active else 0.0
    flop = 2 * vocabulary / tp * (both * (n * score + taught) + 2 * h * taught)
    size = LOGIT_PASSES * FP32 * vocabulary / tp * (n * score + taught)
    size += of_loss * GRADIENT_BYTES * vocabulary / tp * h
    told = f"{n:,.0f} tokens scored, " * score + f"{taught:,.0f} taught"
    busy = [
        Cost(
            "heads' products",
            rate,
            flop / where.at(rate),
            f"2 x {vocabulary:,} / {tp} x {both} x ({told}) = {flop:.3g} FLOP, gradients too, "
            f"at {getattr(where.rates, rate):g} TFLOP/s",
        ),
        Cost(
            "heads' elementwise",
            "memory_gb",
            size / memory,
            f"{chunks:.1f} chunks of {vocabulary:,} / {tp} logits a token = {size:.3g} B at "
            f"{where.rates.memory_gb:g} GB/s",
        ),
    ]
    kernels = (chunks - of_loss) * HEAD_KERNELS + of_loss * LOSS_KERNELS
    costs = [*busy, launches(where, kernels, busy, f"{chunks:.1f} chunks, {kernels:,.0f} kernels")]
    if tp > 1:
        gathered = where.width * batch.tokens * both * (tp - 1) / tp if where.split > 1 else 0.0
        costs += where.messages(
            "heads' messages", gathered, 3 * chunks, where.link(tp), f"hidden states {gathered:.3g} B"
        )
    return costs
