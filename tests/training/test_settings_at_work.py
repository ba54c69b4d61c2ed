"""Settings that no other run of the tests sets: each does in a run what its description says.

Runs of one rank and a few steps, most of them on the same recorded rollouts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT, metrics_of
from tests.training.test_engines import SETTINGS, drive, run

TINY = ROOT / "examples" / "tiny"


@pytest.fixture(scope="module")
def recorded(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of a student that does not learn, the one with the lower pass rate first."""
    output = tmp_path_factory.mktemp("recorded") / "run"
    run(pools, output, "rollouts.max_new_tokens=40", "training.lr=1e-12", "training.min_lr=0", "seed=1")
    rates = [line["pass_rate"] for line in metrics_of(output)]
    assert rates[0] != rates[1]
    if rates[0] > rates[1]:
        first, second = (output / "rollouts" / f"step-{step}.jsonl" for step in (0, 1))
        shutil.move(first, output / "kept")
        shutil.move(second, first)
        shutil.move(output / "kept", second)
    return output


def replay(recorded: Path) -> list[str]:
    return ["rollouts.engine=replay", f"rollouts.path={recorded}"]


def test_mastery_smoothing_weighs_the_past(pools: RankPools, recorded: Path, tmp_path: Path) -> None:
    low, high = sorted(line["pass_rate"] for line in metrics_of(recorded))
    between = (low + high) / 2
    mastery = ["curriculum.mode=mastery", f"curriculum.mastery_threshold={between}", "curriculum.tiers=4"]
    opened = {}
    for smoothing in ("0", "0.9"):
        output = tmp_path / smoothing
        run(pools, output, *replay(recorded), *mastery, f"curriculum.smoothing={smoothing}")
        opened[smoothing] = [line["eligible_prompts"] for line in metrics_of(output)]
    assert opened == {"0": [250, 500], "0.9": [250, 250]}


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["zones.teacher_entropy_floor=5"], True),
        (["zones.teacher_entropy_floor=0"], False),
        (["zones.teacher_entropy_floor=5", "policy.name=opd"], False),  # which reads no zones
    ],
)
def test_a_teacher_that_is_sure_of_everything_is_warned_of_once(
    pools: RankPools, recorded: Path, tmp_path: Path, overrides: list[str], told: bool
) -> None:
    _, lines = run(pools, tmp_path / "run", *replay(recorded), *overrides)
    warnings = [line for line in lines if "zones.teacher_entropy_floor" in line]
    assert len(warnings) == told
    if told:
        tau = metrics_of(tmp_path / "run")[0]["tau_teacher"]
        assert warnings[0].startswith(f"step 0: zone C begins at {tau:.2g} nats of teacher entropy, under")


@pytest.mark.parametrize(("beta2", "whole"), [("0", True), ("0.95", False)])
def test_without_adams_memory_every_weight_moves_by_the_learning_rate(
    pools: RankPools, recorded: Path, tmp_path: Path, beta2: str, whole: bool
) -> None:
    """Two updates of lr * g / |g| each move a weight by a whole number of learning rates; with memory they do not."""
    adam = ["training.adam_beta1=0", f"training.adam_beta2={beta2}", "training.adam_eps=1e-20", "training.clip_grad=0"]
    schedule = ["training.lr=1e-4", "training.min_lr=1e-4", "training.lr_warmup_steps=0"]
    schedule.append("training.lr_decay_style=constant")
    run(pools, tmp_path / "run", *replay(recorded), *adam, *schedule)
    before, after = (
        load_file(folder / "model.safetensors") for folder in (TINY / "student", tmp_path / "run/student-hf")
    )
    moved = (after["model.norm.weight"].double() - before["model.norm.weight"].double()) / 1e-4
    off = (moved - moved.round()).abs()
    assert bool((off < 0.02).all()) == whole


def test_prompts_have_the_ids_of_their_field(pools: RankPools, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (TINY / "prompts.jsonl").read_text().splitlines()[:64]]
    named = [{"number": f"q{index}", **{k: v for k, v in row.items() if k != "id"}} for index, row in enumerate(rows)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in named))
    prompts = [f"prompts.path={tmp_path / 'prompts.jsonl'}", "prompts.id_field=number", "training.steps=1"]
    run(pools, tmp_path / "run", *prompts)
    lines = (tmp_path / "run" / "rollouts" / "step-0.jsonl").read_text().splitlines()
    asked = {record["prompt_id"] for record in map(json.loads, lines)}
    assert len(asked) == 8 and asked <= {f"q{index}" for index in range(64)}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("tests.training.own_policy:nothing", "has no function or Policy nothing"),
        ("tests.training.nowhere:gentle", "No module named 'tests.training.nowhere'; its folder must be in PYTHONPATH"),
    ],
)
def test_a_policy_of_ones_own_that_is_not_there_is_told_before_anything_is_loaded(
    pools: RankPools, tmp_path: Path, name: str, told: str
) -> None:
    with pytest.raises(AssertionError) as caught:
        run(pools, tmp_path / "run", f"policy.name={name}")
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith(f"megatron_sead.errors.UserError: policy.name={name}: ") and last.endswith(told)
    assert not (tmp_path / "run").exists()


def test_a_policy_of_ones_own_whose_weights_do_not_fit_is_told(
    pools: RankPools, recorded: Path, tmp_path: Path
) -> None:
    told = r"UserError: policy\.name=tests\S+crooked: forward weights must be a tensor of shape \[\d+\], one a token"
    with pytest.raises(AssertionError, match=told):
        run(pools, tmp_path / "run", *replay(recorded), "policy.name=tests.training.own_policy:crooked")


def test_more_tokens_than_there_are_is_told(pools: RankPools, tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"UserError: policy\.top_k=400: must be at most 307, the tokens there are"
    ):
        run(pools, tmp_path / "run", "policy.name=top_k", "policy.top_k=400")


def gatherings(overrides: list[str]) -> int:
    """On a rank: how often a run takes quantiles of all ranks' tokens for their zones."""
    from megatron_sead.distillation import zones

    calls, whole = [], zones._assigned

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return whole(*arguments)

    zones._assigned = counted
    try:
        drive(overrides, None)
    finally:
        zones._assigned = whole
    return len(calls)


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.micro_batch_size=4"],
        [],  # one micro-batch: the step is decided in the training pass
        ["zones.thresholds=running"],
        ["policy.name=opd", "training.micro_batch_size=4"],
        ["policy.name=tip_soft_or", "training.micro_batch_size=4"],
    ],
    ids=str,
)
def test_tokens_are_gathered_for_their_zones_once_a_step(
    pools: RankPools, recorded: Path, tmp_path: Path, overrides: list[str]
) -> None:
    settings = [*SETTINGS, *replay(recorded), f"output={tmp_path / 'run'}", *overrides]
    (count,) = pools.of(1).run(gatherings, settings)
    assert count == 2  # steps
