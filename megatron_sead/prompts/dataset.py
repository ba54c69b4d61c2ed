"""Prompt sets: rows of a JSONL or parquet file, or of a hub data set, as prompts with ids, answers and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sead.config import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.answers import reference_answers
from megatron_sead.prompts.rows import Row, read_rows
from megatron_sead.prompts.tokenizer import ModelTokenizer


@dataclass(frozen=True)
class Prompt:
    """One problem."""

    id: str
    text: str
    answers: tuple[str, ...]  # more than one: all must be given
    difficulty: float | None  # 1 - pass rate of the initial student
    level: str | None
    student_token_ids: tuple[int, ...]
    teacher_token_ids: tuple[int, ...]


def load_prompts(
    settings: PromptSettings,
    student: ModelTokenizer,
    teacher: ModelTokenizer | None = None,
    *,
    teacher_prompt_field: str | None = None,
    max_new_tokens: int = 0,
    limit: int | None = None,
) -> list[Prompt]:
    """Read, check and tokenize a prompt set.

    Args:
        teacher: None: the prompts are for one model alone, and its tokens stand for the teacher's too.
        teacher_prompt_field: field with the teacher's own prompt; None: the student's text, in the teacher's template.
        max_new_tokens: room that a response must find in the context after the prompt.
        limit: read the first so many rows only.

    Raises:
        UserError: names file, line and field: whatever `read_rows` refuses, a missing field or answer, an id given
            twice, a difficulty outside [0, 1], a prompt that is empty or too long.
    """
    rows = read_rows(settings)[:limit]
    prompts, places = [], dict[str, str]()
    for number, row in enumerate(rows):
        prompt = _make_prompt(row, number, settings, student, teacher, teacher_prompt_field)
        if prompt.id in places:
            raise UserError(
                f"{row.place}: {settings.id_field} {prompt.id!r} is given twice, first at {places[prompt.id]}"
            )
        places[prompt.id] = row.place
        _require_room(prompt.student_token_ids, prompt.id, row, settings, student, max_new_tokens)
        if teacher is not None:
            _require_room(prompt.teacher_token_ids, prompt.id, row, settings, teacher, max_new_tokens)
        prompts.append(prompt)
    return prompts


def _make_prompt(
    row: Row,
    number: int,
    settings: PromptSettings,
    student: ModelTokenizer,
    teacher: ModelTokenizer | None,
    teacher_prompt_field: str | None,
) -> Prompt:
    text = _text(row, settings.prompt_field, "prompts.prompt_field") + settings.instruction
    student_tokens = _tokenize(text, settings, student)
    teacher_tokens = student_tokens
    if teacher is not None:
        teacher_text = text
        if teacher_prompt_field is not None:
            teacher_text = _text(row, teacher_prompt_field, "teacher.prompt_field") + settings.instruction
        teacher_tokens = _tokenize(teacher_text, settings, teacher)
    if not student_tokens or not teacher_tokens:
        raise UserError(f"{row.place}: the prompt is empty")
    answers = reference_answers(_field(row, settings.answer_field, "prompts.answer_field"))
    if not answers:
        raise UserError(f"{row.place}: {settings.answer_field!r} holds no answer")
    given_id, level = row.fields.get(settings.id_field), row.fields.get(settings.level_field)
    return Prompt(
        id=str(number if given_id is None else given_id),
        text=text,
        answers=answers,
        difficulty=_difficulty(row, settings),
        level=None if level is None else str(level),
        student_token_ids=student_tokens,
        teacher_token_ids=teacher_tokens,
    )


def _tokenize(text: str, settings: PromptSettings, tokenizer: ModelTokenizer) -> tuple[int, ...]:
    return tokenizer.encode(tokenizer.render(text) if settings.template == "chat" else text)


def _field(row: Row, name: str, setting: str) -> Any:
    if name not in row.fields:
        raise UserError(
            f"{row.place}: has no {name!r}, which {setting} names; it has {', '.join(map(repr, row.fields))}"
        )
    return row.fields[name]


def _text(row: Row, name: str, setting: str) -> str:
    value = _field(row, name, setting)
    if not isinstance(value, str):
        raise UserError(f"{row.place}: {name!r} ({setting}) must be text, not {type(value).__name__}")
    return value


def _difficulty(row: Row, settings: PromptSettings) -> float | None:
    value = row.fields.get(settings.difficulty_field)
    if value is None:
        return None
    try:
        difficulty = float(value)
    except (TypeError, ValueError):
        difficulty = float("nan")
    if not 0 <= difficulty <= 1:
        raise UserError(
            f"{row.place}: {settings.difficulty_field}={value!r}: must be 1 - pass rate, in [0, 1]; if this field "
            "means something else, set prompts.difficulty_field to another name"
        )
    return difficulty


def _require_room(
    tokens: tuple[int, ...],
    prompt_id: str,
    row: Row,
    settings: PromptSettings,
    tokenizer: ModelTokenizer,
    max_new_tokens: int,
) -> None:
    where = f"{row.place}: prompt {prompt_id!r} has {len(tokens)} tokens"
    if settings.max_prompt_tokens is not None and len(tokens) > settings.max_prompt_tokens:
        raise UserError(f"{where}, more than prompts.max_prompt_tokens={settings.max_prompt_tokens}")
    context = tokenizer.context_length
    if context is not None and len(tokens) + max_new_tokens > context:
        room = f", which leaves no room for {max_new_tokens} new ones" if max_new_tokens else ", more than fit"
        raise UserError(f"{where}{room} in the {tokenizer.role}'s context of {context}")
