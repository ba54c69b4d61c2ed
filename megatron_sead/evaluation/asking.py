"""Ask, grade, keep: every sample of every prompt once, however often the command is killed on the way.

Difficulty and benchmarks ask here. The order of requests is fixed, and so are the batches in which they are asked: an
answer depends on neither, but for a model's last bits, which depend on what it computes together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from megatron_sead.checkpoints.manifest import from_first_rank
from megatron_sead.evaluation.tally import Graded, Key, Tally
from megatron_sead.grading.grader import Grader
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.prompts.tokenizer import ModelTokenizer
from megatron_sead.rollouts.engine import GenerationRequest, Rollout, RolloutEngine, Sampling

Advance = Callable[[int], None]  # answers that have come
Asked = Sequence[tuple[Prompt, int]]  # prompts, each with the number of the sample


@dataclass(frozen=True)
class Questions:
    """Prompts, how many samples of each, and how their tokens are chosen."""

    prompts: Sequence[Prompt]
    samples: int
    sampling: Sampling
    step: int  # stands for a training step in what rollouts are drawn from

    @property
    def asked(self) -> list[tuple[Prompt, int]]:
        """In order: a prompt's samples follow each other, so that an engine can read the prompt once."""
        return [(prompt, sample) for prompt in self.prompts for sample in range(self.samples)]

    @property
    def keys(self) -> list[Key]:
        """As a tally has them, in order."""
        return [(prompt.id, sample) for prompt, sample in self.asked]


@dataclass(frozen=True)
class Examiner:
    """Who asks and grades.

    Args:
        at_once: requests of one call of the engine. Whatever is in it when the command is killed is asked again.
        group: gloo, the ranks that share the work; each calls everything here.
    """

    engine: RolloutEngine
    tokenizer: ModelTokenizer
    grader: Grader
    at_once: int
    group: dist.ProcessGroup

    def ask_missing(self, questions: Questions, tally: Tally | None, advance: Advance) -> None:
        """Ask what the tally does not hold yet, a batch at a time, and keep each batch when it is graded. Collective.

        Args:
            tally: on the group's first rank, which writes; None on the others.
        """
        done = from_first_rank(None if tally is None else frozenset(tally.answers), self.group)
        asked = questions.asked
        for start in range(0, len(asked), self.at_once):
            batch = [
                (prompt, sample)
                for prompt, sample in asked[start : start + self.at_once]
                if (prompt.id, sample) not in done
            ]
            if batch:
                graded = self._examine(batch, questions)
                if tally is not None:
                    tally.add(graded)
                advance(len(batch))

    def _examine(self, batch: Asked, questions: Questions) -> list[tuple[Graded, str]]:
        rollouts = ask(self.engine, self.tokenizer, batch, questions.step, questions.sampling)
        texts = [self.tokenizer.decode(rollout.response_token_ids) for rollout in rollouts]
        verdicts = self.grader.grade_all(texts, [prompt.answers for prompt, _ in batch], self.group)
        return [
            (
                Graded(rollout.prompt_id, rollout.sample, len(rollout.response_token_ids), rollout.finished, correct),
                text,
            )
            for rollout, text, correct in zip(rollouts, texts, verdicts, strict=True)
        ]


def ask(engine: RolloutEngine, tokenizer: ModelTokenizer, asked: Asked, step: int, sampling: Sampling) -> list[Rollout]:
    """The engine's answers, in order. The tokenizer's role says whose prompt it sees: student's or teacher's."""
    teacher = tokenizer.role == "teacher"
    requests = [
        GenerationRequest(prompt.id, sample, prompt.teacher_token_ids if teacher else prompt.student_token_ids)
        for prompt, sample in asked
    ]
    return engine.generate(requests, step, sampling)


@contextmanager
def progress(what: str, total: int, done: int, *, shown: bool = True) -> Iterator[Advance]:
    """A bar that counts answers, on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(what, total=total, completed=done)
        yield lambda count: bar.advance(task, count)
