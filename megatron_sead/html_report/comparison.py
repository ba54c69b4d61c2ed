"""Several runs: grouped by their settings, curves as bands over seeds, final accuracies and differences with intervals,
and the same budget of steps, tokens and seconds for all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import Any, TypeVar

import numpy as np

from megatron_sead.config.checks import MAY_CHANGE_ON_RESUME
from megatron_sead.evaluation.statistics import Difference, difference_of_groups
from megatron_sead.html_report.figure import Figure, Trace, told
from megatron_sead.html_report.run_directory import Run
from megatron_sead.html_report.series import short, smoothed
from megatron_sead.html_report.summary import duration, rates
from megatron_sead.html_report.tables import Table, value_told

Groups = dict[str, list[Run]]
T = TypeVar("T")
Curve = tuple[np.ndarray, np.ndarray]  # where, and what
COLOURS = ("#0f7fc4", "#d95f02", "#129b72", "#c45c98", "#8a6d00", "#7a5fd0", "#5b6470", "#b3261e")
DASHES = ("solid", "dash", "dot", "dashdot")
SAME_METHOD = ("seed", *(key for key in MAY_CHANGE_ON_RESUME if not key.startswith("evaluation")))
LABELS = {"policy.name": "policy", "curriculum.mode": "curriculum", "zones.thresholds": "thresholds"}
MOST_LABELS = 4  # settings in a group's name
MOST_CHARACTERS = 40  # of a setting there: of a path, its end
GRID = 200  # points of a curve
BUDGETS = ("steps", "response tokens", "seconds")
CURVES = (
    ("pass_rate", "Pass rate of a step's rollouts", "Smoothed over a twentieth of the run.", "share right"),
    ("reverse_kl", "Reverse KL", "KL(student || teacher) of a response token.", "nats"),
    ("forward_kl", "Forward KL", "KL(teacher || student) of a response token.", "nats"),
    ("student_entropy", "Student's entropy", "Of the next token.", "nats"),
    ("teacher_entropy", "Teacher's entropy", "Of the same tokens.", "nats"),
    ("response_length", "Length of a response", "Mean tokens.", "tokens"),
)


@dataclass
class Comparison:
    """What the page shows of several runs."""

    groups: Groups
    figures: list[Figure]
    table: Table  # of the methods, for a paper
    tables: list[Table]
    text: str
    remarks: list[str]


def compare(runs: Sequence[Run]) -> Comparison:
    """Groups in the order in which they were given; the first is what the others are compared with."""
    groups, remarks = grouped(runs), list[str]()
    table = methods(groups, remarks)
    figures = [_curve(groups, *curve) for curve in CURVES]
    first = next(iter(groups))
    text = (
        "Runs that differ in their seed alone are one group. Intervals of 95 % come from drawing prompts and seeds "
        f"anew; differences are to {first}, prompt by prompt. Within noise: the interval of the difference holds zero."
    )
    return Comparison(groups, figures, table, [at_the_same_budget(groups), every_run(groups)], text, remarks)


def grouped(runs: Sequence[Run]) -> Groups:
    """Runs with the same settings but for what makes no other method. A group is named as its runs are but for their
    seeds, if all are named so, or by the settings that set groups apart, if these are few."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        # A run whose settings are not known is no other's seed
        key = tuple(sorted((k, value_told(v)) for k, v in run.settings.items() if not k.startswith(SAME_METHOD)))
        found.setdefault(key or (run.name,), []).append(run)
    apart = [key for key in _keys(found) if len({value_told(group[0].setting(key)) for group in found.values()}) > 1]
    own = [_common(group) for group in found.values()]
    all_own = None not in own and len(set(own)) == len(own)
    named: Groups = {}
    for group, name in zip(found.values(), own, strict=True):
        if not all_own and 0 < len(apart) <= MOST_LABELS:
            name = ", ".join(_label(group[0], key) for key in apart)
        name = name or group[0].name
        named[name if name not in named else f"{name} ({group[0].name})"] = group
    return named


