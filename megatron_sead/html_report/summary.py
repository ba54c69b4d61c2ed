"""What stands first: what was run, what came of it, by level, with intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_sead.evaluation.statistics import Difference, Z, paired_bootstrap
from megatron_sead.html_report.run_directory import Accuracy, Run, number
from megatron_sead.wording import counted

WHEN = ("before", "after", "teacher")
Cell = tuple[str, str]  # a value and its interval


@dataclass(frozen=True)
class AccuracyTable:
    """A row overall and one a level."""

    title: str
    head: list[str]
    rows: list[dict[str, Any]]  # name, cells
    note: str


def facts(run: Run) -> list[tuple[str, str]]:
    """What was run, in words."""
    told: list[tuple[str, str]] = []
    for name, key in (("student", "student.path"), ("teacher", "teacher.path"), ("prompts", "prompts.path")):
        if run.setting(key) is not None:
            told.append((name, str(run.setting(key))))
    if run.setting("policy.name") is not None:
        told.append(("method", _method(run)))
    done = run.steps[-1] + 1 if run.steps else 0
    told.append(("steps", f"{done:,} of {run.planned_steps:,}" if done != run.planned_steps else f"{done:,}"))
    if run.setting("training.global_batch_size") is not None:
        told.append(("rollouts a step", str(run.setting("training.global_batch_size"))))
    if run.known("response_tokens"):
        told.append(("response tokens", f"{sum(run.known('response_tokens')):,.0f}"))
    if seconds := run.known("seconds"):
        told.append(("time", duration(seconds[-1])))
    if run.setting("seed") is not None:
        told.append(("seed", str(run.setting("seed"))))
    if run.starts:
        told.append(("starts", counted(len(run.starts), "start") + _ranks(run)))
    return told


def _method(run: Run) -> str:
    parts = [str(run.setting("policy.name"))]
    if run.setting("curriculum.mode") is not None:
        parts.append(f"curriculum {run.setting('curriculum.mode')}")
    return ", ".join(parts)


def _ranks(run: Run) -> str:
    ranks = number(run.of_last_start("ranks"))
    return f", {counted(int(ranks), 'rank')}" if ranks is not None else ""


def duration(seconds: float) -> str:
    """In words."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    if hours:
        return f"{hours:,} h {minutes} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{seconds:.1f} s"


def accuracy_tables(run: Run) -> list[AccuracyTable]:
    """Greedy, and sampled where that was measured."""
    found = []
    for kind in ("greedy", "sampled"):
        columns = [when for when in WHEN if run.accuracy(when, kind) is not None]
        if not columns:
            continue
        rows: list[dict[str, Any]] = [
            {"name": "all prompts", "cells": [_cell(run.accuracy(when, kind), kind) for when in columns]}
        ]
        levels = {when: run.by_level(when, kind) for when in columns}
        for level in levels[columns[0]]:
            rows.append({"name": f"level {level}", "cells": [_cell(levels[w].get(level), kind) for w in columns]})
        gain = gain_of(run, kind)
        if gain is not None:
            rows[0]["cells"].append((f"{gain.mean:+.3f}", f"{gain.low:+.2f} to {gain.high:+.2f}"))
            for row in rows[1:]:
                row["cells"].append(("", ""))
        head = ["prompts", *columns, *(["gain"] if gain is not None else [])]
        first = run.accuracy(columns[0], kind)
        prompts = first.prompts if first is not None else 0
        note = f"95 % intervals over {prompts} held-out prompts" if prompts else "95 % intervals over prompts"
        note += "; the gain by paired bootstrap." if gain is not None else "."
        found.append(AccuracyTable(f"Held-out accuracy, {kind}", head, rows, note))
    return found


def gain_of(run: Run, kind: str) -> Difference | None:
    """After less before, prompt by prompt; None where single answers are not known."""
    before, after = rates(run, "before", kind), rates(run, "after", kind)
    return paired_bootstrap(after, before) if before and after and len(before) == len(after) else None


def rates(run: Run, when: str, kind: str) -> list[float] | None:
    """Share of right answers of each held-out prompt."""
    found = run.heldout.get(when)
    values = found.get(kind) if isinstance(found, dict) else None
    if not isinstance(values, list):
        return None
    known = [v for v in map(number, values) if v is not None]
    return known if known and len(known) == len(values) else None


def _cell(accuracy: Accuracy | None, kind: str) -> Cell:
    if accuracy is None:
        return "", ""
    low, high = interval(accuracy, kind)
    return f"{accuracy.mean:.3f}", f"{low:.2f} to {high:.2f}"


def interval(accuracy: Accuracy, kind: str) -> tuple[float, float]:
    """Of 95 %. Greedy answers are right or wrong: Wilson's, which is no point where all are right."""
    mean, prompts = accuracy.mean, accuracy.prompts
    if prompts and (kind == "greedy" or not accuracy.error):
        spread = Z / (1 + Z**2 / prompts) * math.sqrt(mean * (1 - mean) / prompts + Z**2 / (4 * prompts**2))
        centre = (mean + Z**2 / (2 * prompts)) / (1 + Z**2 / prompts)
    else:
        centre, spread = mean, Z * accuracy.error
    return max(0.0, centre - spread), min(1.0, centre + spread)
