"""The first look at a set: one candidate a problem, whatever the number of its copies, in bounded memory.

What is kept a problem in memory are a few numbers and keys; what it says goes into a temporary file.
"""

from __future__ import annotations

import os
import pickle
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from typing import IO, Any, NamedTuple

import numpy as np

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.grading.grader import Grader
from megatron_sead.prompts.messages import Conversation, as_text
from megatron_sead.prompts.problems import answers_of, problem_of, same_text, turns_of
from megatron_sead.prompts.rows import Row

FILE = 2**40  # more than the rows of a file
Rows = Sequence[int | str]
NO_PROMPT, NO_ANSWER = "no prompt", "no answer"
# What sets write where there is no answer to compare with, beside what no answer can be
PLACEHOLDERS = {"proof", "notfound", "not found", "no answer", "see solution", "n/a"}


class Candidate(NamedTuple):
    """The first row of a problem."""

    place: str
    id: str | None  # None: the row has none
    turns: Conversation
    answers: tuple[str, ...]
    difficulty: float | None
    level: str | None
    rest: dict[str, Any]  # fields of the row


@dataclass(frozen=True)
class Fault:
    """Why a row cannot be trained on."""

    reason: str
    place: str
    text: str
    told: str


class Candidates:
    """Filled row by row, then read in the order of the problems' first rows.

    Args:
        spool: an empty temporary file.
        settings: how rows are read.
        tell: is given every row that is no candidate.
    """

    def __init__(
        self, spool: IO[bytes], settings: PromptSettings, grader: Grader, tell: Callable[[Fault], None]
    ) -> None:
        self._spool, self._settings, self._grader, self._tell = spool, settings, grader, tell
        self._by_row: dict[bytes, int] = {}  # prompt and answer as they stand there -> problem
        self._by_text: dict[bytes, int] = {}
        self._answers = array("q")  # of each problem's first row, hashed
        self._copied, self._copies = array("q"), array("q")  # problem, and its row
        self._rows = RowNumbers()
        self.others: dict[int, dict[tuple[str, ...], str]] = {}  # problem -> other answers to it, and their places
        self.shared = SharedLines()
        self._content = sha256()
        self.rows = 0

    def __len__(self) -> int:
        return len(self._answers)

    @property
    def content(self) -> str:
        """Fingerprint of the prompts and answers that were read, in order."""
        return self._content.hexdigest()

    def add(self, row: Row) -> None:
        """Raises: UserError: an id, level or difficulty that is none, as training would say."""
        settings, self.rows = self._settings, self.rows + 1
        self._rows.key(row.place)  # of all rows, before any are told
        said = row.value(settings.prompt_field, None), row.value(settings.answer_field, None)
        key = blake2b(repr(said).encode(errors="surrogatepass"), digest_size=16).digest()
        self._content.update(key)
        known = self._by_row.get(key)
        if known is None:
            known = self._new(row, said)
            if known is not None:
                self._by_row[key] = known
        else:
            self._copy(known, row)

    def __iter__(self) -> Iterator[tuple[Candidate, Rows, dict[tuple[str, ...], str]]]:
        """Each problem with the rows that repeat it, and other answers to it with their places."""
        self._spool.seek(0)
        problems, rows = np.frombuffer(self._copied, np.int64), np.frombuffer(self._copies, np.int64)
        order = np.argsort(problems, kind="stable")
        rows, bounds = rows[order], np.searchsorted(problems[order], np.arange(len(self) + 1))
        for number in range(len(self)):
            copies = self._rows.told(rows[bounds[number] : bounds[number + 1]].tolist())
            yield Candidate(*pickle.load(self._spool)), copies, self.others.get(number, {})

    def row_of(self, candidate: Candidate) -> Rows:
        """Its own, as its copies are told."""
        return self._rows.told([self._rows.key(candidate.place)])

    def _new(self, row: Row, said: tuple[Any, Any]) -> int | None:
        """The problem of a row that stands there for the first time; None: the row is unusable."""
        settings = self._settings
        try:
            turns = turns_of(row, settings.prompt_field, "prompts.prompt_field", settings)
        except UserError as error:
            self._tell(Fault(NO_PROMPT, row.place, _shown(said[0]), str(error)))
            return None
        text = as_text(turns)
        try:
            answers = answers_of(row, settings.answer_field, "prompts.answer_field")
            self._require_gradable(answers, row)
        except UserError as error:
            self._tell(Fault(NO_ANSWER, row.place, text, str(error)))
            return None
        problem = self._by_text.setdefault(same_text(text), len(self))
        if problem < len(self):
            if self._answers[problem] != hash(answers):
                self.others.setdefault(problem, {}).setdefault(answers, row.place)
            self._copy(problem, row)
            return problem
        checked = problem_of(row, problem, settings)
        given_id = None if row.value(settings.id_field, None) is None else checked.id
        rest = {name: value for name, value in row.fields.items() if name != settings.prompt_field.split(".")[0]}
        candidate = Candidate(row.place, given_id, turns, answers, checked.difficulty, checked.level, rest)
        pickle.dump(tuple(candidate), self._spool)
        self._answers.append(hash(answers))
        self.shared.add(turns)
        return problem

    def _copy(self, problem: int, row: Row) -> None:
        self._copied.append(problem)
        self._copies.append(self._rows.key(row.place))

    def _require_gradable(self, answers: tuple[str, ...], row: Row) -> None:
        """A model that writes the reference answer itself is right."""
        if all(answer.isdecimal() and len(answer) < 100 for answer in answers):
            return
        field = self._settings.answer_field
        if placeholder := next((answer for answer in answers if answer.casefold() in PLACEHOLDERS), None):
            raise UserError(f"{row.place}: {field!r} is {placeholder!r}, which stands for no answer")
        if not same_answers(self._grader, answers, answers):
            raise UserError(
                f"{row.place}: {field!r} cannot be graded: {_shown(answers)} in a box is not found to be it"
            )


