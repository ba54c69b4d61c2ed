"""The plan's peaks beside those of traced steps, on twenty layouts at true widths:
``tools/plan_against_trace.py OUTPUT.md``.

Each layout is traced with the fewest layers that fill its stages with whole patterns, and planned with as many: the
plan of more layers is the same sum. No GPU; about a minute each on one core.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from megatron_sead.commands.cli import one_line_errors
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.files.outputs import require_free
from megatron_sead.planning.plan import make_plan

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes"
PHASES = ("teacher", "student scores", "training pass", "optimizer")
MIB = 2**20

PP, VPP = (f"parallel.{name}pipeline_model_parallel_size" for name in ("", "virtual_"))
TP = "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel"
RECOMPUTE, TOKENS = "training.recompute_granularity", "training.micro_batch_tokens"
SHORT = ["rollouts.max_new_tokens=3072", "prompts.max_prompt_tokens=1024", f"{TOKENS}=16384"]


class Case(NamedTuple):
    """A layout of the 7B's or the 32B's run, or of the tiny pair's; `rank` is traced."""

    size: str
    world: int
    rank: int
    settings: list[str]


CASES = [
    Case("7b", 32, 0, []),
    Case("7b", 32, 0, [f"{RECOMPUTE}=null", *SHORT]),
    Case("7b", 32, 0, [f"{RECOMPUTE}=selective", *SHORT]),
    Case("7b", 32, 0, [f"{SP}=false"]),
    Case("7b", 32, 0, ["teacher.offload=false"]),
    Case("7b", 32, 0, [*SHORT, f"{TOKENS}=null", "training.micro_batch_size=4"]),
    Case("7b", 32, 0, [f"{TOKENS}=36864"]),
    Case("7b", 8, 0, ["training.use_distributed_optimizer=false"]),
    Case("7b", 16, 0, [f"{TP}=4", *SHORT]),
    Case("7b", 16, 8, [f"{TP}=4", f"{PP}=2", *SHORT]),
    Case("7b", 16, 8, [f"{TP}=4", f"{PP}=2", f"{VPP}=2", *SHORT]),
    Case("7b", 8, 0, [f"{TP}=1", f"{SP}=false", *SHORT]),
    Case("7b", 32, 0, ["policy.name=forward_kl", *SHORT]),
    Case("7b", 8, 0, [f"{TP}=2", "training.precision=fp32", *SHORT]),
    Case("32b", 32, 0, []),
    Case("32b", 32, 16, []),
    Case("32b", 32, 16, [f"{RECOMPUTE}=null", *SHORT]),
    Case("32b", 64, 0, [f"{PP}=4", *SHORT]),
    Case("tiny", 2, 0, [f"{TP}=2", f"{SP}=true", "training.micro_batch_size=32"]),
    Case("tiny", 1, 0, ["training.precision=bf16", "training.micro_batch_size=32"]),
]


def config_of(case: Case) -> RunConfig:
    """The example's settings, with models of which the shapes alone are here."""
    if case.size == "tiny":
        return load_config(ROOT / "examples/configs/sead_tiny.yaml", ["device=cuda", *case.settings])
    shapes = [f"student.path={SHAPES / f'olmo3-{case.size}'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]
    return load_config(ROOT / f"examples/configs/sead_{case.size}.yaml", [*shapes, *case.settings])


def compare(case: Case) -> dict[str, tuple[int, int]]:
    """By phase: what is planned, and what a step of the traced rank has, both in bytes."""
    from megatron_sead.tracing.costs import load_rates
    from megatron_sead.tracing.extend import few_micro_batches, few_parts, trace_ranks, with_layers

    config = config_of(case)
    plan = make_plan(config, case.world)
    with tempfile.TemporaryDirectory() as folder:
        smaller = with_layers(config, plan, few_parts(config, plan)[0], Path(folder, "model"))
        count = few_micro_batches(config, plan)[0]
        traced = trace_ranks(smaller, plan, [case.rank], load_rates(), count)[case.rank]
        planned = make_plan(smaller, case.world).stages[traced.stage]
    return {phase: (planned.phases[phase], traced.memory[phase].peak["device"]) for phase in PHASES}


def line(case: Case, found: dict[str, tuple[int, int]]) -> str:
    """A row of the table; the last column is of the step's peak."""
    cells = [f"{planned / MIB:,.0f} / {traced / MIB:,.0f}" for planned, traced in found.values()]
    planned, traced = (max(pair[i] for pair in found.values()) for i in (0, 1))
    settings = " ".join(s.rpartition(".")[2] if "." in s.partition("=")[0] else s for s in case.settings)
    return (
        f"| {case.size}, {case.world} ranks, rank {case.rank} {settings} | "
        + " | ".join([*cells, f"{planned / traced - 1:+.1%}"])
        + " |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--cases", help="numbers of the cases, as 0,3; default: all")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    with one_line_errors():
        require_free(arguments.output)
    chosen = range(len(CASES)) if arguments.cases is None else map(int, arguments.cases.split(","))
    head = "| run | " + " | ".join((*PHASES, "peak")) + " |\n|---|" + "---|" * (len(PHASES) + 1) + "\n"
    with arguments.output.open("w", encoding="utf-8") as file:
        file.write(head)
        for number in chosen:
            started = time.perf_counter()
            text = line(CASES[number], compare(CASES[number]))
            print(f"{text} {time.perf_counter() - started:.0f} s", flush=True)
            file.write(text + "\n")
            file.flush()


if __name__ == "__main__":
    main()
