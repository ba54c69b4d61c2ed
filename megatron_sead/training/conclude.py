"""The end of a run: the student as a Hugging Face directory, proven to be the trained one, and how good it is."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from megatron_sead.checkpoints.huggingface import verify_huggingface_directory, write_huggingface_directory
from megatron_sead.files.durable import replace_text
from megatron_sead.html_report.write import write_at_the_end
from megatron_sead.prompts.export import export_tokenizer
from megatron_sead.prompts.tokenizer import load_tokenizer
from megatron_sead.training.heldout import evaluate_directory, evaluate_student
from megatron_sead.training.parity import check_export
from megatron_sead.training.run import Run

log = logging.getLogger(__name__)


def conclude(run: Run) -> None:
    """Write and prove ``student-hf/``, evaluate it and the teacher, write ``summary.json``. Collective."""
    directory = run.config.output / "student-hf"
    _write_student(run, directory)
    verify_huggingface_directory(directory, run.weights(), group=run.parallel.control)
    check_export(run, directory)
    before = run.state.accuracy_before
    after = evaluate_student(run, directory)
    teacher = None
    if run.config.evaluation.teacher:
        run.engine.close()  # for the teacher's, which may need its memory
        teacher = evaluate_directory(run, run.config.teacher.path, load_tokenizer(run.config.teacher, "teacher"))
    if run.parallel.rank == 0:
        results = {"before": before, "after": after, "teacher": teacher}
        _write_heldout(run, results)
        _write_summary(run, results)
        _print_results(run, results, write_at_the_end(run.config.output))
    dist.barrier(run.parallel.control)


def _write_student(run: Run, directory: Path) -> None:
    """The trained weights, and how the run spoke to them."""
    student, told = run.config.student, list[str]()
    write_huggingface_directory(
        directory,
        run.weights(),
        source=student.path,
        group=run.parallel.control,
        finish=lambda written: told.extend(export_tokenizer(run.tokenizer, student, written)),
    )
    for line in told:
        log.info("%s: %s", directory.name, line)


def _write_heldout(run: Run, results: dict[str, dict[str, Any] | None]) -> None:
    """``heldout.json``: each prompt's share of right answers, for comparing runs prompt by prompt."""
    if not run.heldout:
        return
    problems = json.dumps([[prompt.text, list(prompt.answers)] for prompt in run.heldout])
    told: dict[str, Any] = {"prompts": [prompt.id for prompt in run.heldout]}
    told["problems"] = hashlib.sha256(problems.encode()).hexdigest()  # ids may be no more than numbers
    for name, result in results.items():
        if result is not None and "greedy_by_prompt" in result:
            told[name] = {kind: result[f"{kind}_by_prompt"] for kind in ("greedy", "sampled")}
    replace_text(run.config.output / "heldout.json", json.dumps(told) + "\n")


def _write_summary(run: Run, results: dict[str, dict[str, Any] | None]) -> None:
    """Greedy accuracies by name, and everything measured beside them."""
    summary: dict[str, Any] = {
        f"accuracy_{name}": None if result is None else result["greedy"]["mean"] for name, result in results.items()
    }
    summary |= {
        f"sampled_accuracy_{name}": result["sampled"]["mean"]
        for name, result in results.items()
        if result is not None and result["sampled"] is not None
    }
    measured = {
        name: None if result is None else {k: v for k, v in result.items() if not k.endswith("_by_prompt")}
        for name, result in results.items()
    }
    summary |= {"steps": run.state.step, "seconds": run.seconds(), "evaluation": measured}
    summary |= {"skipped_steps": run.state.skipped_steps, "changed_inputs": run.state.changed_inputs}
    replace_text(run.config.output / "summary.json", json.dumps(summary, indent=2) + "\n")


def _print_results(run: Run, results: dict[str, dict[str, Any] | None], report: Path | None) -> None:
    measured = {name: result for name, result in results.items() if result is not None}
    if measured:
        table = Table(title="accuracy on held-out prompts, +- standard error", title_justify="left")
        for column in ("", *measured):
            table.add_column(column, justify="right" if column else "left")
        first = next(iter(measured.values()))
        for kind in ("greedy", "sampled"):
            if first[kind] is None:
                continue
            cells = [f"{r[kind]['mean']:.3f} +- {r[kind]['standard_error']:.3f}" for r in measured.values()]
            table.add_row(kind, *cells)
            for level in first[f"{kind}_by_level"]:
                cells = [f"{r[f'{kind}_by_level'][level]['mean']:.3f}" for r in measured.values()]
                table.add_row(f"  level {level}", *cells)
        run.console.print(table)
    run.console.print(f"run directory: {run.config.output}", soft_wrap=True, highlight=False, markup=False)
    if report is not None:
        run.console.print(f"report: {report}", soft_wrap=True, highlight=False, markup=False)
