"""What came of a comparison: every run as data, and tables of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean
from typing import Any

from megatron_sead.files.durable import replace_text
from megatron_sead.files.outputs import require_free
from megatron_sead.html_report.comparison import methods
from megatron_sead.html_report.run_directory import Run, read_run
from megatron_sead.html_report.summary import rates as rates_of_prompts
from megatron_sead.html_report.tables import Table, as_markdown
from method_study.running import Chosen, best, require_folder
from method_study.study import Study, counted

RESULTS, TABLES = "results.json", "tables.md"
PARTS = 10  # of a run, whose means are kept
COLUMNS = {  # of metrics.jsonl, as the tables name them
    "pass_rate": "pass rate",
    "reverse_kl": "reverse KL",
    "forward_kl": "forward KL",
    "student_entropy": "H student",
    "teacher_entropy": "H teacher",
    "zone_a_forward_kl_share": "FKL in A",
    "zone_b_forward_kl_share": "FKL in B",
    "zone_c_forward_kl_share": "FKL in C",
    "response_tokens": "tokens",
    "active_tokens": "active tokens",
    "eligible_prompts": "open prompts",
    "grad_norm": "gradient norm",
}
SHOWN = (  # of them, in the table
    "pass_rate",
    "reverse_kl",
    "forward_kl",
    "student_entropy",
    "zone_a_forward_kl_share",
    "zone_c_forward_kl_share",
    "eligible_prompts",
)


def runs_of(study: Study, work: Path, horizon: int, rates: Mapping[str, float]) -> dict[str, list[Run]]:
    """By method, its seeds' runs."""
    return {
        name: [
            read_run(counted(study, work, name, rates[study.method_of(name)], horizon, seed).output)
            for seed in study.seeds
        ]
        for name in study.names_at(horizon)
    }


def require_place(folder: Path, study: Study) -> None:
    """Refuse a folder with the results of another study, before any run is made.

    Raises:
        UserError: it has some, or is no folder.
    """
    results, tables = folder / RESULTS, folder / TABLES
    require_folder(folder)
    with suppress(OSError, ValueError, KeyError, TypeError):
        if json.loads(results.read_text(encoding="utf-8"))["study"] == study.model_dump(mode="json"):
            return  # written again, if they come out the same
    for place in (results, tables):
        require_free(place)


def write_results(folder: Path, study: Study, chosen: Chosen, found: Mapping[int, dict[str, list[Run]]]) -> None:
    """Raises UserError where something else stands by now, as tables with somebody's notes."""
    texts = {RESULTS: json.dumps(data(study, chosen, found), separators=(",", ":")) + "\n"}
    texts[TABLES] = page(study, chosen, found)
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        require_free(folder / name, own=text)
    for name, text in texts.items():
        replace_text(folder / name, text)


def data(study: Study, chosen: Chosen, found: Mapping[int, dict[str, list[Run]]]) -> dict[str, Any]:
    """Everything that the tables are made of, and each run's answers, prompt by prompt."""
    runs = [
        {"method": name, "steps": horizon, "seed": run.setting("seed"), "lr": run.setting("training.lr")} | _of_run(run)
        for horizon, groups in found.items()
        for name, group in groups.items()
        for run in group
    ]
    some = next(iter(next(iter(found.values())).values()))[0]
    return {
        "study": study.model_dump(mode="json"),
        "machine": some.of_last_start("machine"),
        "versions": some.of_last_start("versions"),
        "prompts": some.heldout.get("prompts"),
        "rates": {method: {f"{rate:g}": told for rate, told in by.items()} for method, by in chosen.items()},
        "runs": runs,
    }


def _of_run(run: Run) -> dict[str, Any]:
    answers = {kind: rates_of_prompts(run, "after", kind) or [] for kind in ("greedy", "sampled")}
    accuracies = {
        f"{kind}_{when}": None if (found := run.accuracy(when, kind)) is None else found.mean
        for kind in answers
        for when in ("before", "after")
    }
    means = {name: parts for name in COLUMNS if (parts := _means(run, name))}
    return accuracies | {
        "tokens": sum(run.known("response_tokens")),
        "seconds": run.summary.get("seconds"),
        "means_of_tenths": means,
        "answers_after": {kind: [round(v, 4) for v in values] for kind, values in answers.items()},
    }


def _means(run: Run, name: str) -> list[float]:
    """Of each tenth of the run; [] where a run has no such column."""
    values = run.column(name)
    if not values or any(value is None for value in values):
        return []
    size = -(-len(values) // PARTS)
    parts = [values[start : start + size] for start in range(0, len(values), size)]
    return [float(f"{fmean(v for v in part if v is not None):.4g}") for part in parts]


def page(study: Study, chosen: Chosen, found: Mapping[int, dict[str, list[Run]]]) -> str:
    """All tables."""
    lines = ["## Learning rates", "", _rates(chosen), f"Accuracy of sampled answers after {study.rates.steps} steps"]
    lines[-1] += f", mean of seeds {', '.join(map(str, study.rates.seeds))}, on problems taken out of the training "
    lines[-1] += "prompts; in bold what is used."
    for horizon, groups in found.items():
        remarks: list[str] = []
        table = methods(groups, remarks)
        lines += ["", f"## {horizon} steps", "", as_markdown(table), *remarks, "### What the runs looked like", ""]
        lines += [as_markdown(_statistics(groups))]
    return "\n".join(lines)


def _rates(chosen: Chosen) -> str:
    tried = sorted({rate for by_rate in chosen.values() for rate in by_rate})
    rows = []
    for method, by_rate in chosen.items():
        told = {rate: f"{accuracy:.3f}" for rate, accuracy in by_rate.items()}
        told[best(by_rate)] = f"**{told[best(by_rate)]}**"
        rows.append([method, *(told.get(rate, "") for rate in tried)])
    head = ["method", *(f"{rate:g}" for rate in tried)]
    return as_markdown(Table("Learning rates", head, rows, numeric=range(1, len(head))))


def _statistics(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Means over a group's runs: of the whole run, or of its first and last tenth where they differ."""
    rows = []
    for name, group in groups.items():
        tokens = fmean(sum(run.known("response_tokens")) for run in group)
        active = fmean(sum(run.known("active_tokens")) for run in group) / tokens
        row = [name, f"{tokens:,.0f}", f"{active:.0%}"]
        for column in SHOWN:
            known = [means for run in group if (means := _means(run, column))]
            row.append(_ends(known) if known else "")
        rows.append(row)
    head = ["method", "tokens", "active", *(COLUMNS[column] for column in SHOWN)]
    return Table("What the runs looked like", head, rows, numeric=range(1, len(head)))


def _ends(known: Sequence[Sequence[float]]) -> str:
    """Of the first tenth and the last, mean over runs."""
    first, last = fmean(means[0] for means in known), fmean(means[-1] for means in known)
    return f"{first:,.0f} → {last:,.0f}" if last >= 10 else f"{first:.3f} → {last:.3f}"
