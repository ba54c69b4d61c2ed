"""Predicted steps beside measured ones, on the tiny pair and a CPU: ``tools/plan_against_runs.py OUTPUT.md WORK``.

Every layout is run for a few steps, in turns, since machines are shared; each run's phases are medians of its steps,
and of its rounds. Rates come from the first two layouts alone (`plan --calibrate`), and tell the seconds of the others.
At most two ranks: on more cores than ranks nothing waits for a core.
"""

from __future__ import annotations

import argparse
import os
from datetime import date
from pathlib import Path
from statistics import median
from typing import NamedTuple

from training_run import train

from megatron_sead.commands.cli import one_line_errors
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import require_free
from megatron_sead.planning.calibration import MeasuredRun, calibrate, read_run
from megatron_sead.planning.rates import CPU_RATES, Rates, load_rates
from megatron_sead.planning.seconds import MEASURED

TP, PP, VPP = (f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline", "virtual_pipeline"))
ROWS, BATCH = (f"training.{name}" for name in ("micro_batch_size", "global_batch_size"))
QUIET = ["evaluation.path=null", "checkpoints.interval=0", "reporting.tensorboard=false", "reporting.token_steps=0"]
QUIET += ["curriculum.mode=none"]
METRICS = (*MEASURED, "step_seconds")


class Case(NamedTuple):
    """A layout of the tiny pair."""

    name: str
    ranks: int
    settings: list[str]


CASES = [  # the first two calibrate
    Case("one rank, rows of 8", 1, [f"{TP}=1", f"{ROWS}=8"]),
    Case("TP 2, rows of 32", 2, [f"{TP}=2", f"{ROWS}=32"]),
    Case("one rank, rows of 32", 1, [f"{TP}=1", f"{ROWS}=32"]),
    Case("one rank, rows of 16, batch 128", 1, [f"{TP}=1", f"{ROWS}=16", f"{BATCH}=128"]),
    Case("TP 2, rows of 8", 2, [f"{TP}=2", f"{ROWS}=8"]),
    Case("DP 2, rows of 8", 2, [f"{TP}=1", f"{ROWS}=8"]),
    Case("PP 2, rows of 16", 2, [f"{TP}=1", f"{PP}=2", f"{ROWS}=16"]),
    Case("PP 2 of 2 chunks, rows of 8", 2, [f"{TP}=1", f"{PP}=2", f"{VPP}=2", f"{ROWS}=8"]),
]


def take_steps(case: Case, output: Path, steps: int) -> None:
    """Run it. A run that is there already is not run again."""
    if (output / "summary.json").exists():
        return
    settings = [f"output={output}", f"training.steps={steps}", *QUIET, *case.settings]
    done = train(Path("examples/configs/sead_tiny.yaml"), case.ranks, settings)
    if done.returncode:
        raise UserError(f"{case.name}: ended with code {done.returncode}: {done.stderr.strip()[-300:]}")


def compared(runs: list[MeasuredRun], rates: Rates) -> dict[str, tuple[float, float]]:
    """By metric: medians of the rounds, measured and predicted."""
    found = {}
    for metric in METRICS:
        told = []
        for run in runs:
            prediction = run.predicted(rates)
            phases = MEASURED.get(metric, tuple(phase for both in MEASURED.values() for phase in both))
            told.append(sum(map(prediction.of_phase, phases)))
        found[metric] = median(run.seconds[metric] for run in runs), median(told)
    return found


def line(name: str, found: dict[str, tuple[float, float]], calibrates: bool) -> str:
    """A row of the table: milliseconds, and how far the step is off."""
    cells = [f"{1000 * measured:,.0f} / {1000 * told:,.0f}" for measured, told in found.values()]
    measured, told = found["step_seconds"]
    mark = " (calibrates)" if calibrates else ""
    return f"| {name}{mark} | " + " | ".join([*cells, f"{told / measured - 1:+.0%}"]) + " |"


def page(runs: dict[str, list[MeasuredRun]], rounds: int, steps: int) -> str:
    """What was measured and told."""
    first = [run for case in CASES[:2] for run in runs[case.name]]
    calibrated = calibrate(load_rates(CPU_RATES), first)
    rows = {case.name: compared(runs[case.name], calibrated.rates) for case in CASES}
    off = [abs(rows[c.name]["step_seconds"][1] / rows[c.name]["step_seconds"][0] - 1) for c in CASES[2:]]
    rates = " ".join(f"{name}={getattr(calibrated.rates, name):.4g}" for name in calibrated.factors)
    load = os.getloadavg()[2]
    return "\n".join(
        [
            "# Predicted steps beside measured ones",
            "",
            f"`python tools/plan_against_runs.py`, {date.today()}, {os.cpu_count()} cores, load {load:.1f}: {rounds} "
            f"rounds in turns, {steps} steps a run, of which the first two do not count. Milliseconds a step of the "
            "tiny pair, measured / predicted; last, the step's error. Rates come from the first two rows alone:",
            "",
            f"    {rates}",
            "",
            "| run | " + " | ".join(m.removesuffix("_seconds") for m in METRICS) + " | step, predicted |",
            "|---|" + "---|" * (len(METRICS) + 1),
            *(line(case.name, rows[case.name], case in CASES[:2]) for case in CASES),
            "",
            f"Of {len(off)} layouts that did not calibrate, {sum(o <= 0.15 for o in off)} are told within 15 %; the "
            f"furthest is off by {max(off):.0%}.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("work", type=Path, help="folder for the runs; those that are there are taken as they are")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    arguments = parser.parse_args()
    with one_line_errors():
        require_free(arguments.output)
        runs: dict[str, list[MeasuredRun]] = {case.name: [] for case in CASES}
        for turn in range(arguments.rounds):
            for number, case in enumerate(CASES):
                output = arguments.work.absolute() / f"round-{turn}" / f"case-{number}"
                take_steps(case, output, arguments.steps)
                runs[case.name].append(read_run(f"{output}@{case.ranks}", "cpu"))
                print(case.name, {m: round(s, 4) for m, s in runs[case.name][-1].seconds.items()}, flush=True)
        text = page(runs, arguments.rounds, arguments.steps)
        arguments.output.write_text(text, encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
