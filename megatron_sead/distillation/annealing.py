"""The phase scale: alpha as a function of u, the point of the run, and u from the student's competence."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

Shape = Literal["cosine", "linear", "constant"]


def annealing_coefficient(u: float, *, start: float = 0.8, end: float = 0.0, shape: Shape = "cosine") -> float:
    """alpha(u): `start` at u = 0, `end` at u = 1 (SEAD, cosine schedule). u outside [0, 1] counts as the nearer end.

    Raises:
        ValueError: an unknown shape, or a number that is not one.
    """
    if math.isnan(u) or not math.isfinite(start) or not math.isfinite(end):
        raise ValueError(f"u={u}, start={start}, end={end}: must be numbers")
    u = min(1.0, max(0.0, u))
    if shape == "cosine":
        return end + (start - end) / 2 * (1 + math.cos(math.pi * u))
    if shape == "linear":
        return start + (end - start) * u
    if shape == "constant":
        return start
    raise ValueError(f"shape={shape!r}: must be one of {', '.join(get_args(Shape))}")


class CompetenceTracker:
    """u from the student's pass rate on the admitted prompts: never falls, 1 when the target is reached.

    The pass rate is smoothed exponentially; u is its running maximum, scaled from the first observation to `target`.
    """

    def __init__(self, *, target: float = 0.9, smoothing: float = 0.9) -> None:
        if not 0 < target <= 1:
            raise ValueError(f"target={target}: must be over 0 and at most 1")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing}: must be at least 0 and under 1")
        self._target, self._smoothing = target, smoothing
        self._start = 0.0
        self._best = 0.0
        self._seen = False
        self.value = 0.0  # smoothed pass rate; 0 before the first observation

    def update(self, pass_rate: float) -> None:
        """Observe a step's pass rate.

        Raises:
            ValueError: it is not in [0, 1].
        """
        if not 0 <= pass_rate <= 1:
            raise ValueError(f"pass_rate={pass_rate}: must be from 0 to 1")
        if not self._seen:
            self._seen = True
            self.value = self._start = self._best = pass_rate
            return
        self.value = self._smoothing * self.value + (1 - self._smoothing) * pass_rate
        self._best = max(self._best, self.value)

    @property
    def u(self) -> float:
        """In [0, 1]; 0 before the first observation."""
        if not self._seen:
            return 0.0
        if self._best >= self._target:
            return 1.0
        return (self._best - self._start) / (self._target - self._start)

    def state_dict(self) -> dict[str, Any]:
        """Everything that was observed."""
        return {"value": self.value, "start": self._start, "best": self._best, "seen": self._seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` left off."""
        self.value, self._start = float(state["value"]), float(state["start"])
        self._best, self._seen = float(state["best"]), bool(state["seen"])
