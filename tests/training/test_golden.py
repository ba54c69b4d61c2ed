"""Ten steps give what they gave when golden.json was last renewed, whatever else was changed since."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest

from tests.distributed.ranks import RankPools
from tests.training.golden import METRICS, RUNS, STEPS, changes, stored, trajectory


@pytest.mark.mcore_lane
@pytest.mark.transformers_lane
@pytest.mark.parametrize("name", RUNS)
def test_steps_are_as_stored(name: str, pools: RankPools, tmp_path: Path) -> None:
    golden = stored()[name]
    assert [set(step) for step in golden] == [set(METRICS)] * STEPS
    lines = changes(golden, trajectory(name, pools, tmp_path / "run"))
    assert not lines, "if this is meant, say why in the commit and run: make golden\n" + "\n".join(lines)


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("loss", lambda value: value * (1 + 2e-5)),
        ("response_tokens", lambda value: value + 1),
        ("grad_norm", lambda value: math.nan),
        ("alpha", lambda value: None),
    ],
)
def test_a_change_is_told_with_its_first_step(key: str, change: object) -> None:
    golden = stored()["sead"]
    found = copy.deepcopy(golden)
    for step in found[4:]:
        step[key] = change(step[key])  # type: ignore[operator]
    (line,) = changes(golden, found)
    assert line.startswith(f"{key} of step 4: {golden[4][key]} -> {found[4][key]}; at worst ")


def test_rounding_is_no_change_and_a_missing_step_is() -> None:
    golden = stored()["opd"]
    found = [{key: value * (1 + 5e-6) if key == "loss" else value for key, value in step.items()} for step in golden]
    assert changes(golden, found) == []
    assert changes(golden, found[:-1]) == ["9 steps, and 10 before"]
