"""Faults of ranks, in small programs: a trace tells each, and finds none where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sead.tracing.device import compiler
from tests.tracing.programs import ALONE, APART

pytestmark = pytest.mark.skipif(compiler() is None, reason="a fake CUDA device needs a C++ compiler")
Results = dict[str, dict[str, Any]]


@pytest.mark.parametrize("case", APART)
def test_the_first_call_in_which_ranks_would_not_meet_is_told(case: str, results: Results) -> None:
    assert results[case]["error"] is None
    (line,) = results[case]["disagreements"]
    assert APART[case][1] in line and "0" in line and "1" in line


@pytest.mark.parametrize("case", ALONE)
def test_what_a_rank_would_fail_with_raises(case: str, results: Results) -> None:
    error = results[case]["error"] or ""
    assert ALONE[case][1] in error, results[case]
    assert "traced as rank 0" in error or case == "no wait"


def test_a_right_program_passes(results: Results) -> None:
    assert (results["right"]["error"], results["right"]["disagreements"]) == (None, [])


def test_what_the_host_waits_for_is_counted(results: Results) -> None:
    assert results["looked at"]["reads"] == 7  # tolist() is one
    assert results["copied"]["copies"] == [["to device", 2, 2], ["to host", 2, 1]]


def test_an_operation_that_ran_before_takes_no_more_memory_than_the_first_time(results: Results) -> None:
    assert results["multiplied twice"]["peak"] == 4 * (512 * 2 * 4 + 4 * 512 + 512 * 2 * 512)
