"""Layouts: who stands where, generators that differ where they must, and layouts that are refused in one line."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sead.config.parallel import ParallelSettings
from tests.distributed.programs import exit_code
from tests.distributed.ranks import RankPool, RankPools


@pytest.fixture(scope="session")
def ranks(pools: RankPools) -> RankPool:
    return pools.of(4)


def place(**sizes: Any) -> dict[str, Any]:
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    context = initialize_parallel(ParallelSettings(**sizes), "cpu", seed=5)
    flag = torch.tensor(context.rank)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=context.control)
    found = {
        "share": context.share,
        "place": (context.tp_rank, context.pp_rank, context.dp_rank),
        "sizes": (context.tp_size, context.pp_size, context.dp_size, context.chunks),
        "stage": (context.is_first_stage, context.is_last_stage),
        "groups": [dist.get_process_group_ranks(g) for g in (context.tp, context.pp, context.dp, context.dp_with_cp)],
        "largest": int(flag),
        "timeouts": {timeout_of(group) for group in (context.tp, context.pp, context.dp, context.control)},
        "draws": draws(),
    }
    destroy_parallel(keep_world=True)
    return found


def timeout_of(group: Any) -> float:
    """Minutes."""
    return float(group._get_backend(torch.device("cpu")).options._timeout.total_seconds()) / 60


def draws() -> tuple[float, float]:
    """From the generator of weights that are sharded, and from the one of weights that are not."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    with get_cuda_rng_tracker().fork():
        sharded = torch.rand(()).item()
    return sharded, torch.rand(()).item()


@pytest.mark.mcore_lane
def test_four_ranks_as_two_by_two(ranks: RankPool) -> None:
    found = ranks.run(place, tensor_model_parallel_size=2, pipeline_model_parallel_size=2, timeout_minutes=7.5)
    assert all(f["timeouts"] == {7.5} for f in found)
    assert [f["place"] for f in found] == [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0)]
    assert [f["stage"] for f in found] == [(True, False)] * 2 + [(False, True)] * 2
    assert found[3]["groups"] == [[2, 3], [1, 3], [3], [3]]
    assert all(f["sizes"] == (2, 2, 1, 1) and f["largest"] == 3 for f in found)
    sharded = {f["draws"][0] for f in found}
    assert len(sharded) == 4  # every shard of every stage is its own
    assert found[0]["draws"][1] == found[1]["draws"][1] != found[2]["draws"][1]


def test_data_parallel_ranks_are_what_is_left_and_draw_alike(ranks: RankPool) -> None:
    found = ranks.run(place, tensor_model_parallel_size=2)
    assert [f["place"] for f in found] == [(0, 0, 0), (1, 0, 0), (0, 0, 1), (1, 0, 1)]
    assert found[0]["draws"] == found[2]["draws"]
    assert found[0]["draws"][0] != found[1]["draws"][0]


def cudnn_attention() -> bool:
    """On a rank: may attention take cuDNN's kernel once the run has its GPU?"""
    from unittest import mock

    import torch

    from megatron_sead.parallel import groups

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with mock.patch.object(groups, "local_gpu", return_value=torch.device("cuda", 0)):
            groups._choose_device("cuda")
        return torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def test_attention_by_cudnn_is_off_on_a_gpu(ranks: RankPool) -> None:
    """It plans anew for every length, and its backward pass is NaN for some."""
    assert not any(ranks.run(cudnn_attention))


def test_context_parallel_ranks_stand_between_tensor_and_data_parallel_ones(ranks: RankPool) -> None:
    found = ranks.run(place, context_parallel_size=2)
    assert [f["share"] for f in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [f["place"] for f in found] == [(0, 0, 0), (0, 0, 0), (0, 0, 1), (0, 0, 1)]
    assert found[1]["groups"][2:] == [[1, 3], [0, 1, 2, 3]]
    assert len({f["draws"] for f in found}) == 1


def refusal(values: dict[str, Any], device: str = "cpu") -> str:
    from megatron_sead.errors import UserError
    from megatron_sead.parallel.groups import initialize_parallel

    try:
        # Without validation: the configuration refuses most of these itself, and so does this function
        initialize_parallel(
            ParallelSettings.model_construct(**{**ParallelSettings().model_dump(), **values}), device, 0
        )
    except UserError as error:
        return str(error)
    return ""


def test_ranks_that_the_layout_does_not_divide_are_refused(ranks: RankPool) -> None:
    line = "4 ranks: must be a multiple of 3, which is tensor 3 x pipeline 1 x context 1 (parallel.*)"
    assert ranks.run(refusal, {"tensor_model_parallel_size": 3}) == [line] * 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here")
def test_a_gpu_that_is_not_there_is_refused(ranks: RankPool) -> None:
    assert "device: cuda, but no GPU is visible; use device=cpu" in ranks.run(refusal, {}, "cuda")[0]


def alone() -> None:
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    os.environ.clear()
    context = initialize_parallel(ParallelSettings(), "cpu", 0)
    assert (context.world_size, context.is_first_stage, context.is_last_stage) == (1, True, True)
    destroy_parallel()


def test_one_process_without_torchrun() -> None:
    assert exit_code(alone) == 0
