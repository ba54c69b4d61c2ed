"""What a watched rank tells of a step, against what the step is known to do."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
from megatron_sead.scaling.watching import StepWatch
from tests.distributed.ranks import RankPools

FLOAT = 4
KEPT, MADE = 1_000_000, 500_000  # elements before the step, and in it


def watched() -> dict[str, Any]:
    parallel = initialize_parallel(ParallelSettings(tensor_model_parallel_size=2), "cpu", seed=0)
    try:
        kept = torch.ones(KEPT)
        dist.all_reduce(kept, group=parallel.tp)  # before
        watch = StepWatch(parallel)
        with watch.entered():
            made = kept[:MADE] + 1
            for _ in range(3):
                dist.all_reduce(made, group=parallel.tp)
            dist.all_gather_into_tensor(torch.empty(2 * MADE), made, group=parallel.tp)
            dist.all_reduce(made, group=parallel.dp_with_cp)  # of this rank alone
            dist.barrier(parallel.control)
            del made
            torch.ones(MADE)
        return watch.told()
    finally:
        destroy_parallel()


def of_two_groups_of_the_same_ranks() -> list[tuple[str, int]]:
    parallel = initialize_parallel(ParallelSettings(context_parallel_size=2), "cpu", seed=0)
    try:
        watch = StepWatch(parallel)
        with watch.entered():
            for calls, group in ((3, parallel.cp), (2, parallel.dp_with_cp), (1, parallel.dp)):
                for _ in range(calls):
                    dist.all_reduce(torch.ones(4), group=group)
        return [(c["group"], c["calls"]) for c in watch.told()["collectives"]]
    finally:
        destroy_parallel()


def test_ranks_of_the_context_are_told_apart_from_those_that_share_the_optimizer(pools: RankPools) -> None:
    assert pools.of(2).run(of_two_groups_of_the_same_ranks) == [[("cp", 3), ("dp", 2)]] * 2


def test_calls_bytes_and_the_most_that_is_held(pools: RankPools) -> None:
    for told in pools.of(2).run(watched):
        calls = {(c["group"], c["name"]): (c["calls"], c["bytes"]) for c in told["collectives"]}
        assert calls.pop(("control", "barrier")) == (1, 0)
        assert calls == {
            ("tp", "allreduce_"): (3, 3 * MADE * FLOAT),
            ("tp", "_allgather_base_"): (1, 2 * MADE * FLOAT),
        }
        least = (KEPT + MADE + 2 * MADE) * FLOAT
        assert least <= told["tensors_peak"]["host"] < least + KEPT * FLOAT
