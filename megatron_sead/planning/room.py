"""What of a cluster's memory a candidate takes, and what it leaves to the rollout engine."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial

from megatron_sead.config.checks import check_world_size
from megatron_sead.config.rollouts import VllmRollouts
from megatron_sead.config.run import RunConfig
from megatron_sead.planning.candidates import Changes, Cluster, Pair, with_changes
from megatron_sead.planning.decoding import cache_bytes_a_token
from megatron_sead.planning.engines import engine_weights
from megatron_sead.planning.fit import FRAGMENTATION, LIBRARIES, needed, shortages
from megatron_sead.planning.memory import Load, StageBytes, stage_bytes
from megatron_sead.planning.plan import Plan, make_plan, most_micro_batches, size_of
from megatron_sead.planning.seconds import setting_of
from megatron_sead.planning.work import Setting

ENGINE_KEEPS = 2 * 2**30  # vLLM's activations and graphs, beside weights and cache
MOST_UTILIZATION = 95  # percent


def outer_stages(config: RunConfig, pair: Pair, cluster: Cluster) -> list[StageBytes]:
    """Bytes of the stages that can need most: the first two and the last."""
    last = config.parallel.pipeline_model_parallel_size - 1
    replicas = check_world_size(config, cluster.world)
    count = most_micro_batches(config, replicas, pair.length)
    replicas *= config.parallel.context_parallel_size
    of_stage = partial(Load, config, replicas=replicas, micro_batches=count, length=pair.length)
    return [
        stage_bytes(of_stage(stage=stage), pair.student, pair.teacher, cluster.machine.gpu_bytes)
        for stage in sorted({0, min(1, last), last})
    ]


def room_for_engine(where: Setting, stages: list[StageBytes], pair: Pair, cluster: Cluster) -> tuple[float, Changes]:
    """Bytes of vLLM's cache on a rank, and the share of a GPU that gives it so many: what the models leave."""
    rollouts = where.config.rollouts
    assert isinstance(rollouts, VllmRollouts)
    if rollouts.kv_cache_memory_bytes is not None:
        return float(rollouts.kv_cache_memory_bytes), {}
    taken = max(stage.resident for stage in stages) * (1 + FRAGMENTATION) + LIBRARIES
    percent = max(1, min(MOST_UTILIZATION, math.floor(100 * (1 - taken / cluster.machine.gpu_bytes))))
    extra = {"rollouts.gpu_memory_utilization": percent / 100}
    changed = setting_of(with_changes(where.config, extra), cluster.world, cluster.rates)
    return cache_of(changed, pair, cluster), extra


def cache_of(where: Setting, pair: Pair, cluster: Cluster) -> float:
    """Bytes of vLLM's cache on a rank, by its settings; at least those of one rollout."""
    rollouts = where.config.rollouts
    assert isinstance(rollouts, VllmRollouts)
    if rollouts.kv_cache_memory_bytes is not None:
        return float(rollouts.kv_cache_memory_bytes)
    given = rollouts.gpu_memory_utilization * cluster.machine.gpu_bytes
    least = pair.length * cache_bytes_a_token(where, pair.student)
    return max(least, given - engine_weights(where.config, pair.student) - ENGINE_KEEPS)


def what_does_not_fit(config: RunConfig, pair: Pair, cluster: Cluster) -> str | None:
    """What stands in the way; None: nothing."""
    size = cluster.machine.gpu_bytes
    rollouts = config.rollouts
    if isinstance(rollouts, VllmRollouts):
        where = setting_of(config, cluster.world, cluster.rates)
        weights, cache = engine_weights(config, pair.student), pair.length * cache_bytes_a_token(where, pair.student)
        least = weights + ENGINE_KEEPS + cache
        given = rollouts.gpu_memory_utilization * size
        if rollouts.kv_cache_memory_bytes is None and given < least:
            return f"vLLM has {size_of(given)} of a GPU and needs {size_of(least)} at least"
    problems = shortages(config, planned(config, pair, cluster), cluster.machine)
    return problems[0] if problems else None


def planned(config: RunConfig, pair: Pair, cluster: Cluster) -> Plan:
    """As a run is planned.

    Raises:
        UserError: as `make_plan` does.
    """
    shapes = {"student": pair.student, "teacher": pair.teacher}
    return make_plan(config, cluster.world, cluster.machine.gpu_bytes, shapes)


def too_large_without_engine(config: RunConfig, stages: list[StageBytes], cluster: Cluster) -> str | None:
    """A phase that needs too much, the engine's aside; None: none does."""
    size = cluster.machine.gpu_bytes
    for stage in stages if config.device == "cuda" else ():
        phase, count = needed(replace(stage, phases={n: p for n, p in stage.phases.items() if n != "rollouts"}))
        if count > size:
            return f"phase {phase} needs {size_of(count)} of a GPU's {size_of(size)}"
    return None
