"""Packed rollouts against the same rollouts in rows, and against each alone: hidden states, loss and every gradient."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.ranks import RankPool, RankPools
from tests.models.families import make_model
from tests.models.packs import BUDGET, EVERY, ROLLOUTS, Step, run_step
from tests.models.parity import Layout, relative

BOUND = 2e-6  # relative to a tensor's largest entry, fp32: summation order

# Four ranks each, of which tensor x pipeline ranks leave the rest to data parallelism
LAYOUTS = (
    Layout(),
    Layout(recompute="full"),
    Layout(tp=2),
    Layout(tp=4, sp=True),
    Layout(pp=2, recompute="selective"),
    Layout(pp=2, vpp=2),
    pytest.param(Layout(tp=2, pp=2, vpp=2, sp=True, recompute="full"), marks=pytest.mark.mcore_lane),
    Layout(tp=2, sp=True, recompute="selective"),
    Layout(cp=2),
    Layout(cp=4),
    Layout(tp=2, cp=2, sp=True, recompute="selective"),
    Layout(pp=2, cp=2, recompute="full"),
    Layout(pp=2, vpp=2, cp=2),
)


@pytest.fixture(scope="module")
def in_rows(pools: RankPools, hf_dir: Path) -> Step:
    return pools.of(1).run(run_step, hf_dir, Layout(), None)[0]


def check_same(found: list[Step], expected: Step) -> None:
    assert sum(step.count for step in found) % expected.count == 0
    copies = sum(step.count for step in found) // expected.count  # tensor-parallel ranks see the same
    assert sum(step.loss for step in found) / copies == pytest.approx(expected.loss, rel=BOUND)
    for name in ("teacher", "student"):
        seen = {token: row for step in found for token, row in getattr(step, name).items()}
        if seen:
            assert seen.keys() == getattr(expected, name).keys()
            for token, row in getattr(expected, name).items():
                assert relative(seen[token], row) < 10 * BOUND, (name, token)
    assert found[0].gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert relative(found[0].gradients[name], gradient) < 10 * BOUND, name


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_packed_rollouts_train_as_in_rows(layout: Layout, ranks: RankPool, hf_dir: Path, in_rows: Step) -> None:
    found = ranks.run(run_step, hf_dir, layout, BUDGET)
    assert len({len(step.rollouts) for step in found}) == 1
    assert all(length <= BUDGET for step in found for length in step.lengths)
    check_same(found, in_rows)


def test_ranks_that_share_rows_train_as_one(ranks: RankPool, hf_dir: Path, in_rows: Step) -> None:
    check_same(ranks.run(run_step, hf_dir, Layout(tp=2, cp=2), None), in_rows)


@pytest.mark.parametrize("layout", [Layout(), Layout(pp=2, vpp=2), Layout(tp=2, sp=True)], ids=str)
def test_a_micro_batch_without_rollouts_changes_nothing(layout: Layout, ranks: RankPool, hf_dir: Path) -> None:
    """Five rollouts that are too long for four micro-batches, and two or four ranks with as many each."""
    long = (2, 3, 7, 0, 5)
    expected = ranks.run(run_step, hf_dir, Layout(tp=4), None, long)[0]
    found = ranks.run(run_step, hf_dir, layout, BUDGET, long)
    assert {len(step.rollouts) for step in found} == {2 if layout == Layout() else 4 if layout.vpp else 3}
    assert any(0 in step.rollouts for step in found)
    assert all(step.rollouts[0] for step in found)
    check_same(found, expected)


@pytest.mark.parametrize("family", ["llama-tied", "qwen3", "olmo2"])
def test_other_families_train_packed_as_in_rows(family: str, pools: RankPools, tmp_path: Path) -> None:
    hf_dir = make_model(family, tmp_path)
    (rows,) = pools.of(1).run(run_step, hf_dir, Layout(), None)
    check_same(pools.of(4).run(run_step, hf_dir, Layout(tp=2, pp=2, sp=True), BUDGET), rows)


@pytest.mark.parametrize("layout", [Layout(), Layout(cp=4)], ids=str)
def test_no_token_sees_another_rollout(layout: Layout, pools: RankPools, hf_dir: Path) -> None:
    """All tokens of one rollout are changed: those of the others have the same states, bit for bit."""
    pool = pools.of(layout.cp)
    before, after = (pool.run(run_step, hf_dir, layout, 1000, EVERY, changed) for changed in (None, 3))
    assert before[0].rollouts == [len(ROLLOUTS)]
    for name in ("teacher", "student"):
        old, new = ({k: v for step in steps for k, v in getattr(step, name).items()} for steps in (before, after))
        assert {rollout for rollout, _ in old} == set(range(len(ROLLOUTS)))
        assert all(torch.equal(old[token], new[token]) == (token[0] != 3) for token in old)


def angles_are_of_own_positions(hf_dir: Path) -> bool:
    """On a rank: what Megatron's model asks its rotary embedding for, as it does in `_preprocess`."""
    from megatron_sead.models.builder import build_model
    from megatron_sead.models.packed import PackedSequences
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(Layout().settings(), "cpu", seed=0)
    (model,) = build_model(hf_dir, parallel, precision="fp32")
    positions = torch.tensor([0, 1, 2, 0, 1, 0])
    packed = PackedSequences.of(torch.tensor([0, 3, 5, 6], dtype=torch.int32), positions, (3, 2, 1))
    asked = model.rotary_pos_emb.get_rotary_seq_len(None, model.decoder, torch.empty(6, 1, 1), model.config, packed)
    found, plain = model.rotary_pos_emb(asked, packed_seq=True, cp_group=None), model.rotary_pos_emb(3)
    destroy_parallel(keep_world=True)
    return torch.equal(found, plain[:, positions])


