"""The table of an evaluation: for a terminal, as JSON, as Markdown and as a plot."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sead.evaluation.benchmarks import Benchmark
from megatron_sead.evaluation.evaluate import EvaluateSettings, Outcome
from megatron_sead.evaluation.groups import by_group
from megatron_sead.evaluation.models import Model
from megatron_sead.evaluation.statistics import (
    Difference,
    Summary,
    mean_of_summaries,
    paired_bootstrap,
    pass_rates,
    summarize,
)
from megatron_sead.files.replaceable import replace_files

FILES = ("results.json", "results.md", "results.png")
COLUMNS = ("benchmark", "accuracy", "if finished", "cut", "tokens", "problems", "samples")
AVERAGE = "average"


@dataclass(frozen=True)
class Results:
    """What came of every model and benchmark."""

    titles: dict[str, str]  # of benchmarks, in order
    summaries: dict[str, dict[str, Summary]]  # by model and benchmark
    averages: dict[str, tuple[float, float]]  # of each model over the benchmarks, with its error
    baseline: str  # the model that the others are compared with
    differences: dict[str, dict[str, Difference]]  # of each other model and benchmark
    groups: dict[str, dict[str, dict[str, dict[str, Summary]]]]  # by benchmark, field, group and model


def tabulate(outcome: Outcome, benchmarks: Sequence[Benchmark]) -> Results:
    """Accuracies of all models, also by group, and how each other one differs from the first on the same problems."""
    answers = outcome.answers
    summaries = {
        label: {name: summarize(of_prompts) for name, of_prompts in by_name.items()}
        for label, by_name in answers.items()
    }
    baseline, *others = answers
    return Results(
        titles={benchmark.name: benchmark.title for benchmark in benchmarks},
        summaries=summaries,
        averages={label: mean_of_summaries(list(by_name.values())) for label, by_name in summaries.items()},
        baseline=baseline,
        differences={
            label: {
                name: paired_bootstrap(pass_rates(answers[label][name]), pass_rates(answers[baseline][name]))
                for name in answers[baseline]
            }
            for label in others
        },
        groups={
            name: {field: _of_groups(outcome, name, values) for field, values in groups.items()}
            for name, groups in outcome.groups.items()
        },
    )


def _of_groups(outcome: Outcome, benchmark: str, values: Sequence[str]) -> dict[str, dict[str, Summary]]:
    found: dict[str, dict[str, Summary]] = {}
    for label, by_name in outcome.answers.items():
        for group, answers in by_group(values, by_name[benchmark]).items():
            found.setdefault(group, {})[label] = summarize(answers)
    return found


def write_results(results: Results, models: Sequence[Model], settings: EvaluateSettings, output: Path) -> None:
    """results.json, results.md and results.png, in place of what an earlier call wrote.

    Raises:
        UserError: one of them is somebody else's.
    """
    contents = (_json(results, models, settings).encode(), markdown(results).encode(), _plot(results))
    replace_files(output, dict(zip(FILES, contents, strict=True)))


def print_results(results: Results) -> None:
    """Tables on stdout."""
    console = Console()
    for title, rows in _tables(results):
        table = Table(title=title, title_justify="left")
        head, *body = rows
        table.add_column(head[0], no_wrap=True)
        for column in head[1:]:
            table.add_column(column, justify="right", no_wrap=True)
        for row in body:
            table.add_row(*map(Text, row))
        console.print(table)


def markdown(results: Results) -> str:
    """The same tables, with what their columns mean."""
    lines = ["# Evaluation", ""]
    for title, (head, *body) in _tables(results):
        lines += [f"## {title}", "", _row(head), _row(("---", *["---:"] * (len(head) - 1))), *map(_row, body), ""]
    lines += [
        "Accuracy is the share of right answers in percent, ± one standard error over problems (a problem's answers "
        "are one unit); of benchmarks with several answers each it is their mean. If finished: of the answers that "
        "were not cut at the limit of tokens. Cut: the share that was. Tokens: mean length of an answer.",
    ]
    if results.differences:
        lines += [
            "",
            "Differences are in percentage points, with the 95 % interval of a paired bootstrap over problems.",
        ]
    return "\n".join(lines) + "\n"


def _tables(results: Results) -> list[tuple[str, list[tuple[str, ...]]]]:
    """Titles and rows, the first of which is the head."""
    tables = []
    for label, by_name in results.summaries.items():
        rows = [COLUMNS, *(_summary_row(results.titles[name], summary) for name, summary in by_name.items())]
        if len(by_name) > 1:
            mean, error = results.averages[label]
            rows.append((AVERAGE, f"{mean:.1%} ± {100 * error:.1f}", *[""] * (len(COLUMNS) - 2)))
        tables.append((label, rows))
    for label, differences in results.differences.items():
        head = ("benchmark", "difference", "95 % interval")
        body = [
            (results.titles[name], f"{100 * d.mean:+.1f}", f"{100 * d.low:+.1f} to {100 * d.high:+.1f}")
            for name, d in differences.items()
        ]
        tables.append((f"{label} against {results.baseline}", [head, *body]))
    for name, fields in results.groups.items():
        for field, groups in fields.items():
            of_groups = [(field, "problems", *results.summaries), *map(_group_row, groups, groups.values())]
            tables.append((f"{results.titles[name]} by {field}", of_groups))
    return tables


def _group_row(group: str, summaries: dict[str, Summary]) -> tuple[str, ...]:
    problems = next(iter(summaries.values())).prompts
    return (group, f"{problems:,}", *map(_accuracy, summaries.values()))


def _accuracy(summary: Summary) -> str:
    return f"{summary.accuracy:.1%} ± {100 * summary.standard_error:.1f}"


def _summary_row(title: str, summary: Summary) -> tuple[str, ...]:
    finished = summary.accuracy_if_finished
    return (
        title,
        _accuracy(summary),
        "none finished" if finished is None else f"{finished:.1%}",
        f"{summary.truncated:.1%}",
        f"{summary.mean_tokens:,.0f}",
        f"{summary.prompts:,}",
        f"{summary.samples}" if summary.samples > 1 else "greedy",
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _json(results: Results, models: Sequence[Model], settings: EvaluateSettings) -> str:
    content: dict[str, Any] = {
        "models": {model.label: str(model.checkpoint or model.place) for model in models},
        "benchmarks": results.titles,
        "results": {label: _as_dicts(by_name) for label, by_name in results.summaries.items()},
        "average": {
            label: {"accuracy": mean, "standard_error": error} for label, (mean, error) in results.averages.items()
        },
        "differences": {
            label: {name: asdict(difference) | {"against": results.baseline} for name, difference in by_name.items()}
            for label, by_name in results.differences.items()
        },
        "groups": {
            name: {
                field: {group: _as_dicts(by_model) for group, by_model in groups.items()}
                for field, groups in fields.items()
            }
            for name, fields in results.groups.items()
            if fields
        },
        "settings": settings.model_dump(mode="json", exclude={"model": {"path"}, "device": True}),
    }
    return json.dumps(content, indent=2) + "\n"


def _as_dicts(summaries: dict[str, Summary]) -> dict[str, dict[str, Any]]:
    return {name: asdict(summary) for name, summary in summaries.items()}


def _plot(results: Results) -> bytes:
    """Accuracies as bars, with their standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles, labels = list(results.titles.values()), list(results.summaries)
    figure = Figure(figsize=(max(5.0, 1.3 * len(titles) + 1.5), 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    width = 0.8 / len(labels)
    for i, label in enumerate(labels):
        summaries = [results.summaries[label][name] for name in results.titles]
        places = [place + (i - (len(labels) - 1) / 2) * width for place in range(len(titles))]
        heights, errors = [100 * s.accuracy for s in summaries], [100 * s.standard_error for s in summaries]
        axes.bar(places, heights, width, yerr=errors, capsize=3, label=label)
    axes.set_xticks(range(len(titles)), titles, rotation=20, ha="right")
    axes.set_ylabel("accuracy, percent (± standard error)")
    axes.set_ylim(bottom=0)
    axes.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=150)
    return picture.getvalue()
