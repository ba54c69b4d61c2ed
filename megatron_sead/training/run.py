"""A run in progress: what its steps use, and the small functions that the loop calls."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
from rich.console import Console
from torch.distributed import ProcessGroup

from megatron_sead.checkpoints.store import CheckpointStore
from megatron_sead.config.micro_batches import count_multiple, length_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.distillation import CompetenceTracker, Curriculum, annealing_coefficient
from megatron_sead.errors import UserError
from megatron_sead.grading.grader import Grader
from megatron_sead.models.decoder import Decoder
from megatron_sead.models.huggingface import iterate_huggingface_weights
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.prompts.packing import MicroBatch, pack
from megatron_sead.prompts.table import PromptTable
from megatron_sead.prompts.token_texts import TokenTexts
from megatron_sead.prompts.tokenizer import ModelTokenizer, TextsOnDemand
from megatron_sead.reporting.metrics import MetricsWriter
from megatron_sead.reporting.progress import StepProgress
from megatron_sead.reporting.rollout_metrics import ROLLOUT_METRICS, Written
from megatron_sead.rollouts.engine import EngineContext, EngineFailed, GenerationRequest, Rollout, RolloutEngine
from megatron_sead.rollouts.sharing import raise_together
from megatron_sead.training.inputs import Inputs
from megatron_sead.training.interrupt import InterruptFlag
from megatron_sead.training.step import Learner

AnswerT = TypeVar("AnswerT")


@dataclass
class RunState:
    """Where a run stands; saved with every checkpoint, so that a resumed run goes on as if never interrupted."""

    step: int = 0  # steps done, and the number of the next one: steps count from 0
    seconds: float = 0.0  # over all starts of the run
    accuracy_before: dict[str, Any] | None = None
    probe_tokens: list[int] = field(default_factory=list)  # of the run's first prompts, whatever they are now
    probe_log_probs: list[float] = field(default_factory=list)  # of the student as saved
    skipped_steps: int = 0  # whose numbers were not finite
    skipped_in_a_row: int = 0  # the last ones
    changed_inputs: list[str] = field(default_factory=list)  # since the run began, by consent


@dataclass(frozen=True)
class EngineScores:
    """Log-probabilities [n] of the same tokens, after the same update."""

    engine: torch.Tensor
    student: torch.Tensor


@dataclass
class Run:
    """Everything that the steps of a run use. Built by `setup.prepare`."""

    config: RunConfig
    parallel: ParallelContext
    learner: Learner
    student_chunks: list[Decoder]  # the student without Megatron's DDP around it
    tokenizer: ModelTokenizer
    prompts: PromptTable
    heldout: list[Prompt]  # to measure on; empty without evaluation.path
    engine_context: EngineContext  # the student's
    grader: Grader
    curriculum: Curriculum
    competence: CompetenceTracker
    store: CheckpointStore
    writer: MetricsWriter | None  # on the first rank
    console: Console
    interrupt: InterruptFlag
    state: RunState
    probe: list[int]
    inputs: Inputs
    started: float
    engine: RolloutEngine = field(init=False)  # made when the models have proven to be those of their directories
    engine_scores: EngineScores | None = None  # when the engine was last given weights
    told_of_mismatch: bool = False
    written: dict[int, list[Rollout]] = field(default_factory=dict)  # by step; of steps to come, where rollouts lag

    @cached_property
    def token_texts(self) -> TokenTexts:
        """Of the student's tokens; each is decoded once a start."""
        return TokenTexts(self.tokenizer)

    @property
    def length_multiple(self) -> int:
        """What padded lengths must be a multiple of, so that they split evenly over sequence-parallel ranks."""
        return length_multiple(self.config.parallel)

    def requests(self, asked: list[int]) -> list[GenerationRequest]:
        """What the engine is asked to write for these prompts."""
        return [
            GenerationRequest(self.prompts[index].id, sample, self.prompts[index].student_token_ids)
            for index in asked
            for sample in range(self.config.rollouts.samples_per_prompt)
        ]

    def prompt_of(self, rollout: Rollout) -> Prompt:
        """The prompt that a rollout answers."""
        number = self.prompts.find(rollout.prompt_id)
        if number is None:  # only a recorded one can
            raise UserError(
                f"rollouts.path={self.config.rollouts.recorded}: a rollout answers prompt {rollout.prompt_id!r}, which "
                f"prompts.path={self.config.prompts.path} does not hold; replay a run of the same prompts"
            )
        return self.prompts[number]

    def grade(self, rollouts: list[Rollout], group: ProcessGroup | None = None) -> list[bool]:
        """Right or wrong, on every rank; ranks share the work. Collective over the group; None: over all ranks."""
        texts = TextsOnDemand([rollout.response_token_ids for rollout in rollouts], self.tokenizer.decode)
        answers = [self.prompt_of(rollout).answers for rollout in rollouts]
        return self.grader.grade_all(texts, answers, group or self.parallel.control)

    def observe(self, rollouts: list[Rollout], correct: list[bool], step: int) -> float:
        """Let competence and curriculum see the grades, and return the step's alpha."""
        self.competence.update(sum(correct) / len(correct))
        graded = zip(rollouts, correct, strict=True)
        self.curriculum.update([(self.prompts.find(r.prompt_id) or 0, right) for r, right in graded])
        annealing = self.config.annealing
        u = {"step": step / self.config.training.steps, "competence": self.competence.u}
        u["larger"] = max(u.values())
        return annealing_coefficient(
            u[annealing.driver], start=annealing.start, end=annealing.end, shape=annealing.shape
        )

    def pack(self, rollouts: list[Rollout], *, shared: bool = True) -> list[MicroBatch]:
        """This data-parallel rank's micro-batches.

        Args:
            shared: the rollouts are a step's, which the data-parallel ranks share; else all are this rank's.
        """
        masks_truncated = self.config.training.mask_truncated
        size = self.config.training.micro_batch_size
        try:
            return pack(
                [r.prompt_token_ids for r in rollouts],
                [self.prompt_of(r).teacher_token_ids for r in rollouts],
                [r.response_token_ids for r in rollouts],
                [r.finished or not masks_truncated for r in rollouts],
                micro_batch_size=size if shared else math.gcd(size, len(rollouts)),
                data_parallel_rank=self.parallel.dp_rank if shared else 0,
                data_parallel_size=self.parallel.dp_size if shared else 1,
                length_multiple=self.length_multiple,
                pad_token_id=self.tokenizer.pad_token_id,
                device=self.parallel.device,
                log_probs=[r.log_probs for r in rollouts],
                micro_batch_tokens=self.config.training.micro_batch_tokens,
                count_multiple=count_multiple(self.config.parallel),
                share=self.parallel.share,
            )
        except ValueError as error:  # only recorded rollouts can be too many, too long, or empty
            raise UserError(f"rollouts.path={self.config.rollouts.recorded}: {error}") from None

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The student as (Hugging Face name, whole tensor), one at a time. Collective: consume it on every rank."""
        return iterate_huggingface_weights(self.student_chunks, self.parallel)

    def load_engine(self) -> None:
        """Wake the engine, and give it the student's weights. Collective.

        Raises:
            EngineFailed: it has other weights than the student, or did not get all, or died.
        """
        self.ask(self.engine.wake)
        self.ask(lambda: self.engine.load_weights(self.weights()))

    def ask(self, call: Callable[[], AnswerT], group: ProcessGroup | None = None) -> AnswerT:
        """What the engine answers. Collective: where one rank's fails, no other waits for it in the next collective.

        Args:
            group: gloo; None: all ranks.

        Raises:
            EngineFailed: the first rank's, on every rank.
        """
        answer, problem = None, None
        try:
            answer = call()
        except EngineFailed as error:
            problem = error
        except ValueError as error:
            problem = EngineFailed(f"rollouts.engine={self.config.rollouts.engine!r}: {error}")
        raise_together(problem, group or self.parallel.control)
        return cast(AnswerT, answer)

    def rollout_metrics(self, rollouts: list[Rollout], correct: list[bool], step: int) -> dict[str, Any]:
        """Metrics that need the rollouts and grades alone, and of the curriculum that chose their prompts."""
        lengths = [len(r.response_token_ids) for r in rollouts]
        written = Written(correct, [r.finished for r in rollouts], [r.repeated for r in rollouts], lengths)
        return {
            "competence": self.competence.value,
            "eligible_prompts": self.curriculum.eligible_count(step),
            "eligible_difficulty": self.curriculum.eligible_difficulty(step),
        } | {measured.metric.name: measured.value(written) for measured in ROLLOUT_METRICS}

    def progress_bar(self) -> StepProgress:
        """The bar that a person watches."""
        return StepProgress(
            self.console, total=self.config.training.steps, done=self.state.step, enabled=self.parallel.rank == 0
        )

    def checkpoint_due(self, step: int) -> bool:
        """Is a checkpoint to be written after this step?"""
        done, interval = step + 1, self.config.checkpoints.interval
        return done == self.config.training.steps or (interval > 0 and done % interval == 0)

    def seconds(self) -> float:
        """Wall time of the run, earlier starts included."""
        return self.state.seconds + time.perf_counter() - self.started

    def state_dict(self) -> dict[str, Any]:
        """All that is not in the model or the optimizer."""
        return {
            "progress": asdict(self.state),
            "curriculum": self.curriculum.state_dict(),
            "competence": self.competence.state_dict(),
            "supervisor": self.learner.supervisor.state_dict(),
            "written": {step: [asdict(r) for r in self.written[step]] for step in sorted(self.written)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint.

        Raises:
            UserError: its values are not of this make.
        """
        try:
            self.state = self._checked_state(state["progress"])
            self.probe = self.state.probe_tokens or self.probe
            self.curriculum.load_state_dict(state["curriculum"])
            self.competence.load_state_dict(state["competence"])
            self.learner.supervisor.load_state_dict(state["supervisor"])
            written = state.get("written", {})
            self.written = {step: [Rollout(**rollout) for rollout in written[step]] for step in sorted(written)}
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(
                f"{self.store.directory}: the newest checkpoint holds another run's state "
                f"({type(error).__name__}: {error}); restore it from a copy, or delete its folder"
            ) from error

    def _checked_state(self, saved: dict[str, Any]) -> RunState:
        """Where a checkpoint says that the run stands. Raises ValueError for what no run writes."""
        state = RunState(**saved)
        for name, value in asdict(state).items():
            if name != "accuracy_before" and type(value) is not type(getattr(RunState(), name)):
                raise ValueError(f"{name} is {value!r:.60}")
        if not 0 <= state.step <= self.config.training.steps:
            raise ValueError(f"step {state.step} of {self.config.training.steps}")
        tokens = state.probe_tokens
        if not all(type(t) is int and 0 <= t < self.learner.heads.vocab_size for t in tokens):
            raise ValueError("probe_tokens are not tokens of the student")
        if len(torch.tensor(state.probe_log_probs)) != len(tokens or self.probe) - 1:
            raise ValueError("probe_log_probs are not those of probe_tokens")
        return state
