"""Figures of single tokens at chosen steps, from their records: the paper's Figure 2, and how far the models agree."""

from __future__ import annotations

from typing import Any

from megatron_sead.html_report.figure import (
    FORWARD,
    REVERSE,
    STUDENT,
    SYMBOLS,
    TEACHER,
    ZONES,
    Figure,
    Trace,
    line,
    told,
)
from megatron_sead.html_report.run_directory import Run, number
from megatron_sead.html_report.series import short
from megatron_sead.reporting.token_records import LIKELIEST, MOST_POINTS

MOST_CHOICES = 5  # steps
CURVE_POINTS = 150
SCATTER_POINTS = 900  # a step
LEAST = 1e-6  # nats: less is drawn as this on a logarithmic axis

SAMPLE = f"Tokens of one step (up to {MOST_POINTS:,}, spread evenly over it)"

Records = dict[int, dict[str, Any]]  # by step


def token_figures(run: Run, records: Records) -> list[Figure]:
    """Both of the paper's, and the overlap."""
    chosen = {step: records[step] for step in spread(list(records), MOST_CHOICES)}
    return [sorted_divergence(chosen), joint_entropy(chosen), overlap(run, records)]


def spread(steps: list[int], most: int) -> list[int]:
    """Of these so many, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(place * (len(steps) - 1) / (most - 1))] for place in range(most)]


def sorted_divergence(records: Records) -> Figure:
    """Divergences of a step's tokens from the largest down."""
    figure = Figure(
        "sorted-divergence",
        "Divergence of tokens, sorted",
        f"{SAMPLE} from the largest divergence down. A steep fall means that few tokens hold what there is to learn.",
    )
    for step, record in records.items():
        points, traces = record["all_tokens"], []
        for kind, colour, dash in (("forward_kl", FORWARD, "solid"), ("reverse_kl", REVERSE, "dash")):
            values = sorted((v for v in points[kind] if v is not None), reverse=True)
            if values:
                places = sorted({round(i * (len(values) - 1) / (CURVE_POINTS - 1)) for i in range(CURVE_POINTS)})
                xs = [short(100 * (place + 0.5) / len(values), 4) or 0.0 for place in places]
                ys = [max(values[place], LEAST) for place in places]
                traces += line(kind.replace("_kl", " KL"), xs, ys, colour, dash=dash)
                figure.numbers += [_mass_row(f"step {step}, {kind.replace('_kl', ' KL')}", values)]
        if traces:
            figure.choices.append((_choice(step, record), traces))
    if figure.numbers:
        figure.numbers.insert(0, ("divergence", "median", "largest", "held by the largest 10 %", "by the largest 20 %"))
    figure.layout = {
        "xaxis": {"title": {"text": "percent of the tokens"}, "range": [0, 100]},
        "yaxis": {"title": {"text": "nats"}, "type": "log"},
    }
    return figure


def _choice(step: int, record: dict[str, Any]) -> str:
    recorded, of = len(record["all_tokens"]["zones"]), number(record.get("tokens"))
    return f"step {step}" + (f", {recorded:,} of {of:,.0f} tokens" if of and of > recorded else "")


def _mass_row(name: str, values: list[float]) -> tuple[str, ...]:
    total = sum(values)
    held = [sum(values[: max(1, len(values) * percent // 100)]) / total if total else 0.0 for percent in (10, 20)]
    return (name, told(values[len(values) // 2]), told(values[0]), *(f"{100 * part:.0f} %" for part in held))


def joint_entropy(records: Records) -> Figure:
    """Student's entropy against the teacher's, by zone."""
    figure = Figure(
        "joint-entropy",
        "Both entropies of tokens, by zone",
        f"{SAMPLE}. Zone C is what the teacher is unsure of, B what only the student is, A the rest. Where the cloud "
        "bends along an axis, one model knows what the other does not.",
    )
    for step, record in records.items():
        points, traces = record["all_tokens"], list[Trace]()
        every = max(1, -(-len(points["zones"]) // SCATTER_POINTS))
        rows = list(zip(points["student_entropy"], points["teacher_entropy"], points["zones"], strict=True))[::every]
        counts = []
        for zone, colour in ZONES.items():
            inside = [(s, t) for s, t, z in rows if z == zone and s is not None and t is not None]
            counts.append(str(len(inside)))
            marker = {"color": colour, "symbol": SYMBOLS[zone], "size": 6, "opacity": 0.55}
            x, y = [short(s, 3) for s, _ in inside], [short(t, 3) for _, t in inside]
            if inside:
                traces.append(
                    {"type": "scatter", "mode": "markers", "name": f"zone {zone}", "x": x, "y": y} | {"marker": marker}
                )
        if traces:
            figure.choices.append((_choice(step, record), traces))
            figure.numbers.append((f"step {step}", *counts))
    if figure.numbers:
        figure.numbers.insert(0, ("tokens drawn", *(f"zone {zone}" for zone in ZONES)))
    figure.layout = {"xaxis": {"title": {"text": "student, nats"}}, "yaxis": {"title": {"text": "teacher, nats"}}}
    return figure


def overlap(run: Run, records: Records) -> Figure:
    """How far both models hold the same tokens likeliest, by recorded step."""
    figure = Figure(
        "overlap",
        "Do both models say the same?",
        "Over the tokens that were recorded: how often the likeliest token is the same, how many of the three "
        "likeliest are, and how probable the teacher holds what the student holds likeliest. And over every step: how "
        "often both are sure (zone A) of different tokens.",
    )
    steps, same, shared, given = list[int](), list[float | None](), list[float | None](), list[float | None]()
    for step, record in records.items():
        pairs = [
            pair
            for rollout in record["rollouts"]
            for pair in zip(*(rollout.get(name) or () for name in LIKELIEST), strict=False)
        ]
        if pairs:
            steps.append(step)
            same.append(sum(s[0][0] == t[0][0] for s, t in pairs) / len(pairs))
            of_three = [len({e[0] for e in s} & {e[0] for e in t}) / len(s) for s, t in pairs]
            shared.append(sum(of_three) / len(pairs))
            given.append(sum(s[0][2] or 0.0 for s, _ in pairs) / len(pairs))
    named = [
        ("likeliest token is the same", same),
        ("of the three likeliest", shared),
        ("teacher's for the student's", given),
    ]
    for (name, values), (colour, dash) in zip(
        named, ((STUDENT, "solid"), (TEACHER, "dash"), (FORWARD, "dot")), strict=True
    ):
        figure.traces += line(name, steps, values, colour, dash=dash, mode="lines+markers")
    figure.traces += line("zone A: not the same", run.steps, run.column("confident_mismatch_rate"), ZONES["A"])
    figure.layout = {"yaxis": {"title": {"text": "share"}, "range": [0, 1.03]}, "xaxis": {"title": {"text": "step"}}}
    if steps:
        figure.numbers = [("step", *(name for name, _ in named))]
        figure.numbers += [
            (str(s), told(a), told(b), told(c)) for s, a, b, c in zip(steps, same, shared, given, strict=True)
        ]
    return figure


def read_records(run: Run) -> Records:
    """All that can be read."""
    found = ((step, run.tokens(step)) for step in run.token_steps)
    return {step: record for step, record in found if record is not None}
