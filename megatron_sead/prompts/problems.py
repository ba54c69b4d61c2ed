"""Checks rows and makes problems of them: which fields a row must have, and what they must hold. Imports no torch.

A field is named as it stands in the row, or by dots through objects and lists: ``reward_model.ground_truth``. A run,
its held-out evaluation, a check before them and an estimate of difficulty all ask here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from hashlib import blake2b
from itertools import islice
from numbers import Real
from typing import Any, Protocol
from unicodedata import normalize

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.answers import reference_answers, written_number
from megatron_sead.prompts.exact_json import fault
from megatron_sead.prompts.messages import NO_TEXT, Conversation, as_text, conversation, with_instruction
from megatron_sead.prompts.row_mistakes import RowMistakes
from megatron_sead.prompts.rows import Row, stream_rows

SAME_ANSWER, OTHER_ANSWER = "the same answer; each counts as often as it stands there", "another answer"


class Asked(Protocol):
    """A problem, or a prompt made of it."""

    @property
    def id(self) -> str: ...

    @property
    def text(self) -> str: ...


@dataclass(frozen=True)
class Problem:
    """A row that can be asked and graded; not yet tokens."""

    place: str  # "FILE, line 3"
    id: str
    turns: Conversation
    teacher_turns: Conversation  # the same, unless the teacher has a prompt field of its own
    answers: tuple[str, ...]
    difficulty: float | None
    level: str | None

    @property
    def text(self) -> str:
        return as_text(self.turns)


def read_problems(
    settings: PromptSettings,
    setting: str = "prompts.path",
    *,
    teacher_prompt_field: str | None = None,
    needs_difficulty: bool = False,
    limit: int | None = None,
) -> list[Problem]:
    """`check_rows` of the first ``limit`` rows that `stream_rows` finds.

    Raises:
        UserError: whatever these refuse.
    """
    mistakes = RowMistakes()
    return check_rows(
        islice(stream_rows(settings, setting, mistakes), limit),
        settings,
        setting.partition(".")[0],
        teacher_prompt_field=teacher_prompt_field,
        needs_difficulty=needs_difficulty,
        mistakes=mistakes,
    )


def check_rows(
    rows: Iterable[Row],
    settings: PromptSettings,
    group: str = "prompts",
    *,
    teacher_prompt_field: str | None = None,
    needs_difficulty: bool = False,
    mistakes: RowMistakes | None = None,
) -> list[Problem]:
    """All that `stream_problems` makes.

    Args:
        mistakes: those that reading the rows has found, which are told with those found here.

    Raises:
        UserError: what `stream_problems` finds wrong, a line each kind of mistake.
    """
    found = RowMistakes() if mistakes is None else mistakes
    problems = list(
        stream_problems(
            rows,
            settings,
            found,
            group,
            teacher_prompt_field=teacher_prompt_field,
            needs_difficulty=needs_difficulty,
        )
    )
    found.refuse()
    return problems


def stream_problems(
    rows: Iterable[Row],
    settings: PromptSettings,
    mistakes: RowMistakes,
    group: str = "prompts",
    *,
    teacher_prompt_field: str | None = None,
    needs_difficulty: bool = False,
) -> Iterator[Problem]:
    """Every row as a problem.

    Args:
        mistakes: collects those of single rows, which are left out; the caller refuses them: a missing or blank prompt,
            messages that are no conversation, an answer that is none, an id given twice, a difficulty that is missing
            or outside [0, 1].
        group: of the settings that name the fields, for messages: prompts or evaluation.
        teacher_prompt_field: field with the teacher's own prompt; None: the student's text.
        needs_difficulty: a row without one is a mistake.

    Raises:
        UserError: prompts.instruction, which ends every prompt, is no text.
    """
    if (found := fault(settings.instruction)) is not None:
        raise UserError(f"{group}.instruction={settings.instruction!a}: {found}")
    places: dict[str, str] = {}
    for number, row in enumerate(rows):
        problem = None
        with mistakes.kept(row.place):
            problem = problem_of(row, number, settings, group, teacher_prompt_field)
            if problem.id in places:
                first = places[problem.id]
                if row.value(settings.id_field, None) is None:
                    first += " (a row without one has its number, from 0)"
                raise UserError(f"{row.place}: {settings.id_field} {problem.id!r} is given twice, first at {first}")
            if needs_difficulty and problem.difficulty is None:
                raise UserError(
                    f"{row.place}: has no {settings.difficulty_field!r}, which the curriculum needs; "
                    "measure it with `sead difficulty`, or set curriculum.mode=none"
                )
            places[problem.id] = row.place
        if problem is not None and places.get(problem.id) == row.place:
            yield problem


def same_text(text: str) -> bytes:
    """A key that two prompts share if they differ in spaces alone, or in how the same characters are encoded: é is one
    code point or two."""
    return blake2b(" ".join(normalize("NFC", text).split()).encode(), digest_size=16).digest()


class Repeats:
    """Prompts that stand in a set more than once: odd, and may be meant."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[str, int]] = {}  # place and answers of the first
        self._total = 0
        self._counts: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, problem: Problem) -> None:
        self._total += 1
        mine = problem.place, hash(problem.answers)
        place, answers = self._seen.setdefault(same_text(problem.text), mine)
        if place != problem.place:
            kind = SAME_ANSWER if answers == mine[1] else OTHER_ANSWER
            self._counts[kind] += 1
            self._first.setdefault(kind, f"{problem.place} and {place}")

    def counting(self, problems: Iterable[Problem]) -> Iterator[Problem]:
        """The same problems, each added when it is asked for."""
        for problem in problems:
            self.add(problem)
            yield problem

    def lines(self, source: str) -> list[str]:
        """Counted, a line a kind."""
        return [
            f"{source}: {self._counts[kind]} of {self._total} rows have the prompt of an earlier row and {kind} "
            f"(first: {self._first[kind]})"
            for kind in (SAME_ANSWER, OTHER_ANSWER)
            if self._counts[kind]
        ]