class SharedLines:
    """The lines that all prompts begin with, and those that all end with: an instruction around the problem."""

    def __init__(self) -> None:
        self._begins: str | None = None
        self._ends = ""
        self._prompts = 0

    def add(self, turns: Conversation) -> None:
        text, self._prompts = turns[0].content if len(turns) == 1 else "", self._prompts + 1
        if self._begins is None:
            self._begins, self._ends = text, text[::-1]
        elif self._begins or self._ends:
            self._begins = _common(self._begins, text)
            self._ends = _common(self._ends, text[::-1])

    @property
    def begins(self) -> str:
        """Whole lines; nothing where there is but one prompt to compare."""
        text = self._begins or ""
        return text[: text.rfind("\n") + 1] if self._prompts > 1 else ""

    @property
    def ends(self) -> str:
        text = self._ends[::-1]
        return text[text.find("\n") :] if self._prompts > 1 and "\n" in text else ""

    def without(self, turns: Conversation) -> Conversation:
        """The prompt, its last turn without these lines; as it is where nothing would be left of it."""
        text = turns[-1].content
        inner = text.removeprefix(self.begins).removesuffix(self.ends).strip()
        long_enough = len(text) >= len(self.begins) + len(self.ends)
        return (*turns[:-1], turns[-1]._replace(content=inner)) if inner and long_enough and len(turns) == 1 else turns


def _common(one: str, other: str) -> str:
    """What both begin with."""
    return os.path.commonprefix([one, other])  # noqa: RUF071 (of characters, which is meant)


def same_answers(grader: Grader, reference: tuple[str, ...], given: tuple[str, ...]) -> bool:
    return grader.grade(" and ".join(rf"\boxed{{{answer}}}" for answer in given), reference)


class RowNumbers:
    """Rows as single numbers: 17 for "FILE, row 17", and more for a row of the next of several files."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}  # "FILE, row" -> place among them

    def key(self, place: str) -> int:
        file, _, number = place.rpartition(" ")
        return self._files.setdefault(file, len(self._files)) * FILE + int(number)

    def told(self, keys: list[int]) -> Rows:
        """The rows' numbers; their places, where several files have numbers."""
        if len(self._files) <= 1:
            return list(keys)
        files = list(self._files)
        return [f"{files[key // FILE]} {key % FILE}" for key in keys]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else "" if value is None else repr(value)
    return text if len(text) <= 2000 else text[:2000] + " ..."
