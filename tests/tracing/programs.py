"""Small programs of two ranks on fake CUDA tensors, most with one fault of a kind that runs on GPUs have."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.parallel.context import ParallelContext

Body = Callable[[int, ParallelContext], None]


def numbers(count: int = 4, dtype: torch.dtype = torch.float32, device: str = "cuda") -> torch.Tensor:
    return torch.zeros(count, dtype=dtype, device=device)


# --- Ranks that would not meet: the name of the call that is to be told ----------------------------------------------


def another_order(rank: int, parallel: ParallelContext) -> None:
    calls: list[Callable[..., Any]] = [dist.all_reduce, partial(dist.broadcast, group_src=0)]
    for call in calls if rank == 0 else reversed(calls):
        call(numbers(), group=parallel.tp)


def another_order_of_groups(rank: int, parallel: ParallelContext) -> None:
    for group in (parallel.tp, None) if rank == 0 else (None, parallel.tp):
        dist.all_reduce(numbers(), group=group)


def another_group(rank: int, parallel: ParallelContext) -> None:
    dist.all_reduce(numbers(), group=parallel.tp if rank == 0 else None)


def another_type(rank: int, parallel: ParallelContext) -> None:
    dist.all_reduce(numbers(dtype=torch.float32 if rank == 0 else torch.bfloat16), group=parallel.tp)


def another_reduction(rank: int, parallel: ParallelContext) -> None:
    dist.all_reduce(numbers(), dist.ReduceOp.SUM if rank == 0 else dist.ReduceOp.MAX, group=parallel.tp)


def another_size_of_a_gather(rank: int, parallel: ParallelContext) -> None:
    mine = numbers(4 + rank)
    dist.all_gather_into_tensor(numbers(2 * len(mine)), mine, group=parallel.tp)


def another_size_of_a_list(rank: int, parallel: ParallelContext) -> None:
    mine = numbers(4 + rank)
    dist.all_gather([torch.empty_like(mine), torch.empty_like(mine)], mine, group=parallel.tp)


def another_size_of_a_scatter(rank: int, parallel: ParallelContext) -> None:
    mine = numbers(4 + rank)
    dist.reduce_scatter_tensor(mine, numbers(2 * len(mine)), group=parallel.tp)


def splits_that_do_not_fit(rank: int, parallel: ParallelContext) -> None:
    sent, received = ([1, 3], [1, 2]) if rank == 0 else ([2, 2], [2, 2])  # 3 to rank 1, which expects 2
    dist.all_to_all_single(numbers(sum(received)), numbers(4), received, sent, group=parallel.tp)


def another_source(rank: int, parallel: ParallelContext) -> None:
    dist.broadcast(numbers(), group_src=rank, group=parallel.tp)


def another_source_of_objects(rank: int, parallel: ParallelContext) -> None:
    dist.broadcast_object_list([1], group_src=rank, group=parallel.control)


def another_destination(rank: int, parallel: ParallelContext) -> None:
    dist.reduce(numbers(), group_dst=rank, group=parallel.tp)


def one_more(rank: int, parallel: ParallelContext) -> None:
    for _ in range(2 + rank):
        dist.all_reduce(numbers(), group=parallel.tp)


def no_receive(rank: int, parallel: ParallelContext) -> None:
    if rank == 0:
        dist.send(numbers(), group_dst=1, group=parallel.tp)


def no_send(rank: int, parallel: ParallelContext) -> None:
    if rank == 1:
        dist.recv(numbers(), group_src=0, group=parallel.tp)


def another_size_of_a_message(rank: int, parallel: ParallelContext) -> None:
    if rank == 0:
        dist.send(numbers(4), group_dst=1, group=parallel.tp)
    else:
        dist.recv(numbers(5), group_src=0, group=parallel.tp)


def no_barrier(rank: int, parallel: ParallelContext) -> None:
    if rank == 0:
        dist.barrier(parallel.control)


APART: dict[str, tuple[Body, str]] = {
    "another order": (another_order, "allreduce_"),
    "another order of groups": (another_order_of_groups, "allreduce_"),
    "another group": (another_group, "group world"),
    "another type": (another_type, "bfloat16"),
    "another reduction": (another_reduction, "MAX"),
    "another size of a gather": (another_size_of_a_gather, "_allgather_base_ of [10]"),
    "another size of a list": (another_size_of_a_list, "allgather_ of [5, 5]"),
    "another size of a scatter": (another_size_of_a_scatter, "_reduce_scatter_base_ of [10]"),
    "splits that do not fit": (splits_that_do_not_fit, "alltoall_base_"),
    "another source": (another_source, "root 1"),
    "another source of objects": (another_source_of_objects, "root 1"),
    "another destination": (another_destination, "root 1"),
    "one more": (one_more, "2 calls against 3"),
    "no receive": (no_receive, "1 calls against 0"),
    "no send": (no_send, "0 calls against 1"),
    "another size of a message": (another_size_of_a_message, "recv_ of [5]"),
    "no barrier": (no_barrier, "barrier"),
}


# --- What one rank alone would fail with, or be wrong by: a part of the message --------------------------------------


def no_wait(rank: int, parallel: ParallelContext) -> None:
    dist.all_reduce(numbers(), group=parallel.tp, async_op=True)


def used_before_the_wait(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    work: Any = dist.all_reduce(x, group=parallel.tp, async_op=True)
    x.sum()
    work.wait()


def part_used_before_the_wait(rank: int, parallel: ParallelContext) -> None:
    whole = numbers(8)
    work: Any = dist.all_gather_into_tensor(whole, numbers(4), group=parallel.tp, async_op=True)
    whole[6:].add_(1)
    work.wait()


def sent_and_written(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    work: Any = dist.isend(x, group_dst=1 - rank, group=parallel.tp)
    x.add_(1)
    work.wait()


def sent_and_freed(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    work: Any = dist.isend(x, group_dst=1 - rank, group=parallel.tp)
    x.untyped_storage().resize_(0)
    work.wait()


def read_before_it_came(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    work: Any = dist.irecv(x, group_src=1 - rank, group=parallel.tp)
    x.clone()
    work.wait()


def sent_on_before_it_came(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    work: Any = dist.all_reduce(x, group=parallel.tp, async_op=True)
    dist.all_reduce(x)
    work.wait()


def of_the_host(rank: int, parallel: ParallelContext) -> None:
    dist.all_reduce(numbers(device="cpu"), group=parallel.tp)


def of_the_device(rank: int, parallel: ParallelContext) -> None:
    dist.all_reduce(numbers(), group=parallel.control)


def uneven_list(rank: int, parallel: ParallelContext) -> None:
    dist.all_gather([numbers(3), numbers(5)], numbers(4), group=parallel.tp)


def columns(rank: int, parallel: ParallelContext) -> None:
    dist.all_reduce(torch.zeros(4, 4, device="cuda")[:, 1], group=parallel.tp)


def splits_of_too_few(rank: int, parallel: ParallelContext) -> None:
    dist.all_to_all_single(numbers(4), numbers(4), [2, 2], [1, 2], group=parallel.tp)


def lengths_on_the_host(rank: int, parallel: ParallelContext) -> None:
    from torch.nn.attention.varlen import varlen_attn

    rows = torch.zeros(8, 2, 64, dtype=torch.bfloat16, device="cuda")
    starts = torch.tensor([0, 4, 8], dtype=torch.int32)
    varlen_attn(rows, rows, rows, starts, starts, 4, 4)


def mask_on_the_host(rank: int, parallel: ParallelContext) -> None:
    numbers().masked_select(torch.ones(4, dtype=torch.bool))


def counted_on_two_devices(rank: int, parallel: ParallelContext) -> None:
    torch.bincount(torch.zeros(4, dtype=torch.int64, device="cuda"), torch.ones(4))


def lists_on_two_devices(rank: int, parallel: ParallelContext) -> None:
    torch._foreach_add_([numbers()], [numbers(device="cpu")])


def moments_on_the_host(rank: int, parallel: ParallelContext) -> None:
    weight = torch.nn.Parameter(numbers())
    adam = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    adam.step()
    adam.state[weight]["exp_avg"] = adam.state[weight]["exp_avg"].cpu()
    adam.step()


def index_on_the_device(rank: int, parallel: ParallelContext) -> None:
    numbers(device="cpu")[torch.zeros(2, dtype=torch.int64, device="cuda")]


def freed_and_used(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    x.untyped_storage().resize_(0)
    x.add(1)


ALONE: dict[str, tuple[Body, str]] = {
    "no wait": (no_wait, "has not been waited for"),
    "used before the wait": (used_before_the_wait, "is used"),
    "part used before the wait": (part_used_before_the_wait, "is used"),
    "sent and written": (sent_and_written, "is written"),
    "sent and freed": (sent_and_freed, "was freed"),
    "read before it came": (read_before_it_came, "is used"),
    "sent on before it came": (sent_on_before_it_came, "is used"),
    "of the host": (of_the_host, "its group takes those on cuda"),
    "of the device": (of_the_device, "its group takes those on cpu"),
    "uneven list": (uneven_list, "is not 2 times"),
    "columns": (columns, "not contiguous"),
    "splits of too few": (splits_of_too_few, "[1, 2] elements of 4"),
    "lengths on the host": (lengths_on_the_host, "different devices"),
    "mask on the host": (mask_on_the_host, "different devices"),
    "counted on two devices": (counted_on_two_devices, "different devices"),
    "lists on two devices": (lists_on_two_devices, "device"),
    "moments on the host": (moments_on_the_host, "device"),
    "index on the device": (index_on_the_device, "different devices"),
    "freed and used": (freed_and_used, "after its memory was freed"),
}


# --- What is right, and what the host waits for -----------------------------------------------------------------------


def right(rank: int, parallel: ParallelContext) -> None:
    whole, sizes = numbers(8), ([1, 3], [1, 2]) if rank == 0 else ([2, 2], [3, 2])
    work: Any = dist.all_reduce(whole[:4], group=parallel.tp, async_op=True)
    whole[4:].add_(1)  # no part of it
    view = whole[:2]  # touches nothing
    work.wait()
    view.add_(1)
    dist.all_to_all_single(numbers(sum(sizes[1])), numbers(4), sizes[1], sizes[0], group=parallel.tp)
    if rank == 0:
        work = dist.isend(whole, group_dst=1, group=parallel.tp)
        whole.sum()  # may be read while it goes
        work.wait()
    else:
        dist.recv(whole, group_src=0, group=parallel.tp)
    dist.gather(whole, [numbers(8), numbers(8)] if rank == 0 else None, group_dst=0, group=parallel.tp)
    dist.scatter(whole, [numbers(8), numbers(8)] if rank == 0 else None, group_src=0, group=parallel.tp)
    dist.broadcast(whole, group_src=1, group=parallel.tp)
    dist.barrier(parallel.control)


def looked_at(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    x.sum().item()
    x.tolist()
    bool(x.any())
    x[x > 0]
    x[x > 0] = numbers(1)
    x.nonzero()
    torch.equal(x, x)
    torch.cuda.synchronize()


def multiplied_twice(rank: int, parallel: ParallelContext) -> None:
    """The product of a batch with a matrix is a matrix, and a view of it: one piece of memory."""
    for _ in range(2):
        product = torch.ones(512, 2, 4, device="cuda") @ torch.ones(4, 512, device="cuda")
        del product


def copied(rank: int, parallel: ParallelContext) -> None:
    x = numbers()
    x.cpu()
    x.to("cpu", non_blocking=True)
    x.copy_(numbers(device="cpu"))
    x[torch.zeros(2, dtype=torch.int64)]


def found(body: Body, ranks: tuple[int, ...] = (0, 1)) -> dict[str, Any]:
    """What a trace of a program tells."""
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.tracing.calls import disagreements
    from megatron_sead.tracing.device import install_device
    from megatron_sead.tracing.watch import Record, Watch
    from megatron_sead.tracing.world import Told, world_of

    install_device()
    records, told = dict[int, Record](), Told()
    try:
        for rank in ranks:
            watch, settings = Watch(load_rates()), ParallelSettings(tensor_model_parallel_size=2)
            with watch.entered(), world_of(settings, rank, 2, told, watch) as parallel:
                watch.collectives.name_groups(parallel)
                with watch.recording() as records[rank], watch.during("program"):
                    body(rank, parallel)
    except RuntimeError as error:
        return {"error": " ".join([str(error), *getattr(error, "__notes__", [])])}
    copies = [[way, c.number, c.waited_for] for (_, way, _), c in records[0].copies.items()]
    return {
        "error": None,
        "disagreements": disagreements({rank: record.calls for rank, record in records.items()}),
        "reads": sum(records[0].reads.values()),
        "copies": sorted(copies),
        "peak": max(memory.peak["device"] for memory in records[0].memory.values()),
    }
