"""From a configuration to everything that a step needs, checked in the order in which a mistake costs least."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from rich.console import Console

from megatron_sead.checkpoints.manifest import from_first_rank
from megatron_sead.checkpoints.store import CheckpointStore
from megatron_sead.config.checks import (
    OWNER_FILE,
    check_batch,
    check_output,
    check_world_size,
    config_warnings,
    opening_line,
)
from megatron_sead.config.micro_batches import check_token_budget
from megatron_sead.config.run import ModelSettings, RunConfig, dump_config
from megatron_sead.config.settings_file import flatten
from megatron_sead.distillation import CompetenceTracker, Curriculum
from megatron_sead.errors import UserError, kept
from megatron_sead.files.durable import replace_text
from megatron_sead.grading.grader import Grader
from megatron_sead.launch.ownership import sole_owner
from megatron_sead.models.builder import build_model
from megatron_sead.models.decoder import Decoder
from megatron_sead.models.huggingface import OpenWeights
from megatron_sead.models.tensor_files import TensorFiles
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.parallel.groups import parallel_groups
from megatron_sead.planning.plan import make_plan
from megatron_sead.planning.preflight import check_inputs
from megatron_sead.prompts.dataset import Prompt, stream_prompts
from megatron_sead.prompts.pair import check_pair
from megatron_sead.prompts.problems import seen_in_training
from megatron_sead.prompts.table import PromptTable
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer
from megatron_sead.reporting.elsewhere import Elsewhere, TensorBoard, WeightsAndBiases, require_wandb
from megatron_sead.reporting.metrics import MetricsWriter
from megatron_sead.reporting.starts import append_start
from megatron_sead.rollouts.engine import EngineContext
from megatron_sead.rollouts.registry import make_engine, packages_of, require_available
from megatron_sead.training.engines import start_engine
from megatron_sead.training.heldout import evaluate_directory, evaluate_student
from megatron_sead.training.inputs import Inputs, settle_inputs, versions
from megatron_sead.training.interrupt import InterruptFlag
from megatron_sead.training.optimizer import build_optimizer
from megatron_sead.training.parity import check_models, probe_tokens
from megatron_sead.training.prompt_sets import prompts_once_a_node
from megatron_sead.training.run import Run, RunState
from megatron_sead.training.scoring import Heads
from megatron_sead.training.step import Learner
from megatron_sead.training.supervision import Supervisor, policy_of
from megatron_sead.training.teacher import Teacher

log = logging.getLogger(__name__)


@contextmanager
def prepare(config: RunConfig) -> Iterator[Run]:
    """A run, ready for its next step: new, or where its newest whole checkpoint left it.

    Raises:
        UserError: whatever must change before it can run; an earlier run's files are left as they are.
    """
    started = time.perf_counter()
    require_available(config.rollouts)
    policy_of(config)
    require_wandb(config.reporting.wandb)
    check_output(config)
    with ExitStack() as stack:
        parallel = stack.enter_context(parallel_groups(config.parallel, config.device, config.seed))
        _own_output(config, parallel, stack)
        check_world_size(config, parallel.world_size)
        check_token_budget(config)
        with _telling_all_mistakes(config, parallel.world_size):
            student, teacher = load_tokenizer(config.student, "student"), load_tokenizer(config.teacher, "teacher")
            pair = check_pair(student, teacher, config.student, config.teacher, config.prompts.template)
            console = Console()
            if parallel.rank == 0:
                console.print(pair)
                log.info("%s", opening_line(config))
            prompts = prompts_once_a_node(lambda: _stream_prompts(config, student, teacher), parallel.control)
            check_batch(config, prompts.difficulties)
            check_token_budget(config, prompts.longest)
            heldout = _load_heldout(config, student, teacher)
            store = CheckpointStore(config.output / "checkpoints", config.checkpoints.keep, parallel)
            inputs = settle_inputs(config, (student, teacher), prompts, heldout, store, parallel.control)
            if parallel.rank == 0:
                _warn(config, inputs, prompts, heldout)
            stop_token_ids = student.stop_token_ids, teacher.stop_token_ids
            learner, chunks = build_learner(config, stop_token_ids, parallel)
        probe = probe_tokens(config.student.path, (p.student_token_ids for p in prompts))
        run = Run(
            config=config,
            parallel=parallel,
            learner=learner,
            student_chunks=chunks,
            tokenizer=student,
            prompts=prompts,
            heldout=heldout,
            engine_context=_engine_context(config, student, learner, chunks, _longest(config, prompts, heldout, probe)),
            grader=stack.enter_context(Grader(config.grading.timeout_seconds)),
            curriculum=_build_curriculum(config, prompts),
            competence=CompetenceTracker(smoothing=config.annealing.smoothing, target=config.annealing.target),
            store=store,
            writer=None,
            console=console,
            interrupt=InterruptFlag(),
            state=RunState(),
            probe=probe,
            inputs=inputs,
            started=started,
        )
        _begin_or_resume(run, stack)
        run.interrupt.listen()  # until now there was nothing to save, and a signal ended the process at once
        stack.callback(run.interrupt.restore)
        if parallel.rank == 0:
            run.writer = MetricsWriter(config.output, run.state.step, _elsewhere(run))
            stack.callback(run.writer.close)
        yield run


@contextmanager
def _telling_all_mistakes(config: RunConfig, world_size: int) -> Iterator[None]:
    """Tell a mistake in the inputs with all others that a check of the files finds, on every rank."""
    try:
        yield
    except UserError as error:
        first, others = str(error).splitlines(), list[str]()
        with kept(others):
            make_plan(config, world_size)
        with kept(others):
            check_inputs(config)
        if set(others) <= set(first):
            raise
        # A layout that does not divide a model is told by both, and the plan names the model's setting
        planned = {line.partition(": ")[0] for line in others if line.startswith("parallel.")}
        first = [line for line in first if line.partition(": ")[0] not in planned]
        raise UserError("\n".join(dict.fromkeys([*first, *others]))) from error


def _own_output(config: RunConfig, parallel: ParallelContext, stack: ExitStack) -> None:
    """Own the output directory until the stack ends; the first rank does so for all. Collective."""
    refusal = None
    if parallel.rank == 0:
        try:
            stack.enter_context(sole_owner(config.output / OWNER_FILE, f"output={config.output}"))
        except UserError as error:
            refusal = error
    refusal = from_first_rank(refusal, parallel.control)
    if refusal is not None:
        raise refusal


def _warn(config: RunConfig, inputs: Inputs, prompts: Sequence[Prompt], heldout: list[Prompt]) -> None:
    """Warn of what is valid and probably not meant."""
    shared = seen_in_training(heldout, prompts, f"evaluation.path={config.evaluation.path}")
    for line in [*config_warnings(config), *shared, *nothing_to_learn(config, inputs, prompts)]:
        log.warning("%s", line)


def nothing_to_learn(config: RunConfig, inputs: Inputs, prompts: Sequence[Prompt]) -> list[str]:
    """A warning where the teacher is the student; else nothing. Another prompt of the teacher's makes a difference."""
    student, teacher = (inputs.record[role]["weights"] for role in ("student", "teacher"))
    if student != teacher or any(prompt.student_token_ids != prompt.teacher_token_ids for prompt in prompts):
        return []
    return [
        f"student.path={config.student.path} and teacher.path={config.teacher.path} hold the same weights, and see the "
        "same prompts: every loss is 0, and nothing is learnt"
    ]


