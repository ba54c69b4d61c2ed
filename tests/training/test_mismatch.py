"""What the engine says of its tokens beside what the student says: measured in every step, and weighed if asked."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

from megatron_sead.training.mismatch import importance_weights
from tests.distributed.ranks import RankPools
from tests.training.launching import metrics_of
from tests.training.test_engines import run

QUIET = ["training.lr=1e-12", "training.min_lr=0", "policy.name=opd"]  # a student that does not move; all tokens teach
QUIET += ["rollouts.temperature=0.6", "rollouts.top_p=0.8"]  # how tokens are drawn is no mismatch of models
NAMES = [f"sampling_log_prob_difference{end}" for end in ("", "_p99", "_max")]


def test_importance_is_truncated_above_alone() -> None:
    student = torch.tensor([-1.0, -1.0, -1.0, -1.0, -200.0, 0.0])
    sampled = torch.tensor([-1.0, -2.0, -9.0, math.nan, 0.0, -200.0])
    weights = importance_weights(student, sampled, cap=4.0)
    torch.testing.assert_close(weights, torch.tensor([1.0, math.e, 4.0, 1.0, 0.0, 4.0]))


@pytest.fixture(scope="module")
def written(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("written") / "run"
    run(pools, output, *QUIET)
    return output


def replay(written: Path, folder: Path, shift: float | None) -> list[str]:
    """The same tokens, of which the engine says log-probabilities that are lower by `shift`; None: it says none."""
    shutil.copytree(written / "rollouts", folder)
    for path in folder.glob("*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        for record in records:
            record["log_probs"] = None if shift is None else [value - shift for value in record["log_probs"]]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["rollouts.engine=replay", f"rollouts.path={folder}", *QUIET]


def test_an_engine_with_the_students_weights_differs_by_rounding(written: Path) -> None:
    for line in metrics_of(written):
        mean, p99, most = (line[name] for name in NAMES)
        assert 0 < mean <= p99 <= most < 1e-4


@pytest.mark.parametrize(("shift", "cap", "factor"), [(-math.log(2), 4.0, 0.5), (math.log(8), 3.0, 3.0)])
def test_the_loss_is_weighed_by_importance(
    pools: RankPools, written: Path, tmp_path: Path, shift: float, cap: float, factor: float
) -> None:
    """All tokens have the same ratio, so that loss and gradient are those of the first run, times the weight."""
    output = tmp_path / "run"
    _, lines = run(pools, output, *replay(written, tmp_path / "said", shift), f"training.importance_cap={cap}")
    for line, unweighed in zip(metrics_of(output), metrics_of(written), strict=True):
        assert line[NAMES[0]] == pytest.approx(abs(shift), rel=1e-4)
        for name in ("loss", "grad_norm"):
            assert line[name] == pytest.approx(factor * unweighed[name], rel=1e-4)
    told = [line for line in lines if "rollouts.mismatch_warning=0.1 (told once)" in line]
    assert len(told) == 1 and told[0].startswith("step 0: log-probabilities of rollouts.engine=replay and the student")


def test_an_engine_that_says_nothing_is_not_measured_and_not_weighed(
    pools: RankPools, written: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    run(pools, output, *replay(written, tmp_path / "said", None), "training.importance_cap=2")
    for line, unweighed in zip(metrics_of(output), metrics_of(written), strict=True):
        assert line.keys() & set(NAMES) == set()
        assert line["loss"] == pytest.approx(unweighed["loss"], rel=1e-6)
