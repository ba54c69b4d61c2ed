"""What a trace tells, on stdout."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sead.planning.plan import Plan, size_of
from megatron_sead.tracing.extend import Summary, Traced
from megatron_sead.tracing.memory import DEVICE, HOST, PINNED
from megatron_sead.wording import counted

HOLDERS = 5  # of a phase's peak that are named
STEP = ("teacher", "student scores", "training pass", "measure", "optimizer")
AROUND = ("weights to the engine", "parity check", "saving", "resuming")  # a step, once each
ORDER = ("loading", *STEP, *AROUND)


def print_trace(traced: Traced, plan: Plan) -> None:
    """A part a rank, then whether ranks agree."""
    console = Console(width=None if Console().is_terminal else 120)
    say = lambda text: console.print(text, highlight=False, soft_wrap=True, markup=False)  # noqa: E731
    layers, batches = (" and ".join(map(str, numbers)) for numbers in (traced.layers, traced.micro_batches))
    all_layers, all_batches = counted(plan.student.layers, "layer"), counted(plan.micro_batches, "micro-batch")
    say(
        f"traced on fake CUDA tensors: a first step, and steps with {layers} of {all_layers} of the student and "
        f"{batches} of {all_batches}; numbers are of a later step, extended to all of them"
    )
    for rank in traced.ranks:
        _print_rank(console, say, rank, plan)
    for line in traced.disagreements:
        say(f"DISAGREE: {line}")
    if len(traced.ranks) > 1 and not traced.disagreements:
        names = " and ".join(str(rank.rank) for rank in traced.ranks)
        say(f"ranks {names} agree on all {traced.shared_calls} collectives that they share, from loading to resuming")


def _print_rank(console: Console, say: Any, rank: Summary, plan: Plan) -> None:
    stage = plan.stages[rank.stage]
    planned = {"student": stage.parameters, "teacher": stage.teacher_parameters}
    say(f"\nrank {rank.rank} of {plan.world_size}, pipeline stage {rank.stage}")
    for role, count in rank.of("parameters").items():
        verdict = "as planned" if round(count) == planned[role] else f"PLANNED ARE {planned[role]:,}"
        say(f"  {role}: {round(count):,} parameters, {verdict}")
    peaks, flops, seconds, waiting = (rank.of(kind) for kind in ("peak", "flops", "seconds", "waiting"))
    for phase in phases_of(rank):
        device, host, pinned = (size_of(peaks.get((phase, place), 0)) for place in (DEVICE, HOST, PINNED))
        work = f"; {flops.get(phase, 0) / 1e12:.2f} TFLOP, {seconds.get(phase, 0):.2f} s and collectives "
        work += f"{waiting.get(phase, 0):.2f} s, without overlap"
        say(f"  {phase}: peak {device}; host {host} and {pinned} pinned" + (work if seconds.get(phase) else ""))
        holders = Counter({line: size for (of, line), size in rank.of("holder").items() if of == phase})
        for line, size in holders.most_common(HOLDERS):
            say(f"    {size_of(size):>11} {line}")
    _print_messages(console, rank)
    _print_copies(console, rank)


def phases_of(rank: Summary) -> list[str]:
    """In the order of a step; what is between phases has no name, and is left out."""
    names = {phase for phase, place in rank.of("peak") if phase not in ("", "step", "rollouts")}
    return sorted(names, key=lambda name: (_place(name), name))


def _print_messages(console: Console, rank: Summary) -> None:
    table = Table("phase", "group", "collective", "calls", "GB", title="collectives of a step", title_justify="left")
    sent = rank.of("sent")
    for kind, calls in sorted(rank.of("calls").items()):
        table.add_row(*kind, f"{calls:,.0f}", f"{sent[kind] / 1e9:,.3f}")
    if table.rows:
        console.print(table)


def _print_copies(console: Console, rank: Summary) -> None:
    table = Table(
        "phase", "copies", "line", "number", "GB", "waits", title="between host and GPU", title_justify="left"
    )
    sizes, copies, waits = rank.of("copied"), rank.of("copies"), rank.of("waited")
    for key in sorted(sizes, key=lambda key: (_place(key[0]), -sizes[key])):
        table.add_row(*key, f"{copies[key]:,.0f}", f"{sizes[key] / 1e9:,.3f}", f"{waits[key]:,.0f}")
    if table.rows:
        console.print(table)
        console.print("waits: copies after which the host waits for the GPU", highlight=False)
    reads = rank.of("reads")
    table = Table("phase", "line", "reads", title="the host waits for values of the GPU", title_justify="left")
    for key in sorted(reads, key=lambda key: (_place(key[0]), -reads[key])):
        table.add_row(*key, f"{reads[key]:,.0f}")
    if table.rows:
        console.print(table)
        of_step = sum(count for (phase, _), count in reads.items() if phase != "loading" and phase not in AROUND)
        console.print(f"{of_step:,.0f} reads in a step", highlight=False)


def _place(phase: str) -> int:
    return ORDER.index(phase) if phase in ORDER else len(ORDER)
