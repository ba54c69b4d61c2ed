"""Pictures of a study. Everything drawn is in its records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import BytesIO
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_sead.scaling.records import Numbers, best_by_ranks, efficiency, phases_of, same_workload
from megatron_sead.scaling.study import Experiments

INK, IDEAL = "#222222", "#999999"
COLOURS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#bab0ac", "#e45756", "#72b7b2", "#eeca3b")
MARKERS, LINES = ("o", "s", "^", "D"), ("-", "--", ":", "-.")  # where colours come again
GIB, MIB = 2**30, 2**20


def draw_all(experiments: dict[str, list[Numbers]]) -> dict[str, bytes]:
    """An SVG for each experiment, one of memory and one of parity, by their files' names."""
    found: dict[str, bytes] = {}
    every = {run.name: run for runs in experiments.values() for run in runs if run.reason is None}
    for experiment, runs in experiments.items():
        whole = [run for run in runs if run.reason is None]
        if whole:
            draw = _scaling if experiment in ("strong", "weak") else _growth
            found[f"{experiment}.svg"] = _svg(draw(whole, experiment))
    if held := [run for run in every.values() if run.memory]:
        found["memory.svg"] = _svg(_memory(held))
    groups = same_workload(list(every.values()))
    if groups:
        found["parity.svg"] = _svg(_parity(max(groups, key=len)))
    return found


def _svg(figure: Figure) -> bytes:
    matplotlib.rcParams["svg.hashsalt"] = "scaling"  # the same picture is the same file
    drawn = BytesIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    return drawn.getvalue()


def _figure(columns: int, width: float = 5.0, height: float = 3.8) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(columns * width, height), layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)[0]
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, list(axes)


def _scaling(runs: Sequence[Numbers], experiment: str) -> Figure:
    """Tokens a second by ranks with the ideal line, and efficiency."""
    figure, (speed, ratio) = _figure(2, width=6)
    best = best_by_ranks(runs)
    ranks = [run.ranks for run in best]
    base, ratios = best[0], efficiency(runs)
    speed.plot(ranks, [base.per_rank * n for n in ranks], "--", color=IDEAL, label="ideal")
    speed.plot(ranks, [run.tokens_per_second for run in best], color=COLOURS[0], label="fastest layout")
    for number, run in enumerate(runs):
        again, colour = divmod(number, len(COLOURS))
        mark: dict[str, Any] = {"color": COLOURS[colour], "marker": MARKERS[again % len(MARKERS)], "ls": "none"}
        speed.plot([run.ranks], [run.tokens_per_second], **mark, label=run.shape)
        ratio.plot([run.ranks], [100 * ratios[run.name]], **mark)
    ratio.axhline(100, linestyle="--", color=IDEAL)
    for ax in (speed, ratio):
        ax.set_xscale("log", base=2)
        ax.set_xticks(sorted(set(ranks)), [f"{n:,}" for n in sorted(set(ranks))], minor=False, fontsize=8)
        ax.set_xlabel("ranks")
    speed.set_yscale("log")
    speed.set_ylabel("response tokens / s")
    ratio.set_ylabel("efficiency, % of the fewest ranks'")
    ratio.set_ylim(bottom=0)
    speed.set_title(_title(runs, Experiments.TITLES[experiment]), fontsize=10, loc="left")
    if len(runs) <= 12:
        figure.legend(fontsize=7, frameon=False, loc="outside right upper")
    return figure


def _title(runs: Sequence[Numbers], text: str) -> str:
    return f"{text} (predicted)" if all(run.kind == "predicted" for run in runs) else text


def _growth(runs: Sequence[Numbers], experiment: str) -> Figure:
    """Seconds by phase, against what grows."""
    of: Callable[[Numbers], float] = {
        "tokens": lambda run: run.tokens,
        "length": lambda run: run.tokens / max(1, run.batch),
        "vocabulary": lambda run: run.vocabulary,
        "layers": lambda run: run.layers,
    }[experiment]
    unit = {"tokens": "response tokens of a step", "length": "mean tokens of a response"}.get(experiment, experiment)
    figure, (ax,) = _figure(1)
    ordered = sorted(runs, key=of)
    places = [of(run) for run in ordered]
    for number, name in enumerate(phases_of(ordered)):
        ax.plot(places, [r.phases.get(name, 0.0) for r in ordered], "o-", color=COLOURS[number], label=name, ms=4)
    ax.plot(places, [run.seconds for run in ordered], "o-", color=INK, label="step", ms=4)
    ax.set_xlabel(unit)
    ax.set_ylabel("seconds")
    ax.set_ylim(bottom=0)
    ax.set_title(_title(runs, Experiments.TITLES[experiment]), fontsize=10, loc="left")
    ax.legend(fontsize=7, frameon=False)
    return figure


def _memory(runs: Sequence[Numbers]) -> Figure:
    figure, (ax,) = _figure(1, width=8, height=1.2 + 0.3 * len(runs))
    unit, name = (GIB, "GiB") if max(run.memory for run in runs) >= GIB else (MIB, "MiB")
    places = range(len(runs))
    ax.barh([p - 0.2 for p in places], [r.memory / unit for r in runs], 0.4, color=COLOURS[0], label="tensors")
    planned = [r.planned_memory / unit for r in runs]
    ax.barh([p + 0.2 for p in places], planned, 0.4, color=IDEAL, label="planned")
    ax.set_yticks(list(places), [run.text for run in runs], fontsize=7)
    ax.invert_yaxis()
    ax.set_xlabel(f"{name} at the peak, of the rank that needs most")
    ax.legend(fontsize=7, frameon=False)
    return figure


def _parity(runs: Sequence[Numbers]) -> Figure:
    """Curves of runs that compute the same lie on each other; below, by how much they do not."""
    figure, axes = _figure(3, width=4.2)
    reference = runs[0]
    for number, run in enumerate(runs):
        style: dict[str, Any] = {
            "color": COLOURS[number % len(COLOURS)],
            "ls": LINES[number // len(COLOURS) % len(LINES)],
            "label": run.shape,
            "lw": 3.0 - 2.0 * number / len(runs),
        }
        axes[0].plot([float("nan") if v is None else v for v in run.loss], **style)
        axes[1].plot([float("nan") if v is None else v for v in run.grad_norm], **style)
        if run is not reference:
            axes[2].plot(_differences(run.loss, reference.loss), **style)
    for ax, name in zip(
        axes, ("loss, nats", "gradient norm", f"loss: relative difference to {reference.shape}"), strict=True
    ):
        ax.set_xlabel("step")
        ax.set_title(name, fontsize=10, loc="left")
    axes[2].set_yscale("symlog", linthresh=1e-8)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _differences(values: Sequence[float | None], reference: Sequence[float | None]) -> list[float]:
    pairs = zip(values, reference, strict=True)
    return [float("nan") if a is None or b is None else abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs]
