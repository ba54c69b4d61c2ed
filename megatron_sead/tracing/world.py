"""Process groups that nothing goes through: this process is any one rank of any world."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
from megatron_sead.tracing.watch import Watch

BACKEND = "fake"


@dataclass
class Told:
    """Objects that ranks have broadcast, by the rank; for the ranks that are traced after them."""

    objects: dict[int, list[Any]] = field(default_factory=dict)


@contextmanager
def world_of(
    settings: ParallelSettings, rank: int, world_size: int, told: Told, watch: Watch
) -> Iterator[ParallelContext]:
    """Lay out a world of so many ranks, as one of them. Objects travel in Python: all ranks have said what this one
    says, but what another rank broadcasts is what it broadcast when it was traced itself.

    Args:
        watch: is told of each collective of objects, and what reductions compute.
    """
    all_reduce = dist.all_reduce
    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    heard: dict[int, int] = {}
    if rank in told.objects:
        told.objects[rank] = []

    def broadcast(box: list[Any], src: int | None = None, group: Any = None, **options: Any) -> None:
        watch.objects("broadcast_object_list", group)
        source = src if src is not None else dist.get_global_rank(group, options.get("group_src", 0))
        if source == rank:
            told.objects.setdefault(rank, []).append(copy.deepcopy(box))
            return
        said, number = told.objects.get(source, []), heard.get(source, 0)
        if number < len(said):
            box[:] = copy.deepcopy(said[number])
        heard[source] = number + 1

    def all_gather(objects: list[Any], mine: Any, group: Any = None) -> None:
        watch.objects("all_gather_object", group)
        objects[:] = [mine] * len(objects)

    def gather(mine: Any, objects: list[Any] | None = None, dst: int = 0, group: Any = None) -> None:
        watch.objects("gather_object", group)
        if objects is not None:
            objects[:] = [mine] * len(objects)

    def reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, *args: Any, **options: Any) -> Any:
        watch.collectives.sums = op == dist.ReduceOp.SUM
        return all_reduce(tensor, op, *args, **options)

    answers: dict[str, Any] = {
        "broadcast_object_list": broadcast,
        "all_gather_object": all_gather,
        "gather_object": gather,
    }
    answers["all_reduce"] = reduce
    with mock.patch.multiple(dist, **answers):
        try:
            yield initialize_parallel(settings, "cuda", 0, BACKEND)
        finally:  # nobody waits, and another rank may be traced next
            destroy_parallel()
