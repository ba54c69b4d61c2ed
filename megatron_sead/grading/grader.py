"""Is this answer right? Exact for integers and equal texts; Math-Verify, in a process of its own, for the rest."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from megatron_sead.grading.answers import exactly_same, split_answers, split_choice, split_parts, split_sequence
from megatron_sead.grading.conclusions import stated
from megatron_sead.grading.extraction import marked_answers, names_a_box, unmarked_answers
from megatron_sead.grading.notation import as_text, without_unit

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

GRADER_VERSION = "4"  # goes up when a change of code or of Math-Verify changes verdicts: difficulties depend on it


class Grader:
    """Grades responses. The worker process starts when an answer first needs it; close it, or use `with`.

    It is a fresh interpreter, not a fork, so that threads, process groups and devices of this one do not matter.

    Args:
        timeout_seconds: of processor time; a comparison that takes longer counts as wrong, and its process is replaced.
    """

    def __init__(self, timeout_seconds: float = 5.0) -> None:
        self._timeout_seconds = timeout_seconds
        self._worker: subprocess.Popen[str] | None = None
        self._verdicts: dict[tuple[str, str], bool] = {}

    def grade(self, response: str, answers: Sequence[str]) -> bool:
        """Whether a response's final answer is the reference's: all of `answers`, in any order, and no other.

        The final answer is in the last box, or after "####" or "the answer is"; a response without such a mark may
        end with it on a line of its own, written as the reference is (no algebra is spent on unmarked text).
        """
        if not answers:
            raise ValueError("no reference answer to grade against")
        given = marked_answers(response, count=len(answers))
        if not given:
            return len(answers) == 1 and any(_plainly_same(answers[0], text) for text in unmarked_answers(response))
        if len(given) > len(answers):
            given = [", ".join(given)]
        if len(answers) == 1:
            return any(self._same(answers[0], text) for text in _readings(given[0], names_a_box(response)))
        parts = [part for answer in given for part in split_answers(answer)]
        if len(parts) == len(answers):
            return self._same_set(list(answers), parts)
        return self._same(", ".join(answers), given[-1])

    def grade_all(
        self, responses: Sequence[str], answers: Sequence[Sequence[str]], group: ProcessGroup | None = None
    ) -> list[bool]:
        """`grade` for each response with its own reference.

        Args:
            responses: those that another rank grades are not looked at here.
            group: gloo group whose ranks share the work; each passes all responses and receives all verdicts. They
                agree even where a comparison runs into the time limit on one machine and not on another.
        """
        if len(responses) != len(answers):
            raise ValueError(f"{len(responses)} responses and {len(answers)} references: must be as many")
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        mine = [self.grade(responses[i], answers[i]) for i in range(rank, len(responses), size)]
        if group is None:
            return mine
        import torch.distributed as dist  # here: the worker process imports this package and needs no torch

        shares: list[list[bool]] = [[] for _ in range(size)]
        dist.all_gather_object(shares, mine, group=group)
        return [shares[i % size][i // size] for i in range(len(responses))]

    def close(self) -> None:
        """End the worker process, if there is one."""
        if self._worker is not None:
            self._worker.kill()
            self._worker.wait()
            for stream in (self._worker.stdin, self._worker.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # what a dead worker has not read
                        stream.close()
            self._worker = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _same_set(self, references: list[str], given: list[str]) -> bool:
        for reference in references:
            match = next((part for part in given if self._same(reference, part)), None)
            if match is None:
                return False
            given.remove(match)
        return True

    def _same(self, reference: str, given: str) -> bool:
        exact = exactly_same(reference, given)
        if exact is not None:
            return exact
        parts, given_parts = split_parts(reference), split_parts(given)
        if parts or given_parts:
            return self._same_parts(parts or split_answers(reference), given_parts or split_answers(given))
        asked, chosen = split_choice(reference), split_choice(given)
        if (asked and asked[1]) or (chosen and chosen[1]):  # the value behind a letter counts
            return self._same((asked and asked[1]) or reference, (chosen and chosen[1]) or given)
        sequence, given_sequence = split_sequence(reference), split_sequence(given)
        if sequence or given_sequence:
            return self._same_sequence(sequence or [], given_sequence or [])
        if (reference, given) not in self._verdicts:
            self._verdicts[reference, given] = self._ask_worker(reference, given)
        return self._verdicts[reference, given]

    def _same_parts(self, references: list[Any], given: list[Any]) -> bool:
        """Part by part in their order; a label may be left out, and is the same where both have it."""
        for asked, part in zip(references, given, strict=False):
            labels = [item[0] for item in (asked, part) if isinstance(item, tuple)]
            contents = [item[1] if isinstance(item, tuple) else item for item in (asked, part)]
            if len(set(labels)) > 1 or not self._same(*contents):
                return False
        return len(references) == len(given)

    def _same_sequence(self, references: list[str], given: list[str]) -> bool:
        """Lists that dots abbreviate, part by part; a single part is text, whose equality is not found here."""
        return 1 < len(references) == len(given) and all(map(self._same, references, given))

    def _ask_worker(self, reference: str, given: str) -> bool:
        if self._worker is not None and self._worker.poll() is not None:
            self.close()  # ended from outside, and not by what is asked now
        if self._worker is None:
            self._worker = _start_worker()
        stdin, stdout = self._worker.stdin, self._worker.stdout
        assert stdin is not None
        assert stdout is not None
        request = {
            "reference": without_unit(reference),
            "given": without_unit(given),
            "seconds": self._timeout_seconds,
        }
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
            verdict = stdout.readline()
        except BrokenPipeError:
            verdict = ""
        if verdict not in ("true\n", "false\n"):  # the alarm struck, or sympy ran out of stack or memory
            self.close()
            return False
        return verdict == "true\n"


def _readings(given: str, is_boxed: bool) -> list[str]:
    """What a marked answer may say: "5!" in prose is 5 or 120, and "the total is 42" is 42."""
    if is_boxed:
        return [given]
    said = stated(given)
    return [*([given.rstrip("!")] if given.endswith("!") else []), given, *([said] if said else [])]


def _plainly_same(reference: str, given: str) -> bool:
    """`exactly_same`, also of lists: "x = 2 or x = 3" is "2, 3"."""
    if exactly_same(reference, given):
        return True
    asked = split_answers(as_text(reference).removeprefix(r"\{").removesuffix(r"\}"))
    parts = [stated(part) or part for part in split_answers(given)]
    if not 1 < len(asked) == len(parts):
        return False
    matches = [[bool(exactly_same(stated(one) or one, part)) for part in parts] for one in asked]
    return all(sum(row) == 1 for row in [*matches, *zip(*matches, strict=True)])


def _start_worker() -> subprocess.Popen[str]:
    worker = subprocess.Popen(
        [sys.executable, "-m", "megatron_sead.grading.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        start_new_session=True,  # Ctrl-C is for this process; the worker ends when its input does
    )
    assert worker.stdout is not None
    if worker.stdout.readline() != "ready\n":
        worker.kill()
        raise RuntimeError("the grading process did not start: python -m megatron_sead.grading.worker fails")
    return worker
