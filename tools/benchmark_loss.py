"""The loss beside its peers and the physical floors: ``python tools/benchmark_loss.py [--python PEERS_PYTHON]``.

Ours, plain torch (eager and compiled) and the peers' released implementations on the same tensors in the same
processes: time, peak memory, collectives, and gradient error against fp64. Peers are measured where their packages
import; benchmarks/README.md says how to make an environment for them.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from datetime import date
from itertools import pairwise, product
from pathlib import Path
from typing import Annotated, Any

import typer
from loss_benchmark.cases import DTYPES, FUSED, LOGITS, Case, Loss
from loss_benchmark.ceilings import least_work
from loss_benchmark.launch import run_ranks
from loss_benchmark.registry import all_losses
from loss_benchmark.report import markdown, plot, print_tables
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import require_free

FITS = 0.8  # of the memory that is free at the start


app = App()


@app.command()
def main(
    python: Annotated[
        Path, typer.Option(exists=True, dir_okay=False, help="interpreter of the ranks; peers must import there")
    ] = Path(sys.executable),
    only: Annotated[str, typer.Option(help="e.g. ours,floors,torch,compiled,trl; empty: all")] = "",
    forms: Annotated[str, typer.Option(help="logits, fused, or both")] = "logits,fused",
    tokens: Annotated[str, typer.Option(help="T, comma-separated")] = "512,2048,8192,16384",
    vocab: Annotated[int, typer.Option(min=2, help="V, all of it real tokens")] = 100_352,
    hidden: Annotated[int, typer.Option(min=1, help="h of student and teacher, fused form")] = 1024,
    dtypes: Annotated[str, typer.Option("--dtype", help="fp32, bf16")] = "fp32,bf16",
    tp: Annotated[str, typer.Option(help="ranks over which the vocabulary is split")] = "1,2",
    shares: Annotated[str, typer.Option("--share", help="of the tokens that have a weight, fused form")] = "1,0.5,0.1",
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds")] = 11,
    budget: Annotated[float, typer.Option(help="seconds of one loss in one case; slow ones sit rounds out")] = 60,
    cores: Annotated[int, typer.Option(min=1, help="cores of all ranks together")] = os.cpu_count() or 1,
    error_tokens: Annotated[int, typer.Option(min=1, help="T of the comparison with fp64")] = 256,
    memory_gb: Annotated[float, typer.Option(help="leave out what needs more; 0: most of what is free")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda, one GPU a rank")] = "cpu",
    also: Annotated[
        list[Path], typer.Option(exists=True, dir_okay=False, help="Python file with a list LOSSES of further ones")
    ] = [],  # noqa: B006  (typer copies it)
    write: Annotated[Path | None, typer.Option(help="new files: WRITE.md, WRITE.json and WRITE.png")] = None,
) -> None:
    """Measure, print a table, write it with the machine, the versions and the command."""
    with one_line_errors():
        _choices("--device", device, ("cpu", "cuda"))
        for suffix in (".md", ".json", ".png") if write is not None else ():
            require_free(write.with_suffix(suffix))
        losses = all_losses(also)
        cases = _cases(forms, tokens, vocab, hidden, dtypes, tp, shares)
        families = _families(only, losses)
        limit = memory_gb * 1e9 or FITS * _free_bytes(device)
        plan = {case: fitting(case, losses, families, limit) for case in cases}
        settings = {"rounds": rounds, "budget": budget, "error_tokens": error_tokens, "device": device}
        result = _measure(str(python), plan, losses, settings | {"also": list(map(str, also))}, cores)
    result["settings"] = settings | {"dtypes": dtypes.split(",")}
    result |= {
        "date": date.today().isoformat(),
        "machine": machine(device, cores),
        "command": command_line(sys.argv[1:]),
    }
    print_tables(result, Console())
    if write is not None:
        write.parent.mkdir(parents=True, exist_ok=True)
        write.with_suffix(".json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        write.with_suffix(".md").write_text(markdown(result), encoding="utf-8")
        plot(result, write.with_suffix(".png"))


def _cases(forms: str, tokens: str, vocab: int, hidden: int, dtypes: str, tp: str, shares: str) -> list[Case]:
    """All combinations, in the order of the tables."""
    known = _choices("--forms", forms, (LOGITS, FUSED)), _choices("--dtype", dtypes, tuple(DTYPES))
    counts, splits = _numbers("--tokens", tokens, int), _numbers("--tp", tp, int)
    for split in splits:
        if vocab % split:
            raise UserError(f"--tp {split}: must divide --vocab {vocab}")
    active = _numbers("--share", shares, float)
    if max(active) > 1:
        raise UserError(f"--share {shares}: at most 1")
    return [
        Case(form, count, vocab, hidden, dtype, split, share)
        for form, dtype, split, count in product(*known, splits, counts)
        for share in (active if form == FUSED else [1.0])
    ]


def _choices(option: str, text: str, valid: tuple[str, ...]) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in valid:
            raise UserError(f"{option} {name}: must be of {', '.join(valid)}")
    return names


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or min(values) <= 0:
        raise UserError(f"{option} {text}: positive numbers, comma-separated")
    return values


def _families(only: str, losses: list[Loss]) -> set[str]:
    known = {loss.family for loss in losses}
    return set(_choices("--only", only, tuple(sorted(known)))) if only else known


def fitting(case: Case, losses: list[Loss], families: set[str], limit: float) -> dict[int, str | None]:
    """Losses that there are for the case, by index; with the reason where one is left out."""
    found: dict[int, str | None] = {}
    for index, loss in enumerate(losses):
        if loss.family in families and loss.form == case.form and (case.tp == 1 or loss.tensor_parallel):
            needed = loss.needed_bytes(case)
            found[index] = f"needs about {needed / 1e9:.0f} GB" if needed > limit else None
    return found


def _measure(
    python: str, plan: dict[Case, dict[int, str | None]], losses: list[Loss], settings: dict[str, Any], cores: int
) -> dict[str, Any]:
    """Both passes of every TP."""
    result: dict[str, Any] = {"absent": _without_tensor_parallelism(plan, losses), "versions": {}, "rows": []}
    rows = {
        (case, index): {"case": vars(case), "name": losses[index].name, "computes": str(losses[index].computes or "")}
        | ({"reason": reason} if reason else {})
        for case, chosen in plan.items()
        for index, reason in chosen.items()
    }
    passes = [(split, what) for split in sorted({case.tp for case in plan}) for what in ("memory", "time")]
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=len(passes))
        for split, what in passes:
            own = [
                (vars(case), [index for index, reason in chosen.items() if reason is None])
                for case, chosen in plan.items()
                if case.tp == split
            ]
            request = settings | {"cases": own, "tp": split, "measure": what, "threads": max(1, cores // split)}
            for message in run_ranks(python, request):
                if message["kind"] == "doing":
                    progress.update(bar, description=message["text"])
                else:
                    _take(message, losses, rows, result, f"TP {split}, {what}")
            progress.advance(bar)
    rows = {key: row for key, row in rows.items() if losses[key[1]].name not in result["absent"]}
    _compare(rows, losses, result.get("ceilings"))
    result["rows"] = list(rows.values())
    if not any("peak_bytes" in row for row in result["rows"]):
        result["absent"]["peak memory"] = "not measured; on a CPU that needs Linux's /proc/self/clear_refs"
    return result


def _without_tensor_parallelism(plan: dict[Case, dict[int, str | None]], losses: list[Loss]) -> dict[str, str]:
    chosen = {index for indices in plan.values() for index in indices}
    splits = max(case.tp for case in plan) > 1
    return {
        f"{losses[index].name} at TP 2 and more": "it has no tensor parallelism"
        for index in sorted(chosen)
        if splits and not losses[index].tensor_parallel
    }


def _take(
    message: dict[str, Any],
    losses: list[Loss],
    rows: dict[tuple[Case, int], dict[str, Any]],
    result: dict[str, Any],
    where: str,
) -> None:
    """What rank 0 said, into the row that it is about."""
    kind = message.pop("kind")
    if kind == "facts":
        result["versions"] |= message["versions"]
        result |= {key: message[key] for key in ("ceilings",) if key in message}
    elif kind == "absent":
        result["absent"][losses[message["loss"]].name] = message["reason"]
    elif kind == "died":
        result["absent"][f"the rest of {where}"] = message["reason"]
    else:
        rows[Case(**message.pop("case")), message.pop("loss")].update(message)


def _compare(
    rows: dict[tuple[Case, int], dict[str, Any]], losses: list[Loss], ceilings: dict[str, float] | None
) -> None:
    """What follows from the measured: ratios, units, rates."""
    floors = {case: row.get("median_seconds") for (case, index), row in rows.items() if losses[index].computes is None}
    for (case, _), row in rows.items():
        if "median_seconds" in row:
            row["work_per_second"] = least_work(case) / row["median_seconds"]
            if ceilings:
                row["of_ceiling"] = row["work_per_second"] / ceilings[case.form]
            if floors.get(case):
                row["over_floor"] = row["median_seconds"] / floors[case]
        if "peak_bytes" in row:
            row["peak_units"] = row["peak_bytes"] / case.unit
            row["scratch_bytes"] = max(0, row["peak_bytes"] - row["gradient_bytes"])
        if "gradient_errors" in row:
            values = row["gradient_errors"].values()
            row["gradient_error"] = None if None in values else max(values)


def _free_bytes(device: str) -> float:
    if device == "cuda":
        import torch

        return float(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
    return free or float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def machine(device: str, cores: int) -> dict[str, Any]:
    """What it ran on, and how many processes wanted it on average."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    name = model or platform.processor() or platform.machine()
    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    return {
        "device": name,
        "cores": cores,
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load_average_15_minutes": round(os.getloadavg()[2], 1),
    }


def command_line(arguments: list[str]) -> str:
    """How to measure again; where the peers lie on this machine is left out."""
    shown = ["PYTHON" if before == "--python" else after for before, after in pairwise(["", *arguments])]
    return shlex.join(["python", "tools/benchmark_loss.py", *shown])


if __name__ == "__main__":
    app()
