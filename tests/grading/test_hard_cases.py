"""hard_cases.jsonl: answers with the verdict that a mathematician would give, and Math-Verify's where it was asked.

Each line has a kind, the gold answers, a response, whether it is right, what Math-Verify says (null: it was not asked,
as it would take the machine's memory or time), and why. ``<9 x 1000>`` stands for a thousand nines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from math_verify import parse, verify

from megatron_sead.grading.grader import Grader

CASES = [json.loads(line) for line in (Path(__file__).parent / "hard_cases.jsonl").read_text().splitlines()]
KINDS = list(dict.fromkeys(case["kind"] for case in CASES))


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_seconds=2.0) as grader:
        yield grader


def written_out(text: str) -> str:
    return re.sub(r"<(\S+) x (\d+)>", lambda found: found[1] * int(found[2]), text)


def of_kind(kind: str) -> list[dict[str, Any]]:
    return [case for case in CASES if case["kind"] == kind]


@pytest.mark.parametrize("kind", KINDS)
def test_the_verdict_is_a_mathematicians(grader: Grader, kind: str) -> None:
    verdicts = {
        (*case["gold"], case["answer"]): grader.grade(
            written_out(case["answer"]), [written_out(gold) for gold in case["gold"]]
        )
        for case in of_kind(kind)
    }
    assert verdicts == {(*case["gold"], case["answer"]): case["right"] for case in of_kind(kind)}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if of_kind(kind)[0]["math_verify"] is not None])
def test_where_math_verify_differs_the_table_says_why(kind: str) -> None:
    for case in of_kind(kind):
        gold = parse(rf"\boxed{{{', '.join(case['gold'])}}}", parsing_timeout=None)
        theirs = verify(gold, parse(case["answer"], parsing_timeout=None), timeout_seconds=None)
        assert (case["gold"], case["answer"], theirs) == (case["gold"], case["answer"], case["math_verify"])
        assert theirs == case["right"] or case["why"], case
