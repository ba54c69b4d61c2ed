"""Prompt sets: rows of a JSONL or parquet file, or of a hub data set, as prompts with ids, answers and tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from megatron_sead.config.run import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.messages import Conversation
from megatron_sead.prompts.problems import Problem, Repeats, stream_problems
from megatron_sead.prompts.row_mistakes import RowMistakes
from megatron_sead.prompts.rows import stream_rows
from megatron_sead.prompts.tokenizer import ModelTokenizer
from megatron_sead.wording import counted

log = logging.getLogger(__name__)


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
    setting: str = "prompts.path",
    teacher_prompt_field: str | None = None,
    needs_difficulty: bool = False,
    max_new_tokens: int = 0,
    room_setting: str = "rollouts.max_new_tokens",
    limit: int | None = None,
) -> list[Prompt]:
    """All that `stream_prompts` yields.

    Raises:
        UserError: whatever it refuses.
    """
    return list(
        stream_prompts(
            settings,
            student,
            teacher,
            setting=setting,
            teacher_prompt_field=teacher_prompt_field,
            needs_difficulty=needs_difficulty,
            max_new_tokens=max_new_tokens,
            room_setting=room_setting,
            limit=limit,
        )
    )


def stream_prompts(
    settings: PromptSettings,
    student: ModelTokenizer,
    teacher: ModelTokenizer | None = None,
    *,
    setting: str = "prompts.path",
    teacher_prompt_field: str | None = None,
    needs_difficulty: bool = False,
    max_new_tokens: int = 0,
    room_setting: str = "rollouts.max_new_tokens",
    limit: int | None = None,
) -> Iterator[Prompt]:
    """Read, check and tokenize a prompt set, row by row.

    At the end mistakes are told, all together, and in the log how many prompts stand there more than once.

    Args:
        teacher: None: the prompts are for one model alone, and its tokens stand for the teacher's too.
        setting: the setting that names the path, for messages.
        teacher_prompt_field: field with the teacher's own prompt; None: the student's text, in the teacher's template.
        needs_difficulty: a row without one is refused.
        max_new_tokens: room that a response must find in the context after the prompt.
        room_setting: the setting that says so, for messages.
        limit: read the first so many rows only.

    Raises:
        UserError: names file, line and field: whatever `stream_problems` refuses, and a prompt that is too long.
    """
    mistakes = RowMistakes()
    problems = stream_problems(
        islice(stream_rows(settings, setting, mistakes), limit),
        settings,
        mistakes,
        setting.partition(".")[0],
        teacher_prompt_field=teacher_prompt_field,
        needs_difficulty=needs_difficulty,
    )
    room, repeated = _Room(max_new_tokens, room_setting), Repeats()
    for problem in problems:
        repeated.add(problem)
        prompt = None
        with mistakes.kept(problem.place):
            prompt = _tokenize_one(problem, settings, student, teacher, room)
        if prompt is not None:
            yield prompt
    mistakes.refuse()
    for line in repeated.lines(f"{setting}={settings.path}"):
        log.info("%s", line)  # the first rank alone logs at this level


def tokenize(
    problems: Sequence[Problem],
    settings: PromptSettings,
    student: ModelTokenizer,
    teacher: ModelTokenizer | None = None,
    *,
    max_new_tokens: int = 0,
    room_setting: str = "rollouts.max_new_tokens",
) -> list[Prompt]:
    """Problems with their tokens, as `stream_prompts` says.

    Raises:
        UserError: prompts without tokens, or too long, a line each kind.
    """
    room, prompts, mistakes = _Room(max_new_tokens, room_setting), list[Prompt](), RowMistakes()
    for problem in problems:
        with mistakes.kept(problem.place):
            prompts.append(_tokenize_one(problem, settings, student, teacher, room))
    mistakes.refuse()
    return prompts


class _Room(NamedTuple):
    """For a response."""

    tokens: int
    setting: str


def _tokenize_one(
    problem: Problem, settings: PromptSettings, student: ModelTokenizer, teacher: ModelTokenizer | None, room: _Room
) -> Prompt:
    tokens = _tokens(problem.turns, problem, settings, student, room)
    return Prompt(
        id=problem.id,
        text=problem.text,
        answers=problem.answers,
        difficulty=problem.difficulty,
        level=problem.level,
        student_token_ids=tokens,
        teacher_token_ids=(
            tokens if teacher is None else _tokens(problem.teacher_turns, problem, settings, teacher, room)
        ),
    )


def _tokens(
    turns: Conversation, problem: Problem, settings: PromptSettings, tokenizer: ModelTokenizer, room: _Room
) -> tuple[int, ...]:
    tokens = prompt_tokens(turns, problem.place, settings, tokenizer)
    where = f"{problem.place}: prompt {problem.id!r} has {counted(len(tokens), 'token')}"
    if settings.max_prompt_tokens is not None and len(tokens) > settings.max_prompt_tokens:
        raise UserError(f"{where}, more than prompts.max_prompt_tokens={settings.max_prompt_tokens}")
    context = tokenizer.context_length
    if context is not None and len(tokens) + room.tokens > context:
        reason = (
            f", which leaves no room for {room.tokens} new ones ({room.setting})" if room.tokens else ", more than fit"
        )
        raise UserError(f"{where}{reason} in the {tokenizer.role}'s context of {context}")
    return tokens


def prompt_tokens(
    turns: Conversation, place: str, settings: PromptSettings, tokenizer: ModelTokenizer
) -> tuple[int, ...]:
    """Token ids of a prompt, whatever their number.

    Raises:
        UserError: whatever `ModelTokenizer.render` refuses; a prompt without tokens.
    """
    try:
        rendered = tokenizer.render(turns) if settings.template == "chat" else turns[0].content
    except UserError as error:
        raise error if len(turns) == 1 else UserError(f"{place}: {error}") from None
    tokens = tokenizer.encode(rendered)
    if not tokens:
        raise UserError(f"{place}: the prompt is empty: it has no tokens")
    return tokens
