"""The curves of one run. A new one is a function in `FIGURES`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from megatron_sead.html_report.figure import (
    FORWARD,
    QUIET,
    REVERSE,
    STUDENT,
    TEACHER,
    ZONES,
    Figure,
    line,
    numbers_of,
)
from megatron_sead.html_report.run_directory import Run, number
from megatron_sead.html_report.series import places_to_draw, short, smoothed
from megatron_sead.html_report.summary import interval

PAPER_MASS = {"A": 9.7, "B": 58.4, "C": 31.9}  # percent of the forward KL, SEAD's section on zones
SMOOTHING = 20  # windows a run


def _curves(
    run: Run,
    figure: Figure,
    columns: list[tuple[str, str, str, str]],
    *,
    y: str,
    log: bool = False,
    share: bool = False,
) -> Figure:
    """Fill a figure with columns of metrics.jsonl: (column, name, colour, dash) each."""
    figure.layout = {"yaxis": {"title": {"text": y}}, "xaxis": {"title": {"text": "step"}}}
    if log:
        figure.layout["yaxis"] |= {"type": "log", "dtick": 1} if _decades(run, columns) > 1.5 else {"type": "log"}
    if share:
        figure.layout["yaxis"] |= {"range": [0, 1.03]}
    named = [(name, run.column(column)) for column, name, _, _ in columns]
    if log:  # which has no place for zero
        named = [(name, [v if v is None or v > 0 else None for v in values]) for name, values in named]
    for (name, values), (_, _, colour, dash) in zip(named, columns, strict=True):
        figure.traces += line(name, run.steps, values, colour, dash=dash)
    figure.numbers = numbers_of(named, run.steps)
    return figure


def _decades(run: Run, columns: list[tuple[str, str, str, str]]) -> float:
    """Powers of ten that the columns span: of more than one and a half every digit would be labelled."""
    values = [value for column, *_ in columns for value in run.known(column) if value > 0]
    return math.log10(max(values) / min(values)) if values else 0.0


def learning(run: Run) -> Figure:
    """Pass rate by step, held-out accuracy where it was measured."""
    rates, opened = run.column("pass_rate"), run.column("eligible_prompts")
    window = max(3, len(run.steps) // SMOOTHING)
    figure = Figure(
        "learning",
        "Right answers by step",
        "Share of a step's own rollouts that are right, and held-out accuracy before and after. Where a curriculum "
        "opens harder prompts (grey) the pass rate may fall while the student learns.",
        wide=True,
    )
    most = max((v for v in opened if v is not None), default=0)
    if most:
        shares = [None if v is None else v / most for v in opened]
        fill: dict[str, Any] = {
            "fill": "tozeroy",
            "fillcolor": "rgba(138,143,152,.16)",
            "line": {"width": 0, "shape": "hv"},
        }
        figure.traces += line("prompts open, of those ever open", run.steps, shares, QUIET, **fill)
    dots: dict[str, Any] = {"mode": "markers", "marker": {"color": STUDENT, "size": 4, "opacity": 0.35}}
    figure.traces += line("pass rate of a step", run.steps, rates, STUDENT, **dots)
    figure.traces += line(f"mean over {window} steps", run.steps, smoothed(rates, window), STUDENT)
    figure.traces += _heldout(run)
    figure.layout = {
        "yaxis": {"title": {"text": "share right"}, "range": [0, 1.05]},
        "xaxis": {"title": {"text": "step"}},
    }
    figure.numbers = numbers_of([("pass rate", rates), ("competence", run.column("competence"))], run.steps)
    return figure


def _heldout(run: Run) -> list[dict[str, object]]:
    """Greedy accuracy as points with their 95 % intervals, the teacher's as a line."""
    last = run.steps[-1] + 1 if run.steps else 0
    points = [(x, a) for x, a in ((0, run.accuracy("before")), (last, run.accuracy("after"))) if a is not None]
    traces: list[dict[str, object]] = []
    if points:
        ends = [interval(a, "greedy") for _, a in points]
        above = [short(high - a.mean, 3) for (_, high), (_, a) in zip(ends, points, strict=True)]
        below = [short(a.mean - low, 3) for (low, _), (_, a) in zip(ends, points, strict=True)]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "held-out, greedy",
                "x": [x for x, _ in points],
                "y": [short(a.mean) for _, a in points],
                "error_y": {"type": "data", "array": above, "arrayminus": below, "color": TEACHER},
                "marker": {"color": TEACHER, "size": 10, "symbol": "diamond"},
                "cliponaxis": False,
            }
        )
    teacher = run.accuracy("teacher")
    if teacher is not None and last:
        traces += line("held-out, the teacher", [0, last], [teacher.mean] * 2, TEACHER, dash="dash", mode="lines")
    return traces