def _common(group: Sequence[Run]) -> str | None:
    """The name of a group's runs but for a seed at its end: opd of opd-seed0 and opd-seed1. None: they have none."""
    bare = {re.sub(r"[-_. ]*(seed)?[-_=. ]*\d+$", "", run.name) for run in group}
    return bare.pop() or None if len(group) > 1 and len(bare) == 1 else None


def _label(run: Run, key: str) -> str:
    """What a setting says, in few words: opd; curriculum none; steps 60."""
    value, last = value_told(run.setting(key)), key.rpartition(".")[2]
    value = value if len(value) <= MOST_CHARACTERS else "..." + value[-MOST_CHARACTERS:]
    return value if key == "policy.name" else f"{LABELS.get(key, last.replace('_', ' '))} {value}"


def _keys(found: dict[tuple[Any, ...], list[Run]]) -> list[str]:
    keys = dict.fromkeys(key for group in found.values() for key in group[0].settings)
    return sorted((key for key in keys if not key.startswith(SAME_METHOD)), key=lambda key: key not in LABELS)


def methods(groups: Groups, remarks: list[str]) -> Table:
    """Final accuracy of each group, and its difference to the first. Of runs that have one: others may still run."""
    first, *_ = groups
    measured = {name: [run for run in group if run.accuracy("after") is not None] for name, group in groups.items()}
    asked = {_problems(run) for group in measured.values() for run in group}
    paired = len(asked) == 1 and None not in asked
    rows = []
    for name, group in measured.items():
        row = [name, str(len(_by_seed(group)))]
        for kind in ("greedy", "sampled"):
            row.append(_accuracy(group, kind, paired))
        compared = paired and name != first
        greedy, sampled = (
            _difference(group, measured[first], kind) if compared else None for kind in ("greedy", "sampled")
        )
        rows.append([*row, _signed(greedy), _signed(sampled), _verdict(greedy)])
    head = ["method", "seeds", "greedy", "sampled", "greedy, difference", "sampled, difference", "greedy is"]
    remarks += _left_out(groups, measured, paired)
    return Table("Held-out accuracy after training", head, rows, numeric=(1, 2, 3, 4, 5))


def _problems(run: Run) -> str | None:
    """What the run was measured on, if it was recorded: ids alone may be no more than numbers."""
    prompts, digest = run.heldout.get("prompts"), run.heldout.get("problems")
    return json.dumps([prompts, digest or run.setting("evaluation.path")]) if isinstance(prompts, list) else None


def _left_out(groups: Groups, measured: Groups, paired: bool) -> Iterator[str]:
    """What the accuracies do not hold."""
    without = [run.name for group in groups.values() for run in group if run.accuracy("after") is None]
    if without:
        yield f"Not finished, or not evaluated, and in no accuracy after training: {', '.join(without)}."
    if not paired and any(measured.values()):
        yield (
            "The runs have not all recorded their answers to the same held-out prompts, so differences are not taken "
            "prompt by prompt and have no intervals."
        )
    seeds = {name: _by_seed(group) for name, group in measured.items()}
    again = [f"{name}, {seed}" for name, of in seeds.items() for seed, runs in of.items() if len(runs) > 1]
    if again:
        yield f"Run more than once (method, seed): {'; '.join(again)}. Such runs count as one, which is their mean."
    single = [name for name, found in seeds.items() if len(found) == 1]
    if single:
        yield f"One seed alone ({', '.join(single)}): what other seeds would change is in no interval there."


def _by_seed(group: Sequence[Run]) -> dict[str, list[Run]]:
    found: dict[str, list[Run]] = {}
    for run in group:
        found.setdefault(value_told(run.setting("seed")), []).append(run)
    return found


