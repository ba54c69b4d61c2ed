"""The layout does not matter: replayed rollouts give the same losses, gradient norms and zones under every one.

fp32, ten steps with Adam. Losses and gradient norms differ by what summation order gives (measured: 4e-7 and 2e-6
relative at worst); the bound is 1e-5. A sum over micro-batches or ranks taken as a mean of means, a wrong virtual stage
or padded columns in a softmax are off by 1e-2 and more. Ranks that share sequences begin a step with the same gradient
norm within 3e-7; over ten steps one of them, the most sensitive to the weights, came to differ by 1.1e-5.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sead.reporting.metrics import NAMES
from tests.distributed.ranks import RankPools
from tests.training.launching import metrics_of, train_tiny, zones_of

STEPS = 10
BOUND = 1e-5

TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2"]
SP = ["parallel.sequence_parallel=true"]
VPP2 = ["parallel.virtual_pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
FULL = ["training.recompute_granularity=full"]
PACKED = ["training.micro_batch_size=1", "training.micro_batch_tokens=100"]

LAYOUTS = {
    "one rank": (1, []),
    "micro-batches of 32": (1, ["training.micro_batch_size=32"]),
    "uneven last tokens: micro-batches of 1": (1, ["training.micro_batch_size=1"]),
    "packed, pp2 virtual 2": (2, [*PACKED, *PP2, *VPP2]),
    "tp2": (2, TP2),
    "tp2 sequence parallel": (2, [*TP2, *SP]),
    "tp2 sequence parallel, full recompute": (2, [*TP2, *SP, *FULL]),
    "pp2": (2, PP2),
    "pp2 virtual 2": (2, [*PP2, *VPP2]),
    "pp2, layers moved": (2, [*PP2, "parallel.first_stage_layers=1", "parallel.teacher_last_stage_layers=1"]),
    "packed, pp2, teacher alone virtual": (
        2,
        [*PACKED, *PP2, "parallel.teacher_virtual_pipeline_model_parallel_size=2"],
    ),
    "pp3 does not divide 4 layers": (3, ["parallel.pipeline_model_parallel_size=3"]),
    "dp2": (2, []),
    "dp2 without the distributed optimizer": (2, ["training.use_distributed_optimizer=false"]),
    "tp2 x pp2": (4, [*TP2, *PP2]),
    "tp2 x pp2 sequence parallel": (4, [*TP2, *PP2, *SP]),
    "tp2 x dp2": (4, TP2),
    "cp2 x dp2": (4, CP2),
    "packed, cp2 x tp2 sequence parallel, full recompute": (
        4,
        [*PACKED, *CP2, *TP2, *SP, *FULL, "training.micro_batch_tokens=800"],
    ),
}


@pytest.fixture(scope="module")
def recorded(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recorded") / "run"
    assert train_tiny(pools, 1, output, [f"training.steps={STEPS}"]) == [True]
    return output


@pytest.mark.parametrize("layout", LAYOUTS)
def test_replayed_steps_are_the_same(layout: str, pools: RankPools, recorded: Path, tmp_path: Path) -> None:
    ranks, overrides = LAYOUTS[layout]
    replay = ["rollouts.engine=replay", f"rollouts.path={recorded}", f"training.steps={STEPS}"]
    assert train_tiny(pools, ranks, tmp_path / "run", [*replay, *overrides]) == [True] * ranks
    expected, found = metrics_of(recorded), metrics_of(tmp_path / "run")
    assert len(found) == len(expected) == STEPS
    for step, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        norm_bound = 2 * BOUND if "cp" in layout else BOUND
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=norm_bound), step
        for key in ("loss", "student_entropy", "teacher_entropy", "forward_kl", "reverse_kl"):
            assert ours[key] == pytest.approx(theirs[key], rel=BOUND), (step, key)
        for key in ("response_tokens", "active_tokens", "eligible_prompts", "pass_rate", "alpha", "learning_rate"):
            assert ours[key] == theirs[key], (step, key)
        assert zones_of(tmp_path / "run", step) == zones_of(recorded, step), step


@pytest.mark.mcore_lane
def test_two_layouts_generate_and_train_alike(pools: RankPools, tmp_path: Path) -> None:
    """Not replayed: each layout writes its own rollouts, which depend on (seed, step, prompt, sample) alone."""
    assert train_tiny(pools, 1, tmp_path / "one", ["training.steps=4"]) == [True]
    assert train_tiny(pools, 2, tmp_path / "tp2", ["training.steps=4", *TP2, *SP]) == [True, True]
    for theirs, ours in zip(metrics_of(tmp_path / "one"), metrics_of(tmp_path / "tp2"), strict=True):
        for key in ("loss", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=BOUND), key


def test_a_step_writes_every_metric_of_the_registry_and_no_other(recorded: Path) -> None:
    lines = [json.loads(line) for line in (recorded / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line.keys() == NAMES
        parts = (line[f"{part}_seconds"] for part in ("rollout", "score", "train", "sync"))
        assert sum(parts) <= line["step_seconds"] <= line["seconds"]
        assert 0 < line["eligible_difficulty"] < 1
    assert [line["step"] for line in lines] == list(range(STEPS))


def test_shares_hold_to_one_token(recorded: Path) -> None:
    for line in metrics_of(recorded):
        tokens = line["response_tokens"]
        for zone, share in zip("abc", (0.5, 0.4, 0.1), strict=True):
            assert abs(line[f"zone_{zone}_share"] - share) * tokens <= 1, (line["step"], zone)