def _stream_prompts(config: RunConfig, student: ModelTokenizer, teacher: ModelTokenizer) -> Iterator[Prompt]:
    return stream_prompts(
        config.prompts,
        student,
        teacher,
        teacher_prompt_field=config.teacher.prompt_field,
        needs_difficulty=config.curriculum.mode != "none",
        max_new_tokens=config.rollouts.max_new_tokens,
    )


def _load_heldout(config: RunConfig, student: ModelTokenizer, teacher: ModelTokenizer) -> list[Prompt]:
    """The held-out prompts. The teacher answers the problem itself here, whatever its prompt in training."""
    evaluation, settings = config.evaluation, config.evaluation.prompts(config.prompts)
    if settings is None:
        return []
    prompts = stream_prompts(
        settings,
        student,
        teacher,
        setting="evaluation.path",
        max_new_tokens=evaluation.max_new_tokens or config.rollouts.max_new_tokens,
        room_setting=f"{'evaluation' if evaluation.max_new_tokens else 'rollouts'}.max_new_tokens",
        limit=evaluation.limit,
    )
    return list(prompts)


def _build_model(
    config: RunConfig,
    model: ModelSettings,
    parallel: ParallelContext,
    open_weights: OpenWeights,
    *,
    sequence_parallel_output: bool,
) -> list[Decoder]:
    return build_model(
        model.path,
        parallel,
        precision=config.training.precision,
        sequence_parallel=config.parallel.sequence_parallel,
        sequence_parallel_output=sequence_parallel_output,
        recompute_granularity=config.training.recompute_granularity,
        attention_backend=config.training.attention_backend,
        open_weights=open_weights,
    )


def build_learner(
    config: RunConfig,
    stop_token_ids: tuple[tuple[int, ...], tuple[int, ...]],
    parallel: ParallelContext,
    open_weights: OpenWeights = TensorFiles,
) -> tuple[Learner, list[Decoder]]:
    """Both models with their weights, and what trains the student; and the student's chunks. Collective.

    Args:
        stop_token_ids: the student's and the teacher's.
        open_weights: where weights are read from, if not from the models' directories.

    Raises:
        UserError: as `build_model`; or policy.top_k is beyond the vocabulary.
    """
    teacher_chunks = _build_model(
        config, config.teacher, parallel.for_teacher(), open_weights, sequence_parallel_output=False
    )
    frozen = Teacher(teacher_chunks, offload=config.teacher.offload)
    # The loss gathers
    student_chunks = _build_model(config, config.student, parallel, open_weights, sequence_parallel_output=True)
    _check_top_k(config, student_chunks[0].config.vocab_size)
    ddp_chunks, optimizer, scheduler = build_optimizer(student_chunks, config.training, parallel)
    heads = Heads(
        student=student_chunks[-1].head_weight,
        teacher=frozen.head,
        student_stop_token_ids=stop_token_ids[0],
        teacher_stop_token_ids=stop_token_ids[1],
        vocab_size=student_chunks[0].config.vocab_size,  # the teacher's too: check_pair has seen to it
        scratch_bytes=config.training.scratch_bytes,
        group=parallel.tp if parallel.tp_size > 1 else None,
        sequence_parallel=config.parallel.sequence_parallel,
        context=parallel.cp if parallel.cp_size > 1 else None,
    )
    supervisor = Supervisor(config, parallel.dp if parallel.dp_size > 1 else None)
    return Learner(ddp_chunks, frozen, optimizer, scheduler, heads, supervisor, parallel), student_chunks