def _known_by_seed(group: Sequence[Run], value: Callable[[Run], T | None]) -> list[list[T]]:
    """Of each seed what is known of its runs. Of seeds of which nothing is known there is no list."""
    known = [[v for run in runs if (v := value(run)) is not None] for runs in _by_seed(group).values()]
    return [values for values in known if values]


def _of_seeds(group: Sequence[Run], value: Callable[[Run], float | None]) -> list[float]:
    """One number a seed: the mean of its runs."""
    return [fmean(values) for values in _known_by_seed(group, value)]


def _matrix(group: list[Run], kind: str) -> np.ndarray | None:
    """[seeds, prompts] shares of right answers after training. None: of some run they are not known, or there is none.

    Runs of the same seed are one row, their mean: as many rows of their own they would narrow what seeds change.
    """
    rows = _known_by_seed(group, lambda run: rates(run, "after", kind))
    lengths = [len(values) for known in rows for values in known]
    if len(lengths) != len(group) or len(set(lengths)) != 1:
        return None
    return np.array([np.mean(known, axis=0) for known in rows])


def _accuracy(group: list[Run], kind: str, paired: bool) -> str:
    matrix = _matrix(group, kind) if paired else None
    if matrix is not None:
        found = difference_of_groups(matrix)
        return f"{found.mean:.3f} [{found.low:.3f}, {found.high:.3f}]"
    means = _of_seeds(group, lambda run: None if (a := run.accuracy("after", kind)) is None else a.mean)
    if not means:
        return ""
    return f"{sum(means) / len(means):.3f}" + (f" ({min(means):.3f} to {max(means):.3f})" if len(means) > 1 else "")


def _difference(group: list[Run], first: list[Run], kind: str) -> Difference | None:
    ours, theirs = _matrix(group, kind), _matrix(first, kind)
    if ours is None or theirs is None or ours.shape[1] != theirs.shape[1]:
        return None
    return difference_of_groups(ours, theirs)


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return ""
    return f"{difference.mean:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"


def _verdict(difference: Difference | None) -> str:
    if difference is None:
        return ""
    if difference.low <= 0 <= difference.high:
        return "within noise"
    return "higher" if difference.low > 0 else "lower"


def every_run(groups: Groups) -> Table:
    """What each single run took and came to."""
    rows = []
    for name, group in groups.items():
        for run in group:
            shown = [run.accuracy(when, kind) for when, kind in WHERE]
            seconds, tokens = run.known("seconds"), sum(run.known("response_tokens"))
            took = [f"{len(run.steps):,}", f"{tokens:,.0f}", duration(seconds[-1]) if seconds else ""]
            came_to = ["" if a is None else f"{a.mean:.3f}" for a in shown]
            rows.append([run.name, name, value_told(run.setting("seed")), *took, *came_to])
    head = ["run", "method", "seed", "steps", "tokens", "time", "before", "after", "after, sampled", "teacher"]
    caption = "Held-out accuracies are greedy where nothing else is said."
    return Table("Every run", head, rows, caption, numeric=range(2, 10))


WHERE = (("before", "greedy"), ("after", "greedy"), ("after", "sampled"), ("teacher", "greedy"))


def at_the_same_budget(groups: Groups) -> Table:
    """Training pass rate where the run that has least of it ends: of steps, of tokens, of seconds."""
    runs = [run for group in groups.values() for run in group]
    limits = [min((axis[-1] for run in runs if len(axis := _axis(run, budget))), default=0.0) for budget in BUDGETS]
    rows = []
    for name, group in groups.items():
        cells = []
        for budget, limit in zip(BUDGETS, limits, strict=True):
            found = _of_seeds(group, partial(_at, budget=budget, limit=limit))
            spread = f" ({min(found):.3f} to {max(found):.3f})" if len(found) > 1 else ""
            cells.append(f"{sum(found) / len(found):.3f}{spread}" if found else "")
        rows.append([name, *cells])
    head = ["method", *(f"at {told(limit)} {budget}" for budget, limit in zip(BUDGETS, limits, strict=True))]
    caption = "Mean pass rate of the tenth of the run before that point, and its lowest and highest seed."
    return Table("Pass rate in training at the same budget", head, rows, caption, numeric=(1, 2, 3))


