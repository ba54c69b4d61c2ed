"""Which layout, recomputation, micro-batch budget, offload and engine is fastest on a cluster, of those that fit it?

Every candidate's seconds are predicted before its memory is counted: in the order of a lower bound (the engine with all
the cache that it can use) candidates are counted until none that is left could be faster. What is reported was planned
as a run is.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_sead.config.checks import check_world_size, data_parallel_size
from megatron_sead.config.micro_batches import check_token_budget
from megatron_sead.config.rollouts import VllmRollouts
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError
from megatron_sead.planning.candidates import (
    Changes,
    Cluster,
    Pair,
    as_settings,
    engines,
    layouts,
    modes,
    with_changes,
)
from megatron_sead.planning.decoding import Decoding, decoding, rollouts_at_once
from megatron_sead.planning.fit import needed
from megatron_sead.planning.memory import StageBytes
from megatron_sead.planning.micro_batches import Batches, micro_batches
from megatron_sead.planning.room import (
    cache_of,
    outer_stages,
    planned,
    room_for_engine,
    too_large_without_engine,
    what_does_not_fit,
)
from megatron_sead.planning.seconds import (
    Prediction,
    Term,
    joined,
    own_terms,
    predict,
    rollout_terms,
    setting_of,
    shared_terms,
)

OWN = ("training.recompute_granularity", "teacher.offload")  # what `own_terms` depend on


@dataclass(frozen=True)
class Candidate:
    """A configuration that fits, and its predicted step."""

    config: RunConfig
    settings: list[str]  # key=value, of all that a search chooses
    prediction: Prediction
    phase: str  # that needs most of a GPU
    needed: int  # bytes, allowances included
    replicas: int


@dataclass
class Found:
    """Of each layout the fastest that fits, the fastest first; and the fastest of all that does not."""

    candidates: list[Candidate] = field(default_factory=list)
    missed: tuple[float, list[str], str] | None = None  # seconds at least, settings, what does not fit
    tried: int = 0  # candidates whose seconds were predicted
    counted: int = 0  # whose bytes were counted


def search(config: RunConfig, pair: Pair, cluster: Cluster, *, best_only: bool = False) -> Found:
    """Rank what fits.

    Args:
        best_only: layouts that cannot be the fastest are left out, which takes less time.

    Raises:
        UserError: no layout of so many ranks is possible, or none fits: what stands in the way.
    """
    looking, found = _Search(pair, cluster), Found()
    refusals = dict[str, None]()
    for layout in layouts(config, pair, cluster):
        changed = with_changes(config, layout)
        try:
            data_parallel_size(changed.parallel, cluster.world)
            candidates = list(looking.bounded(changed, layout))
        except UserError as error:
            refusals[str(error).splitlines()[0]] = None
            continue
        bound = min((c.prediction.seconds for c in found.candidates), default=math.inf) if best_only else math.inf
        looking.fastest_of_layout(candidates, found, bound)
    if not found.candidates:
        raise UserError(_nothing(found, list(refusals) + looking.refusals, cluster.world))
    found.candidates.sort(key=lambda candidate: candidate.prediction.seconds)
    if found.missed is not None and found.missed[0] >= found.candidates[0].prediction.seconds:
        found.missed = None
    return found


def twice(config: RunConfig, pair: Pair, cluster: Cluster) -> Found | str:
    """The same on twice the ranks, the fastest layout alone; or why there is none."""
    try:
        return search(config, pair, replace(cluster, world=2 * cluster.world), best_only=True)
    except UserError as error:
        return str(error)


def predicted(config: RunConfig, pair: Pair, cluster: Cluster) -> Prediction:
    """A step of one configuration, whether it fits or not.

    Raises:
        UserError: as `make_plan` does.
    """
    planned(config, pair, cluster)
    return _told(config, pair, cluster)


def _told(config: RunConfig, pair: Pair, cluster: Cluster) -> Prediction:
    where = setting_of(config, cluster.world, cluster.rates)
    cache = cache_of(where, pair, cluster) if isinstance(config.rollouts, VllmRollouts) else None
    return predict(config, cluster.world, pair.student, pair.teacher, cluster.rates, pair.lengths, cache)


def _nothing(found: Found, refusals: list[str], world: int) -> str:
    """Why there is no candidate, in one line."""
    if found.missed is not None:
        _, settings, why = found.missed
        return f"no layout of {world:,} ranks fits; the fastest that does not is {' '.join(settings)}: {why}"
    why = refusals[0] if refusals else "none divides both models and the ranks"
    return f"no layout of {world:,} ranks is possible: {why}"


@dataclass(order=True)
class _Waiting:
    """A candidate whose bytes are not counted yet."""

    at_least: float
    number: int
    config: RunConfig = field(compare=False)
    changes: Changes = field(compare=False)
    trained: list[Term] = field(compare=False)
    batch: Batches = field(compare=False)


class _Search:
    """One search's candidates, and what of them was computed before."""

    def __init__(self, pair: Pair, cluster: Cluster) -> None:
        self._pair, self._cluster = pair, cluster
        self._decodings: dict[Any, Decoding] = {}
        self.refusals: list[str] = []  # of settings within a layout

    def bounded(self, config: RunConfig, layout: Changes) -> Iterator[_Waiting]:
        """A layout's candidates, with seconds that they take at least."""
        pair, cluster = self._pair, self._cluster
        written = self._fastest_engine(config)
        shared: dict[tuple[Any, ...], tuple[list[Term], Batches]] = {}
        for number, mode in enumerate(modes(config, pair)):
            changed = with_changes(config, mode)
            if not self._possible(changed):
                continue
            where = setting_of(changed, cluster.world, cluster.rates)
            key = tuple(value for name, value in mode.items() if name not in OWN)
            if key not in shared:
                batch = micro_batches(changed, where.replicas, pair.lengths)
                shared[key] = shared_terms(where, pair.student, pair.teacher, batch), batch
            alike, batch = shared[key]
            trained = [*alike, *own_terms(where, pair.student, pair.teacher, batch)]
            at_least = written + sum(term.seconds for term in trained)
            if config.rollouts.overlap:
                at_least -= sum(term.seconds for term in trained if term.phase == "teacher")
            yield _Waiting(at_least, number, changed, layout | mode, trained, batch)

    def _fastest_engine(self, config: RunConfig) -> float:
        """Seconds of rollouts whose cache has all the room that it can use."""
        where = setting_of(config, self._cluster.world, self._cluster.rates)
        choices = (with_changes(config, engine) for engine in engines(config, self._pair, self._cluster))
        written = (self._written(choice, None) for choice in choices)
        return min(sum(term.seconds for term in rollout_terms(where, w)) if w is not None else 0.0 for w in written)

    def fastest_of_layout(self, candidates: list[_Waiting], found: Found, bound: float) -> None:
        """Add the fastest candidate that fits, if one does.

        Args:
            bound: seconds; slower ones are of no interest.
        """
        heapq.heapify(candidates)
        found.tried += len(candidates)
        best: tuple[float, RunConfig, Changes] | None = None
        while candidates and candidates[0].at_least < (bound if best is None else best[0]):
            candidate = heapq.heappop(candidates)
            found.counted += 1
            stages = outer_stages(candidate.config, self._pair, self._cluster)
            problem = too_large_without_engine(candidate.config, stages, self._cluster)
            if problem is not None:
                _missed(found, candidate.at_least, candidate.changes, problem)
                continue
            for seconds, engine in sorted(self._with_engines(candidate, stages), key=lambda both: both[0]):
                if best is not None and seconds >= best[0]:
                    break
                changed = with_changes(candidate.config, engine)
                problem = what_does_not_fit(changed, self._pair, self._cluster)
                if problem is None:
                    best = seconds, changed, candidate.changes | engine
                    break
                _missed(found, candidate.at_least, candidate.changes | engine, problem)
        if best is not None:
            found.candidates.append(self._reported(best[1], best[2]))

    def _possible(self, config: RunConfig) -> bool:
        try:
            check_world_size(config, self._cluster.world)
            check_token_budget(config)
        except UserError as error:
            self.refusals.append(str(error).splitlines()[0])
            return False
        return config.training.global_batch_size % config.training.micro_batch_size == 0

    def _written(self, config: RunConfig, cache: float | None) -> Decoding | None:
        """The rollouts, which depend on little: each of few cases is computed once."""
        rollouts = config.rollouts
        if rollouts.recorded is not None:
            return None
        where = setting_of(config, self._cluster.world, self._cluster.rates)
        at_once = rollouts_at_once(where, self._pair.student, self._pair.lengths, cache)
        key = at_once, rollouts.tensor_parallel_size if isinstance(rollouts, VllmRollouts) else 1
        if key not in self._decodings:
            self._decodings[key] = decoding(where, self._pair.student, self._pair.lengths, cache)
        return self._decodings[key]

    def _with_engines(self, candidate: _Waiting, stages: list[StageBytes]) -> Iterator[tuple[float, Changes]]:
        """Seconds with each size of the engine, given what the models leave of a GPU."""
        pair, cluster = self._pair, self._cluster
        for engine in engines(candidate.config, pair, cluster):
            changed, cache = with_changes(candidate.config, engine), None
            where = setting_of(changed, cluster.world, cluster.rates)
            if isinstance(changed.rollouts, VllmRollouts):
                cache, extra = room_for_engine(where, stages, pair, cluster)
                engine = engine | extra
            written = self._written(changed, cache)
            yield joined(where, written, candidate.trained, candidate.batch).seconds, engine

    def _reported(self, config: RunConfig, changes: Changes) -> Candidate:
        told = _told(config, self._pair, self._cluster)
        stages = outer_stages(config, self._pair, self._cluster)
        phase, size = max((needed(stage) for stage in stages), key=lambda both: both[1])
        replicas = data_parallel_size(config.parallel, self._cluster.world)
        return Candidate(config, as_settings(changes), told, phase, size, replicas)


def _missed(found: Found, seconds: float, changes: Changes, problem: str) -> None:
    if found.missed is None or seconds < found.missed[0]:
        found.missed = seconds, as_settings(changes), problem
