"""Does a planned run fit its GPUs and nodes, and if not, what would help?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_sead.config.checks import check_world_size
from megatron_sead.config.micro_batches import length_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError
from megatron_sead.planning.memory import StageBytes
from megatron_sead.planning.plan import Plan, make_plan, size_of

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
    if config.device == "cpu":
        return
    mistakes = list(_too_large(plan, machine))
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


def host_needed(plan: Plan) -> int:
    """Bytes on the fullest node."""
    ranks = min(plan.world_size, GPUS_PER_NODE)
    per_stage = plan.world_size // len(plan.stages)
    full = sorted((stage.host for stage in plan.stages for _ in range(per_stage)), reverse=True)
    return sum(full[:ranks])


def _too_large(plan: Plan, machine: Machine) -> Iterator[str]:
    for number, stage in enumerate(plan.stages):
        phase, size = needed(stage)
        if size > machine.gpu_bytes:
            yield (
                f"pipeline stage {number}, phase {phase}: needs {size_of(size)} of a GPU's "
                f"{size_of(machine.gpu_bytes)}: {size_of(stage.phases[phase])} of tensors, {FRAGMENTATION:.0%} for "
                f"fragmentation, {size_of(LIBRARIES)} for CUDA and NCCL"
            )
    if (host := host_needed(plan)) > machine.host_bytes:
        yield (
            f"host memory: a node's ranks need {size_of(host)} of {size_of(machine.host_bytes)}: the teacher's pinned "
            "weights and hidden states, and a checkpoint being saved"
        )


def _fits(config: RunConfig, world_size: int, machine: Machine) -> bool:
    try:
        check_world_size(config, world_size)
        return not list(_too_large(make_plan(config, world_size, machine.gpu_bytes), machine))
    except UserError:
        return False


def _helpful_settings(config: RunConfig, plan: Plan, machine: Machine) -> Iterator[str]:
    """Settings that alone make it fit."""
    changes: list[dict[str, dict[str, Any]]] = [
        {"training": {"recompute_granularity": "full"}},
        {"teacher": {"offload": True}},
        {"training": {"use_distributed_optimizer": True}},
        {"training": _smallest_micro_batch(config, plan)},
        {"training": {"scratch_bytes": 2**28}},
    ]
    if config.parallel.tensor_model_parallel_size > 1:
        changes.append({"parallel": {"sequence_parallel": True}})
    if config.rollouts.engine == "vllm":
        room = 1 - max(stage.resident for stage in plan.stages) * (1 + FRAGMENTATION) / machine.gpu_bytes
        share = math.floor(100 * (room - LIBRARIES / machine.gpu_bytes)) / 100
        if share > 0.05:
            changes.append({"rollouts": {"gpu_memory_utilization": share}})
    for change in changes:
        ((group, values),) = change.items()
        ((name, value),) = values.items()
        if getattr(getattr(config, group), name) != value:
            changed = config.model_copy(deep=True)
            setattr(changed, group, getattr(changed, group).model_copy(update=values))
            if _fits(changed, plan.world_size, machine):
                yield f"{group}.{name}={str(value).lower()}"


def _smallest_micro_batch(config: RunConfig, plan: Plan) -> dict[str, Any]:
    if config.training.micro_batch_tokens is None:
        return {"micro_batch_size": 1}
    multiple = length_multiple(config.parallel)
    return {"micro_batch_tokens": -(-plan.sequence_length // multiple) * multiple}


def _nearest_layouts(config: RunConfig, plan: Plan, machine: Machine) -> Iterator[str]:
    """The fewest doublings away first."""
    parallel, world = config.parallel, plan.world_size
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
        if _fits(changed, world, machine):
            sequence = ", sequence parallel" if update["sequence_parallel"] else ""
            yield f"tensor {tp} x pipeline {pp} x data {world // (tp * pp)}{sequence}"
            found += 1
            if found == HELPFUL:
                return
