"""What a search chooses from: layouts, modes of training, engines. New kinds of layouts belong here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_sead.config.micro_batches import length_multiple
from megatron_sead.config.parallel import OF_STAGES, ParallelSettings
from megatron_sead.config.rollouts import TransformersRollouts, VllmRollouts
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError
from megatron_sead.models.layout import tensor_parallel_sizes
from megatron_sead.models.token_ids import require_same_rows
from megatron_sead.planning.fit import Machine
from megatron_sead.planning.lengths import Lengths, read_lengths
from megatron_sead.planning.plan import sequence_length
from megatron_sead.planning.rates import Rates
from megatron_sead.planning.remembered import RememberedShape, remembered_shape

BUDGETS = (1, 2, 4, 8)  # times the smallest
ROWS = (1, 2, 4, 8, 16, 32)
VIRTUAL = (2, 4, 8)
RECOMPUTE = (None, "full")  # selective keeps what None keeps, and computes more: attention's kernels keep no scores
ENGINES = (1, 2, 4, 8)  # ranks of a copy
CONTEXTS = (1, 2, 4, 8)  # ranks that share sequences
LEAST_SHARE = 8192  # tokens of the longest rollout, for each of them: with fewer they wait for each other's keys

Changes = dict[str, Any]  # settings by dotted name


@dataclass(frozen=True)
class Cluster:
    """What a run may use."""

    world: int
    machine: Machine
    rates: Rates


@dataclass(frozen=True)
class Pair:
    """What a run's directories say, and how long its responses are."""

    student: RememberedShape
    teacher: RememberedShape
    length: int  # of the longest rollout, prompt included
    lengths: Lengths


def read_pair(config: RunConfig, lengths: str | None) -> Pair:
    """
    Args:
        lengths: as `read_lengths` takes them.

    Raises:
        UserError: a model cannot be read, both have not the same rows, or what `read_lengths` refuses.
    """
    student, teacher = remembered_shape(config.student, "student"), remembered_shape(config.teacher, "teacher")
    require_same_rows(config.student.path, config.teacher.path)
    longest = config.rollouts.max_new_tokens
    length, _ = sequence_length(config, {"student": student})
    return Pair(student, teacher, length, read_lengths(lengths, longest, length - longest))


def layouts(config: RunConfig, pair: Pair, cluster: Cluster) -> Iterator[Changes]:
    """Tensor parallelism within a node, stages and virtual stages that both models have layers for, and ranks that
    share long sequences. How many layers each stage has is left to time."""
    models = pair.student, pair.teacher
    sizes = set.intersection(*(set(tensor_parallel_sizes(vars(shape.fields))) for shape in models))
    own = [name for name in OF_STAGES if getattr(config.parallel, name) is not None]
    contexts = {n for n in CONTEXTS if n == 1 or n * LEAST_SHARE <= pair.length}
    contexts |= {config.parallel.context_parallel_size}
    for tp, cp in product(sorted(sizes), sorted(contexts)):
        ranks, left = divmod(cluster.world, tp * cp)
        if tp > cluster.rates.gpus_per_node or left:
            continue
        for pp in (n for n in range(1, pair.student.layers + 1) if ranks % n == 0):
            for virtual in (None, *VIRTUAL) if pp > 1 else (None,):
                layout: Changes = {
                    "parallel.tensor_model_parallel_size": tp,
                    "parallel.pipeline_model_parallel_size": pp,
                    "parallel.virtual_pipeline_model_parallel_size": virtual,
                    "parallel.context_parallel_size": cp,
                }
                layout |= {f"parallel.{name}": None for name in own if f"parallel.{name}" not in layout}
                if all(_has_layers(shape, with_changes(config, layout).parallel) for shape in models):
                    yield layout


def _has_layers(shape: RememberedShape, parallel: ParallelSettings) -> bool:
    try:
        shape.stage_layers(parallel)
    except UserError:
        return False
    return True


def modes(config: RunConfig, pair: Pair) -> Iterator[Changes]:
    """Within a layout: sequence parallelism, recomputation, micro-batches, offload."""
    training, parallel = config.training, config.parallel
    splits = (True, False) if parallel.tensor_model_parallel_size > 1 else (False,)
    offloads = (True, False) if config.device == "cuda" else (config.teacher.offload,)
    for split in splits:
        multiple = length_multiple(parallel.model_copy(update={"sequence_parallel": split}))
        if training.micro_batch_tokens is None:
            name, sizes = "training.micro_batch_size", {*ROWS, training.micro_batch_size}
        else:
            least = -(-pair.length // multiple) * multiple
            name, sizes = "training.micro_batch_tokens", {least * n for n in BUDGETS} | {training.micro_batch_tokens}
        for size in sorted(sizes):
            for recompute in RECOMPUTE:
                for offload in offloads:
                    yield {
                        "parallel.sequence_parallel": split,
                        name: size,
                        "training.recompute_granularity": recompute,
                        "teacher.offload": offload,
                    }


def engines(config: RunConfig, pair: Pair, cluster: Cluster) -> list[Changes]:
    """How the engine's model may be split, or how many rollouts it may write at once."""
    rollouts = config.rollouts
    if isinstance(rollouts, VllmRollouts):
        most = min(cluster.rates.gpus_per_node, cluster.world)
        sizes = [n for n in ENGINES if n <= most and cluster.world % n == 0 and pair.student.heads % n == 0]
        return [{"rollouts.tensor_parallel_size": n} for n in sizes]
    if isinstance(rollouts, TransformersRollouts):
        return [{"rollouts.batch_size": n} for n in sorted({max(1, rollouts.batch_size >> k) for k in (0, 2, 4, 6)})]
    return [{}]


def with_changes(config: RunConfig, changes: Changes) -> RunConfig:
    """A copy with other settings. They are checked where they may not fit each other: for thousands of candidates
    pydantic takes long."""
    groups: dict[str, Changes] = {}
    for key, value in changes.items():
        group, _, name = key.partition(".")
        groups.setdefault(group, {})[name] = value
    update = {group: getattr(config, group).model_copy(update=values) for group, values in groups.items()}
    return config.model_copy(update=update)


def as_settings(changes: Changes) -> list[str]:
    """key=value, as a command takes them."""
    plain = (bool, type(None))  # as YAML writes them
    return [f"{k}={json.dumps(v) if isinstance(v, plain) else v}" for k, v in changes.items()]
