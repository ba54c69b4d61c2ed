"""Rollouts that lag an update: whose they are, that a resumed run has them, and what they are refused with."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sead.config.run import load_config
from megatron_sead.errors import UserError
from megatron_sead.rollouts.engine import Rollout
from megatron_sead.rollouts.records import read_records, record_path
from tests.distributed.ranks import RankPools
from tests.training.launching import TINY, metrics_of, train_tiny

STEPS = 5
LAG = ["rollouts.lag=1", "training.importance_cap=2.0"]
SETTINGS = [f"training.steps={STEPS}", "training.global_batch_size=8", "rollouts.max_new_tokens=16"]
SETTINGS += ["training.micro_batch_size=2", "training.lr=1e-3", "training.min_lr=0", "training.lr_warmup_steps=0"]


def rollouts_of(output: Path, step: int) -> list[Rollout]:
    return read_records(record_path(output, step))


@pytest.fixture(scope="module")
def whole(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("lag") / "run"
    assert train_tiny(pools, 2, output, [*SETTINGS, *LAG]) == [True, True]
    return output


def test_a_steps_rollouts_are_of_the_student_before_the_last_update(
    pools: RankPools, whole: Path, tmp_path: Path
) -> None:
    """A student that learns next to nothing writes what the first student would at any step."""
    still = [*SETTINGS, "training.lr=1e-30"]
    assert train_tiny(pools, 2, tmp_path / "still", still) == [True, True]
    assert train_tiny(pools, 2, tmp_path / "on-policy", SETTINGS) == [True, True]
    for step in (0, 1):
        assert rollouts_of(whole, step) == rollouts_of(tmp_path / "still", step)
    assert rollouts_of(whole, 1) != rollouts_of(tmp_path / "on-policy", 1)
    first, *later = [line["sampling_log_prob_difference"] for line in metrics_of(whole)]
    assert first < 1e-5 < 1e-3 < min(later)


def test_a_resumed_run_trains_on_what_was_written(pools: RankPools, whole: Path, tmp_path: Path) -> None:
    settings = [*SETTINGS, *LAG]
    assert train_tiny(pools, 2, tmp_path / "run", settings, interrupt_at=1) == [False, False]
    assert train_tiny(pools, 2, tmp_path / "run", settings) == [True, True]
    assert metrics_of(tmp_path / "run") == metrics_of(whole)
    for step in range(STEPS):
        assert rollouts_of(tmp_path / "run", step) == rollouts_of(whole, step)


def test_a_lag_needs_importance_weights() -> None:
    with pytest.raises(UserError, match=r"^rollouts.lag=1: needs training.importance_cap, for example 2.0"):
        load_config(TINY, ["rollouts.lag=1"])
