"""The run's rollout engine: new weights after every update, and the proof that it writes with them."""

from __future__ import annotations

import logging
import math

import torch
import torch.distributed as dist

from megatron_sead.errors import NotFiniteNumbers
from megatron_sead.rollouts.engine import EngineFailed
from megatron_sead.training.parity import TOLERANCE, largest_difference, student_log_probs
from megatron_sead.training.run import EngineScores, Run

log = logging.getLogger(__name__)

UPDATE_PROBE = 65  # tokens of the probe that are scored after an update; at the start it is all of them
USUAL = 20.0  # nats; a model that knows nothing of 100,000 tokens gives each 11.5


def start_engine(run: Run) -> None:
    """Give the engine the weights that the run begins with, and prove it on the whole probe. Collective.

    Raises:
        EngineFailed: it died, or would write with another model than the one that learns.
    """
    run.load_engine()
    if not run.engine.has_weights:
        log.info(
            "rollouts.engine=%s: comes without weights; that its responses are the student's is not checked",
            run.config.rollouts.engine,
        )
        return
    check_engine(run, run.probe, logging.INFO)


def renew_engine(run: Run) -> None:
    """Give the engine the student's weights, so that the next rollouts are on-policy, and prove it. Collective.

    Raises:
        EngineFailed: it died, has others, or its old ones.
    """
    run.load_engine()
    if run.engine.has_weights:
        check_engine(run, run.probe[:UPDATE_PROBE])


def check_engine(run: Run, tokens: list[int], level: int = logging.DEBUG) -> None:
    """Compare the engine's log-probabilities of a text with the student's, and check that an update moved both.
    Collective.

    A bf16 engine differs from Megatron by as much as many updates move a student, so closeness alone would not show old
    weights: an engine none of whose numbers has moved while the student's have was not updated.

    Args:
        level: at which the difference is logged.

    Raises:
        EngineFailed: on every rank alike.
    """
    try:
        student = student_log_probs(run, tokens)
    except NotFiniteNumbers:
        return  # the next rollouts or the checkpoint tell it, with what to do
    scores = EngineScores(run.ask(lambda: run.engine.score(tokens)), student)
    precision, engine = run.config.training.precision, f"rollouts.engine={run.config.rollouts.engine}"
    # Of a student that diverges log-probabilities are large, and so are their rounding errors
    allowed = TOLERANCE[precision] * max(1.0, student.abs().mean().item() / USUAL)
    difference = largest_difference(scores.engine, student)
    told = "%s and student: log-probabilities differ by %.1e nats over %d tokens, %.0e are allowed"
    log.log(level, told, engine, difference, len(student), allowed)
    stands_still = run.engine_scores is not None and _engine_alone_stands_still(run.engine_scores, scores)
    run.engine_scores = scores
    worst = torch.tensor([difference / allowed if math.isfinite(difference) else math.inf, float(stands_still)])
    dist.all_reduce(worst, dist.ReduceOp.MAX, group=run.parallel.control)
    if worst[1]:
        raise EngineFailed(
            f"{engine}: still writes with old weights: the student's log-probabilities have moved, its not"
        )
    if not worst[0] <= 1:
        raise EngineFailed(
            f"{engine} and the student do not agree: log-probabilities differ by {worst[0] * allowed:.2e} nats a "
            f"token, at most {allowed:.0e} are allowed with training.precision={precision}"
        )


def _engine_alone_stands_still(before: EngineScores, now: EngineScores) -> bool:
    count = min(len(before.student), len(now.student))
    moved = (now.student[:count] != before.student[:count]).float().mean()
    return bool(moved > 0.5) and torch.equal(now.engine[:count], before.engine[:count])
