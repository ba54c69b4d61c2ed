"""The command that checks parity at true widths, at small ones: its processes, its memory accounts, its files."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from megatron_sead.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import check_true_shapes
from true_shapes import launch
from true_shapes.errors import Distance, Seen
from true_shapes.model import SHAPES, Shape

SMALL = Shape(hidden=256, heads=4, kv_heads=2, ffn=512, vocab=5003)


def test_passes_in_processes_of_their_own(tmp_path: Path) -> None:
    result = launch.check(SMALL, "fp32", 2, tmp_path)
    assert result["passed"]
    assert result["megatron"]["worst_gradient"]["l2"] < 2e-5
    assert list(tmp_path.iterdir()) == []
    assert result["seconds"].keys() == result["peak_gb"].keys() == {"reference", "megatron"}
    for kind, peak in result["peak_gb"].items():  # so small, it is the program itself for the most part
        assert 0.1 < peak < result["accounted_gb"][kind]


def test_a_pass_that_fails_is_told(tmp_path: Path) -> None:
    odd = Shape(hidden=64, heads=2, kv_heads=1, ffn=128, vocab=300)
    (tmp_path / "model").mkdir()
    with pytest.raises(UserError, match=r"the megatron pass failed on rank 0: .*config.json"):
        launch._run({"folder": str(tmp_path), "shape": vars(odd), "dtype": "fp32", "kind": "megatron", "processes": 1})


def test_no_room_is_told_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Little:
        available = 10**9

    monkeypatch.setattr(psutil, "virtual_memory", lambda: Little)
    monkeypatch.setattr(launch, "_run", None)
    with pytest.raises(UserError, match=r"memory: 1[0-9]\.\d GB are needed and 1.0 GB are free"):
        launch.check(SHAPES["7b"], "fp32", 1, tmp_path)


def test_accounts_of_the_true_shapes() -> None:
    """A 32B-wide pass in fp32 fits a machine with 24 GB, 7B-wide ones fit 16."""
    assert 8e9 < launch.memory_needed(SHAPES["7b"], 4, 1) < 13e9
    assert 14e9 < launch.memory_needed(SHAPES["32b"], 4, 2) < 20e9
    assert launch.disk_needed(SHAPES["32b"]) < 15e9


def test_a_gradient_that_is_no_number_is_the_worst() -> None:
    seen = Seen(loss=1.0, logits=Distance(0.0, 1.0, 0.0, 1.0))
    seen.gradients = {"a": Distance(1.0, 1.0), "b": Distance(float("nan"), 1.0), "c": Distance(2.0, 1.0)}
    for distance in seen.gradients.values():
        distance.expected_largest = 1.0
    assert launch.summary(seen, seen)["worst_gradient"]["name"] == "b"


def made_up(passed: bool) -> dict[str, Any]:
    one = {"logits": {"l2": 1e-6}, "loss": 1e-7, "worst_gradient": {"name": "lm_head.weight", "l2": 2e-6}}
    return {"megatron": one, "passed": passed, "peak_gb": {"megatron": 9.0}, "seconds": {"megatron": 61.0}}


def test_results_are_gathered(tmp_path: Path) -> None:
    stem = tmp_path / "true_shapes"
    check_true_shapes.write_results("7b fp32 tp2", made_up(True), stem)
    check_true_shapes.write_results("32b fp32 tp1", made_up(False), stem)
    check_true_shapes.write_results("7b fp32 tp2", made_up(True), stem)
    assert list(json.loads(stem.with_suffix(".json").read_text())) == ["32b fp32 tp1", "7b fp32 tp2"]
    rows = [line for line in stem.with_suffix(".md").read_text().splitlines() if line.startswith(("| 7b", "| 32b"))]
    assert rows == [
        "| 32b fp32 tp1 | 1.0e-06 | 1.0e-07 | 2.0e-06 (lm_head.weight) |  |  | 9.0 | 61 | NOT THE SAME |",
        "| 7b fp32 tp2 | 1.0e-06 | 1.0e-07 | 2.0e-06 (lm_head.weight) |  |  | 9.0 | 61 | same |",
    ]


@pytest.mark.parametrize(
    ("ours", "theirs", "verdict"),
    [
        ((1e-6, 1e-6), None, True),
        ((1e-6, 1e-2), None, False),
        ((1e-2, 1e-6), None, False),
        ((1e-2, 3e-2), (1e-2, 3e-2), True),
        ((2e-2, 3e-2), (1e-2, 3e-2), False),
        ((1e-2, 5e-2), (1e-2, 3e-2), False),
        ((float("nan"), 1e-6), None, False),
    ],
)
def test_verdict(ours: tuple[float, float], theirs: tuple[float, float] | None, verdict: bool) -> None:
    def summarized(pair: tuple[float, float]) -> dict[str, Any]:
        return {"logits": {"l2": pair[0]}, "worst_gradient": {"l2": pair[1]}}

    result = {"megatron": summarized(ours)} | ({"transformers": summarized(theirs)} if theirs else {})
    assert launch.passed(result) is verdict
