"""Process groups that nothing goes through: this process is any one rank of any world."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
from megatron_sead.tracing.watch import Watch

BACKEND = "fake"
REDUCTIONS = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_tensor")


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
    dist.init_process_group(BACKEND, store=FakeStore(), rank=rank, world_size=world_size)
    heard: dict[int, int] = {}
    if rank in told.objects:
        told.objects[rank] = []

    def broadcast(box: list[Any], src: int | None = None, group: Any = None, **options: Any) -> None:
        source = src if src is not None else dist.get_global_rank(group, options.get("group_src", 0))
        watch.objects("broadcast_object_list", group, source)
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

    def gather(
        mine: Any, objects: list[Any] | None = None, dst: int | None = None, group: Any = None, **options: Any
    ) -> None:
        watch.objects("gather_object", group, dst if dst is not None else options.get("group_dst", 0))
        if objects is not None:
            objects[:] = [mine] * len(objects)

    answers: dict[str, Any] = {
        "broadcast_object_list": broadcast,
        "all_gather_object": all_gather,
        "gather_object": gather,
    }
    answers |= {name: _telling_op(watch, getattr(dist, name)) for name in REDUCTIONS}
    with mock.patch.multiple(dist, **answers):
        try:
            yield initialize_parallel(settings, "cuda", 0, BACKEND)
        finally:  # nobody waits, and another rank may be traced next
            destroy_parallel()


def _telling_op(watch: Watch, reduction: Callable[..., Any]) -> Callable[..., Any]:
    """One of torch's functions, that tells the watch what it computes: below, Python cannot ask."""
    parameters = inspect.signature(reduction)

    @functools.wraps(reduction)
    def told(*args: Any, **kwargs: Any) -> Any:
        op = parameters.bind(*args, **kwargs).arguments.get("op", dist.ReduceOp.SUM)
        watch.collectives.op = str(getattr(op, "op", op)).rpartition(".")[2]
        return reduction(*args, **kwargs)

    return told