def loss(run: Run) -> Figure:
    """Loss and the gradient's norm."""
    figure = Figure(
        "loss",
        "Loss and gradient norm",
        "The weighted divergence of an active token, and the norm of the whole gradient before clipping. A spike that "
        "does not come back down is worth a look; a gap is a step that was skipped.",
    )
    columns = [("loss", "loss, nats", STUDENT, "solid"), ("grad_norm", "gradient norm", QUIET, "dot")]
    return _curves(run, figure, columns, y="nats; norm", log=True)


def divergences(run: Run) -> Figure:
    """Both divergences."""
    figure = Figure(
        "divergences",
        "Divergence of a token",
        "Means over all response tokens. Forward KL is large where the student misses what the teacher would say, "
        "reverse KL where it says what the teacher would not.",
    )
    columns = [
        ("forward_kl", "forward KL(teacher || student)", FORWARD, "solid"),
        ("reverse_kl", "reverse KL(student || teacher)", REVERSE, "dash"),
    ]
    return _curves(run, figure, columns, y="nats a token", log=True)


def divergences_by_zone(run: Run) -> Figure:
    """Both divergences of a token of each zone, from shares of mass and of tokens."""
    figure = Figure(
        "divergences-by-zone",
        "Divergence of a token, by zone",
        "Zones are the step's own quantiles: A both sure, B the student unsure, C the teacher unsure too. Solid: "
        "forward KL, dashed: reverse KL.",
    )
    named = []
    for zone, colour in ZONES.items():
        z, tokens = zone.lower(), run.column(f"zone_{zone.lower()}_share")
        for kind, dash in (("forward_kl", "solid"), ("reverse_kl", "dash")):
            values = [
                share * mean / part if share and mean and part else None
                for share, mean, part in zip(
                    run.column(f"zone_{z}_{kind}_share"), run.column(kind), tokens, strict=True
                )
            ]
            name = f"{zone}, {kind.replace('_kl', ' KL')}"
            figure.traces += line(name, run.steps, values, colour, dash=dash)
            named.append((name, values))
    figure.layout = {"yaxis": {"title": {"text": "nats a token"}, "type": "log"}, "xaxis": {"title": {"text": "step"}}}
    figure.numbers = numbers_of(named, run.steps)
    return figure


def entropies(run: Run) -> Figure:
    """Both entropies, and where zones begin."""
    figure = Figure(
        "entropies",
        "Entropy of the next token",
        "The paper's Figure 3: on-policy distillation draws the student's entropy towards the teacher's; one that "
        "goes to nothing has collapsed. Thin: where zones B and C begin.",
    )
    columns = [
        ("student_entropy", "student", STUDENT, "solid"),
        ("teacher_entropy", "teacher, of the same tokens", TEACHER, "dash"),
        ("tau_student", "zone B begins (student)", ZONES["B"], "dot"),
        ("tau_teacher", "zone C begins (teacher)", ZONES["C"], "dot"),
    ]
    return _curves(run, figure, columns, y="nats")


