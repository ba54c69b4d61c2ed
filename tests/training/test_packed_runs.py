"""Whole steps on packed rollouts: the same metrics and zones as in rows, whatever decides which tokens teach.

Seven rollouts on two data-parallel ranks, in micro-batches that hold one each: one of the eight holds none. Loss and
gradient norm agree to summation order; tests/models/test_packed.py compares every gradient.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sead.errors import UserError
from tests.distributed.ranks import RankPools
from tests.training.launching import metrics_of, train_tiny, zones_of

SETTINGS = ["training.steps=1", "training.lr_warmup_steps=0", "training.global_batch_size=7"]
ROWS = ["training.micro_batch_size=7"]
PACKED = ["training.micro_batch_size=1", "training.micro_batch_tokens=70"]
TP2 = ["parallel.tensor_model_parallel_size=2"]
PP2 = ["parallel.pipeline_model_parallel_size=2", "parallel.virtual_pipeline_model_parallel_size=2"]
CP2 = ["parallel.context_parallel_size=2"]
ON_FOUR_RANKS = {
    "quantile zones": [*TP2, *PP2, "parallel.sequence_parallel=true"],
    "no zones": TP2,
    "one sequence as much as another": CP2,
    "zones of each sequence": CP2,
    "half of each rollout": CP2,
    "sampled tokens, by their importance": [*CP2, *TP2, "parallel.sequence_parallel=true"],
    "the teacher sees another prompt": [*CP2, *TP2],
}

CASES = {
    "quantile zones": [],
    "one sequence as much as another": ["training.normalizer=sequence"],
    "all response tokens, truncated ones masked": ["training.normalizer=valid", "training.mask_truncated=true"],
    "zones of each sequence": ["zones.scope=sequence"],
    "running thresholds": ["zones.thresholds=running", "training.steps=2"],
    "no zones": ["policy.name=opd"],
    "half of each rollout": ["policy.name=tip_entropy"],
    "half of the step": ["policy.name=tip_soft_or"],
    "sampled tokens, by their importance": ["policy.name=opd_sampled", "training.importance_cap=2"],
    "a function of one's own, a micro-batch at a time": [
        "policy.name=tests.training.own_policy:of_some",
        "zones.thresholds=absolute",
    ],
    "the teacher sees another prompt": ["teacher.prompt_field=answer"],
}


@pytest.fixture(scope="module")
def recorded(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One response of a single token; the longest are cut."""
    output = tmp_path_factory.mktemp("recorded") / "run"
    assert train_tiny(pools, 1, output, [*SETTINGS, *ROWS, "training.steps=2"]) == [True]
    for step in range(2):
        file = output / "rollouts" / f"step-{step}.jsonl"
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for record, kept in zip(records, (1, 40, 40, 40, 39, 40, 40), strict=True):
            record["response_token_ids"] = (record["response_token_ids"] * 40)[:kept]
            if record.get("log_probs") is not None:
                record["log_probs"] = (record["log_probs"] * 40)[:kept]
            record["finished"] = kept < 40
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return output


def replay(recorded: Path, *overrides: str) -> list[str]:
    return [*SETTINGS, "rollouts.engine=replay", f"rollouts.path={recorded}", *overrides]


@pytest.mark.parametrize("case", CASES)
def test_packed_steps_are_those_of_rows(case: str, pools: RankPools, recorded: Path, tmp_path: Path) -> None:
    overrides = CASES[case]
    assert train_tiny(pools, 1, tmp_path / "rows", replay(recorded, *ROWS, *overrides)) == [True]
    layout = ON_FOUR_RANKS.get(case, [])
    ranks, settings = 4 if layout else 2, replay(recorded, *PACKED, *overrides, *layout)
    assert train_tiny(pools, ranks, tmp_path / "packed", settings) == [True] * ranks
    check_same(tmp_path / "rows", tmp_path / "packed")


def check_same(rows: Path, packed: Path) -> None:
    for step, (theirs, ours) in enumerate(zip(metrics_of(rows), metrics_of(packed), strict=True)):
        assert ours.keys() == theirs.keys()
        for key in ours:
            # Adam's first step divides by the square root of gradients that are nearly zero
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4 if step else 1e-5, abs=1e-6), (step, key)
        assert zones_of(packed, step) == zones_of(rows, step)


def test_a_recorded_rollout_beyond_the_budget_is_told(pools: RankPools, recorded: Path, tmp_path: Path) -> None:
    overrides = replay(recorded, *PACKED, "training.micro_batch_tokens=40", "rollouts.max_new_tokens=8")
    with pytest.raises(AssertionError, match=r"training\.micro_batch_tokens holds 40") as caught:
        train_tiny(pools, 1, tmp_path / "run", overrides)
    assert UserError.__name__ in str(caught.value)
