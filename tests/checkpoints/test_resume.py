"""A resumed run is the uninterrupted one: losses and weights of the three steps after a checkpoint.

The step AFTER the next one is what shows most faults: Adam's moments and its step act on it, not on the first loss.
Same layout: equal bits. Another layout: 1e-5, relative to the largest entry of each weight; summation order alone
gives 1e-6 after six steps of lr 1e-3.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints.training import Trained, train
from tests.distributed.ranks import RankPool
from tests.models.parity import Layout, relative

SAVED, LAST = 3, 6  # steps
TOLERANCE = 1e-5


def last_stage(by_rank: list[Trained]) -> list[float]:
    return next(trained.losses for trained in reversed(by_rank) if trained.losses)


@pytest.mark.parametrize(
    ("layout", "precision", "distributed"),
    [
        pytest.param(Layout(tp=2), "fp32", True, id="tp2-fp32"),
        pytest.param(Layout(), "fp32", True, id="dp2-fp32"),
        pytest.param(Layout(), "bf16", True, id="dp2-bf16", marks=pytest.mark.mcore_lane),
        pytest.param(Layout(pp=2, vpp=2), "bf16", True, id="pp2-vpp2-bf16"),
        pytest.param(Layout(), "fp32", False, id="dp2-fp32-whole-optimizer"),
        pytest.param(Layout(tp=2), "bf16", False, id="tp2-bf16-whole-optimizer"),
    ],
)
def test_the_same_layout_continues_bit_for_bit(
    ranks: RankPool, hf_dir: Path, tmp_path: Path, layout: Layout, precision: str, distributed: bool
) -> None:
    how = {"precision": precision, "distributed": distributed, "steps": LAST}
    whole = ranks.run(train, hf_dir, layout, tmp_path, save_after=(SAVED,), **how)
    resumed = ranks.run(train, hf_dir, layout, tmp_path, resume=True, **how)

    assert last_stage(resumed) == last_stage(whole)[SAVED:]
    for rank in range(2):
        assert resumed[rank].state == {"step": SAVED, "seen": [("a", 0.5)]}
        assert resumed[rank].learning_rates == whole[rank].learning_rates[SAVED:]
        assert resumed[rank].adam_steps == [{4.0}, {5.0}, {6.0}] == whole[rank].adam_steps[SAVED:]
        assert resumed[rank].draws == whole[rank].draws[4 * SAVED :]
    for found, expected in zip(resumed[0].weights, whole[0].weights[SAVED:], strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def saved_at_tp2(ranks: RankPool, hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Trained]]:
    directory = tmp_path_factory.mktemp("tp2")
    return directory, ranks.run(train, hf_dir, Layout(tp=2), directory, steps=LAST, save_after=(SAVED,))


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(), id="dp2", marks=pytest.mark.mcore_lane),
        pytest.param(Layout(pp=2, first=1), id="pp2-first1"),
        pytest.param(Layout(pp=2, vpp=2), id="pp2-vpp2", marks=pytest.mark.mcore_lane),
    ],
)
def test_another_layout_continues_the_run(
    ranks: RankPool, hf_dir: Path, saved_at_tp2: tuple[Path, list[Trained]], layout: Layout
) -> None:
    directory, whole = saved_at_tp2
    resumed = ranks.run(train, hf_dir, layout, directory, steps=LAST, resume=True)

    assert last_stage(resumed) == pytest.approx(last_stage(whole)[SAVED:], rel=TOLERANCE)
    for trained in resumed:
        assert trained.adam_steps == [{4.0}, {5.0}, {6.0}]
    for found, expected in zip(resumed[0].weights, whole[0].weights[SAVED:], strict=True):
        assert max(relative(found[name], expected[name]) for name in expected) < TOLERANCE
