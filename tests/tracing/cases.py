"""A process that traces all cases of `test_step.py`, one after another: ``python -m tests.tracing.cases FOLDER``.

It prints a JSON object a case, as it ends. A process of its own, since it changes torch for good.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from tests.tracing import programs
from tests.tracing.models import ROOT, run_of

TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
SP, VPP2 = "parallel.sequence_parallel=true", "parallel.virtual_pipeline_model_parallel_size=2"
CP2 = "parallel.context_parallel_size=2"
FULL, SELECTIVE = "training.recompute_granularity=full", "training.recompute_granularity=selective"
NONE = "training.recompute_granularity=null"

# World size, ranks that are traced, settings
MATRIX: dict[str, tuple[int, list[int], list[str]]] = {
    "one rank, no recompute": (1, [0], [NONE]),
    "tp2, sequence parallel": (2, [0, 1], [TP2, SP, FULL]),
    "tp2, selective recompute, forward KL": (2, [0, 1], [TP2, SELECTIVE, "policy.name=forward_kl"]),
    "pp2, teacher kept": (2, [1, 0], [PP2, "teacher.offload=false", "zones.scope=sequence"]),
    "pp2, virtual 2": (2, [1, 0], [PP2, VPP2, "policy.name=zones"]),
    "dp2, no distributed optimizer": (2, [0, 1], ["training.use_distributed_optimizer=false", "policy.name=eopd"]),
    "tp2, pp2, dp2": (8, [4, 0], [TP2, PP2, SP, "zones.thresholds=running", "training.micro_batch_size=2"]),
    "cp2, tp2, sequence parallel": (4, [0, 2], [CP2, TP2, SP, NONE]),
    "fp32, absolute zones": (1, [0], ["training.precision=fp32", "zones.thresholds=absolute"]),
    "sampled token": (2, [0, 1], [TP2, SP, "policy.name=opd_sampled"]),
}
ROOT_ENVIRONMENT = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS = {"tp2, sequence parallel": 2}  # of the others one
DEEP = {"one rank, no recompute", "pp2, virtual 2", "tp2, pp2, dp2"}  # four layers; the others have two
STEP = {"step", "teacher", "student scores", "training pass", "measure", "optimizer"}  # its phases
KINDS = ["sliding_attention", "full_attention"]


def trace(folder: Path, name: str) -> dict[str, Any]:
    from megatron_sead.planning.plan import make_plan
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.tracing.calls import disagreements
    from megatron_sead.tracing.step import Rollouts, trace_rank
    from megatron_sead.tracing.world import Told

    world, ranks, overrides = MATRIX[name]
    layers = 4 if name in DEEP else 2
    config, told, traces = run_of(folder, *overrides, layers=layers, layer_types=KINDS), Told(), {}
    for rank in ranks:
        traces[rank] = trace_rank(config, rank, world, [Rollouts(2, 16, 48)] * STEPS.get(name, 1), load_rates(), told)
    plan = make_plan(config, world)
    return {
        "parameters": [
            [
                t.parameters,
                plan.stages[t.stage].parameters,
                t.teacher_parameters,
                plan.stages[t.stage].teacher_parameters,
            ]
            for t in traces.values()
        ],
        "metrics": [t.metrics for t in traces.values()],
        "disagreements": disagreements({rank: t.calls for rank, t in traces.items()}),
        "calls": [len(t.calls) for t in traces.values()],
        "small_calls": [_over_replicas(t) for t in traces.values()],
        "phases": [{name: memory.peak["device"] for name, memory in t.memory.items()} for t in traces.values()],
        "unknown": sorted({name for t in traces.values() for name in t.unknown}),
        "waits": sorted({line for t in traces.values() for line in _waits(t)}),
    }


def _over_replicas(traced: Any) -> dict[str, int]:
    """By phase of a step: calls in which data-parallel ranks agree on zones and metrics."""
    return Counter(call.phase for call in traced.calls if call.group == "dp" and call.phase in STEP)


def _waits(traced: Any) -> Iterator[str]:
    """Lines of a step at which the host waits for the device: for a number, or until a copy has ended."""
    for step in traced.steps:
        yield from (line for phase, line in step.reads if phase in STEP)
        yield from (line for (phase, _, line), c in step.copies.items() if phase in STEP and c.waited_for)


# --- Sabotages: each is a fault that a run on GPUs would have --------------------------------------------------------


def not_moved() -> AbstractContextManager[Any]:
    """The teacher's hidden states are left on the host."""
    from megatron_sead.training import scoring

    return mock.patch.object(scoring.Heads, "score", _on_host(scoring.Heads.score))


def _on_host(score: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, hidden, teacher, batch: score(self, hidden, teacher.cpu(), batch)


def wrong_gather() -> AbstractContextManager[Any]:
    """A gather into a tensor for one rank too few."""
    from megatron_sead.distillation import chunks

    gather = chunks.dist.all_gather_into_tensor

    def short(out: Any, mine: Any, **options: Any) -> Any:
        return gather(out[: len(out) - len(mine)], mine, **options)

    return mock.patch.object(chunks.dist, "all_gather_into_tensor", short)


def freed_early() -> AbstractContextManager[Any]:
    """The student's hidden states are given back before the loss has read them."""
    from megatron_sead.training import scoring

    loss = scoring.Heads.loss

    def freed(self: Any, hidden: Any, *args: Any) -> Any:
        hidden.untyped_storage().resize_(0)
        return loss(self, hidden, *args)

    return mock.patch.object(scoring.Heads, "loss", freed)


def teacher_left_on_host() -> AbstractContextManager[Any]:
    """The teacher's weights are not brought back."""
    from megatron_sead.training import teacher

    return mock.patch.object(teacher._OffloadedWeights, "__enter__")


@contextmanager
def left_out(rank: int) -> Iterator[None]:
    """One rank leaves out one sum of squares of its queries and keys."""
    import torch.distributed as dist

    from megatron_sead.models.olmo3 import norms

    reduce, skipped = norms._all_reduce, []

    def forgetful(x: Any, group: Any) -> Any:
        if dist.get_rank() == rank and not skipped:
            skipped.append(True)
            return x
        return reduce(x, group)

    with mock.patch.object(norms, "_all_reduce", forgetful):
        yield


SABOTAGES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "not moved": not_moved,
    "wrong gather": wrong_gather,
    "freed early": freed_early,
    "teacher left on the host": teacher_left_on_host,
    "a collective left out": lambda: left_out(1),
}


