"""Where a step's time goes: ``python -m megatron_sead.launch --nproc-per-node N tools/profile_step.py --config FILE``.

Runs the training loop as it is with a clock at the doors of its parts: time counts for the innermost part that is
open, so the parts add up to the step. Settings follow as ``key=value``; the first rank prints.
"""

from __future__ import annotations

import importlib
import json
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import date
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from megatron_sead.commands.cli import App, one_line_errors_on_ranks
from megatron_sead.config.run import load_config
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import require_free
from megatron_sead.launch.rank_failures import ending_together
from megatron_sead.reporting.machine import machine

WARM_UP = 3  # first steps, not counted
LOOP = "the rest: schedule, loop, progress"
PARTS = {  # in the table's order: what a step must do, then what it should hardly notice
    "generation: model": "work",
    "generation: sampling, bookkeeping": "work",
    "teacher forward": "work",
    "student forward, scoring": "work",
    "student forward, training": "work",
    "backward": "work",
    "statistics and loss, with LM heads": "work",
    "optimizer": "work",
    "weights to the engine": "work",
    "the engine's check": "work",
    "collectives": "work",
    "grading": "else",
    "packing": "else",
    "zones and policy": "else",
    "metrics": "else",
    "records": "else",
    LOOP: "else",
}
COLLECTIVES = (
    *("all_reduce", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor", "broadcast", "barrier"),
    *("all_gather_object", "gather_object", "broadcast_object_list", "isend", "irecv", "batch_isend_irecv"),
)


class Clock:
    """Time a step, by the innermost part that is open."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open = [LOOP]
        self._since = time.perf_counter()

    def next_step(self) -> None:
        """A step begins."""
        self._count()
        self.steps.append(defaultdict(float))

    def watch(self, owner: Any, name: str, part: str | Callable[[], str]) -> None:
        """Count the calls of `owner.name` for a part."""
        inner = getattr(owner, name)

        @wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._count()
            self._open.append(part if isinstance(part, str) else part())
            try:
                return inner(*args, **kwargs)
            finally:
                self._count()
                self._open.pop()

        setattr(owner, name, timed)

    def _count(self) -> None:
        now = time.perf_counter()
        if self.steps:
            self.steps[-1][self._open[-1]] += now - self._since
        self._since = now


def main(
    config: Annotated[Path, typer.Option(help="YAML file with the run's settings; it must run on a CPU")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value ...")] = None,
    write: Annotated[Path | None, typer.Option(help="also write the table as JSON, a new file")] = None,
) -> None:
    """Train as the settings say, with clocks."""
    with one_line_errors_on_ranks():
        if write is not None:
            require_free(write)
        settings = load_config(config, overrides or [])
        if settings.device != "cpu":
            raise UserError(f"device={settings.device}: must be cpu; a GPU works on while the host's clock reads it")
        if settings.training.steps < WARM_UP + 2:
            raise UserError(f"training.steps={settings.training.steps}: must be at least {WARM_UP + 2}")
        from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

        adapt_to_cpu()
        clock = Clock()
        watch_collectives(clock)  # before Megatron is imported: it keeps functions of torch.distributed by other names
        from megatron_sead.training.loop import distill
        from megatron_sead.training.setup import prepare

        with ending_together(), prepare(settings) as run:
            watch_run(clock, run)
            distill(run)
            if run.parallel.rank == 0:
                result = summarize(clock.steps)
                Console().print(table(result))
                if write is not None:
                    result |= {"ranks": run.parallel.world_size, "machine": machine(), "date": date.today().isoformat()}
                    write.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def watch_collectives(clock: Clock) -> None:
    """Waiting for other ranks included."""
    import torch.distributed as dist

    for name in COLLECTIVES:
        clock.watch(dist, name, "collectives")


def watch_run(clock: Clock, run: Any) -> None:
    """Clocks at the doors of everything that `distill` calls."""
    import torch

    from megatron_sead.training import loop, step
    from megatron_sead.training.scoring import Heads
    from megatron_sead.training.supervision import Supervisor

    def student_pass() -> str:
        return "student forward, training" if torch.is_grad_enabled() else "student forward, scoring"

    next_batch = run.curriculum.next_batch

    def begin(number: int) -> list[int]:
        clock.next_step()
        return next_batch(number)

    run.curriculum.next_batch = begin
    clock.watch(run.engine, "generate", "generation: sampling, bookkeeping")
    if hasattr(run.engine, "model"):  # of vLLM all of generation counts as one part
        clock.watch(run.engine.model, "forward", "generation: model")
    clock.watch(run, "grade", "grading")
    clock.watch(run, "pack", "packing")
    clock.watch(run, "load_engine", "weights to the engine")
    clock.watch(run.engine, "score", "the engine's check")
    for chunk in run.learner.teacher.chunks:
        clock.watch(chunk, "forward", "teacher forward")
    for chunk in run.learner.student:
        clock.watch(chunk, "forward", student_pass)
        clock.watch(chunk, "zero_grad_buffer", "optimizer")
    schedules = importlib.import_module("megatron.core.pipeline_parallel.schedules")
    clock.watch(schedules, "backward_step", "backward")
    clock.watch(run.student_chunks[0].config, "finalize_model_grads_func", "optimizer")
    clock.watch(run.learner.optimizer, "zero_grad", "optimizer")
    clock.watch(step, "_update", "optimizer")
    for name in ("score", "loss"):
        clock.watch(Heads, name, "statistics and loss, with LM heads")
    for name in ("supervise_step", "supervise_micro_batch"):
        clock.watch(Supervisor, name, "zones and policy")
    clock.watch(step, "_measure", "metrics")
    clock.watch(loop, "record_step", "records")


def summarize(steps: list[dict[str, float]]) -> dict[str, Any]:
    """Mean milliseconds of each part over the faster half of the steps: others' load shows as slow ones."""
    counted = sorted(steps[WARM_UP:-1], key=lambda s: sum(s.values()))  # the last one saves a checkpoint
    faster = counted[: max(1, len(counted) // 2)]
    parts = {part: 1000 * sum(step.get(part, 0.0) for step in faster) / len(faster) for part in PARTS}
    total = sum(parts.values())
    outside = sum(value for part, value in parts.items() if PARTS[part] == "else")
    return {"steps": len(faster), "milliseconds": total, "share_everything_else": outside / total, "parts": parts}


def table(result: dict[str, Any]) -> Table:
    """Milliseconds and percent, the parts that are not the work itself summed up at the end."""
    drawn = Table("part of a step", "ms", "%")
    total = result["milliseconds"]
    previous = "work"
    for part, value in result["parts"].items():
        if PARTS[part] != previous:
            drawn.add_section()
        previous = PARTS[part]
        drawn.add_row(part, f"{value:.1f}", f"{100 * value / total:.1f}")
    drawn.add_section()
    drawn.add_row(
        "everything else",
        f"{result['share_everything_else'] * total:.1f}",
        f"{100 * result['share_everything_else']:.1f}",
    )
    drawn.add_row(f"step, mean of the {result['steps']} faster", f"{total:.1f}", "100.0")
    return drawn


if __name__ == "__main__":
    app = App()
    app.command()(main)
    app()
