"""The arithmetic and the layout of what the benchmark and the profile report. How fast anything is, is not tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.errors import UserError
from megatron_sead.reporting.machine import machine

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_step.py"
sys.path.insert(0, str(TOOL.parent))

import profile_step  # noqa: E402  (the tools are commands, not a package)
from benchmark_step import OURS, TRL, Samples, command_line, markdown, parse_metrics, table  # noqa: E402


def result(*names: str) -> dict[str, Any]:
    """What a measurement leaves, of trainers whose steps take 0.25 and 1 second."""
    summaries = {}
    for name, seconds in zip(names, (0.25, 1.0), strict=False):
        samples = Samples(facts={"versions": {"torch": "2.13.0"}})
        samples.extend([9.0, seconds, seconds, 4 * seconds], [1, 100, 100, 200], warm_up=1)
        summaries[name] = samples.summary() | samples.facts
    settings = {"prompts": 64, "max_new_tokens": 40, "micro_batch_size": 64, "rounds": 1, "steps": 4}
    return summaries | {"settings": settings, "machine": machine(), "date": "2026-01-01", "command": "python x"}


def test_a_step_lasts_from_the_end_of_the_one_before() -> None:
    """So that what is written after a step counts as part of it, and start-up as part of none."""
    lines = [json.dumps({"seconds": s, "response_tokens": t}) for s, t in ((60.0, 7), (60.5, 8), (62.5, 9))]
    assert parse_metrics(lines) == ([0.5, 2.0], [8, 9])


def test_summary_leaves_out_the_warm_up_of_every_round() -> None:
    samples = Samples()
    for _ in range(2):
        samples.extend([9.0, 1.0, 2.0, 6.0], [1, 100, 100, 200], warm_up=1)
    summary = samples.summary()
    assert summary["steps"] == 6
    assert (summary["median_seconds"], summary["min_seconds"]) == (2.0, 1.0)
    assert summary["median_response_tokens"] == 100
    # of each step's own quotient: 10, 20 and 30 milliseconds a token
    assert summary["median_microseconds_per_token"] == pytest.approx(20_000)
    assert summary["min_microseconds_per_token"] == pytest.approx(10_000)


def test_a_round_of_warm_up_alone_is_refused() -> None:
    with pytest.raises(UserError, match="--steps: of 3 steps timed 3 are warm-up"):
        Samples().extend([1.0] * 3, [1] * 3, warm_up=3)


def test_table_divides_ours_by_theirs() -> None:
    header, *rows = table(result(OURS, TRL))
    assert header == ["", OURS, TRL, "ratio"]
    assert rows[0] == ["seconds a step, median", "0.250", "1.000", "0.25"]
    assert rows[-1] == ["steps timed", "3", "3"]


def test_ours_alone_has_no_ratio() -> None:
    header, *rows = table(result(OURS))
    assert header == ["", OURS]
    assert all(len(row) == 2 for row in rows)


def test_markdown_is_a_whole_table_with_what_it_depends_on() -> None:
    text = markdown(result(OURS, TRL))
    drawn = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in drawn} == {5}
    for fact in (machine()["cpu"], "trl: torch 2.13.0", "64 prompts a step", "`python x`", "2026-01-01"):
        assert fact in text


def test_command_does_not_say_where_trl_lies() -> None:
    assert command_line(["--rounds", "2", "--trl-python", "/home/me/bin/python"]) == (
        "python tools/benchmark_step.py --rounds 2 --trl-python PYTHON"
    )


def test_mistakes_are_one_line() -> None:
    arguments = [sys.executable, str(TOOL), "--prompts", "64", "--micro-batch-size", "48"]
    done = subprocess.run(arguments, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr == "error: --micro-batch-size 48: must divide --prompts 64\n"


class Parts:
    """Something to watch: an outer part that calls an inner one."""

    def __init__(self, spend: Any) -> None:
        self.spend = spend

    def outer(self) -> None:
        self.spend(1)
        self.inner()
        self.spend(2)

    def inner(self) -> None:
        self.spend(10)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only moves when told."""
    time = [0.0]
    monkeypatch.setattr(profile_step.time, "perf_counter", lambda: time[0])
    return time


def test_time_counts_for_the_innermost_part(now: list[float]) -> None:
    def spend(seconds: float) -> None:
        now[0] += seconds

    parts, clock = Parts(spend), profile_step.Clock()
    clock.watch(parts, "outer", "packing")
    clock.watch(parts, "inner", lambda: "grading")
    spend(100)  # before the first step: no part of any
    clock.next_step()
    spend(5)
    parts.outer()
    clock.next_step()
    assert clock.steps[0] == {"packing": 3, "grading": 10, profile_step.LOOP: 5}


def test_a_part_that_raises_is_closed(now: list[float]) -> None:
    def fail(_: float) -> None:
        raise RuntimeError

    parts, clock = Parts(fail), profile_step.Clock()
    clock.watch(parts, "inner", "grading")
    clock.next_step()
    with pytest.raises(RuntimeError):
        parts.inner()
    now[0] += 7
    clock.next_step()
    assert clock.steps[0][profile_step.LOOP] == 7


def test_profile_takes_the_faster_half_between_warm_up_and_last() -> None:
    seconds = [50.0] * profile_step.WARM_UP + [0.3, 9.0, 0.1, 9.0] + [0.01]
    steps = [{"backward": 0.75 * s, "records": 0.25 * s} for s in seconds]
    summary = profile_step.summarize(steps)
    assert summary["steps"] == 2
    assert summary["milliseconds"] == pytest.approx(200)
    assert summary["parts"]["backward"] == pytest.approx(150)
    assert summary["share_everything_else"] == pytest.approx(0.25)
