"""What a step's rollouts alone say. A new one is a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """A key of metrics.jsonl."""

    name: str
    unit: str
    meaning: str
    computed_in: str  # module of megatron_sead


@dataclass(frozen=True)
class Written:
    """A step's rollouts, an entry each."""

    correct: Sequence[bool]
    finished: Sequence[bool]  # with a stop token
    repeated: Sequence[bool]  # cut because of it
    lengths: Sequence[int]  # tokens, the stop token included

    def right_and_finished(self) -> int:
        return sum(right and end for right, end in zip(self.correct, self.finished, strict=True))


@dataclass(frozen=True)
class RolloutMetric:
    """A metric with its value."""

    metric: Metric
    value: Callable[[Written], float]


def _of(name: str, unit: str, meaning: str, value: Callable[[Written], float]) -> RolloutMetric:
    return RolloutMetric(Metric(name, unit, meaning, "reporting.rollout_metrics"), value)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


ROLLOUT_METRICS = (
    _of("pass_rate", "share", "rollouts whose answer is right", lambda w: _mean(w.correct)),
    _of("finished_share", "share", "rollouts that ended with a stop token", lambda w: _mean(w.finished)),
    _of(
        "truncated_share",
        "share",
        "rollouts cut at rollouts.max_new_tokens, or for repetition",
        lambda w: 1 - _mean(w.finished),
    ),
    _of("repetition_share", "share", "rollouts cut because they repeated themselves", lambda w: _mean(w.repeated)),
    _of(
        "pass_rate_given_finish",
        "share",
        "right answers among the finished rollouts",
        lambda w: w.right_and_finished() / max(1, sum(w.finished)),
    ),
    _of("response_length", "tokens", "mean length of a response", lambda w: _mean(w.lengths)),
)
