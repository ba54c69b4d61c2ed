"""The pair is checked before it trains: same tokens, and no unnoticed difference in stop tokens or prompts.

Models that stop on different tokens are the commonest cause of responses that grow without end.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from rich.table import Table

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.models.token_ids import require_same_rows
from megatron_sead.prompts.token_tables import require_same_tokenizer, shown
from megatron_sead.prompts.tokenizer import PROBE, ModelTokenizer


@dataclass(frozen=True)
class PairAspect:
    """One thing that was compared."""

    name: str
    student: str
    teacher: str
    verdict: Literal["same", "mapped by config", "same prompt", "not used"]


@dataclass(frozen=True)
class PairReport:
    """What both models are, side by side. Rich prints it as a table."""

    aspects: tuple[PairAspect, ...]

    def __rich__(self) -> Table:
        table = Table("", "student", "teacher", "", title="The pair")
        for aspect in self.aspects:
            table.add_row(aspect.name, aspect.student, aspect.teacher, aspect.verdict)
        return table


def check_pair(
    student: ModelTokenizer,
    teacher: ModelTokenizer,
    student_settings: ModelSettings,
    teacher_settings: ModelSettings,
    template: Literal["chat", "plain"],
) -> PairReport:
    """Compare both models' tokenizers, widths of the vocabulary, stop tokens, chat templates and system prompts.

    Different tokenizers are always refused. Different stop tokens or prompts are refused unless a setting of either
    model says that they are meant: stop_token_ids, chat_template, system_prompt.

    Raises:
        UserError: the first difference that nothing maps, and the settings that would.
    """
    require_same_tokenizer(student.tables, teacher.tables)
    require_same_rows(student_settings.path, teacher_settings.path)
    return PairReport(
        (
            PairAspect("tokenizer", _size(student), _size(teacher), "same"),
            _compare_stop(student, teacher, student_settings, teacher_settings),
            *_compare_prompts(student, teacher, student_settings, teacher_settings, template),
        )
    )


def _compare_stop(
    student: ModelTokenizer, teacher: ModelTokenizer, student_settings: ModelSettings, teacher_settings: ModelSettings
) -> PairAspect:
    ours, theirs = set(student.stop_token_ids), set(teacher.stop_token_ids)
    verdict: Literal["same", "mapped by config"] = "same"
    if ours != theirs:
        if student_settings.stop_token_ids is None and teacher_settings.stop_token_ids is None:
            lists = f"{_tokens(student, student.stop_token_ids)} and {_tokens(teacher, teacher.stop_token_ids)}"
            raise UserError(
                f"student and teacher stop on different tokens: {lists}, from {student.stop_source} and "
                f"{teacher.stop_source}; say which are meant with student.stop_token_ids or teacher.stop_token_ids, "
                f"for example student.stop_token_ids={sorted(ours | theirs)}"
            )
        verdict = "mapped by config"
    return PairAspect(
        "stops on", _tokens(student, student.stop_token_ids), _tokens(teacher, teacher.stop_token_ids), verdict
    )


def _compare_prompts(
    student: ModelTokenizer,
    teacher: ModelTokenizer,
    student_settings: ModelSettings,
    teacher_settings: ModelSettings,
    template: Literal["chat", "plain"],
) -> tuple[PairAspect, ...]:
    if template == "plain":
        return (PairAspect("chat template", "", "", "not used"), *_left_out(student, teacher))
    ours, theirs = student.render(PROBE), teacher.render(PROBE)
    verdict: Literal["same", "mapped by config", "same prompt"] = "same"
    if ours != theirs:
        settings = (student_settings, teacher_settings)
        if all(s.chat_template is None and s.system_prompt is None for s in settings):
            place = next(i for i, pair in enumerate(zip_longest(ours, theirs)) if pair[0] != pair[1])
            raise UserError(
                "student and teacher would see different prompts: their chat templates differ from character "
                f"{place} of the prompt on, {shown(ours[place : place + 40])} and "
                f"{shown(theirs[place : place + 40])}; set student.chat_template or teacher.chat_template to a Jinja "
                "file, or student.system_prompt or teacher.system_prompt"
            )
        verdict = "mapped by config"
    elif student.chat_template != teacher.chat_template:
        verdict = "same prompt"
    same_system = student.system_prompt == teacher.system_prompt
    return (
        PairAspect("chat template", student.template_source, teacher.template_source, verdict),
        PairAspect(
            "system prompt",
            "none" if student.system_prompt is None else student.system_prompt,
            "none" if teacher.system_prompt is None else teacher.system_prompt,
            "same" if same_system else "mapped by config",
        ),
        PairAspect("a prompt", ours, theirs, "same" if ours == theirs else verdict),
    )


def _left_out(student: ModelTokenizer, teacher: ModelTokenizer) -> tuple[PairAspect, ...]:
    """Plain prompts are text as it is, also where a tokenizer by itself would begin it with BOS: that is shown."""
    ours, theirs = (", ".join(tokenizer.codec.added()) for tokenizer in (student, teacher))
    return (PairAspect("put around text by its tokenizer", ours, theirs, "not used"),) if ours or theirs else ()


def _size(tokenizer: ModelTokenizer) -> str:
    return f"{len(tokenizer.token_names):,} tokens, {tokenizer.path}"


def _tokens(tokenizer: ModelTokenizer, ids: tuple[int, ...]) -> str:
    return ", ".join(f"{token} {tokenizer.token_names.get(token, '?')}" for token in ids)
