"""One optimizer step: teacher scores, student scores where zones need it, then forward, loss, backward, update."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_sead.distillation import NotFiniteError, Thresholds, TokenScores
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.reporting.timing import PhaseTimer
from megatron_sead.training.measure import measure_tokens
from megatron_sead.training.mismatch import measure_mismatch
from megatron_sead.training.not_finite import Report, gather_reports, own_grad_norm
from megatron_sead.training.optimizer import apply_gradients
from megatron_sead.training.pipeline import OnHidden, run_schedule
from megatron_sead.training.scoring import Heads, score_student
from megatron_sead.training.seen_tokens import NOBODY, Outcome, SeenTokens, Watch
from megatron_sead.training.supervision import StepTokens, Supervision, Supervisor
from megatron_sead.training.teacher import Teacher

log = logging.getLogger(__name__)


@dataclass
class Learner:
    """The student that trains, the teacher that scores it, and what updates the student."""

    student: list[torch.nn.Module]  # chunks under Megatron's DDP
    teacher: Teacher
    optimizer: Any  # megatron.core MegatronOptimizer
    scheduler: Any  # megatron.core OptimizerParamScheduler
    heads: Heads
    supervisor: Supervisor
    parallel: ParallelContext


@dataclass
class StepResult:
    """What a step did. The tokens' fields are filled on the last pipeline stage alone."""

    metrics: dict[str, float] = field(default_factory=dict)  # of the whole step, on every rank
    tokens: SeenTokens | None = None  # of this rank; None of a skipped step, too
    reports: list[Report] | None = None  # of a step that was skipped: every rank's, on every rank


def train_step(
    learner: Learner,
    micro_batches: list[MicroBatch],
    alpha: float,
    step: int,
    teacher_hidden: list[torch.Tensor] | None = None,
    watch: Watch = NOBODY,
    timer: PhaseTimer | None = None,
) -> StepResult:
    """Update the student once on this rank's share of a step's rollouts. Collective over all ranks.

    The loss is Megatron's per-token sum: gradients are divided by the count over all ranks and micro-batches, so
    that no mean of means arises. A step whose numbers are not finite on any rank is skipped on all, by the rule of
    `not_finite`; its result has the ranks' reports.

    Args:
        teacher_hidden: the teacher's states of the micro-batches, `Heads.own_rows`, where they are known already.
        watch: of which rollouts the likeliest tokens are wanted. The loss knows nothing of it.
        timer: is told which part of the step runs.
    """
    timer, problems = timer or PhaseTimer(), list[str]()
    with timer.phase("score"):
        if teacher_hidden is None:
            with timer.part("teacher"):
                teacher_hidden = learner.teacher.hidden_states(micro_batches, learner.parallel, learner.heads.own_rows)
        with timer.part("student scores"):
            decided, reports = _score_step(learner, micro_batches, teacher_hidden, alpha, step)
    if reports is not None:
        return _skipped(learner, reports)

    def distill(index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Any]:
        micro_batch, heads = micro_batches[index], learner.heads
        from_teacher = teacher_hidden[index].to(hidden.device, non_blocking=True)
        try:
            if decided is not None:
                score, supervision = decided[index]
            else:
                score, supervision = _decide(learner, hidden, from_teacher, micro_batch, alpha, step)
            tokens = (hidden, from_teacher, supervision.weights, micro_batch)
            loss = heads.loss(*tokens, learner.supervisor.token_loss, score.student_log_prob)
            likeliest = watch.likeliest(heads, hidden, from_teacher, micro_batch)
        except NotFiniteError as error:  # told after the pass: the other stages and replicas are waiting in it
            problems.append(str(error))
            return _without_loss(hidden, heads)
        counted = supervision.count.int() * (learner.parallel.cp_rank == 0)  # all of them count the same tokens
        return loss, counted, Outcome(loss.detach(), score, supervision, likeliest)

    with timer.phase("train"):
        with timer.part("training pass"):
            outcomes = _forward_backward(learner, micro_batches, distill)
        loss, count = _global_loss(outcomes, learner.parallel)
        norm = own_grad_norm(learner.optimizer)
        reports = gather_reports(learner.parallel, learner.student, _first(problems), loss=loss, grad_norm=norm)
        if reports is not None:
            return _skipped(learner, reports)
        result, thresholds = StepResult(), None
        if learner.parallel.is_last_stage:
            with timer.part("measure"):
                result, thresholds = _measure(learner, micro_batches, outcomes)
        with timer.part("optimizer"):
            result.metrics |= {"loss": loss, "active_tokens": count} | _update(learner, count, step)
    result.metrics |= timer.metrics()
    result.metrics, thresholds = _from_last_stage((result.metrics, thresholds), learner.parallel)
    learner.supervisor.remember(thresholds)
    if learner.parallel.rank == 0:
        learner.supervisor.warn_of_floor(thresholds, step)
    return result


def _score_step(
    learner: Learner,
    micro_batches: list[MicroBatch],
    teacher_hidden: list[torch.Tensor],
    alpha: float,
    step: int,
) -> tuple[list[tuple[TokenScores, Supervision]] | None, list[Report] | None]:
    """Score and supervise the whole step before it trains, where the policy or its zones need all tokens together.

    Returns:
        What was decided for each micro-batch; None before the last stage, and where the training pass decides. And
        the reports of a step that must be skipped.
    """
    if not learner.supervisor.needs_whole_step() or len(micro_batches) == 1:  # a single one is the whole step
        return None, None
    problems: list[str] = []
    scores = score_student(learner.student, micro_batches, teacher_hidden, learner.heads, learner.parallel, problems)
    reports = gather_reports(learner.parallel, learner.student, _first(problems))
    if reports is not None or not learner.parallel.is_last_stage:
        return None, reports
    supervised = learner.supervisor.supervise_step(scores, micro_batches, alpha, step)
    return list(zip(scores, supervised, strict=True)), None


