"""Right and wrong answers in the forms that models and benchmarks write them, hostile ones included."""

from __future__ import annotations

import os
import re
import resource
import signal
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sead.boxed import box_cut_off, boxed
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.grading.answers import integer, split_answers, split_choice
from megatron_sead.grading.extraction import marked_answers, unmarked_answers
from megatron_sead.grading.grader import Grader
from megatron_sead.grading.numerals import exact_value
from megatron_sead.prompts.answers import reference_answers
from megatron_sead.prompts.rows import read_rows
from megatron_sead.prompts.tokenizer import TextsOnDemand


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader(timeout_seconds=5.0) as grader:
        yield grader


@pytest.mark.parametrize(
    ("response", "answers", "right"),
    [
        (r"so \boxed{27}", ["27"], True),
        (r"so \boxed{27.0}", ["27"], True),
        (r"so \boxed{28}", ["27"], False),
        (r"first \boxed{27}, no: \boxed{28}", ["27"], False),
        (r"\boxed{1,000}", ["1000"], True),
        (r"\boxed{1{,}000}", ["1000"], True),
        (r"\boxed{\$1,000}", ["1000"], True),
        (r"\boxed{336}", [r"336^\circ"], True),
        (r"\boxed{336^{\circ}}", ["336"], True),
        (r"\boxed{-7}", ["7"], False),
        (r"\boxed{007}", ["7"], True),
        ("The answer is 12.", ["12"], True),
        ("work\n#### 12", ["12"], True),
        ("12", ["12"], True),
        ("12 + 1 = 13", ["12"], False),
        ("so\n1/2\n", ["1/2"], True),
        ("", ["12"], False),
        (r"\boxed{}", ["12"], False),
        (r"\boxed{5", ["5"], False),
        (r"The answer is \boxed{5", ["5"], False),
        (r"\boxed{\text{Evelyn}}", ["Evelyn"], True),
        (r"\boxed{\frac{\sqrt{3}}{2}}", [r"\dfrac{\sqrt{3}}{2}"], True),
        (r"\boxed{\frac12}", ["0.5"], True),
        (r"\boxed{54/2}", ["27"], True),
        (r"\boxed{(x+1)^2}", ["x^2+2x+1"], True),
        (r"\boxed{(x+1)^2}", ["x^2+2x+2"], False),
        (r"\boxed{(3,\pi/2)}", [r"\left( 3, \frac{\pi}{2} \right)"], True),
        (r"\boxed{(\pi/2,3)}", [r"\left( 3, \frac{\pi}{2} \right)"], False),
        (r"\boxed{(0,1)}", ["[0,1)"], False),
        (r"\boxed{3,-3}", [r"\pm 3"], True),
    ],
)
def test_one_answer(grader: Grader, response: str, answers: list[str], right: bool) -> None:
    assert grader.grade(response, answers) is right


@pytest.mark.parametrize(
    ("response", "right"),
    [
        (r"\boxed{2, \frac{1}{2}}", True),
        (r"\boxed{0.5 \text{ and } 2}", True),
        (r"\boxed{2} or \boxed{0.5}", True),
        (r"\boxed{2}", False),
        (r"\boxed{2, 2}", False),
        (r"\boxed{2, 0.5, 3}", False),
    ],
)
def test_several_answers_in_any_order_and_no_other(grader: Grader, response: str, right: bool) -> None:
    assert grader.grade(response, ["0.5", "2"]) is right


def test_an_answer_that_is_asked_for_twice_must_come_twice(grader: Grader) -> None:
    assert grader.grade(r"\boxed{1, 1}", ["1", "1"])
    assert not grader.grade(r"\boxed{1, 2}", ["1", "1"])


def test_numerals_need_no_worker() -> None:
    with Grader() as grader:
        assert grader.grade(r"\boxed{1,234}", ["1234"])
        assert grader.grade(r"\boxed{\frac12}", ["0.5"])
        assert not grader.grade(r"\boxed{0.333}", ["1/3"])
        assert not grader.grade(r"\boxed{1235}", ["1234"])
        assert not grader.grade("no idea", ["1/2"])  # no mark, no algebra
        assert grader._worker is None


@pytest.mark.parametrize(
    "hostile", ["9^(9^(9^9))", "9^{9^{9^9}}", "(1+" * 300 + "1" + ")" * 300, r"{10^8}!", "9" * 5000]
)
def test_hostile_answers_are_wrong_in_time_and_grading_goes_on(hostile: str) -> None:
    with Grader(timeout_seconds=1.0) as grader:
        assert grader.grade(r"\boxed{x+x}", ["2x"])  # the worker is up
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        assert not grader.grade(rf"\boxed{{{hostile}}}", [r"\frac{1}{3}"])
        assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10  # with the start of the worker
        assert grader.grade(r"\boxed{x+x+x}", ["3x"])


