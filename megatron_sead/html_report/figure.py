"""A figure as plotly.js draws it, with what somebody who does not see it reads instead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sead.html_report.series import Number, short, thinned

Trace = dict[str, Any]
# Told apart by people who do not see all colours (Okabe and Ito), on white and on black
STUDENT, TEACHER, FORWARD, REVERSE, QUIET = "#0f7fc4", "#d95f02", "#129b72", "#c45c98", "#8a8f98"
ZONES = {"A": "#8a8f98", "B": "#2f8fd0", "C": "#e08214"}
SYMBOLS = {"A": "circle", "B": "square", "C": "diamond"}


@dataclass
class Figure:
    """One plot, or one a choice where `choices` are several."""

    id: str
    title: str
    caption: str  # what it shows, and what to look for
    traces: list[Trace] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    choices: list[tuple[str, list[Trace]]] = field(default_factory=list)  # label and traces, instead of `traces`
    numbers: list[tuple[str, ...]] = field(default_factory=list)  # the table beside it; the first row is its head
    wide: bool = False

    @property
    def empty(self) -> bool:
        """There is nothing to draw."""
        return not self.traces and not self.choices

    def data(self) -> dict[str, Any]:
        """For the page's script."""
        return {"traces": self.traces, "layout": self.layout, "choices": [list(choice) for choice in self.choices]}


def line(
    name: str, xs: Sequence[float], ys: Sequence[Number], colour: str, *, dash: str = "solid", **more: Any
) -> list[Trace]:
    """A curve, with gaps where nothing is known; no trace where nothing is known at all."""
    if all(y is None for y in ys):
        return []
    few_x, few_y = thinned(xs, ys)
    mode = "lines+markers" if sum(y is not None for y in few_y) < 3 else "lines"
    trace = {"type": "scatter", "mode": mode, "name": name, "x": few_x, "y": few_y}
    return [trace | {"line": {"color": colour, "dash": dash, "width": 1.8}, "marker": {"color": colour}} | more]


def numbers_of(named: Sequence[tuple[str, Sequence[Number]]], steps: Sequence[int]) -> list[tuple[str, ...]]:
    """A row a curve: its first, last, lowest and highest value, and how many values are not known."""
    rows: list[tuple[str, ...]] = [("curve", "first", "last", "lowest", "highest", "unknown")]
    for name, values in named:
        known = [(v, step) for v, step in zip(values, steps, strict=True) if v is not None]
        if known:
            (low, low_step), (high, high_step) = min(known), max(known)
            at = [f"{told(low)} at {low_step}", f"{told(high)} at {high_step}"]
            rows.append((name, told(known[0][0]), told(known[-1][0]), *at, str(len(values) - len(known))))
    return rows if len(rows) > 1 else []


def told(value: Number) -> str:
    """As a person reads it."""
    brief = None if value is None else short(value, 3 if abs(value) < 1000 else 6)
    if brief is None:
        return "unknown"
    return f"{brief:,}" if isinstance(brief, int) else f"{brief:g}"
