"""Tables, plots and the sentence that a reader needs, from the records of a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_sead.config.settings_file import load_settings
from megatron_sead.files.replaceable import replace_files
from megatron_sead.scaling.conclusion import conclusion
from megatron_sead.scaling.folder import STUDY, TABLES
from megatron_sead.scaling.records import (
    Numbers,
    efficiency,
    furthest,
    numbers_of,
    phases_of,
    read_records,
    same_workload,
)
from megatron_sead.scaling.study import Experiments, Study, parse_run
from megatron_sead.wording import counted, first_of

Column = tuple[str, Callable[[Numbers], str]]
MIB = 2**20


def write_report(folder: Path, *, plots: bool = True) -> str:
    """``scaling.json``, ``scaling.md`` and plots, in a study's directory. Returns the conclusion.

    Raises:
        UserError: the study or a record is damaged, or a file that would be replaced is not as it was written.
    """
    study = load_settings(Study, folder / STUDY, [])
    raw = read_records(folder)
    runs = {name: numbers_of(record) for name, record in raw.items()}
    experiments = experiments_of(study, runs)
    pictures: dict[str, bytes] = {}
    if plots:
        from megatron_sead.scaling.plots import draw_all

        pictures = draw_all(experiments)
    said = _said(experiments, raw)
    drawn = {name.removesuffix(".svg"): name for name in pictures}
    texts = (json.dumps(as_json(experiments, said), indent=1) + "\n", markdown(experiments, raw, said, drawn))
    replace_files(folder, dict(zip(TABLES, (text.encode() for text in texts), strict=True)) | pictures)
    return said


def _said(experiments: dict[str, list[Numbers]], raw: dict[str, Any]) -> str:
    if "strong" in experiments:
        return conclusion(experiments["strong"], _cores(raw))
    whole = {run.name for runs in experiments.values() for run in runs if run.reason is None}
    return (
        f"Numbers of {counted(len(whole), 'run')}; layouts are compared in strong scaling, of which the study has none."
    )


def experiments_of(study: Study, runs: dict[str, Numbers]) -> dict[str, list[Numbers]]:
    """By experiment the runs that have a record, in the study's order."""
    lists = study.runs.lists()
    names = {experiment: [parse_run(text).name for text in texts] for experiment, texts in lists.items()}
    return {experiment: [runs[n] for n in dict.fromkeys(found) if n in runs] for experiment, found in names.items()}


def as_json(experiments: dict[str, list[Numbers]], said: str) -> dict[str, Any]:
    """All numbers of the tables, unrounded."""
    found: dict[str, Any] = {"conclusion": said, "experiments": {}}
    for experiment, runs in experiments.items():
        ratios = efficiency(runs) if experiment in ("strong", "weak") else {}
        found["experiments"][experiment] = [
            vars(run) | {"per_rank": run.per_rank, "efficiency": ratios.get(run.name)} for run in runs
        ]
    return found


def markdown(experiments: dict[str, list[Numbers]], raw: dict[str, Any], said: str, drawn: dict[str, str]) -> str:
    """The report."""
    every = {run.name: run for runs in experiments.values() for run in runs}
    parts = ["# Scaling", said, _circumstances([raw[name] for name in every])]
    for experiment, runs in experiments.items():
        whole = [run for run in runs if run.reason is None]
        parts.append(f"## {Experiments.TITLES[experiment]}")
        if whole:
            parts.append(table(_columns(experiment, whole), whole))
        if experiment in drawn:
            parts.append(f"![{Experiments.TITLES[experiment]}]({drawn[experiment]})")
    whole = [run for run in every.values() if run.reason is None]
    if any(run.memory for run in whole):
        parts += ["## Memory, by layout", table(MEMORY, [run for run in whole if run.memory])]
        parts += [f"![Memory by layout, and the plan]({drawn['memory']})"] if "memory" in drawn else []
        if any(run.groups for run in whole):
            parts += ["## Collectives of a step, a rank", _collectives(whole)]
        parts += _parity(whole, drawn)
    failed = [run for run in every.values() if run.reason is not None]
    if failed:
        parts += ["## Not measured", "\n".join(f"- `{run.text}`: {run.reason}" for run in failed)]
    parts.append(HOW_TO_READ)
    return "\n\n".join(parts) + "\n"