def _at(run: Run, budget: str, limit: float) -> float | None:
    axis, values = _axis(run, budget), run.column("pass_rate")
    inside = [v for x, v in zip(axis, values, strict=False) if x <= limit and v is not None]
    last = inside[-max(1, len(inside) // 10) :]
    return sum(last) / len(last) if last else None


def _axis(run: Run, budget: str) -> list[float]:
    """How much of the budget the run had used after each step; empty where that is not known."""
    if budget == "steps":
        return [step + 1.0 for step in run.steps]
    column = run.column("response_tokens" if budget == "response tokens" else "seconds")
    values = [0.0 if v is None else v for v in column]
    if not any(values):
        return []
    return list(np.cumsum(values)) if budget == "response tokens" else list(np.maximum.accumulate(values))


def _curve(groups: Groups, column: str, title: str, caption: str, unit: str) -> Figure:
    """A line a group, the mean of its seeds, within the lowest and highest of them."""
    bands = " Bands: from the lowest to the highest seed; where one has not come so far, of the others."
    figure = Figure(f"compare-{column}", title, caption + bands)
    figure.layout = {"yaxis": {"title": {"text": unit}}}
    for budget in BUDGETS:
        traces: list[Trace] = []
        for number, (name, group) in enumerate(groups.items()):
            curves = _known_by_seed(group, partial(_known, column=column, budget=budget))
            if curves:
                traces += _band(name, curves, number)
        if traces:
            figure.choices.append((f"against {budget}", traces))
    figure.choices = figure.choices[::-1]  # the page shows the last one first
    return figure


def _known(run: Run, column: str, budget: str) -> Curve | None:
    axis, values = _axis(run, budget), run.column(column)
    if not axis:
        return None
    if column == "pass_rate":
        values = smoothed(values, max(3, len(values) // 20))
    pairs = [(x, v) for x, v in zip(axis, values, strict=True) if v is not None]
    return (np.array([x for x, _ in pairs]), np.array([v for _, v in pairs])) if pairs else None


def _band(name: str, seeds: list[list[Curve]], number: int) -> list[Trace]:
    """From the first point that a seed's runs have to the last; a seed's runs are one curve, their mean."""
    ends = [end for runs in seeds for x, _ in runs for end in (x[0], x[-1])]
    low, high = min(ends), max(ends)
    grid = np.linspace(low, high, GRID if high > low else 1)
    values = np.array([_mean([np.interp(grid, x, y, np.nan, np.nan) for x, y in runs]) for runs in seeds])
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    xs = [short(float(x), 6) for x in grid]
    shape = {"type": "scatter", "mode": "lines", "x": xs}
    traces: list[Trace] = []
    if len(seeds) > 1:
        edge = shape | {"line": {"width": 0}, "showlegend": False, "hoverinfo": "skip", "legendgroup": name}
        traces.append(edge | {"y": _short(np.fmin.reduce(values))})
        traces.append(edge | {"y": _short(np.fmax.reduce(values)), "fill": "tonexty", "fillcolor": _pale(colour)})
    mode = "lines" if len(grid) > 1 else "markers"
    line = {"color": colour, "dash": dash, "width": 2}
    traces.append(shape | {"mode": mode, "y": _short(_mean(values)), "name": name, "legendgroup": name, "line": line})
    return traces


def _mean(curves: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
    """[g] of those of [n, g] that are known there; NaN where none is."""
    values = np.asarray(curves)
    count = np.isfinite(values).sum(axis=0)
    return np.where(count > 0, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


def _short(values: np.ndarray) -> list[Any]:
    return [short(float(value), 4) for value in values]


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[place : place + 2], 16) for place in (1, 3, 5))
    return f"rgba({red},{green},{blue},.18)"