def entropies_by_zone(run: Run) -> Figure:
    """Both entropies of each zone."""
    figure = Figure("entropies-by-zone", "Entropy of the next token, by zone", "Solid: student, dashed: teacher.")
    columns = [
        (f"zone_{zone.lower()}_{model}_entropy", f"{zone}, {model}", colour, dash)
        for zone, colour in ZONES.items()
        for model, dash in (("student", "solid"), ("teacher", "dash"))
    ]
    return _curves(run, figure, columns, y="nats")


def mass(run: Run) -> Figure:
    """Which zones hold the divergence, beside the paper's."""
    figure = Figure(
        "mass",
        "Where the divergence is",
        "Shares of the summed forward and reverse KL by zone; of the forward KL the paper measured 9.7, 58.4 and 31.9 "
        "percent. What zone A holds is not taught.",
    )
    tenth = max(1, len(run.steps) // 10)
    parts = [("first tenth", slice(0, tenth)), ("last tenth", slice(-tenth, None)), ("whole run", slice(None))]
    rows = []
    for kind in ("reverse_kl", "forward_kl"):
        for label, steps in parts:
            shares = _mass_of(run, kind, steps)
            if shares is not None:
                rows.append((f"{kind.replace('_kl', ' KL')}, {label}", shares))
    if not rows:
        return figure
    rows.append(("forward KL, the paper", [share / 100 for share in PAPER_MASS.values()]))
    for place, (zone, colour) in enumerate(ZONES.items()):
        figure.traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": f"zone {zone}",
                "y": [name for name, _ in rows],
                "x": [short(100 * shares[place], 3) for _, shares in rows],
                "text": [f"{100 * shares[place]:.1f}" for _, shares in rows],
                "textposition": "inside",
                "insidetextanchor": "middle",
                "marker": {"color": colour},
            }
        )
    figure.layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "percent of the divergence"}, "range": [0, 100]},
        "yaxis": {"automargin": True},
    }
    figure.numbers = [("measure", *(f"zone {zone}" for zone in ZONES))]
    figure.numbers += [(name, *(f"{100 * share:.1f} %" for share in shares)) for name, shares in rows]
    return figure


def _mass_of(run: Run, kind: str, steps: slice) -> list[float] | None:
    """Zones' shares of a divergence summed over steps; None where nothing is known."""
    columns = [run.column(f"zone_{zone.lower()}_{kind}_share")[steps] for zone in ZONES]
    weights = zip(run.column(kind)[steps], run.column("response_tokens")[steps], *columns, strict=True)
    sums = [0.0] * len(ZONES)
    for mean, tokens, *shares in weights:
        if mean is not None and tokens is not None and None not in shares:
            sums = [total + mean * tokens * (share or 0.0) for total, share in zip(sums, shares, strict=True)]
    return [part / sum(sums) for part in sums] if sum(sums) > 0 else None


def curriculum(run: Run) -> Figure:
    """Competence, alpha, and what the gate has opened."""
    figure = Figure(
        "curriculum",
        "Competence, alpha, difficulty",
        "Competence is the smoothed pass rate; alpha the share of forward KL in zone C; difficulty is of the prompts "
        "that the curriculum has opened, one less the initial student's pass rate.",
    )
    columns = [
        ("competence", "competence", STUDENT, "solid"),
        ("alpha", "alpha", TEACHER, "dash"),
        ("eligible_difficulty", "mean difficulty of open prompts", QUIET, "dot"),
    ]
    return _curves(run, figure, columns, y="share", share=True)


def open_prompts(run: Run) -> Figure:
    """How many prompts may be asked."""
    figure = Figure("open-prompts", "Open prompts", "How many prompts the curriculum lets a step ask.")
    return _curves(run, figure, [("eligible_prompts", "open prompts", STUDENT, "solid")], y="prompts")


