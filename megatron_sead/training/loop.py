"""SEAD's Algorithm 1."""

from __future__ import annotations

import logging

from megatron_sead.config.run import RunConfig
from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.html_report.write import write_at_the_end
from megatron_sead.reporting.timing import PhaseTimer
from megatron_sead.rollouts.engine import EngineFailed, Rollout
from megatron_sead.training.conclude import conclude
from megatron_sead.training.early_scores import EarlyScores
from megatron_sead.training.engines import renew_engine
from megatron_sead.training.record import record_step, save
from megatron_sead.training.run import Run
from megatron_sead.training.setup import prepare
from megatron_sead.training.skipping import ended_while_writing, keep_skipped
from megatron_sead.training.step import train_step
from megatron_sead.training.token_record import watched
from megatron_sead.wording import counted

log = logging.getLogger(__name__)


def run(config: RunConfig) -> bool:
    """Distill as the config says, from the newest checkpoint of its output directory if there is one.

    Returns:
        True when all steps are done and ``student-hf/`` is written, False when a signal ended the run early: the
        same command continues it.

    Raises:
        UserError: a setting, file or layout must change; nothing was overwritten.
    """
    with prepare(config) as prepared:
        if not distill(prepared):
            if prepared.parallel.rank == 0:
                write_at_the_end(config.output)
            return False
        conclude(prepared)
        return True


def distill(run: Run) -> bool:
    """The steps that are left. False: interrupted, and saved."""
    early = EarlyScores(run) if run.config.rollouts.overlap else None
    with run.progress_bar() as bar:
        for step in range(run.state.step, run.config.training.steps):
            timer = PhaseTimer()
            with timer.phase("step"):
                with timer.phase("rollout"):
                    rollouts = _rollouts(run, step, early)
                    correct = run.grade(rollouts) if early is None else early.correct()
                    alpha = run.observe(rollouts, correct, step)
                micro_batches = run.pack(rollouts)
                teacher_hidden = None if early is None else early.teacher_hidden(micro_batches)
                watch = watched(run.config, step, rollouts)
                result = train_step(run.learner, micro_batches, alpha, step, teacher_hidden, watch)
                with timer.phase("sync"):
                    failure = _renew(run)

            bar.advance(record_step(run, step, rollouts, correct, alpha, watch, result, timer.metrics()))
            if result.reports is not None:
                keep_skipped(run, step, rollouts, result.reports)
            del run.written[step]
            run.state.step = step + 1
            if failure is not None:
                raise _saved_without_engine(run, failure) from failure
            stop = run.interrupt.agreed(run.parallel.control)
            if stop or run.checkpoint_due(step):
                save(run)
            if stop and run.state.step < run.config.training.steps:
                log.info("stopped after %s; saved, the same command continues", counted(run.state.step, "step"))
                return False
    return True


def _rollouts(run: Run, step: int, early: EarlyScores | None) -> list[Rollout]:
    """The step's responses. With a lag, those of later steps are written first, before this step changes the student;
    then the engine sleeps.

    Raises:
        UserError: the student's weights are spoilt; or the engine is, and the student is saved.
    """
    last = min(step + run.config.rollouts.lag, run.config.training.steps - 1)
    try:
        for number in range(step, last + 1):
            if number not in run.written:
                run.written[number] = _write(run, number, early)
        run.ask(run.engine.sleep)
    except EngineFailed as error:
        raise _saved_without_engine(run, error) from error
    return run.written[step]


def _write(run: Run, step: int, early: EarlyScores | None) -> list[Rollout]:
    asked = run.curriculum.next_batch(step)
    try:
        return run.engine.generate(run.requests(asked), step, meanwhile=None if early is None else early.meanwhile)
    except NotFiniteNumbers as error:
        raise ended_while_writing(run, step, asked, error) from None


def _renew(run: Run) -> EngineFailed | None:
    """The engine's new weights, proven; or why it cannot go on, which undoes nothing of the step."""
    try:
        renew_engine(run)
    except EngineFailed as error:
        return error
    return None


def _saved_without_engine(run: Run, failure: EngineFailed) -> UserError:
    """What to raise when the engine cannot go on: the student can, and is saved."""
    save(run)
    return UserError(f"{failure}; saved after {counted(run.state.step, 'step')}, the same command continues")
