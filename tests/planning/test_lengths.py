"""Lengths of responses: log-normal ones, a file's, a run's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sead.errors import UserError
from megatron_sead.planning.lengths import Lengths, read_lengths


def test_a_log_normal_distribution_has_the_mean_and_the_percentile() -> None:
    lengths = read_lengths("2000,12000", 10**6, None)
    assert lengths.mean == pytest.approx(2000, rel=0.02)
    assert lengths.of_step(100)[98] == pytest.approx(12000, rel=0.2)
    assert sum(value > 12000 for value in lengths.values) == pytest.approx(0.01 * len(lengths.values), rel=0.05)


def test_what_is_longer_than_the_longest_is_cut() -> None:
    lengths = read_lengths("2000,12000", 4096, None)
    assert max(lengths.values) == 4096 and lengths.mean < 2000


def test_a_step_has_the_middles_of_equal_parts() -> None:
    lengths = Lengths(tuple(range(1, 101)), 1.0, "")
    assert lengths.of_step(4) == (13, 38, 63, 88)
    assert lengths.of_step(100) == lengths.values
    assert len(lengths.of_step(300)) == 300


def test_a_file_of_lengths_is_taken_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "lengths.txt"
    file.write_text("30\n10\n900\n20\n")
    assert read_lengths(str(file), 100, 7).values == (10, 20, 30, 100)
    assert read_lengths(str(file), 100, 7).prompt == 7


def test_a_run_tells_responses_and_prompts(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    for step, length in ((2, 5), (10, 3)):
        record = {"prompt_token_ids": [1] * 4, "response_token_ids": [1] * length, "text": "\u2028"}
        (tmp_path / f"rollouts/step-{step}.jsonl").write_text(json.dumps(record, ensure_ascii=False) + "\n")
    assert read_lengths(str(tmp_path), 100, None).values == (3, 5)
    assert read_lengths(str(tmp_path), 100, None).prompt == 4


def test_without_records_a_runs_metrics_tell_the_mean(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"response_length": 10}\n{"response_length": 30}\n')
    assert read_lengths(str(tmp_path), 80, None).mean == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize(
    ("told", "part"),
    [
        ("2000,1000", "1 to 15.0 times as much"),
        ("10,1000", "1 to 15.0 times as much"),
        ("1.2.3,4", "must be two numbers"),
        ("nowhere", "no such file or directory"),
    ],
)
def test_what_is_no_distribution_is_refused(told: str, part: str) -> None:
    with pytest.raises(UserError, match=part) as caught:
        read_lengths(told, 100, None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "0\n", "ten\n", "inf\n"])
def test_a_file_without_lengths_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "lengths").write_text(text)
    with pytest.raises(UserError, match="lengths of responses in tokens"):
        read_lengths(str(tmp_path / "lengths"), 100, None)


def test_a_directory_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no rollouts"):
        read_lengths(str(tmp_path), 100, None)
