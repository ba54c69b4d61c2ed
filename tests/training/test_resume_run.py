"""An interrupted run goes on as if nothing had happened: weights, Adam, curriculum, competence, thresholds, data order.

The comparison reaches several steps past the resume: a wrong Adam step counter or curriculum state shows no earlier.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.ranks import RankPools
from tests.training.launching import metrics_of, train_tiny

STEPS = 8
INTERRUPTED_AT = 3  # while this step runs; it is finished and saved, so the next start begins with step 4

# Every kind of state that a step can leave for the next: mastery's tiers, competence, running thresholds, Adam
STATEFUL = [
    f"training.steps={STEPS}",
    "curriculum.mode=mastery",
    "curriculum.patience=2",
    "annealing.driver=larger",
    "zones.thresholds=running",
]
TP2 = ["parallel.tensor_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]


@pytest.fixture(scope="module")
def whole(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train_tiny(pools, 2, output, [*STATEFUL, *TP2]) == [True, True]
    return output


@pytest.fixture(scope="module")
def interrupted(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stopped by a signal on its last rank alone."""
    output = tmp_path_factory.mktemp("interrupted") / "run"
    assert train_tiny(pools, 2, output, [*STATEFUL, *TP2], interrupt_at=INTERRUPTED_AT) == [False, False]
    assert [line["step"] for line in metrics_of(output)] == list(range(INTERRUPTED_AT + 1))
    assert f"{INTERRUPTED_AT + 1} steps of {STEPS} are recorded" in (output / "report.html").read_text()
    return output


def copy_of(run: Path, tmp_path: Path) -> Path:
    """The same run directory at another place; output may change when a run is resumed."""
    return Path(shutil.copytree(run, tmp_path / "run"))


@pytest.mark.mcore_lane
def test_same_layout_continues_bit_for_bit(pools: RankPools, whole: Path, interrupted: Path, tmp_path: Path) -> None:
    output = copy_of(interrupted, tmp_path)
    assert train_tiny(pools, 2, output, [*STATEFUL, *TP2]) == [True, True]
    assert metrics_of(output) == metrics_of(whole)
    expected = load_file(whole / "student-hf" / "model.safetensors")
    found = load_file(output / "student-hf" / "model.safetensors")
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_layouts_continue_within_rounding(
    pools: RankPools, whole: Path, interrupted: Path, tmp_path: Path
) -> None:
    """Rollouts are written anew under CP 2, then under PP 2; the same, since their randomness is their own. Bound: as
    for layouts."""
    output = copy_of(interrupted, tmp_path)
    assert train_tiny(pools, 2, output, [*STATEFUL, *CP2], interrupt_at=INTERRUPTED_AT + 2) == [False, False]
    assert train_tiny(pools, 2, output, [*STATEFUL, *PP2, "training.micro_batch_size=16"]) == [True, True]
    for expected, found in zip(metrics_of(whole), metrics_of(output), strict=True):
        for key in ("loss", "grad_norm", "tau_teacher", "alpha", "eligible_prompts", "pass_rate"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5), (expected["step"], key)


def test_metrics_of_void_steps_are_written_once(
    pools: RankPools, interrupted: Path, whole: Path, tmp_path: Path
) -> None:
    """Killed two steps after its last checkpoint: those steps run again, and leave one line each."""
    output = copy_of(interrupted, tmp_path)
    line = json.dumps({"step": INTERRUPTED_AT + 1, "loss": 123.0})
    with (output / "metrics.jsonl").open("a") as file:
        file.write(line + "\n" + line[:10])  # the second was being written
    assert train_tiny(pools, 2, output, [*STATEFUL, *TP2]) == [True, True]
    assert metrics_of(output) == metrics_of(whole)


def test_damaged_newest_checkpoint_falls_back(pools: RankPools, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    settings = [*STATEFUL, *TP2, "checkpoints.interval=2"]
    assert train_tiny(pools, 2, output, settings, interrupt_at=INTERRUPTED_AT + 2) == [False, False]
    newest = max((output / "checkpoints").iterdir())
    assert newest.name.endswith(str(INTERRUPTED_AT + 3))
    shard = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    assert train_tiny(pools, 2, output, settings) == [True, True]
    assert metrics_of(output) == metrics_of(whole)