def table(columns: Sequence[Column], runs: Sequence[Numbers]) -> str:
    """A Markdown table, a run a line."""
    lines = [[name for name, _ in columns], ["---"] * len(columns), *([cell(r) for _, cell in columns] for r in runs)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _columns(experiment: str, runs: Sequence[Numbers]) -> list[Column]:
    predicted = any(run.kind == "predicted" for run in runs)
    first: Column = ("predicted layout", lambda r: r.shape) if predicted else ("run", lambda r: r.text)
    columns: list[Column] = [first, ("ranks", lambda r: f"{r.ranks:,}")]
    if experiment in ("vocabulary", "layers"):
        columns.append((experiment, lambda r: f"{getattr(r, experiment):,}"))
    columns += [("tokens a step", lambda r: f"{r.tokens:,.0f}"), ("seconds a step", seconds)]
    columns += [("tokens / s", lambda r: f"{r.tokens_per_second:,.0f}"), ("a rank", lambda r: f"{r.per_rank:,.1f}")]
    if experiment in ("strong", "weak"):
        ratios = efficiency(runs)
        columns.append(("efficiency", lambda r: f"{ratios[r.name]:.0%}"))
    if any(run.cpu_seconds for run in runs):
        columns.append(("processor s, all ranks", lambda r: f"{r.cpu_seconds:.3f}"))
    names = [name for name in phases_of(runs) if name]
    columns += [(name, lambda r, n=name: f"{r.phases.get(n, 0):.3g}") for name in names]  # type: ignore[misc]
    if any(run.bubble for run in runs):
        columns.append(("bubble", lambda r: f"{r.bubble:.0%}" if r.bubble else ""))
    if any(run.padding > 0.005 for run in runs):
        columns.append(("padding", lambda r: f"{r.padding:.0%}"))
    if any(run.binds for run in runs):
        columns.append(("most goes to", lambda r: r.binds or ""))
    if predicted:
        columns += [("planned GiB", lambda r: f"{r.planned_memory / 2**30:.1f}"), ("run", lambda r: f"`{r.text}`")]
    return columns


def seconds(run: Numbers) -> str:
    """With its spread, where there is one."""
    if not run.slowest:
        return f"{run.seconds:.3g}"
    return f"{run.seconds:.3g} ({run.fastest:.3g} to {run.slowest:.3g})"


def _mib(size: float) -> str:
    return f"{size / MIB:,.0f}" if size >= 100 * MIB else f"{size / MIB:,.1f}"


MEMORY: list[Column] = [
    ("run", lambda r: r.text),
    ("tensors at the peak, MiB", lambda r: _mib(r.memory)),
    ("planned", lambda r: _mib(r.planned_memory)),
    ("process, MiB", lambda r: _mib(r.resident) if r.resident else ""),
]


def _collectives(runs: Sequence[Numbers]) -> str:
    groups = list(dict.fromkeys(group for run in runs for group in run.groups if group != "control"))
    columns: list[Column] = [("run", lambda r: r.text)]
    for group in groups:
        columns.append((f"{group}: calls, MB", lambda r, g=group: _sent(r, g)))  # type: ignore[misc]
    return table(columns, [run for run in runs if run.ranks > 1])


def _sent(run: Numbers, group: str) -> str:
    calls, size = run.groups.get(group, (0, 0))
    return f"{calls:,.0f}, {size / 1e6:,.3g}" if calls else ""


def _parity(runs: Sequence[Numbers], drawn: dict[str, str]) -> list[str]:
    groups = same_workload(runs)
    if not groups:
        return []
    lines = ["| run | against | loss | gradient norm | loss, first step | gradient norm, first step |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for reference, *others in groups:
        for run in others:
            curves = (run.loss, reference.loss), (run.grad_norm, reference.grad_norm)
            worst = [*(furthest(*pair) for pair in curves), *(furthest(one[:1], other[:1]) for one, other in curves)]
            lines.append(f"| {run.text} | {reference.text} | " + " | ".join(f"{value:.1e}" for value in worst) + " |")
    text = (
        "Largest relative difference over all steps, on the same rollouts, and that of the first step alone, which the "
        "layout's rounding makes before training does more with it. It does much on synthetic rollouts, whose random "
        "tokens have far larger gradients than a student's own."
    )
    picture = [f"![Loss and gradient norm by layout]({drawn['parity']})"] if "parity" in drawn else []
    return ["## Parity of curves", text, "\n".join(lines), *picture]


def _circumstances(records: Sequence[dict[str, Any]]) -> str:
    measured = [record for record in records if record["kind"] == "measured"]
    lines = []
    if len(measured) < len(records):
        lines.append(
            "**These are predictions, not measurements**: "
            + first_of(list(dict.fromkeys(r.get("source", "") for r in records if r["kind"] == "predicted")))
        )
    if measured:
        machines = {f"{m['cpu']}, {counted(m['cores'], 'core')}" for m in (r["machine"] for r in measured)}
        gpus = {rank["gpu"] for r in measured for rank in r.get("processes", []) if "gpu" in rank}
        loads = [load for record in measured for load in record.get("load", [])]
        lines.append(f"Measured on {' and '.join(sorted(gpus or machines))}, {_span([r['date'] for r in measured])}.")
        if loads:
            lines.append(
                f"Load of the machine between {min(loads)} and {max(loads)}, these runs included: times of a busy "
                "machine are high, and processor seconds suffer least."
            )
        versions = {", ".join(f"{n} {v}" for n, v in record["versions"].items()) for record in measured}
        lines.append(f"{'; '.join(sorted(versions))}.")
        for what, values in (("machines", machines), ("versions", versions), ("code", {r["code"] for r in measured})):
            if len(values) > 1:
                lines.append(f"**Records of different {what} stand beside each other.**")
    return " ".join(lines)


def _span(dates: Sequence[str]) -> str:
    return min(dates) if min(dates) == max(dates) else f"{min(dates)} to {max(dates)}"


def _cores(raw: dict[str, Any]) -> int | None:
    """Of the machine, where ranks were processes that share its cores."""
    on_cpu = [r for r in raw.values() if r["kind"] == "measured" and r["settings"].get("device") == "cpu"]
    return on_cpu[0]["machine"]["cores"] if on_cpu else None


HOW_TO_READ = """## How to read it

- A step lasts from the end of the one before to its own end. The first ones are warm-up and do not count, nor does the
  last one, in which operations are watched. Tokens, seconds, phases, processor seconds and the bubble are of one step:
  that whose seconds a token are the median, of an even number of steps the lower of both. The spread, and padding, are
  of all that count.
- Tokens are those of responses, each once, whatever the layout; padding and prompts are not among them. A run that
  counts others than its rollouts hold is refused.
- "A rank" divides by the ranks that ran. Efficiency: tokens a second and rank, over those of the best run of the fewest
  ranks.
- Memory is of the rank that needs most: on a GPU what torch had allocated, on a CPU the tensors of the watched step.
- Bytes of collectives are of the whole that is moved (all parts of a gather); the control group's are left out.
- The bubble follows from the schedule and the step's own micro-batches, as if all took as long.
- On a GPU the host's clock puts work that is still queued into the phase that waits for it; whole steps are exact.
- `scaling.json` has the same numbers unrounded; `sead scaling report DIR` makes all of it again from `records/`."""