def sabotage(folder: Path, name: str) -> dict[str, Any]:
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.tracing.calls import disagreements
    from megatron_sead.tracing.step import Rollouts, trace_rank

    config, calls = run_of(folder, TP2, SP, layers=1), {}
    try:
        with SABOTAGES[name]():
            for rank in (0, 1):
                calls[rank] = trace_rank(config, rank, 2, [Rollouts(2, 4, 28)], load_rates()).calls
    except (RuntimeError, ValueError) as error:
        return {"error": str(error)}
    return {"error": None, "disagreements": disagreements(calls)}


def program(folder: Path, name: str) -> dict[str, Any]:
    return programs.found(PROGRAMS[name], (0,) if name in programs.ALONE else (0, 1))


# --- Few layers and micro-batches, extended ---------------------------------------------------------------------------


def extension(folder: Path, name: str) -> dict[str, Any]:
    """Of 3 layers and 4 micro-batches: all numbers as they follow from fewer, and as they are."""
    from megatron_sead.planning.plan import make_plan
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.tracing import extend

    small = ["rollouts.max_new_tokens=48", "prompts.max_prompt_tokens=16", "training.global_batch_size=4"]
    config = run_of(folder / "extension", TP2, SP, *small, layers=3, layer_types=KINDS[1:])
    plan, rates = make_plan(config, 2), load_rates()
    (extended,) = extend.trace_run(config, plan, [0], rates).ranks
    with mock.patch.multiple(extend, few_parts=lambda *_: [3], few_micro_batches=lambda *_: [4]):
        (whole,) = extend.trace_run(config, plan, [0], rates).ranks
    kinds = ("parameters", "peak", "flops", "calls", "sent", "copies", "copied", "reads")
    return {
        kind: [[str(key), value, whole.of(kind).get(key, 0)] for key, value in extended.of(kind).items()]
        for kind in kinds
    }


# --- The plan ---------------------------------------------------------------------------------------------------------

WIDE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 2000,
    "sliding_window": 512,
}
LARGE = 2**18  # bytes of a copy that a GPU should not be idle for
PLANS: dict[str, tuple[int, int, list[str]]] = {
    "planned: no recompute": (1, 0, [NONE]),
    "planned: cp2, no recompute": (2, 0, [CP2, NONE]),
    "planned: tp2, sequence parallel": (2, 0, [TP2, SP, FULL]),
    "planned: pp2, last stage": (2, 1, [PP2, FULL]),
    "planned: rows in fp32": (1, 0, [NONE, "training.precision=fp32", "training.micro_batch_size=2"]),
    "planned: packed, and filled by a shorter one": (1, 0, [NONE, "training.micro_batch_tokens=5000"]),
}


def planned(folder: Path, name: str) -> dict[str, Any]:
    """By phase: bytes that are planned for two layers, and those of a traced step."""
    from megatron_sead.planning.plan import make_plan
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.tracing.step import Rollouts, trace_rank
    from megatron_sead.tracing.world import Told

    world, rank, overrides = PLANS[name]
    small = ["rollouts.max_new_tokens=1792", "prompts.max_prompt_tokens=256", "training.scratch_bytes=67108864"]
    config = run_of(
        folder / "wide", *small, "training.global_batch_size=4", *overrides, layers=2, layer_types=KINDS, **WIDE
    )
    plan = make_plan(config, world)
    traced = trace_rank(config, rank, world, [Rollouts(1, 256, 1792), Rollouts(2, 256, 1792)], load_rates(), Told())
    phases = plan.stages[traced.stage].phases
    return {
        "planned": {
            p: [phases[p], traced.memory[p].peak["device"]] for p in traced.memory if p in phases and p != "rollouts"
        },
        "waited": [
            str(key)
            for key, c in traced.steps[-1].copies.items()
            if "to device" in key and c.waited_for and c.bytes > LARGE
        ],
    }


PROGRAMS = {name: body for name, (body, _) in (programs.APART | programs.ALONE).items()}
PROGRAMS |= {"right": programs.right, "looked at": programs.looked_at, "copied": programs.copied}
PROGRAMS |= {"multiplied twice": programs.multiplied_twice}


def main(folder: Path) -> None:
    warnings.simplefilter("ignore")
    from megatron_sead.tracing import shadows

    shadows.SMALL = 2**10  # a histogram is known; small models' activations are to be as unknown as large ones'
    kinds = ((program, PROGRAMS), (trace, MATRIX), (sabotage, SABOTAGES), (extension, ["extension"]), (planned, PLANS))
    for kind, cases in kinds:
        for name in cases:
            started = time.process_time()
            try:
                result = kind(folder, name)
            except Exception as error:
                result = {"failed": f"{type(error).__name__}: {error}"}
            print(json.dumps({"case": name, "seconds": time.process_time() - started, **result}), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
