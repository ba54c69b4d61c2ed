"""What a replica grades and scores while others still write changes nothing but when it is done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sead.config.run import load_config
from megatron_sead.errors import UserError
from tests.distributed.ranks import RankPools
from tests.parallel.test_groups import timeout_of
from tests.training.launching import SHORT, TINY, metrics_of, train_tiny, zones_of

SETTINGS = ["training.steps=3", "training.global_batch_size=8", "training.micro_batch_size=1"]
SETTINGS += ["rollouts.max_new_tokens=24"]
LAYOUTS = {
    "one rank": (1, []),
    "dp2": (2, []),
    "pp2 virtual 2": (
        2,
        ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    ),
    "tp2 x dp2": (4, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "cp2 x dp2": (4, ["parallel.context_parallel_size=2"]),
    "pp2 x dp2": (4, ["parallel.pipeline_model_parallel_size=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_the_same(layout: str, pools: RankPools, tmp_path: Path) -> None:
    """Bit for bit, with a rollout a micro-batch, which the teacher then sees alone either way."""
    ranks, overrides = LAYOUTS[layout]
    plain, overlapped = tmp_path / "plain", tmp_path / "overlapped"
    assert train_tiny(pools, ranks, plain, [*SETTINGS, *overrides]) == [True] * ranks
    assert train_tiny(pools, ranks, overlapped, [*SETTINGS, *overrides, "rollouts.overlap=true"]) == [True] * ranks
    assert metrics_of(overlapped) == metrics_of(plain)
    assert all(zones_of(overlapped, step) == zones_of(plain, step) for step in range(3))


def test_packed_steps_are_the_same_within_rounding(pools: RankPools, tmp_path: Path) -> None:
    """Twice as many replicas as rollouts that fill a budget: some micro-batches hold none."""
    packed = [*SETTINGS, "training.micro_batch_tokens=100", "training.global_batch_size=4"]
    packed += ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
    assert train_tiny(pools, 4, tmp_path / "plain", packed) == [True] * 4
    assert train_tiny(pools, 4, tmp_path / "overlapped", [*packed, "rollouts.overlap=true"]) == [True] * 4
    for plain, overlapped in zip(metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "overlapped"), strict=True):
        for key in ("loss", "grad_norm", "forward_kl"):
            assert overlapped[key] == pytest.approx(plain[key], rel=1e-5), key


def events_of_a_step(overrides: list[str]) -> list[str]:
    """On a rank: when the engine begins and ends to write, and sleeps, and when the teacher's pass runs; and how long a
    group waits for a rank that grades."""
    from megatron_sead.rollouts.transformers_engine import TransformersEngine
    from megatron_sead.training import early_scores, loop
    from megatron_sead.training.teacher import Teacher

    events: list[str] = []
    group_of = early_scores._model_parallel_group

    def group(*arguments: Any) -> Any:
        made = group_of(*arguments)
        events.append(f"waits {timeout_of(made):g} minutes")
        return made

    def told(owner: type, name: str) -> Any:
        method = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            events.append(f"{name} begins")
            result = method(*arguments, **keywords)
            events.append(f"{name} ends")
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (TransformersEngine, "generate"),
            (TransformersEngine, "sleep"),
            (Teacher, "hidden_states"),
        ):
            patch.setattr(owner, name, told(owner, name))
        patch.setattr(early_scores, "_model_parallel_group", group)
        loop.run(load_config(TINY, [*SHORT, *SETTINGS, "training.steps=1", "parallel.timeout_minutes=7.5", *overrides]))
    waits = [event for event in events if event.startswith("waits")]
    return waits + events[events.index("generate begins") :]


def test_the_teachers_pass_runs_before_the_engine_has_all_rollouts(pools: RankPools, tmp_path: Path) -> None:
    plain = pools.of(2).run(events_of_a_step, [f"output={tmp_path / 'plain'}"])
    overlapped = pools.of(2).run(events_of_a_step, [f"output={tmp_path / 'overlapped'}", "rollouts.overlap=true"])
    sleeps, scores = ["sleep begins", "sleep ends"], ["hidden_states begins", "hidden_states ends"]
    inside = ["generate begins", *sleeps, *scores, "generate ends"]
    after = ["generate begins", "generate ends", *sleeps, *scores]
    assert [events[:6] for events in plain] == [after] * 2
    assert [events[:7] for events in overlapped] == [["waits 7.5 minutes", *inside]] * 2


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["rollouts.engine=replay", "rollouts.path=."], "engine 'replay' writes nothing; it must be false"),
        (["rollouts.lag=1", "training.importance_cap=2"], "must be false with rollouts.lag=1"),
    ],
)
def test_what_it_does_not_go_with(overrides: list[str], told: str) -> None:
    with pytest.raises(UserError, match=f"^rollouts.overlap=true: {told}"):
        load_config(TINY, ["rollouts.overlap=true", *overrides])
