"""Does a planned run fit its GPUs and nodes, and if not, what would help?"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sead.config.checks import check_world_size
from megatron_sead.config.micro_batches import length_multiple
from megatron_sead.config.rollouts import TransformersRollouts, VllmRollouts
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError
from megatron_sead.planning.engines import too_little_for_engine
from megatron_sead.planning.memory import StageBytes
from megatron_sead.planning.plan import Plan, make_plan, size_of
from megatron_sead.wording import counted

FRAGMENTATION = 0.03  # of a phase's tensors, which torch's allocator may lose
LIBRARIES = 3 * 2**29  # CUDA's context and NCCL's buffers
GPUS_PER_NODE = 8
HELPFUL = 3  # layouts that are named


@dataclass(frozen=True)
class Machine:
    """What a run may use."""

    gpu_bytes: int = 80 * 2**30
    host_bytes: int = 2000 * 2**30  # of a node


def needed(stage: StageBytes) -> tuple[str, int]:
    """The phase that needs most of a GPU, and how much, allowances included. An engine's share stays in one piece."""
    sizes = {phase: size + int(FRAGMENTATION * _in_pieces(stage, phase)) for phase, size in stage.phases.items()}
    phase = max(sizes, key=lambda name: sizes[name])
    return phase, sizes[phase] + LIBRARIES


def _in_pieces(stage: StageBytes, phase: str) -> int:
    return stage.resident if phase == "rollouts" else stage.phases[phase]


def require_fit(config: RunConfig, plan: Plan, machine: Machine) -> None:
    """
    Raises:
        UserError: a phase needs more than a GPU has, or the ranks of a node more than its host; with settings that
            would help, and the nearest layouts that fit.
    """
    mistakes = shortages(config, plan, machine)
    if not mistakes:
        return
    helps, layouts = list(_helpful_settings(config, plan, machine)), list(_nearest_layouts(config, plan, machine))
    if helps:
        mistakes.append(f"it would fit with {', or with '.join(helps)}")
    if layouts:
        mistakes.append(f"nearest layouts of {plan.world_size} ranks that fit: {'; '.join(layouts)}")
    if not helps and not layouts:
        mistakes.append("no other layout of as many ranks fits either; take more ranks, or shorter rollouts")
    raise UserError("\n".join(mistakes))


def shortages(config: RunConfig, plan: Plan, machine: Machine) -> list[str]:
    """What does not fit, a line each."""
    return list(_too_large(config, plan, machine))


