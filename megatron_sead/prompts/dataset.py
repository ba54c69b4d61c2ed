"""Prompt sets: rows of a JSONL or parquet file, or of a hub data set, as prompts with ids, answers and tokens."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.messages import Conversation
from megatron_sead.prompts.problems import Problem, Repeats, stream_problems
from megatron_sead.prompts.row_mistakes import RowMistakes
from megatron_sead.prompts.rows import stream_rows
from megatron_sead.prompts.tokenizer import ModelTokenizer
from megatron_sead.wording import counted

log = logging.getLogger(__name__)

AT_ONCE = 512  # prompts of one call of the tokenizer, which shares them among its threads
Tokens = tuple[int, ...]


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
    """Read, check and tokenize a prompt set; few of its rows are in memory at a time.

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
    repeated = Repeats()
    tokenizing = _Tokenizing(settings, max_new_tokens, room_setting, mistakes)
    yield from tokenizing.prompts(repeated.counting(problems), student, teacher)
    mistakes.refuse()
    for line in repeated.lines(f"{setting}={settings.path}"):
        log.info("%s", line)  # the first rank alone logs at this level
    if (told := tokenizing.rendered.line(f"{setting}={settings.path}")) is not None:
        log.warning("%s", told)


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
    mistakes = RowMistakes()
    tokenizing = _Tokenizing(settings, max_new_tokens, room_setting, mistakes)
    prompts = list(tokenizing.prompts(problems, student, teacher))
    mistakes.refuse()
    return prompts


@dataclass
class _Rendered:
    """Prompts that look as if they came out of the chat template: how many of a role, and the first one's place."""

    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def count(self, turns: Conversation, place: str, tokenizer: ModelTokenizer) -> None:
        if tokenizer.is_rendered(turns):
            self.counts[tokenizer.role] += 1
            self.first.setdefault(tokenizer.role, place)

    def line(self, prompts: str) -> str | None:
        """What to warn of; None: nothing."""
        for role, count in self.counts.items():
            return (
                f"{prompts}: {counted(count, 'prompt')} with a beginning or an end that the {role}'s chat template "
                f"writes, the first at {self.first[role]}; the template is applied to them all the same. If they are "
                "rendered already, set prompts.template=plain"
            )
        return None


@dataclass(frozen=True)
class _Tokenizing:
    """Problems become prompts, some at a time; those with a mistake are left out."""

    settings: PromptSettings
    max_new_tokens: int  # room for a response
    room_setting: str
    mistakes: RowMistakes
    rendered: _Rendered = field(default_factory=_Rendered)

    def prompts(
        self, problems: Iterable[Problem], student: ModelTokenizer, teacher: ModelTokenizer | None
    ) -> Iterator[Prompt]:
        """`teacher` as in `stream_prompts`."""
        encode_equally = teacher is not None and teacher.codec.encodes_as(student.codec)
        following = iter(problems)
        while piece := list(islice(following, AT_ONCE)):
            ours = self._tokens([(problem, problem.turns) for problem in piece], student, {})
            theirs = ours
            if teacher is not None:
                asked = [(problem, problem.teacher_turns) for problem in piece if problem.place in ours]
                theirs = self._tokens(asked, teacher, dict(ours.values()) if encode_equally else {})
            yield from (
                Prompt(
                    id=problem.id,
                    text=problem.text,
                    answers=problem.answers,
                    difficulty=problem.difficulty,
                    level=problem.level,
                    student_token_ids=ours[problem.place][1],
                    teacher_token_ids=theirs[problem.place][1],
                )
                for problem in piece
                if problem.place in theirs
            )

    def _tokens(
        self, asked: list[tuple[Problem, Conversation]], tokenizer: ModelTokenizer, known: Mapping[str, Tokens]
    ) -> dict[str, tuple[str, Tokens]]:
        """The text and the tokens of each prompt, by its problem's place.

        Args:
            known: tokens of texts, which need not be encoded again.
        """
        texts: dict[str, str] = {}
        for problem, turns in asked:
            with self.mistakes.kept(problem.place):
                texts[problem.place] = _rendered(turns, problem.place, self.settings, tokenizer)
                if self.settings.template == "chat":
                    self.rendered.count(turns, problem.place, tokenizer)
        new = list({text: None for text in texts.values() if text not in known})
        tokens = {**known, **dict(zip(new, tokenizer.encode_all(new), strict=True))}
        fitting: dict[str, tuple[str, Tokens]] = {}
        for problem, _ in asked:
            if (text := texts.get(problem.place)) is not None:
                with self.mistakes.kept(problem.place):
                    self._require_room(tokens[text], problem, tokenizer)
                    fitting[problem.place] = text, tokens[text]
        return fitting

    def _require_room(self, tokens: Tokens, problem: Problem, tokenizer: ModelTokenizer) -> None:
        _require_some(tokens, problem.place)
        where = f"{problem.place}: prompt {problem.id!r} has {counted(len(tokens), 'token')}"
        most = self.settings.max_prompt_tokens
        if most is not None and len(tokens) > most:
            raise UserError(f"{where}, more than prompts.max_prompt_tokens={most}")
        context, new = tokenizer.context_length, self.max_new_tokens
        if context is not None and len(tokens) + new > context:
            reason = f", which leaves no room for {new} new ones ({self.room_setting})" if new else ", more than fit"
            raise UserError(f"{where}{reason} in the {tokenizer.role}'s context of {context}")


def prompt_tokens(turns: Conversation, place: str, settings: PromptSettings, tokenizer: ModelTokenizer) -> Tokens:
    """Token ids of a prompt, whatever their number.

    Raises:
        UserError: whatever `ModelTokenizer.render` refuses; a prompt without tokens.
    """
    tokens = tokenizer.encode(_rendered(turns, place, settings, tokenizer))
    _require_some(tokens, place)
    return tokens


def _rendered(turns: Conversation, place: str, settings: PromptSettings, tokenizer: ModelTokenizer) -> str:
    try:
        return tokenizer.render(turns) if settings.template == "chat" else turns[0].content
    except UserError as error:
        raise error if len(turns) == 1 else UserError(f"{place}: {error}") from None


def _require_some(tokens: Tokens, place: str) -> None:
    if not tokens:
        raise UserError(f"{place}: the prompt is empty: it has no tokens")
