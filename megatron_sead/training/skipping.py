"""What is kept of a step that was skipped, and when a run that skips its steps ends."""

from __future__ import annotations

import logging

from megatron_sead.checkpoints.manifest import from_first_rank
from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.rollouts.engine import EngineFailed, Rollout
from megatron_sead.rollouts.records import write_records
from megatron_sead.training.not_finite import (
    FOLDER,
    KEPT,
    Report,
    describe,
    gather_reports,
    weights_are_finite,
    write_reports,
)
from megatron_sead.training.parity import student_log_probs
from megatron_sead.training.run import Run

log = logging.getLogger(__name__)


def keep_skipped(run: Run, step: int, rollouts: list[Rollout], reports: list[Report]) -> None:
    """Write down what a skipped step saw: its rollouts and every rank's report. Collective.

    Raises:
        UserError: it was one too many in a row.
    """
    state, most = run.state, run.config.training.max_skipped_steps
    state.skipped_steps += 1
    state.skipped_in_a_row += 1
    where = _keep_batch(run, step, rollouts, reports)
    if run.parallel.rank == 0:
        log.warning("step %d is skipped, the student stays as it was: %s (%s)", step, describe(reports), where)
    if state.skipped_in_a_row >= most:
        raise UserError(
            f"step {step}: {describe(reports)}. {state.skipped_in_a_row} steps in a row were skipped, as many as "
            f"training.max_skipped_steps={most}; {where}. {remedy(run)}"
        )


def ended_while_writing(run: Run, step: int, asked: list[int], error: NotFiniteNumbers) -> UserError:
    """What to raise when numbers are not finite as rollouts are written: no step can mend the student's weights; where
    these are sound, the engine has failed. Collective."""
    if _student_is_sound(run):
        return EngineFailed(f"rollouts.engine={run.config.rollouts.engine!r}: {error}, and the student's are")
    reports = gather_reports(run.parallel, run.learner.student, str(error))
    assert reports is not None
    prompts = [run.prompts[index].id for index in asked]
    where = _keep_batch(run, step, [], [report | {"prompts": prompts} for report in reports])
    return UserError(f"step {step}: {error}: the student's weights are spoilt; {where}. {remedy(run)}")


def _student_is_sound(run: Run) -> bool:
    """Are its weights finite, and what it makes of the probe? Collective."""
    if not weights_are_finite(run.student_chunks, run.parallel):
        return False
    try:
        student_log_probs(run, run.probe)
    except NotFiniteNumbers:
        return False
    return True


def _keep_batch(run: Run, step: int, rollouts: list[Rollout], reports: list[Report]) -> str:
    """Keep a skipped step's batch and reports, and say on every rank where they are."""
    where = f"{KEPT} steps are kept in {run.config.output / FOLDER} already"
    if run.parallel.rank == 0:
        folder = write_reports(run.config.output, step, reports)
        if folder is not None:
            if rollouts:
                write_records(folder / "rollouts.jsonl", rollouts)
            where = f"its batch and every rank's norms are in {folder}"
    return str(from_first_rank(where, run.parallel.control))


def remedy(run: Run) -> str:
    """What to do about a run that comes to the same end whenever it is resumed. Collective."""
    newest, lr = run.store.newest(), f"training.lr={run.config.training.lr:g}"
    if newest is None:
        return f"The same command comes here again: lower {lr}, in another output directory"
    return (
        f"From {newest} the same command comes here again: lower {lr} in another output directory, whose student.path "
        "megatron-to-hf makes of that checkpoint"
    )