def _engine_context(
    config: RunConfig, student: ModelTokenizer, learner: Learner, chunks: list[Decoder], max_length: int
) -> EngineContext:
    return EngineContext(
        config.student.path,
        stop_token_ids=student.stop_token_ids,
        pad_token_id=student.pad_token_id,
        seed=config.seed,
        device=learner.parallel.device,
        dtype=chunks[0].config.params_dtype,
        vocab_size=learner.heads.vocab_size,
        group=learner.parallel.control,
        max_length=max_length,
    )


def _longest(config: RunConfig, prompts: PromptTable, heldout: list[Prompt], probe: list[int]) -> int:
    """Tokens of the longest text that the engine may be asked to write or to score."""
    training, evaluation = config.rollouts.max_new_tokens, config.evaluation.max_new_tokens
    asked = [max(len(p.student_token_ids), len(p.teacher_token_ids)) + (evaluation or training) for p in heldout]
    return max(prompts.longest + training, *asked, len(probe) + 1)  # as `probe_tokens` says


def _check_top_k(config: RunConfig, vocab_size: int) -> None:
    if config.policy.name == "top_k" and config.policy.top_k > vocab_size:
        raise UserError(f"policy.top_k={config.policy.top_k}: must be at most {vocab_size}, the tokens there are")


def _build_curriculum(config: RunConfig, prompts: PromptTable) -> Curriculum:
    try:
        return Curriculum(
            prompts.difficulties,
            **config.curriculum.model_dump(),
            seed=config.seed,
            total_steps=config.training.steps,
            batch_size=config.training.global_batch_size // config.rollouts.samples_per_prompt,
        )
    except ValueError as error:
        raise UserError(f"curriculum, prompts.path={config.prompts.path}: {error}") from None


def _begin_or_resume(run: Run, stack: ExitStack) -> None:
    """Prove that the models are those of their directories; then measure the student as given, or load the newest
    checkpoint and prove that its student came back."""
    restored = run.store.load_latest(run.student_chunks, run.learner.optimizer, run.learner.scheduler)
    if restored is None:
        check_models(run, fresh=True)
    else:
        run.load_state_dict(restored)
        if run.inputs.changes:
            run.written.clear()  # what lies there may answer other prompts
        run.state.changed_inputs += [f"step {run.state.step}: {text}" for text in run.inputs.changes]
        log.info("continuing at step %d", run.state.step)
        check_models(run, fresh=False)
    if restored is not None and run.inputs.heldout_changed:
        run.state.accuracy_before = evaluate_directory(run, run.config.student.path, run.tokenizer)
    run.engine = make_engine(run.config.rollouts, run.engine_context)
    stack.callback(run.engine.close)
    start_engine(run)
    if run.parallel.rank == 0:
        run.config.output.mkdir(parents=True, exist_ok=True)
        replace_text(run.config.output / "config.yaml", dump_config(run.config))
        append_start(run.config.output, _start(run))
    if restored is None:
        run.state.accuracy_before = evaluate_student(run, run.config.student.path)
    torch.distributed.barrier(run.parallel.control)


def _elsewhere(run: Run) -> list[Elsewhere]:
    """Where else the run's numbers go."""
    config, reporting = run.config, run.config.reporting
    found: list[Elsewhere] = [TensorBoard(config.output, run.state.step)] if reporting.tensorboard else []
    if reporting.wandb != "off":
        settings = flatten(config.model_dump(mode="json"))
        found.append(WeightsAndBiases(config.output, reporting.wandb, reporting.wandb_project, settings))
    return found


def _start(run: Run) -> dict[str, Any]:
    """What somebody will want to know of this start of the run, and what the plan expects of its memory."""
    stages = make_plan(run.config, run.parallel.world_size).stages
    phase, peak = max((stage.peak for stage in stages), key=lambda found: found[1])
    packages = ("megatron-sead", "torch", "megatron-core", "transformers", *packages_of(run.config.rollouts))
    return {
        "step": run.state.step,
        "ranks": run.parallel.world_size,
        "prompts": len(run.prompts),
        "versions": versions(*packages),
        "gpu": torch.cuda.get_device_name() if run.parallel.device.type == "cuda" else None,
        "plan": {"phase": phase, "peak_bytes": peak},
    }