def test_a_dead_worker_is_replaced() -> None:
    with Grader() as grader:
        assert grader.grade(r"\boxed{x+x}", ["2x"])
        assert grader._worker is not None
        os.kill(grader._worker.pid, signal.SIGKILL)
        grader._worker.wait()
        assert grader.grade(r"\boxed{x+x+x}", ["3x"])


def test_closing_ends_the_process() -> None:
    grader = Grader()
    grader.grade(r"\boxed{x+x}", ["2x"])
    worker = grader._worker
    assert worker is not None
    grader.close()
    assert worker.poll() is not None


def test_a_rank_looks_at_no_response_that_another_grades(grader: Grader, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that reading what all ranks have written costs a rank its own share."""
    asked: list[int] = []
    ids = [(n,) for n in range(5)]
    texts = TextsOnDemand(ids, lambda tokens: asked.append(tokens[0]) or str(tokens[0]))  # type: ignore[func-returns-value]

    def gathered(shares: list[list[bool]], mine: list[bool], group: object) -> None:
        shares[:] = [[True] * 3, mine]

    monkeypatch.setattr("torch.distributed.all_gather_object", gathered)
    group: Any = SimpleNamespace(rank=lambda: 1, size=lambda: 2)
    assert grader.grade_all(texts, [["1"]] * 5, group) == [True, True, True, False, True]
    assert asked == [1, 3]


def test_grade_all_keeps_the_order(grader: Grader) -> None:
    assert grader.grade_all(["1", "2", "3"], [["1"], ["3"], ["3"]]) == [True, False, True]
    with pytest.raises(ValueError, match="no reference"):
        grader.grade("1", [])


def test_pieces() -> None:
    assert marked_answers(r"\boxed{a} \boxed{b} \boxed{c}", 2) == ["b", "c"]
    assert marked_answers("Thus the final answer is: $x$.") == ["$x$"]
    assert split_answers("1,234") == ["1,234"]
    assert split_answers(r"(1,2), \{3,4\} and 5") == ["(1,2)", r"\{3,4\}", "5"]
    assert integer("9" * 5000) is None
    assert integer("1,23") is None
    assert split_choice(r"\textbf{(C) }24") == ("C", "24")
    assert split_choice("(A), (C)") is None
    assert exact_value(r"0.1\overline{6}") == Fraction(1, 6)
    assert exact_value("1e999999999") is None
    assert boxed(r"\boxed{a \boxed{b}} \boxed 5, \fbox {c\}}") == [r"a \boxed{b}", "5", r"c\}"]
    assert box_cut_off(r"\boxed{5} \boxed{\frac{1}") and not box_cut_off(r"\boxed{5} \boxed{7}")


@pytest.mark.parametrize(
    "text", ["\\boxed{" * 15000, "answer to " * 10000, "\n" * 100000, " " * 100000 + "**a " * 9000, "1 + 1 = " * 30]
)
def test_a_response_that_repeats_itself_is_read_in_time(text: str) -> None:
    started = time.process_time()
    assert marked_answers(text) == []
    unmarked_answers(text)
    assert time.process_time() - started < 10  # a second; a search of every place from every place takes minutes


BENCHMARKS = {
    "math500/test.jsonl": "answer",
    "minerva_math/test.jsonl": "solution",
    "olympiadbench/test.jsonl": "final_answer",
    "amc23/test.jsonl": "answer",
    "aime24/test.jsonl": "answer",
    "aime25/test.jsonl": "answer",
    "gsm8k/test.jsonl": "answer",
}
FORMS = [
    r"Therefore $\boxed{%s}$.",
    "The answer is **%s**.",
    "#### %s",
    "**Final Answer:** %s. I hope it is correct.",
    "The answer is $%s$, since we computed it.",
]


@pytest.mark.parametrize("file", BENCHMARKS)
def test_benchmark_references_are_right_and_each_others_are_wrong(data_folder: Path, grader: Grader, file: str) -> None:
    rows = read_rows(PromptSettings(path=str(data_folder / file)))
    references = [reference_answers(row.fields[BENCHMARKS[file]]) for row in rows]
    texts = [re.sub(r"^\$|\$\.?$", "", ", ".join(reference)) for reference in references]
    for form in FORMS:
        verdicts = grader.grade_all([form % text for text in texts], references)
        assert [text for text, right in zip(texts, verdicts, strict=True) if not right] == [], form
    sample = range(0, len(references), max(1, len(references) // 40))  # comparing all takes Math-Verify half a minute
    for i in sample:
        j = (i + 1) % len(references)
        same = integer(references[i][0]) is not None and integer(references[i][0]) == integer(references[j][0])
        assert grader.grade(FORMS[0] % texts[j], references[i]) == same