def repeats(problems: Iterable[Problem], source: str) -> list[str]:
    """`Repeats` of these problems, told."""
    found = Repeats()
    for problem in problems:
        found.add(problem)
    return found.lines(source)


def seen_in_training(heldout: Sequence[Asked], training: Sequence[Asked], source: str) -> list[str]:
    """A warning where problems that accuracy is measured on are also trained on; else nothing.

    Args:
        source: the setting that names the held-out prompts, and its value.
    """
    asked = {same_text(problem.text) for problem in heldout}
    trained = {key for problem in training if (key := same_text(problem.text)) in asked} if asked else set()
    shared = [problem for problem in heldout if same_text(problem.text) in trained]
    if not shared:
        return []
    return [
        f"{source}: {len(shared)} of {len(heldout)} prompts are trained on too (the first is {shared[0].id!r}): "
        "accuracy on them is not that on held-out problems"
    ]


def problem_of(
    row: Row, number: int, settings: PromptSettings, group: str = "prompts", teacher_prompt_field: str | None = None
) -> Problem:
    """One row.

    Args:
        number: of the row, from 0: the id of one that has none.

    Raises:
        UserError: as `stream_problems`, but for what rows have to do with each other.
    """
    turns = teacher_turns = turns_of(row, settings.prompt_field, f"{group}.prompt_field", settings)
    if teacher_prompt_field is not None:
        teacher_turns = turns_of(row, teacher_prompt_field, "teacher.prompt_field", settings)
    given_id = _name(row, settings.id_field, "prompts.id_field")
    return Problem(
        place=row.place,
        id=str(number) if given_id is None else given_id,
        turns=turns,
        teacher_turns=teacher_turns,
        answers=answers_of(row, settings.answer_field, f"{group}.answer_field"),
        difficulty=_difficulty(row, settings.difficulty_field),
        level=_name(row, settings.level_field, f"{group}.level_field"),
    )


def _field(row: Row, name: str, setting: str) -> Any:
    try:
        return row.value(name)
    except KeyError as error:
        raise UserError(f"{row.place}: has no {name!r}, which {setting} names; it has {error.args[0]}") from None


def turns_of(row: Row, name: str, setting: str, settings: PromptSettings) -> Conversation:
    value = _field(row, name, setting)
    try:
        turns = conversation("" if value is None else value)
    except ValueError as error:
        empty = "the prompt is empty, " if str(error).startswith(NO_TEXT) else ""
        raise UserError(f"{row.place}: {empty}{name!r} ({setting}) {error}") from None
    if settings.template == "plain" and len(turns) > 1:
        raise UserError(
            f"{row.place}: {name!r} ({setting}) is a conversation of {len(turns)} messages, which only a chat template "
            "makes into one text; prompts.template must be 'chat', not 'plain'"
        )
    return with_instruction(turns, settings.instruction)


def answers_of(row: Row, name: str, setting: str) -> tuple[str, ...]:
    try:
        answers = reference_answers(_field(row, name, setting))
    except ValueError as error:
        raise UserError(f"{row.place}: {name!r} holds no answer but {error}") from None
    if not answers:
        raise UserError(f"{row.place}: {name!r} holds no answer")
    return answers


def _name(row: Row, name: str, setting: str) -> str | None:
    """An id or a level: text or a number."""
    value = row.value(name, None)
    if value is None or isinstance(value, str):
        return value
    try:
        if type(value) is not bool and isinstance(value, Real | Decimal):
            return written_number(value)
    except ValueError:
        pass
    raise UserError(
        f"{row.place}: {name!r} is {_shown(value)}: must be text or a number; if this field means something else, set "
        f"{setting} to another name"
    )


def _difficulty(row: Row, name: str) -> float | None:
    value = row.value(name, None)
    if value is None:
        return None
    try:
        difficulty = float("nan" if isinstance(value, bool) else value)
    except (TypeError, ValueError, OverflowError):
        difficulty = float("nan")
    if not 0 <= difficulty <= 1:
        raise UserError(
            f"{row.place}: {name}={_shown(value)}: must be 1 - pass rate, in [0, 1]; if this field "
            "means something else, set prompts.difficulty_field to another name"
        )
    return difficulty


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Decimal) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
