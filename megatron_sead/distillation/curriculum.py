"""The prompt scale: which prompts may be asked at a step, and which of them are.

Difficulty is 1 - pass rate of the initial student. A batch is a function of (seed, step, state) alone, decided before
any rollout of the step is written; only `mastery` has a state, which grades change. What a step costs does not depend
on the number of prompts: they are sorted once, and drawn by their place in that order.
"""

from __future__ import annotations

import logging
import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from random import Random
from typing import Any, Literal, get_args

log = logging.getLogger(__name__)

Mode = Literal["gated", "sorted", "competence_cdf", "mastery", "none"]
MODES: tuple[Mode, ...] = get_args(Mode)


def gate(c0: float, k: float, done: float) -> float:
    """The difficulty c(t) up to which prompts may be asked, when a share `done` = t / T of the run is over."""
    return min(1.0, c0 * (1 + done) ** k)


def gate_problem(c0: float, k: float) -> str | None:
    """Why a gate stays closed for some prompts; None: it opens for all."""
    if c0 * 2**k >= 1:
        return None
    lowest_k = math.ceil(1000 * math.log2(1 / c0)) / 1000
    return (
        f"c0 * 2^k is {c0 * 2**k:g}, under 1: harder prompts would stay locked for ever; with this c0, k must be at "
        f"least {lowest_k:g}"
    )


class Curriculum:
    """Prompts of a run, admitted by difficulty.

    Args:
        difficulties: one a prompt, in [0, 1]; None where it was never measured, which only mode "none" accepts.
        batch_size: prompts of a step, all different.
        total_steps: T.
        mode: gated: uniform among d <= c0 * (1 + t/T)^k (SEAD, Algorithm 1). sorted: one pass from easy to hard
            (Appendix B.2). competence_cdf: uniform among the easiest sqrt(t (1 - c0²)/T + c0²) of the prompts
            (Platanios et al. 2019). mastery: tiers, each opened by the pass rate on those before. none: uniform.
        noise: sorted: standard deviation added to difficulties before sorting.
        tiers: mastery: equal parts of the prompts, by difficulty.
        mastery_threshold: mastery: smoothed pass rate that opens the next tier.
        patience: mastery: steps after which the next tier opens anyway.
        replay_share: mastery: share of a batch from the tiers before the newest.
        smoothing: mastery: weight of the past in the smoothed pass rate.
        drop_unsolved: leave out prompts of difficulty 1.

    Raises:
        ValueError: a value out of range, difficulties missing, fewer prompts than a batch, or a gate that never
            opens wholly.
    """

    def __init__(
        self,
        difficulties: Sequence[float | None],
        *,
        batch_size: int,
        total_steps: int,
        seed: int = 0,
        mode: Mode = "gated",
        # The paper names neither. c0 * 2^k = 1 would be the slowest gate that opens at all, at the last step and at
        # its learning rate; these open it at 26 % of the run
        c0: float = 0.5,
        k: float = 3.0,
        noise: float = 0.02,
        tiers: int = 4,
        mastery_threshold: float = 0.7,
        patience: int = 50,
        replay_share: float = 0.15,
        smoothing: float = 0.9,
        drop_unsolved: bool = False,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"curriculum mode {mode!r}: must be one of {', '.join(MODES)}")
        for name, value in (("c0", c0), ("k", k), ("noise", noise), ("replay_share", replay_share)):
            if not math.isfinite(value):
                raise ValueError(f"{name}={value}: must be a finite number")
        if mode == "gated" and (problem := gate_problem(c0, k)):
            raise ValueError(f"c0={c0:g}, k={k:g}: {problem}")
        self._mode, self._seed = mode, seed
        self._batch_size, self._total_steps = batch_size, total_steps
        self._c0, self._k = c0, k
        self._by_difficulty = _easiest_first(difficulties, seed, mode, drop_unsolved)
        if not 0 < batch_size <= len(self._by_difficulty):
            raise ValueError(
                f"batch of {batch_size} different prompts: must be from 1 to {len(self._by_difficulty)}, the prompts "
                "there are" + (" without the unsolved" if drop_unsolved else "")
            )
        if mode == "sorted":
            self._order = _with_noise(self._by_difficulty, difficulties, noise, seed)
        found = [difficulties[index] for index in self._by_difficulty]
        known = array("d", [difficulty for difficulty in found if difficulty is not None])
        self._ladder = known if len(known) == len(found) else None  # of _by_difficulty; None: not all are measured
        self._sums = self._running_sums(difficulties)
        self._tiers = _Tiers(len(self._by_difficulty), tiers, mastery_threshold, patience, replay_share, smoothing)
        self._told_of_widening = False

    def next_batch(self, step: int) -> list[int]:
        """Indices of the prompts of step `step`, counted from 0; asking again gives the same ones."""
        random = Random(f"{self._seed}/batch/{step}")
        if self._mode == "sorted":
            return self._next_in_order(step)
        if self._mode == "mastery":
            return self._mastery_batch(random)
        return self._at(random.sample(range(self._admitted(step)), self._batch_size))

    def eligible_count(self, step: int) -> int:
        """Prompts that step `step` may draw from; sorted: those left in its pass."""
        if self._mode == "sorted":
            return len(self._order) - step * self._batch_size % len(self._order)
        return self._admitted(step)

    def eligible_difficulty(self, step: int) -> float | None:
        """Mean difficulty of these prompts; None where one was never measured."""
        count = self.eligible_count(step)
        return None if self._sums is None else self._sums[count - 1] / count

    def _running_sums(self, difficulties: Sequence[float | None]) -> array[float] | None:
        """Sum of the first 1, 2, ... difficulties that may be eligible: the easiest, or the last of the pass."""
        if self._ladder is None:
            return None
        if self._mode == "sorted":
            return array("d", accumulate(difficulties[index] or 0.0 for index in reversed(self._order)))
        return array("d", accumulate(self._ladder))

    def update(self, results: Sequence[tuple[int, bool]]) -> None:
        """Observe a step's grades: (prompt index, correct) of each rollout. Only mastery learns from them."""
        if self._mode == "mastery" and results:
            self._tiers.observe(sum(correct for _, correct in results) / len(results))

    def state_dict(self) -> dict[str, Any]:
        """What the next batch depends on beside seed and step."""
        return self._tiers.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self._tiers.load_state_dict(state)

    def _at(self, places: list[int]) -> list[int]:
        """The prompts at these places, counted from the easiest."""
        return [self._by_difficulty[place] for place in places]

    def _admitted(self, step: int) -> int:
        """How many prompts are open at this step, from the easiest on; at least a batch."""
        count = self._admitted_count(step)
        if count < self._batch_size and not self._told_of_widening:
            self._told_of_widening = True
            log.warning(
                "curriculum: prompts that step %d admits: %d, fewer than a batch; the easiest %d are asked instead "
                "(told once)",
                step,
                count,
                self._batch_size,
            )
        return max(count, self._batch_size)

    def _admitted_count(self, step: int) -> int:
        total, done = len(self._by_difficulty), min(1.0, step / self._total_steps)
        if self._mode == "gated":
            assert self._ladder is not None
            return bisect_right(self._ladder, gate(self._c0, self._k, done))
        if self._mode == "competence_cdf":
            return math.floor(total * min(1.0, math.sqrt(done * (1 - self._c0**2) + self._c0**2)))
        if self._mode == "mastery":
            return self._tiers.end(self._tiers.open)
        return total

    def _next_in_order(self, step: int) -> list[int]:
        start, total = step * self._batch_size, len(self._order)
        if start // total < (start + self._batch_size - 1) // total or (start and start % total == 0):
            log.info("curriculum: step %d begins another pass over all %d prompts", step, total)
        return [self._order[(start + offset) % total] for offset in range(self._batch_size)]

    def _mastery_batch(self, random: Random) -> list[int]:
        """From the newest open tier, with a share of the earlier ones; what a tier lacks the others give."""
        newest = self._tiers.end(self._tiers.open - 1)
        earlier, latest = range(newest), range(newest, self._admitted(0))
        replayed = min(len(earlier), round(self._tiers.replay_share * self._batch_size))
        replayed = max(replayed, self._batch_size - len(latest))
        return self._at(random.sample(earlier, replayed) + random.sample(latest, self._batch_size - replayed))


