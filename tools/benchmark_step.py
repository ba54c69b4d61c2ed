"""How long a step takes, ours and TRL's: ``python tools/benchmark_step.py [--trl-python PYTHON]``.

Both train the tiny pair's student on the same 64 prompts every step, in one process with one thread, fp32, and write
their metrics; nothing is evaluated or saved between steps. Rounds alternate, since machines are shared: a busy minute
strikes both. Compare medians and minima, and seconds per response token, since responses differ in length.
"""

from __future__ import annotations

import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import require_free
from megatron_sead.reporting.machine import machine
from megatron_sead.wording import counted

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "examples" / "tiny"
TRL_DRIVER = Path(__file__).with_name("trl_step.py")
WARM_UP = 3  # first steps of every process, not counted: allocations, lazy initialisation, caches
OURS, TRL = "megatron_sead", "trl"


@dataclass
class Samples:
    """Steps of one trainer, over all rounds, warm-up left out."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)  # response tokens of each step
    facts: dict[str, Any] = field(default_factory=dict)  # versions and whatever else a reader may ask for

    def extend(self, seconds: list[float], tokens: list[int], warm_up: int = WARM_UP) -> None:
        """Add a round's steps, in order.

        Raises:
            UserError: nothing is left after the warm-up.
        """
        if len(seconds) <= warm_up:
            raise UserError(f"--steps: of {counted(len(seconds), 'step')} timed {warm_up} are warm-up; ask for more")
        self.seconds += seconds[warm_up:]
        self.tokens += tokens[warm_up:]

    def summary(self) -> dict[str, float]:
        """Seconds a step, response tokens a step, microseconds a response token (median and least of each step's)."""
        per_token = [1e6 * s / t for s, t in zip(self.seconds, self.tokens, strict=True)]
        return {
            "steps": len(self.seconds),
            "median_seconds": statistics.median(self.seconds),
            "min_seconds": min(self.seconds),
            "median_response_tokens": statistics.median(self.tokens),
            "median_microseconds_per_token": statistics.median(per_token),
            "min_microseconds_per_token": min(per_token),
        }


def main(
    trl_python: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Python of an environment with TRL; none: ours alone"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="times that each trainer runs, in turns")] = 5,
    steps: Annotated[int, typer.Option(min=WARM_UP + 2, help="steps of a round, the first not counted")] = 25,
    prompts: Annotated[int, typer.Option(min=1, help="prompts of a step, one rollout each")] = 64,
    micro_batch_size: Annotated[int, typer.Option(min=1, help="rollouts in one forward pass")] = 64,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="most tokens of a response")] = 40,
    lr: Annotated[float, typer.Option(help="learning rate, constant")] = 1e-3,
    write: Annotated[Path | None, typer.Option(help="new files: WRITE.json and WRITE.md")] = None,
) -> None:
    """Time both, print a table, write it with the machine, the versions and the command."""
    with one_line_errors():
        for suffix in (".md", ".json") if write is not None else ():
            require_free(write.with_suffix(suffix))
        if prompts % micro_batch_size:
            raise UserError(f"--micro-batch-size {micro_batch_size}: must divide --prompts {prompts}")
        settings = {
            "student": str(PAIR / "student"),
            "teacher": str(PAIR / "teacher"),
            "prompts": [row["prompt"] for row in _rows(prompts)],
            "steps": steps,
            "micro_batch_size": micro_batch_size,
            "max_new_tokens": max_new_tokens,
            "lr": lr,
        }
        samples = _measure(settings, _rows(prompts), rounds, trl_python)
    settings |= {"student": "examples/tiny/student", "teacher": "examples/tiny/teacher", "prompts": prompts}
    result = {name: s.summary() | s.facts for name, s in samples.items()}
    result |= {"settings": settings | {"rounds": rounds, "warm_up": WARM_UP}, "machine": machine()}
    result |= {"date": date.today().isoformat(), "command": command_line(sys.argv[1:])}
    _print(result)
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def _measure(
    settings: dict[str, Any], rows: list[dict[str, Any]], rounds: int, trl_python: Path | None
) -> dict[str, Samples]:
    samples = {OURS: Samples()} | ({TRL: Samples()} if trl_python else {})
    for number in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            _time_ours(settings | {"seed": number}, rows, Path(folder), samples[OURS])
            if trl_python:
                _time_trl(settings | {"seed": number}, trl_python, Path(folder), samples[TRL])
        print(f"round {number + 1}/{rounds}:", {n: round(s.summary()["median_seconds"], 3) for n, s in samples.items()})
    return samples


