"""Every metric of a step, and the writer of metrics.jsonl and what goes elsewhere, which takes no other."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from megatron_sead.distillation.zone_shares import LETTERS, NOT_VALID
from megatron_sead.files.durable import replace_text
from megatron_sead.reporting.elsewhere import Elsewhere
from megatron_sead.reporting.rollout_metrics import ROLLOUT_METRICS, Metric


def _of_zones() -> list[Metric]:
    where, found = "training.measure", []
    for letter in (letter for zone, letter in LETTERS.items() if zone != NOT_VALID):
        z, zone = letter.lower(), f"zone {letter}"
        found += [
            Metric(f"zone_{z}_share", "share", f"response tokens that are in {zone}", where),
            *(
                Metric(
                    f"zone_{z}_{model}_entropy", "nats", f"mean entropy of the {model} over the tokens of {zone}", where
                )
                for model in ("student", "teacher")
            ),
            Metric(f"zone_{z}_forward_kl_share", "share", f"of the step's summed forward KL: what {zone} holds", where),
            Metric(f"zone_{z}_reverse_kl_share", "share", f"of the step's summed reverse KL: what {zone} holds", where),
        ]
        found += [
            Metric(
                f"zone_{z}_share_quarter_{quarter}",
                "share",
                f"tokens that are in {zone}, of those in quarter {quarter} of their response",
                where,
            )
            for quarter in range(1, 5)
        ]
    return found


METRICS: tuple[Metric, ...] = (
    Metric("step", "number", "the step, counted from 0 as in the log, rollouts/ and not-finite/", "training.record"),
    Metric(
        "skipped", "true or false", "numbers were not finite on some rank; the student is as before", "training.record"
    ),
    Metric("loss", "nats", "weighted divergence over all tokens, divided as training.normalizer says", "training.step"),
    Metric("active_tokens", "count", "what the summed loss was divided by", "training.step"),
    Metric("grad_norm", "norm", "of the whole gradient, before clipping; 0: no token taught", "training.step"),
    Metric("learning_rate", "", "of this step", "training.step"),
    Metric("alpha", "in [0, 1]", "share of forward KL in zone C", "training.run"),
    Metric("forward_kl", "nats", "mean KL(teacher || student) of a response token", "training.measure"),
    Metric("reverse_kl", "nats", "mean KL(student || teacher) of a response token", "training.measure"),
    Metric("student_entropy", "nats", "mean entropy of the student's next token", "training.measure"),
    Metric("teacher_entropy", "nats", "mean entropy of the teacher's next token", "training.measure"),
    Metric(
        "tau_teacher",
        "nats",
        "teacher entropy from which a token is in zone C, by this step's quantiles",
        "training.step",
    ),
    Metric(
        "tau_student",
        "nats",
        "student entropy above which the rest is in zone B, by this step's quantiles",
        "training.step",
    ),
    *_of_zones(),
    Metric(
        "confident_mismatch_rate",
        "share",
        "tokens of zone A whose likeliest token is not the same for student and teacher",
        "training.measure",
    ),
    Metric(
        "teacher_log_prob_ratio",
        "nats",
        "mean log-probability of the sampled token, teacher less student",
        "training.measure",
    ),
    Metric(
        "sampling_log_prob_difference",
        "nats",
        "mean absolute difference of a sampled token's log-probability between rollout engine and student",
        "training.mismatch",
    ),
    Metric("sampling_log_prob_difference_p99", "nats", "the same, 99th percentile", "training.mismatch"),
    Metric("sampling_log_prob_difference_max", "nats", "the same, largest", "training.mismatch"),
    Metric(
        "student_stop_probability", "probability", "of a stop token where a response ends, student", "training.measure"
    ),
    Metric(
        "teacher_stop_probability", "probability", "of a stop token where a response ends, teacher", "training.measure"
    ),
    Metric("competence", "share", "pass rate, smoothed over the steps (annealing.smoothing)", "training.run"),
    Metric("eligible_prompts", "count", "prompts that the curriculum let the step ask", "training.run"),
    Metric(
        "eligible_difficulty",
        "in [0, 1]",
        "mean difficulty of these prompts, 1 less the initial student's pass rate; null: not all have one",
        "training.run",
    ),
    *(measured.metric for measured in ROLLOUT_METRICS),
    Metric("response_tokens", "count", "tokens of all responses of the step", "training.measure"),
    Metric("rollout_seconds", "seconds", "writing and grading the rollouts", "training.loop"),
    Metric(
        "score_seconds",
        "seconds",
        "the teacher's pass, and the student's where zones need one",
        "training.step",
    ),
    Metric("train_seconds", "seconds", "forward, backward and update", "training.step"),
    Metric("sync_seconds", "seconds", "giving the engine the new weights", "training.loop"),
    Metric("step_seconds", "seconds", "the whole step: the four before, and packing", "training.loop"),
    Metric("seconds", "seconds", "since the run began, over all its starts", "training.record"),
    Metric("tokens_per_second", "tokens / s", "response_tokens / step_seconds", "training.record"),
    Metric(
        "peak_memory",
        "GiB",
        "the most that any rank has held so far: of a GPU what torch gave out, on a CPU the process",
        "training.record",
    ),
)
NAMES = frozenset(metric.name for metric in METRICS)


class MetricsWriter:
    """Appends to ``metrics.jsonl``. Only one rank may hold one.

    Args:
        directory: run directory.
        first_step: the step that comes next; lines of this step and later, left by steps that an interruption made
            void, are dropped, because they will be computed again.
        elsewhere: what else gets the numbers; closed with this.
    """

    def __init__(self, directory: Path, first_step: int, elsewhere: Sequence[Elsewhere] = ()) -> None:
        self._path = directory / "metrics.jsonl"
        self._drop_from(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._elsewhere = elsewhere

    def _drop_from(self, first_step: int) -> None:
        kept = []
        if self._path.exists():
            for line in self._path.read_text(encoding="utf-8", errors="replace").splitlines():
                with suppress(ValueError, LookupError, TypeError, RecursionError):  # a line cut short by a crash
                    if json.loads(line)["step"] < first_step:
                        kept.append(line)
        replace_text(self._path, "".join(line + "\n" for line in kept))

    def write(self, metrics: dict[str, Any]) -> None:
        """Append one step. Values that are not finite become null, so that every line is valid JSON.

        Raises:
            KeyError: a metric that `METRICS` does not describe.
        """
        if unknown := metrics.keys() - NAMES:
            raise KeyError(f"{', '.join(sorted(unknown))}: not in METRICS of megatron_sead/reporting/metrics.py")
        clean = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in metrics.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        numbers = {key: v for key, v in clean.items() if isinstance(v, int | float) and key != "step"}
        for other in self._elsewhere:
            other.write(metrics["step"], numbers)

    def close(self) -> None:
        """Flush everything to disk."""
        self._file.close()
        for other in self._elsewhere:
            other.close()
