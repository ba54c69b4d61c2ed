"""What the benchmark of engines makes of its measurements. How fast anything is, is not tested."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import benchmark_rollouts
from benchmark_rollouts import markdown, pairs, updated

SETTINGS = {"requests": 4, "new_tokens": 10, "repetitions": 3}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Processes that were started, in their order: ours takes 2 seconds, what it is made of 1.5 or 1."""
    names: list[str] = []

    def worker(what: str, settings: dict[str, Any]) -> dict[str, Any]:
        names.append(what)
        if what.startswith("update-"):
            return {"copy": [0.001, 0.001, 0.003], "update": [0.004, 0.002, 0.002], "bytes": 2_000_000}
        direct = 1.5 if names.count(what) == 1 else 1.0
        seconds = direct if what.endswith("-direct") else 2.0
        return {"seconds": [9.0, seconds, seconds], "tokens": 40}

    monkeypatch.setattr(benchmark_rollouts, "worker", worker)
    return names


def test_a_pairs_ratio_is_of_speeds_and_pairs_begin_in_turns(asked: list[str]) -> None:
    assert pairs("vllm", 2, SETTINGS)["ratios"] == [0.75, 0.5]
    assert asked == ["vllm-direct", "vllm", "vllm", "vllm-direct"]


def test_the_table_has_medians_and_their_spread(asked: list[str]) -> None:
    result = {"engines": [pairs("vllm", 2, SETTINGS)], "updates": [updated("vllm", Path("m"), "tiny", SETTINGS)]}
    result |= {"settings": SETTINGS | {"rounds": 2}, "versions": {"torch": "2.13.0"}, "date": "2026-01-01"}
    text = markdown(result | {"machine": benchmark_rollouts.machine()})
    assert "| vllm | 20 | 33 | 0.62 (0.50 to 0.75) |" in text
    assert "2.0 | 1.00 | 2.0 | 0.50 (0.25 to 1.50) |" in text
