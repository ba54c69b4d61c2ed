"""The plan's peaks beside those of traced steps, on twenty layouts at true widths:
``tools/plan_against_trace.py OUTPUT.md``.

Each layout is traced with two layers a stage, of either kind, and planned with as many: what further layers add is
tested (`tests/tracing`). No GPU; about half a minute each on one core.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

from megatron_sead.commands.cli import one_line_errors
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.files.outputs import require_free
from megatron_sead.planning.plan import make_plan, together

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes"
PHASES = ("teacher", "student scores", "training pass", "optimizer", "saving")
MIB = 2**20

PP, VPP = (f"parallel.{name}pipeline_model_parallel_size" for name in ("", "virtual_"))
TP = "parallel.tensor_model_parallel_size"
SP = "parallel.sequence_parallel"
RECOMPUTE, TOKENS = "training.recompute_granularity", "training.micro_batch_tokens"
SHORT = ["rollouts.max_new_tokens=3072", "prompts.max_prompt_tokens=1024", f"{TOKENS}=16384"]
ROWS = f"{TOKENS}=null"


class Case(NamedTuple):
    """A layout of the 7B's or the 32B's run, or of the tiny pair's; `rank` is traced."""

    size: str
    world: int
    rank: int
    settings: list[str]


CASES = [
    Case("7b", 32, 0, []),
    Case("7b", 32, 0, [f"{RECOMPUTE}=null", *SHORT]),
    Case("7b", 32, 0, [f"{RECOMPUTE}=selective", *SHORT, ROWS, "training.micro_batch_size=4"]),
    Case("7b", 32, 0, [f"{SP}=false", ROWS]),
    Case("7b", 32, 0, ["teacher.offload=false", f"{TOKENS}=36864"]),
    Case("7b", 32, 0, [*SHORT, ROWS, "training.micro_batch_size=4"]),
    Case("7b", 8, 0, ["training.use_distributed_optimizer=false", f"{TOKENS}=24000"]),
    Case("7b", 16, 0, [f"{TP}=4", *SHORT, f"{TOKENS}=18432"]),
    Case("7b", 16, 8, [f"{TP}=4", f"{PP}=2", *SHORT]),
    Case("7b", 16, 0, [f"{TP}=4", f"{PP}=2", f"{VPP}=2", f"{RECOMPUTE}=null", *SHORT]),
    Case("7b", 8, 0, [f"{TP}=1", f"{SP}=false", *SHORT]),
    Case("7b", 16, 0, ["policy.name=forward_kl", f"{TP}=2", f"{SP}=false", *SHORT]),
    Case("7b", 8, 0, [f"{TP}=2", "training.precision=fp32", *SHORT]),
    Case("32b", 32, 0, []),
    Case("32b", 32, 16, []),
    Case("32b", 32, 16, [f"{RECOMPUTE}=null", *SHORT]),
    Case("32b", 64, 0, [f"{PP}=4", f"{RECOMPUTE}=null", *SHORT]),
    Case("32b", 64, 32, [f"{PP}=4", f"{VPP}=2", f"{TP}=4", *SHORT, ROWS]),
    Case("tiny", 2, 0, [f"{SP}=true", "training.precision=bf16"]),
    Case("tiny", 1, 0, [f"{TP}=1"]),
]


def config_of(case: Case) -> RunConfig:
    """The example's settings, with models of which the shapes alone are here."""
    if case.size == "tiny":
        return load_config(ROOT / "examples/configs/sead_tiny.yaml", ["device=cuda", *case.settings])
    shapes = [f"student.path={SHAPES / f'olmo3-{case.size}'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]
    return load_config(ROOT / f"examples/configs/sead_{case.size}.yaml", [*shapes, *case.settings])


def compare(case: Case) -> dict[str, tuple[int, int]]:
    """By phase: what is planned, and what a step of the traced rank has, both in bytes."""
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.tracing.extend import few_micro_batches, trace_ranks

    config = config_of(case)
    plan = make_plan(config, case.world)
    count = few_micro_batches(config, plan)[0]
    config.training.global_batch_size = count * together(config, plan.sequence_length) * plan.data_parallel_size
    with tempfile.TemporaryDirectory() as folder:
        with_few_layers(config, Path(folder))
        plan = make_plan(config, case.world)
        traced = trace_ranks(config, plan, [case.rank], load_rates(), plan.micro_batches)[case.rank]
    planned = plan.stages[traced.stage].phases
    return {phase: (planned[phase], traced.memory[phase].peak["device"]) for phase in PHASES if phase in traced.memory}


def with_few_layers(config: RunConfig, folder: Path) -> None:
    """Leave two layers on each stage's every chunk, of either kind where there are two."""
    chunks = config.parallel.virtual_pipeline_model_parallel_size or 1
    layers = 2 * chunks * config.parallel.pipeline_model_parallel_size
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        fields = json.loads((model.path / "config.json").read_text(encoding="utf-8")) | {"num_hidden_layers": layers}
        if "layer_types" in fields:
            fields["layer_types"] = ["sliding_attention", "full_attention"] * (layers // 2)
        (folder / role).mkdir()
        (folder / role / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        model.path = folder / role


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