def test_rotary_angles_begin_anew_with_each_sequence(pools: RankPools, hf_dir: Path) -> None:
    """Scores see differences of positions alone, so that no loss would tell but by rounding."""
    assert pools.of(1).run(angles_are_of_own_positions, hf_dir) == [True]


def packed_core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Any, window: Any) -> torch.Tensor:
    from megatron_sead.models.attention import TorchCoreAttention
    from megatron_sead.models.packed import PackedSequences

    config = SimpleNamespace(window=lambda layer: window, attention_scale=lambda layer: 0.3)
    starts = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    packed = PackedSequences.of(starts, torch.cat([torch.arange(n) for n in lengths]), lengths)
    return TorchCoreAttention(config, 1)(query, key, value, None, packed_seq_params=packed)


def dense_core(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: Any, window: Any) -> torch.Tensor:
    """By a whole matrix of scores."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    place = torch.arange(len(query))
    sequence = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    behind = place[:, None] - place
    seen = (behind >= 0) & (behind < (window or len(query))) & (sequence[:, None] == sequence)
    scores = torch.einsum("qnd,knd->nqk", query, key) * 0.3
    return torch.einsum("nqk,knd->qnd", scores.masked_fill(~seen, -math.inf).softmax(-1), value).flatten(1)


def core_errors(lengths: Any, window: Any, kernel: bool, grouped: bool) -> list[float]:
    """Largest differences of output and gradients. With `kernel` by what a GPU calls."""
    from megatron_sead.models import windowed

    generator = torch.Generator().manual_seed(1)
    shapes = [(sum(lengths), heads, 8) for heads in (4, 2, 2)]
    leaves = [torch.randn(*s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    upstream = torch.randn(sum(lengths), 32, generator=generator, dtype=torch.float64)
    serves, attention = windowed.serves, windowed._packed_attention
    if kernel:
        windowed.serves = lambda query: True  # type: ignore[assignment]
        options = {"enable_gqa"} if grouped else set()
        windowed._packed_attention = lambda: (varlen(grouped), frozenset({"window_size", "scale"} | options))  # type: ignore[assignment]
    try:
        found = packed_core(*leaves, lengths, window)
    finally:
        windowed.serves, windowed._packed_attention = serves, attention
    expected = dense_core(*leaves, lengths, window)
    pairs = [(found, expected)]
    pairs += zip(*(torch.autograd.grad(x, leaves, upstream) for x in (found, expected)), strict=True)
    return [(a - b).abs().max().item() for a, b in pairs]


def varlen(grouped: bool) -> Any:
    """torch.nn.attention.varlen.varlen_attn by its documentation, dense."""

    def varlen_attn(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seq_q: torch.Tensor,
        cu_seq_k: torch.Tensor,
        max_q: int,
        max_k: int,
        *,
        scale: float,
        window_size: tuple[int, int],
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert enable_gqa == grouped
        assert grouped or query.shape[1] == key.shape[1]
        lengths = cu_seq_q.diff().tolist()
        assert max_q == max_k == max(lengths)
        left, right = window_size
        assert right == 0
        assert scale == 0.3
        return dense_core(query, key, value, lengths, left + 1 if left >= 0 else None).unflatten(1, (4, 8))

    return varlen_attn


@pytest.mark.parametrize("kernel", ["sequence by sequence", "grouped kernel", "kernel without groups"])
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("lengths", [(40,), (1, 7, 8, 24), (3, 1, 1, 30, 6), (1,) * 9])
def test_attention_is_dense_attention_within_each_sequence(
    lengths: tuple[int, ...], window: int | None, kernel: str, ranks: RankPool
) -> None:
    errors = ranks.run(core_errors, lengths, window, "kernel" in kernel, "grouped" in kernel)[0]
    assert max(errors) < 1e-12  # fp64


@pytest.mark.mcore_lane
def test_transformer_engine_is_given_its_packed_form(tiny_olmo3: Path) -> None:
    """It is in Megatron's own wrapper, and needs a GPU: stood in for by its documented arguments."""
    root = Path(__file__).parents[2]
    program = [sys.executable, "-m", "tests.models.transformer_engine_packs", str(tiny_olmo3)]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert "packed as alone" in run.stdout, run.stderr[-3000:]
