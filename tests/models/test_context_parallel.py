"""Sequences that ranks share: who holds what, and attention over a group against dense attention on one rank."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_sead.models.zigzag import Keys, held
from tests.distributed.ranks import RankPool
from tests.models.test_packed import dense_core

HEADS, GROUPS, WIDTH, SCALE = 4, 2, 8, 0.3
LENGTHS = {2: (40, 4, 8, 32), 4: (8, 48, 16)}  # by ranks, of which they are multiples of twice
WINDOWS = [None, 1, 3, 7, 11, 47, 1000]  # under a piece, over one, over several, over all


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_every_token_is_on_one_rank_and_every_rank_does_as_much(ranks: int) -> None:
    lengths = [2 * ranks * n for n in (1, 7, 2)]
    shares = [held(lengths, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(shares).sort().values, torch.arange(sum(lengths)))
    positions = torch.cat([torch.arange(length) for length in lengths])
    assert len({int((positions[share] + 1).sum()) for share in shares}) == 1  # scores of full causal attention
    for keys in (Keys.of(lengths, rank, ranks, None) for rank in range(ranks)):
        assert sum(keys.query_lengths) == sum(lengths) // ranks
        assert len(keys.index) == sum(keys.key_lengths) == keys.key_starts[-1]


@pytest.mark.parametrize("window", [1, 2, 5, 9])
def test_a_sliding_layer_fetches_what_is_inside_the_window_alone(window: int) -> None:
    """One sequence in pieces of 16 tokens: window - 1 keys across either edge, and what lies here already."""
    for rank in range(4):
        keys = Keys.of([128], rank, 4, window)
        elsewhere = sum(count for one, count in enumerate(keys.received_counts) if one != rank)
        first_piece_has_no_edge, pieces_are_neighbours = rank == 0, rank == 3
        assert elsewhere == (window - 1) * (2 - first_piece_has_no_edge - pieces_are_neighbours)
        assert keys.received_counts[rank] == 32
        assert keys.key_lengths == [16 + (window - 1) * (rank > 0), 16 + window - 1]


class OneNode(torch.autograd.Function):
    """torch.nn.attention.varlen.varlen_attn by its documentation: one node that saves what it was given."""

    @staticmethod
    def forward(ctx: Any, query: Any, key: Any, value: Any, lengths: Any, scale: float, left: int) -> torch.Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.rest = lengths, scale, left
        return lower_right(query, key, value, *ctx.rest)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
            return (*torch.autograd.grad(lower_right(*leaves, *ctx.rest), leaves, grad), None, None, None)


def lower_right(query: Any, key: Any, value: Any, lengths: Any, scale: float, left: int) -> torch.Tensor:
    """Queries are the last of each sequence's keys. [t, n, d]"""
    parts = []
    for q, k, v in zip(query.split(lengths[0]), key.split(lengths[1]), value.split(lengths[1]), strict=True):
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        behind = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        hidden = (behind < 0) | (behind > left if left >= 0 else False)
        weights = (torch.einsum("qnd,knd->nqk", q, k) * scale).masked_fill(hidden, -torch.inf).softmax(-1)
        parts.append(torch.einsum("nqk,knd->qnd", weights, v))
    return torch.cat(parts)


def varlen_attn(query: Any, key: Any, value: Any, cu_q: Any, cu_k: Any, max_q: int, max_k: int, **more: Any) -> Any:
    assert cu_q.dtype == cu_k.dtype == torch.int32
    lengths = cu_q.diff().tolist(), cu_k.diff().tolist()
    assert (max(lengths[0]), max(lengths[1])) == (max_q, max_k)
    assert more.pop("enable_gqa")
    left, right = more.pop("window_size")
    assert right == 0
    return OneNode.apply(query, key, value, lengths, more["scale"], left)


def kernel() -> AbstractContextManager[Any]:
    """What a GPU calls, stood in for."""
    from megatron_sead.models import windowed

    known = varlen_attn, frozenset({"window_size", "scale", "enable_gqa"})
    return mock.patch.multiple(windowed, serves=lambda query: True, _packed_attention=lambda: known)


def shared_attention(ranks: int, kernel_too: bool, recompute: str | None) -> dict[Any, tuple[float, int, int]]:
    """By window: largest difference of output and gradients on this rank from dense attention, calls of a collective
    forward and backward, and how much of what was fetched is still held in between."""
    from torch.multiprocessing.reductions import StorageWeakRef

    from megatron_sead.config.run import ParallelSettings
    from megatron_sead.models import context_parallel
    from megatron_sead.models.attention import TorchCoreAttention
    from megatron_sead.models.packed import PackedSequences
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(ParallelSettings(context_parallel_size=ranks), "cpu", seed=0)
    lengths = LENGTHS[ranks]
    place, size = held(lengths, *parallel.share), sum(lengths)
    generator = torch.Generator().manual_seed(1)

    def draw(heads: int) -> torch.Tensor:
        return torch.randn(size, heads, WIDTH, generator=generator, dtype=torch.float64)

    whole = [draw(heads).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)]
    upstream = draw(HEADS).flatten(1)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = PackedSequences.of(starts, torch.cat([torch.arange(n) for n in lengths])[place], lengths, parallel.share)
    found: dict[Any, tuple[float, int, int]] = {}
    storages: list[Any] = []
    fetch = context_parallel.fetch

    def counted(*args: Any) -> torch.Tensor:
        result = fetch(*args)
        storages.append(StorageWeakRef(result.untyped_storage()))
        return result

    with kernel() if kernel_too else nullcontext(), mock.patch.object(context_parallel, "fetch", counted):
        for window in WINDOWS:
            config: Any = SimpleNamespace(
                window=lambda layer, window=window: window, attention_scale=lambda layer: SCALE,
                recompute_granularity=recompute,
            )  # fmt: skip
            core = TorchCoreAttention(config, 1, pg_collection=parallel.megatron)
            own = [x.detach()[place].requires_grad_() for x in whole]
            storages.clear()
            output = core(*own, None, packed_seq_params=packed)
            held_between = sum(not storage.expired() for storage in storages)
            expected = dense_core(*whole, lengths, window)
            pairs = [(output, expected[place])]
            pairs += zip(
                torch.autograd.grad(output, own, upstream[place]),
                (x[place] for x in torch.autograd.grad(expected, whole, upstream)),
                strict=True,
            )
            found[window] = max((a - b).abs().max().item() for a, b in pairs), len(storages), held_between
    destroy_parallel(keep_world=True)
    return found


@pytest.mark.parametrize("way", ["piece by piece", "one kernel", "one kernel, recomputed"])
@pytest.mark.parametrize("size", LENGTHS)
def test_a_group_attends_as_one_rank_does(size: int, way: str, ranks: RankPool) -> None:
    recompute = "selective" if "recomputed" in way else None
    for found in ranks.run(shared_attention, size, "kernel" in way, recompute):
        for window, (error, fetches, held_between) in found.items():
            assert error < 1e-12, window  # fp64
            assert fetches == (2 if way == "one kernel" else 1), window
            if "kernel" in way:  # the other way attention keeps a copy, of keys repeated for their queries
                assert held_between == (way != "one kernel"), window