def _time_ours(settings: dict[str, Any], rows: list[dict[str, Any]], folder: Path, samples: Samples) -> None:
    """A training run as users start it, without the ends that are not steps."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    overrides = {
        "output": folder / "run",
        "seed": settings["seed"],
        "student.path": settings["student"],
        "teacher.path": settings["teacher"],
        "prompts.path": folder / "prompts.jsonl",
        "parallel.tensor_model_parallel_size": 1,
        "training.steps": settings["steps"],
        "training.global_batch_size": len(rows),
        "training.micro_batch_size": settings["micro_batch_size"],
        "training.lr": settings["lr"],
        "training.lr_decay_style": "constant",
        "training.lr_warmup_steps": 0,
        "rollouts.max_new_tokens": settings["max_new_tokens"],
        "curriculum.mode": "none",  # the same prompts every step: all there are
        "checkpoints.interval": 0,
        "evaluation.path": "null",
    }
    train = [sys.executable, "-m", "megatron_sead.train", "--config", ROOT / "examples/configs/sead_tiny.yaml"]
    _run([*train, *(f"{key}={value}" for key, value in overrides.items())])
    lines = (folder / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    samples.extend(*parse_metrics(lines))
    samples.facts = {"versions": {name: version(name) for name in ("torch", "transformers", "megatron-core")}}


def parse_metrics(lines: list[str]) -> tuple[list[float], list[int]]:
    """Seconds and response tokens of each step but the first, from metrics.jsonl: the differences of `seconds`."""
    steps = [json.loads(line) for line in lines]
    seconds = [after["seconds"] - before["seconds"] for before, after in pairwise(steps)]
    return seconds, [step["response_tokens"] for step in steps[1:]]


def _time_trl(settings: dict[str, Any], python: Path, folder: Path, samples: Samples) -> None:
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    printed = _run([python, TRL_DRIVER, folder / "settings.json"])
    measured = json.loads(printed.splitlines()[-1])
    samples.extend(measured.pop("step_seconds"), measured.pop("response_tokens"))
    samples.facts = measured


def _run(command: list[Any]) -> str:
    """Standard output of a command that has one thread to compute with."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise UserError(f"{shlex.join(map(str, command[:3]))} ... failed: {''.join(last)}")
    return done.stdout


def _rows(count: int) -> list[dict[str, Any]]:
    lines = (PAIR / "prompts.jsonl").read_text(encoding="utf-8").splitlines()  # their order is random already
    if count > len(lines):
        raise UserError(f"--prompts {count}: {PAIR / 'prompts.jsonl'} has {len(lines)}")
    return [json.loads(line) for line in lines[:count]]


def command_line(arguments: list[str]) -> str:
    """How to measure again; where TRL lies on this machine is left out."""
    shown = ["PYTHON" if before == "--trl-python" else after for before, after in pairwise(["", *arguments])]
    return shlex.join(["python", "tools/benchmark_step.py", *shown])


ROWS = (
    ("median_seconds", "seconds a step, median", "{:.3f}"),
    ("min_seconds", "seconds a step, least", "{:.3f}"),
    ("median_response_tokens", "response tokens a step, median", "{:.0f}"),
    ("median_microseconds_per_token", "microseconds a response token, median", "{:.0f}"),
    ("min_microseconds_per_token", "microseconds a response token, least", "{:.0f}"),
    ("steps", "steps timed", "{:.0f}"),
)


def table(result: dict[str, Any]) -> list[list[str]]:
    """Header and rows: ours, TRL's if it ran, and ours divided by TRL's."""
    names = [name for name in (OURS, TRL) if name in result]
    lines = [["", *names, *(["ratio"] if len(names) == 2 else [])]]
    for key, label, form in ROWS:
        values = [result[name][key] for name in names]
        ratio = [f"{values[0] / values[1]:.2f}"] if len(values) == 2 and key != "steps" else []
        lines.append([label, *(form.format(value) for value in values), *ratio])
    return lines


def markdown(result: dict[str, Any]) -> str:
    """The same table for reading, with what it depends on."""
    header, *rows = table(result)
    rows = [row + [""] * (len(header) - len(row)) for row in rows]
    drawn = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    versions = [
        f"{name}: " + ", ".join(f"{package} {v}" for package, v in result[name]["versions"].items())
        for name in (OURS, TRL)
        if name in result
    ]
    m, s = result["machine"], result["settings"]
    return "\n".join(
        [
            "# A step on the tiny pair",
            "",
            f"{result['date']}, {m['cpu']}, {m['cores']} cores (one process, one thread each), Python {m['python']}, "
            f"load {m['load_average_15_minutes']}. {s['prompts']} prompts a step, at most {s['max_new_tokens']} new "
            f"tokens, micro-batches of {s['micro_batch_size']}, fp32; {s['rounds']} alternating rounds of "
            f"{s['steps']} steps.",
            "",
            *drawn,
            "",
            *(f"- {line}" for line in versions),
            f"- `{result['command']}`",
            "",
        ]
    )


def _print(result: dict[str, Any]) -> None:
    header, *rows = table(result)
    drawn = Table(*header)
    for row in rows:
        drawn.add_row(*row)
    Console().print(drawn)


if __name__ == "__main__":
    app = App()
    app.command()(main)
    app()
