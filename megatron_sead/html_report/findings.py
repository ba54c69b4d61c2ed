"""What looks wrong in a run, by rules: each has a threshold, says what it measured and where, and points to a figure.

Thresholds are what experience with on-policy distillation calls worth a look, not proof of a fault.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median

from megatron_sead.html_report.run_directory import Run, number

LAST_TENTH, LAST_HALF = 10, 2
SPIKE_WINDOW = 25  # steps before a spike with which it is compared
Judged = tuple[bool, str]  # is it wrong; what was measured


@dataclass(frozen=True)
class Rule:
    """What to look at. `judge` returns None where the run does not tell."""

    name: str
    threshold: str  # in words
    figure: str  # id of the figure that shows it
    judge: Callable[[Run], Judged | None]


@dataclass(frozen=True)
class Finding:
    """A rule with its verdict: "look", "fine" or "unknown"."""

    rule: Rule
    verdict: str
    measured: str


def findings(run: Run) -> list[Finding]:
    """Every rule's, what is to be looked at first."""
    found = []
    for rule in RULES:
        judged = rule.judge(run)
        if judged is None:
            found.append(Finding(rule, "unknown", "not recorded"))
        else:
            found.append(Finding(rule, "look" if judged[0] else "fine", judged[1]))
    order = ("look", "fine", "unknown")
    return sorted(found, key=lambda finding: order.index(finding.verdict))


def _last(run: Run, name: str, part: int = LAST_TENTH) -> list[float]:
    """Known values of the last steps, at least one."""
    column = run.column(name)
    return [v for v in column[-max(1, len(column) // part) :] if v is not None]


def _mean_of_last(name: str, limit: float, what: str) -> Callable[[Run], Judged | None]:
    def judge(run: Run) -> Judged | None:
        values = _last(run, name)
        return (
            (fmean(values) > limit, f"{100 * fmean(values):.3g} % {what}, mean of the last tenth") if values else None
        )

    return judge


def _stop_gap(run: Run) -> Judged | None:
    student, teacher = _last(run, "student_stop_probability"), _last(run, "teacher_stop_probability")
    if not student or not teacher:
        return None
    gap = fmean(teacher) - fmean(student)
    return abs(gap) > 0.1, f"student {fmean(student):.3f}, teacher {fmean(teacher):.3f} where responses end"


def _mismatch(run: Run) -> Judged | None:
    values, limit = run.known("sampling_log_prob_difference"), number(run.setting("rollouts.mismatch_warning"))
    if not values or limit is None:
        return None
    over = [step for step, v in _with_steps(run, "sampling_log_prob_difference") if v > limit]
    where = f"; over {limit:g} in {len(over)} steps, first {over[0]}" if over else ""
    expected = bool(run.setting("rollouts.lag"))
    return bool(over) and not expected, f"at most {max(values):.3g} nats a token{where}"


def _entropy_collapse(run: Run) -> Judged | None:
    first, last = run.known("student_entropy"), _last(run, "student_entropy")
    teacher = _last(run, "teacher_entropy")
    if len(first) < LAST_TENTH or not last or not teacher:
        return None
    began, ended = fmean(first[: max(1, len(first) // LAST_TENTH)]), fmean(last)
    collapsed = ended < 0.1 * began and ended < 0.5 * fmean(teacher)
    return collapsed, f"student {began:.3g} to {ended:.3g} nats; teacher {fmean(teacher):.3g}"


def _zone_c_floor(run: Run) -> Judged | None:
    values, floor = run.known("tau_teacher"), number(run.setting("zones.teacher_entropy_floor"))
    if not values or floor is None:
        return None
    under = [step for step, v in _with_steps(run, "tau_teacher") if v < floor]
    where = f"; under {floor:g} in {len(under)} of {len(values)} steps, first {under[0]}" if under else ""
    return len(under) > len(values) / 10, f"zone C begins at {min(values):.3g} nats at the least{where}"


def _gate_stuck(run: Run) -> Judged | None:
    opened = run.known("eligible_prompts")
    total = number(run.of_last_start("prompts"))
    if run.setting("curriculum.mode") == "none":
        return False, "no curriculum"
    if not opened or total is None or len(opened) < LAST_TENTH:
        return None
    half = opened[len(opened) // LAST_HALF :]
    stuck = half[-1] < total and half[-1] <= half[0]
    return stuck, f"{half[-1]:,.0f} of {total:,.0f} prompts are open at the last step, {half[0]:,.0f} half-way"


def _spikes(run: Run) -> Judged | None:
    steps = _with_steps(run, "grad_norm")
    if len(steps) < LAST_TENTH:
        return None
    found = []
    for place in range(5, len(steps)):
        before = [value for _, value in steps[max(0, place - SPIKE_WINDOW) : place]]
        if steps[place][1] > 5 * median(before) > 0:
            found.append(steps[place][0])
    told = f"{len(found)} steps, first {found[0]}" if found else "none"
    return len(found) > len(steps) / 100, f"{told}; median norm {median(v for _, v in steps):.3g}"


def _skipped(run: Run) -> Judged | None:
    if not run.known("skipped"):
        return None
    skipped = [step for step, v in _with_steps(run, "skipped") if v]
    return bool(skipped), f"{len(skipped)} steps, first {skipped[0]}" if skipped else "none"


def _got_worse(run: Run) -> Judged | None:
    before, after = run.accuracy("before"), run.accuracy("after")
    if before is None or after is None:
        return None
    error = math.hypot(before.error, after.error)
    return after.mean < before.mean - 2 * error, f"{before.mean:.3f} before, {after.mean:.3f} after"


def _with_steps(run: Run, name: str) -> list[tuple[int, float]]:
    return [(step, v) for step, v in zip(run.steps, run.column(name), strict=True) if v is not None]


RULES = (
    Rule("Accuracy fell", "after is below before by more than two standard errors", "learning", _got_worse),
    Rule("Steps were skipped", "a loss, gradient or weight was not finite", "loss", _skipped),
    Rule(
        "Stopping differs", "stop probabilities of student and teacher differ by more than 0.1", "stopping", _stop_gap
    ),
    Rule(
        "Responses are cut",
        "more than 10 % reach rollouts.max_new_tokens",
        "stopping",
        _mean_of_last("truncated_share", 0.1, "of responses cut"),
    ),
    Rule(
        "Responses repeat themselves",
        "more than 5 % are cut for it",
        "stopping",
        _mean_of_last("repetition_share", 0.05, "of responses"),
    ),
    Rule("Engine and trainer disagree", "a step's mean is above rollouts.mismatch_warning", "mismatch", _mismatch),
    Rule(
        "Student's entropy collapsed",
        "below a tenth of where it began, and below half of the teacher's",
        "entropies",
        _entropy_collapse,
    ),
    Rule(
        "Zone C is arbitrary",
        "it begins under zones.teacher_entropy_floor in more than a tenth of the steps",
        "entropies",
        _zone_c_floor,
    ),
    Rule(
        "Zone A holds much to learn",
        "more than 20 % of the forward KL, which no token of it teaches",
        "mass",
        _mean_of_last("zone_a_forward_kl_share", 0.2, "of the forward KL"),
    ),
    Rule(
        "Both sure, of different tokens",
        "in more than 5 % of zone A, which is skipped",
        "overlap",
        _mean_of_last("confident_mismatch_rate", 0.05, "of zone A"),
    ),
    Rule("The gate is stuck", "prompts are closed, and none opened in the second half", "curriculum", _gate_stuck),
    Rule("Gradients spike", "more than 1 % of the steps have 5 times the median norm before", "loss", _spikes),
)