class _Tiers:
    """Mastery's state: how many tiers are open, and what would open the next."""

    def __init__(
        self, prompts: int, tiers: int, threshold: float, patience: int, replay_share: float, smoothing: float
    ) -> None:
        self._prompts, self._tiers = prompts, tiers
        self._threshold, self._patience, self._smoothing = threshold, patience, smoothing
        self.replay_share = replay_share
        self.open = 1
        self._waited = 0  # steps since the newest tier opened
        self._pass_rate: float | None = None  # smoothed, since then

    def end(self, tiers: int) -> int:
        """Prompts in the first `tiers` tiers."""
        return self._prompts * tiers // self._tiers

    def observe(self, pass_rate: float) -> None:
        """Count a step; open the next tier when it is time."""
        past = pass_rate if self._pass_rate is None else self._pass_rate
        self._pass_rate = self._smoothing * past + (1 - self._smoothing) * pass_rate
        self._waited += 1
        mastered = self._pass_rate >= self._threshold
        if self.open < self._tiers and (mastered or self._waited >= self._patience):
            self.open += 1
            log.info(
                "curriculum: tier %d of %d opens, %s",
                self.open,
                self._tiers,
                f"pass rate {self._pass_rate:.2f}" if mastered else f"steps waited: {self._waited}",
            )
            self._waited, self._pass_rate = 0, None

    def state_dict(self) -> dict[str, Any]:
        return {"open_tiers": self.open, "waited": self._waited, "pass_rate": self._pass_rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.open, self._waited, self._pass_rate = state["open_tiers"], state["waited"], state["pass_rate"]


def _easiest_first(difficulties: Sequence[float | None], seed: int, mode: str, drop_unsolved: bool) -> array[int]:
    """Indices by difficulty; equals in an order drawn by seed, so that the file's order does not decide."""
    missing = [index for index, difficulty in enumerate(difficulties) if difficulty is None]
    if missing and (mode != "none" or drop_unsolved):
        raise ValueError(
            f"{len(missing)} of {len(difficulties)} prompts have no difficulty (the first is number {missing[0]}), "
            f"which curriculum mode {mode!r} needs: measure it with `sead difficulty`, or use mode 'none'"
        )
    for index, difficulty in enumerate(difficulties):
        if difficulty is not None and not 0 <= difficulty <= 1:
            raise ValueError(f"difficulty {difficulty} of prompt number {index}: must be from 0 to 1")
    order = [index for index, difficulty in enumerate(difficulties) if not (drop_unsolved and difficulty == 1)]
    Random(f"{seed}/ties").shuffle(order)
    return array("q", sorted(order, key=lambda index: difficulties[index] or 0.0))


def _with_noise(order: Sequence[int], difficulties: Sequence[float | None], noise: float, seed: int) -> array[int]:
    random = Random(f"{seed}/sorted")
    noisy = {index: (difficulties[index] or 0.0) + random.gauss(0, noise) for index in sorted(order)}
    return array("q", sorted(noisy, key=noisy.__getitem__))
