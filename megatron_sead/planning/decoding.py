"""Seconds in which a step's rollouts are written: prompts, decoding with fewer and fewer at once, and the last ones."""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.rollouts import TransformersRollouts, VllmRollouts
from megatron_sead.planning.lengths import Lengths
from megatron_sead.planning.remembered import RememberedShape
from megatron_sead.planning.work import FORWARD_KERNELS, Setting

GRAPH_KERNELS = 1  # launches a layer that a CUDA graph is felt as
COMPILED_KERNELS = 15  # of a layer of vLLM without graphs
TAIL = 10  # the tail begins when fewer than so many times fewer rollouts are being written


@dataclass(frozen=True)
class Segment:
    """Decoding steps in which as many rollouts are being written."""

    steps: int
    live: int
    age: float  # tokens that each has written, on average, in its middle


@lru_cache(maxsize=4096)
def segments(lengths: tuple[int, ...], at_once: int) -> tuple[Segment, ...]:
    """What one copy of the model does: `at_once` rollouts, and the next one as soon as one ends."""
    waiting = list(lengths)
    random.Random(0).shuffle(waiting)  # nobody knows before which is long
    running: list[tuple[int, int]] = []  # end, begin
    found, now = [], 0
    while waiting or running:
        while waiting and len(running) < at_once:
            heapq.heappush(running, (now + waiting.pop(), now))
        end = running[0][0]
        if end > now:
            middle = (now + end) / 2
            age = middle - sum(begin for _, begin in running) / len(running)
            found.append(Segment(end - now, len(running), age))
        now = end
        while running and running[0][0] == now:
            heapq.heappop(running)
    return tuple(found)


@dataclass(frozen=True)
class Decoding:
    """Seconds of the copy of the model that writes the longest rollout."""

    prompts: float
    steps: int
    calls: float  # the fixed part of all decoding steps
    work: float  # the rest, by the rollouts being written
    tail_calls: float  # of these, while the last tenth are being written
    tail_work: float
    mean: float  # of all copies, whole
    at_once: int
    share: int
    told: dict[str, str] = field(default_factory=dict)

    @property
    def total(self) -> float:
        return self.prompts + self.calls + self.work


def copies_of(where: Setting) -> int:
    """Copies of the student that write at the same time."""
    rollouts = where.config.rollouts
    return where.world // (rollouts.tensor_parallel_size if isinstance(rollouts, VllmRollouts) else 1)


def cache_bytes_a_token(where: Setting, student: RememberedShape) -> float:
    """Of keys and values, on one rank; layers with a window keep fewer tokens, which counts as nothing here."""
    rollouts = where.config.rollouts
    shared = rollouts.tensor_parallel_size if isinstance(rollouts, VllmRollouts) else 1
    heads = -(-student.kv_heads // shared)
    return 2 * student.layers * heads * student.head_dim * where.width


def rollouts_at_once(where: Setting, student: RememberedShape, lengths: Lengths, cache: float | None) -> int:
    """What the engine's batch and its cache allow.

    Args:
        cache: bytes on a rank; None: the engine takes what it needs.
    """
    rollouts = where.config.rollouts
    if cache is None:
        return rollouts.batch_size
    tokens = cache / cache_bytes_a_token(where, student)
    return max(1, min(rollouts.batch_size, int(tokens / (lengths.prompt + lengths.mean))))


def decoding(where: Setting, student: RememberedShape, lengths: Lengths, cache: float | None) -> Decoding:
    """Predict a step's rollouts."""
    config, copies = where.config, copies_of(where)
    of_step = lengths.of_step(config.training.global_batch_size)
    mine = of_step[::-1][::copies]  # of the copy with the longest: dealt out in turns
    at_once = rollouts_at_once(where, student, lengths, cache)
    if isinstance(config.rollouts, TransformersRollouts):  # a batch ends before the next begins
        parts = [mine[i :: -(-len(mine) // at_once)] for i in range(-(-len(mine) // at_once))]
    else:
        parts = [mine]
    step = _Step(where, student, lengths)
    calls = work = tail_calls = tail_work = 0.0
    steps = 0
    for part in parts:
        last = max(1, min(len(part), at_once) // TAIL)
        for segment in segments(tuple(sorted(part)), at_once):
            fixed, moving = step.calls * segment.steps, step.work(segment) * segment.steps
            calls, work, steps = calls + fixed, work + moving, steps + segment.steps
            if segment.live <= last:
                tail_calls, tail_work = tail_calls + fixed, tail_work + moving
    prompts = len(mine) * lengths.prompt * step.token_flop / where.at(where.flops) + len(parts) * step.calls
    per_token = (work + calls) / max(1, sum(mine))
    mean = prompts + per_token * sum(of_step) / copies
    told = {"step": step.told, "share": f"{len(mine)} of {len(of_step):,} rollouts, {at_once} at once"}
    return Decoding(prompts, steps, calls, work, tail_calls, tail_work, mean, at_once, len(mine), told)


class _Step:
    """One decoding step: a fixed part, and one that grows with the rollouts being written."""

    def __init__(self, where: Setting, student: RememberedShape, lengths: Lengths) -> None:
        rollouts, rates = where.config.rollouts, where.rates
        shared = rollouts.tensor_parallel_size if isinstance(rollouts, VllmRollouts) else 1
        graphs = isinstance(rollouts, VllmRollouts) and where.config.device == "cuda" and not rollouts.enforce_eager
        kernels = FORWARD_KERNELS
        if isinstance(rollouts, VllmRollouts):
            kernels = GRAPH_KERNELS if graphs else COMPILED_KERNELS
        self._where, self._student, self._prompt = where, student, lengths.prompt
        self._cache = cache_bytes_a_token(where, student) / student.layers  # of a layer
        self.token_flop = 2 * student.parameters / shared
        self._read = where.width * student.parameters / shared / where.at("memory_gb")
        launches = student.layers * kernels * rates.kernel_microseconds / 1e6
        waits = 2 * student.layers * rates.collective_microseconds / 1e6 if shared > 1 else 0.0
        self.calls = max(self._read, launches) + waits if where.config.device == "cuda" else self._read + launches
        self.told = (
            f"{where.width} B x {student.parameters:,} weights / {shared} at {rates.memory_gb:g} GB/s = "
            f"{1e3 * self._read:.3g} ms, {student.layers} layers x {kernels} launches = {1e3 * launches:.3g} ms"
            + (f", and {1e3 * waits:.3g} ms for messages" if waits else "")
        )
        self._windows = student.layers_by_window(ParallelSettings())[0].items()

    def work(self, segment: Segment) -> float:
        """Seconds of a step beyond the fixed part: caches are read; products, where they take longer than weights."""
        where, context = self._where, self._prompt + segment.age
        seen = sum(count * min(context, window or context) for window, count in self._windows)
        read = segment.live * seen * self._cache / where.at("memory_gb")
        return read + max(0.0, segment.live * self.token_flop / where.at(where.flops) - self._read)