def stopping(run: Run) -> Figure:
    """Do responses end, and where the teacher would end them?"""
    figure = Figure(
        "stopping",
        "How responses end",
        "Probability of a stop token where a response ends, by both models, and the share that was cut. A student that "
        "stops where its teacher would not, or never, grows long or short for no good reason.",
    )
    columns = [
        ("student_stop_probability", "stop probability, student", STUDENT, "solid"),
        ("teacher_stop_probability", "stop probability, teacher", TEACHER, "dash"),
        ("truncated_share", "responses cut", REVERSE, "solid"),
        ("repetition_share", "cut for repetition", QUIET, "dot"),
    ]
    return _curves(run, figure, columns, y="share", share=True)


def lengths(run: Run) -> Figure:
    """How long responses are."""
    figure = Figure("lengths", "Length of a response", "Mean tokens of a response, its stop token included.")
    return _curves(run, figure, [("response_length", "tokens", STUDENT, "solid")], y="tokens")


def seconds(run: Run) -> Figure:
    """What a step's time goes to."""
    figure = Figure(
        "seconds",
        "Seconds of a step",
        "Stacked phases: writing and grading rollouts, both models' scores, training, new weights for the engine.",
    )
    phases = [
        ("rollout_seconds", "rollouts", STUDENT),
        ("score_seconds", "scores", FORWARD),
        ("train_seconds", "training", TEACHER),
        ("sync_seconds", "new weights", QUIET),
    ]
    taken = [[v or 0.0 for v in run.column(column)] for column, *_ in phases]
    places = places_to_draw([sum(of_step) for of_step in zip(*taken, strict=True)])  # where one lacks a point, all jump
    steps = [run.steps[place] for place in places]
    for (column, name, colour), values in zip(phases, taken, strict=True):
        if run.known(column):
            drawn = [values[place] for place in places]
            figure.traces += line(name, steps, drawn, colour, stackgroup="phases", mode="lines")
    figure.layout = {"yaxis": {"title": {"text": "seconds"}}, "xaxis": {"title": {"text": "step"}}}
    named = [(name, run.column(column)) for column, name, _ in phases]
    figure.numbers = numbers_of([*named, ("whole step", run.column("step_seconds"))], run.steps)
    return figure


def speed(run: Run) -> Figure:
    """Tokens a second."""
    figure = Figure("speed", "Tokens a second", "Response tokens over the seconds of their whole step.")
    return _curves(run, figure, [("tokens_per_second", "tokens a second", STUDENT, "solid")], y="tokens / s")


def memory(run: Run) -> Figure:
    """Peak memory beside the plan's."""
    figure = Figure(
        "memory",
        "Memory of the fullest rank",
        "The most that any rank has held so far (GPU: what torch gave out; CPU: the whole process, libraries and all), "
        "and the peak that the plan expected of tensors.",
    )
    _curves(run, figure, [("peak_memory", "measured", STUDENT, "solid")], y="GiB")
    peak = number(run.of_last_start("plan", "peak_bytes"))
    if figure.traces and peak is not None:
        ends = [run.steps[0], run.steps[-1]]
        figure.traces += line("planned", ends, [peak / 2**30] * 2, TEACHER, dash="dash", mode="lines")
    return figure


def mismatch(run: Run) -> Figure:
    """Engine against trainer."""
    figure = Figure(
        "mismatch",
        "Engine against trainer",
        "Difference between the log-probabilities that the rollout engine and the student in training give the same "
        "sampled tokens. Rounding is small and flat; anything that grows is a fault.",
    )
    columns = [
        ("sampling_log_prob_difference", "mean", STUDENT, "solid"),
        ("sampling_log_prob_difference_p99", "99th percentile", TEACHER, "dash"),
        ("sampling_log_prob_difference_max", "largest", QUIET, "dot"),
    ]
    return _curves(run, figure, columns, y="nats", log=True)


FIGURES: tuple[Callable[[Run], Figure], ...] = (
    learning,
    divergences,
    divergences_by_zone,
    entropies,
    entropies_by_zone,
    mass,
    loss,
    curriculum,
    open_prompts,
    stopping,
    lengths,
    mismatch,
    seconds,
    speed,
    memory,
)