def host_needed(config: RunConfig, plan: Plan) -> int:
    """Bytes on the fullest node."""
    nodes: defaultdict[int, int] = defaultdict(int)
    a_stage = plan.world_size // len(plan.stages)
    for rank in range(plan.world_size):  # tensor-parallel ranks are neighbours, then replicas, then stages
        stage, place = plan.stages[rank // a_stage], rank % a_stage
        nodes[rank // GPUS_PER_NODE] += stage.host(writes=place < config.parallel.tensor_model_parallel_size)
    return max(nodes.values())


def _too_large(config: RunConfig, plan: Plan, machine: Machine) -> Iterator[str]:
    if config.device == "cuda":
        yield from _too_large_for_gpus(config, plan, machine)
    if (host := host_needed(config, plan)) > machine.host_bytes:
        what = "the teacher's pinned weights and hidden states, and a checkpoint being saved"
        yield (
            f"host memory: a node's ranks need {size_of(host)} of {size_of(machine.host_bytes)}: "
            f"{what if config.device == 'cuda' else 'all of the run, which is on the CPU'}"
        )


def _too_large_for_gpus(config: RunConfig, plan: Plan, machine: Machine) -> Iterator[str]:
    sizes = [needed(stage) for stage in plan.stages]
    too_large = [number for number, (_, size) in enumerate(sizes) if size > machine.gpu_bytes]
    if too_large:
        number = max(too_large, key=lambda stage: sizes[stage][1])
        phase, size = sizes[number]
        others = f" (and {counted(len(too_large) - 1, 'other stage')} too)" if len(too_large) > 1 else ""
        yield (
            f"pipeline stage {number}, phase {phase}: needs {size_of(size)} of a GPU's {size_of(machine.gpu_bytes)}"
            f"{others}: {size_of(plan.stages[number].phases[phase])} of tensors, {FRAGMENTATION:.0%} for "
            f"fragmentation, {size_of(LIBRARIES)} for CUDA and NCCL"
        )
    too_little = too_little_for_engine(config, plan.student, plan.sequence_length, machine.gpu_bytes)
    if too_little is not None:
        given, least = too_little
        yield (
            f"phase rollouts: vLLM is given {size_of(given)} of a GPU ({_share_of_engine(config)}) and needs "
            f"{size_of(least)} at least, for its weights and one rollout's cache"
        )


def _share_of_engine(config: RunConfig) -> str:
    rollouts = config.rollouts
    assert isinstance(rollouts, VllmRollouts)
    if rollouts.kv_cache_memory_bytes is not None:
        return f"rollouts.kv_cache_memory_bytes={rollouts.kv_cache_memory_bytes}, and its weights"
    return f"rollouts.gpu_memory_utilization={rollouts.gpu_memory_utilization:g}"


def _fits(config: RunConfig, plan: Plan, machine: Machine) -> bool:
    """Would the planned run fit with other settings?"""
    shapes = {"student": plan.student, "teacher": plan.teacher}
    try:
        check_world_size(config, plan.world_size)
        other = make_plan(config, plan.world_size, machine.gpu_bytes, shapes)
        return not list(_too_large(config, other, machine))
    except UserError:
        return False


def _helpful_settings(config: RunConfig, plan: Plan, machine: Machine) -> Iterator[str]:
    """Settings that alone make it fit."""
    changes: list[tuple[str, str, Any]] = [
        ("training", "recompute_granularity", "full"),
        ("teacher", "offload", not config.teacher.offload),
        ("training", "use_distributed_optimizer", True),
        ("training", *_smallest_micro_batch(config, plan)),
        ("training", "scratch_bytes", min(2**28, config.training.scratch_bytes)),
        ("parallel", "sequence_parallel", config.parallel.tensor_model_parallel_size > 1),
        *_smaller_engines(config, plan, machine),
    ]
    for group, name, value in changes:
        if getattr(getattr(config, group), name) != value:
            changed = config.model_copy(deep=True)
            setattr(changed, group, getattr(changed, group).model_copy(update={name: value}))
            if _fits(changed, plan, machine):
                yield f"{group}.{name}={str(value).lower()}"


def _smaller_engines(config: RunConfig, plan: Plan, machine: Machine) -> Iterator[tuple[str, str, Any]]:
    rollouts = config.rollouts
    if isinstance(rollouts, VllmRollouts):
        taken = max(stage.resident for stage in plan.stages) * (1 + FRAGMENTATION) + LIBRARIES
        share = math.floor(100 * (1 - taken / machine.gpu_bytes)) / 100
        if share > 0:
            yield "rollouts", "gpu_memory_utilization", share
        yield "rollouts", "tensor_parallel_size", config.parallel.tensor_model_parallel_size
    elif isinstance(rollouts, TransformersRollouts):
        yield "rollouts", "batch_size", 1


def _smallest_micro_batch(config: RunConfig, plan: Plan) -> tuple[str, int]:
    if config.training.micro_batch_tokens is None:
        return "micro_batch_size", 1
    multiple = length_multiple(config.parallel)
    return "micro_batch_tokens", -(-plan.sequence_length // multiple) * multiple


def _nearest_layouts(config: RunConfig, plan: Plan, machine: Machine) -> Iterator[str]:
    """The fewest doublings away first."""
    parallel, world = config.parallel, plan.world_size // config.parallel.context_parallel_size
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    here = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    others = [(tp, pp) for tp in sizes for pp in sizes if world % (tp * pp) == 0 and (tp, pp) != here]
    others.sort(key=lambda other: sum(abs(math.log2(a / b)) for a, b in zip(other, here, strict=True)))
    found = 0
    for tp, pp in others:
        update = {
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "sequence_parallel": tp > 1 and (parallel.sequence_parallel or here[0] == 1),
            "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size if pp > 1 else None,
        }
        changed = config.model_copy(update={"parallel": parallel.model_copy(update=update)})
        if _fits(changed, plan, machine):
            sequence = ", sequence parallel" if update["sequence_parallel"] else ""
            yield f"tensor {tp} x pipeline {pp} x data {world // (tp * pp)}{sequence}"
            found += 1
            if found == HELPFUL:
                return