def _forward_backward(learner: Learner, micro_batches: list[MicroBatch], distill: OnHidden) -> list[Any]:
    """The training pass, from empty gradients to those that the optimizer is about to apply."""
    for chunk in learner.student:
        chunk.zero_grad_buffer()  # type: ignore[operator]  # Megatron's DistributedDataParallel
    learner.optimizer.zero_grad()
    outcomes = run_schedule(
        learner.student, micro_batches, "student", distill, parallel=learner.parallel, forward_only=False
    )
    learner.optimizer.prepare_grads()
    return outcomes


def _without_loss(hidden: torch.Tensor, heads: Heads) -> tuple[torch.Tensor, torch.Tensor, None]:
    """Of a micro-batch that cannot be trained on: every parameter gets a gradient, as Megatron expects, which no
    optimizer will see."""
    assert heads.student is not None
    nothing = 0 * (hidden.float().sum() + heads.student.float().sum())
    return nothing, torch.zeros((), dtype=torch.int, device=hidden.device), None


def _first(problems: list[str]) -> str | None:
    return problems[0] if problems else None


def _decide(
    learner: Learner,
    hidden: torch.Tensor,
    from_teacher: torch.Tensor,
    micro_batch: MicroBatch,
    alpha: float,
    step: int,
) -> tuple[TokenScores, Supervision]:
    """Score and supervise one micro-batch within the training pass.

    Raises:
        NotFiniteError: its logits are not finite; or those of another replica, where all take part in supervision.
    """
    score, problem = None, None
    try:
        score = learner.heads.score(hidden, from_teacher, micro_batch)
    except NotFiniteError as error:
        problem = error
    if learner.supervisor.needs_whole_step():
        bad = torch.tensor(int(problem is not None), device=hidden.device)
        torch.distributed.all_reduce(bad, torch.distributed.ReduceOp.MAX, group=learner.parallel.dp)
        if bad and problem is None:
            problem = NotFiniteError("another replica's logits are not finite")
    if score is None or problem is not None:
        raise problem or NotFiniteError("no scores")
    if learner.supervisor.needs_whole_step():
        (supervision,) = learner.supervisor.supervise_step([score], [micro_batch], alpha, step)
    else:
        supervision = learner.supervisor.supervise_micro_batch(score, micro_batch, alpha, step)
    return score, supervision


def _skipped(learner: Learner, reports: list[Report]) -> StepResult:
    """End a skipped step: only the schedule moves on."""
    learning_rate = learner.optimizer.param_groups[0]["lr"]
    learner.scheduler.step(increment=1)
    return StepResult({"learning_rate": learning_rate}, reports=reports)


def _from_last_stage(found: Any, parallel: ParallelContext) -> Any:
    """Send what the last pipeline stage has found to every rank; it alone saw the tokens."""
    first_of_last_stage = parallel.world_size - parallel.world_size // parallel.pp_size
    box = [found]
    torch.distributed.broadcast_object_list(box, src=first_of_last_stage, group=parallel.control)
    return box[0]


def _global_loss(outcomes: list[Any], parallel: ParallelContext) -> tuple[float, int]:
    """The step's loss and what it was divided by, on every rank."""
    totals = torch.zeros(2, dtype=torch.float64, device=parallel.device)
    for outcome in filter(None, outcomes):
        # Ranks that share sequences have each their part of the loss, and all of the count
        totals += torch.stack([outcome.loss.double(), outcome.supervision.count.double() / parallel.cp_size])
    torch.distributed.all_reduce(totals, group=parallel.dp_with_cp)
    torch.distributed.broadcast(totals, group_src=parallel.pp_size - 1, group=parallel.pp)
    total, count = totals.tolist()
    return total / max(1.0, count), round(count)


def _update(learner: Learner, count: int, step: int) -> dict[str, float]:
    """Clip and apply the gradients. A step in which no token teaches changes nothing, momentum included."""
    learning_rate = learner.optimizer.param_groups[0]["lr"]
    grad_norm = 0.0
    if count > 0:
        grad_norm = apply_gradients(learner.optimizer)
    else:
        log.warning("step %d: no token teaches (every weight is zero); the student is left as it is", step)
    learner.scheduler.step(increment=1)
    return {"grad_norm": grad_norm, "learning_rate": learning_rate}


def _measure(
    learner: Learner, micro_batches: list[MicroBatch], outcomes: list[Outcome]
) -> tuple[StepResult, Thresholds]:
    """Metrics of the tokens that were just trained on, and where the step's quantile zones begin."""
    scores = [outcome.score for outcome in outcomes]
    tokens = StepTokens.of(scores, micro_batches)
    zones = torch.cat([outcome.supervision.zones for outcome in outcomes])
    thresholds = outcomes[0].supervision.thresholds
    if thresholds is None:
        by_quantiles, thresholds = learner.supervisor.quantile_zones(tokens)
        zones = zones if learner.supervisor.reads_zones else by_quantiles
    metrics = measure_tokens(tokens, zones, scores, micro_batches, learner.parallel.dp)
    metrics |= measure_mismatch(scores, micro_batches, learner.parallel.dp)
    metrics |= {"tau_teacher": thresholds.teacher, "tau_student": thresholds.student}
    return StepResult(metrics, SeenTokens(tokens, zones, outcomes)), thresholds
