"""What a run will need, from its configuration alone: layout, parameters and bytes per rank. No torch, no GPU.

Sizes come from each model's ``config.json``. Parameters are exact; the terms of memory are in `memory`, and whether a
GPU has as much is for `fit` to say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_sead.config.checks import check_world_size, config_warnings
from megatron_sead.config.micro_batches import check_token_budget, count_multiple, length_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError, kept
from megatron_sead.models.layout import check_layout
from megatron_sead.models.token_ids import require_same_rows
from megatron_sead.planning.memory import Load, StageBytes, stage_bytes
from megatron_sead.planning.shapes import ModelShape, read_shape
from megatron_sead.wording import counted

ASSUMED_PROMPT_TOKENS = 1024  # where prompts.max_prompt_tokens is not set
GPU_BYTES = 80 * 2**30


@dataclass(frozen=True)
class Plan:
    world_size: int
    data_parallel_size: int
    micro_batches: int  # a data-parallel rank and step
    sequence_length: int
    student: ModelShape
    teacher: ModelShape
    stages: list[StageBytes]
    notes: list[str]


def print_plan(plan: Plan, config: RunConfig) -> None:
    """A table a model, a table of bytes per rank, and the notes, on stdout."""
    console = Console(width=None if Console().is_terminal else 120)
    parallel = config.parallel
    context = f"context {parallel.context_parallel_size} x " if parallel.context_parallel_size > 1 else ""
    console.print(
        f"{counted(plan.world_size, 'rank')} = tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x {context}data {plan.data_parallel_size}; a step: "
        f"{counted(config.training.global_batch_size, 'rollout')}, {_told_micro_batches(plan, config)} a data-parallel "
        f"rank, at most {plan.sequence_length:,} tokens a rollout",
        highlight=False,
    )
    models = Table("model", "layers", "hidden", "heads", "KV heads", "MLP", "vocabulary", "parameters")
    for name, shape in (("student", plan.student), ("teacher", plan.teacher)):
        sizes = (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.vocabulary, shape.parameters)
        models.add_row(name, *(f"{size:,}" for size in sizes))
    console.print(models)
    console.print(_memory_table(plan))
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def _told_micro_batches(plan: Plan, config: RunConfig) -> str:
    count, budget = plan.micro_batches, config.training.micro_batch_tokens
    if budget is None:
        return f"{counted(count, 'micro-batch')} of {config.training.micro_batch_size}"
    return f"at most {counted(count, 'micro-batch')} of {budget:,} tokens"


ROWS = (
    ("student parameters", "parameters"),
    ("teacher parameters", "teacher_parameters"),
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations that wait for their backward pass", "activations"),
    ("teacher weights", "teacher_weights"),
    ("on the GPU in all phases", "resident"),
)
HOST_ROWS = (
    ("host: teacher weights, pinned", "teacher_weights_host"),
    ("host: teacher hidden states, pinned", "teacher_hidden_host"),
    ("host: a checkpoint being saved", "saving_host"),
)


def _memory_table(plan: Plan) -> Table:
    table = Table("per rank", *(f"stage {i}" for i in range(len(plan.stages))))
    for label, name in ROWS:
        values = [getattr(stage, name) for stage in plan.stages]
        table.add_row(label, *(f"{v:,}" if "parameters" in label else size_of(v) for v in values))
    for phase in plan.stages[0].phases:
        table.add_row(f"peak of phase: {phase}", *(size_of(stage.phases[phase]) for stage in plan.stages))
    table.add_row("peak of the step", *(f"{size_of(stage.peak[1])}, {stage.peak[0]}" for stage in plan.stages))
    for label, name in HOST_ROWS:
        table.add_row(label, *(size_of(getattr(stage, name)) for stage in plan.stages))
    return table


def size_of(count: float) -> str:
    """Bytes as a person reads them."""
    if count == 0:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def make_plan(
    config: RunConfig, world_size: int, gpu_bytes: int = GPU_BYTES, known: Mapping[str, ModelShape] | None = None
) -> Plan:
    """Check the layout against both models and count bytes per rank.

    Args:
        gpu_bytes: of a GPU, of which vLLM takes a share.
        known: the shapes of student and teacher, where they have been read.

    Raises:
        UserError: a line a mistake: unreadable or foreign config.json, sizes that the layout does not divide,
            vocabularies that differ, sequences longer than a model's context.
    """
    mistakes: list[str] = []
    with kept(mistakes):
        data_parallel_size = check_world_size(config, world_size)
    with kept(mistakes):
        check_token_budget(config)
    shapes: dict[str, ModelShape] = {}
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        with kept(mistakes):
            shapes[role] = read_shape(model, role) if known is None else known[role]
            _check_layout(config, f"{role}.path={model.path}", shapes[role])
    with kept(mistakes):
        if known is None:
            require_same_rows(config.student.path, config.teacher.path)
    length, notes = sequence_length(config, shapes)
    mistakes += _too_long(config, shapes, length)
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    micro_batches = most_micro_batches(config, data_parallel_size, length)
    if (missing := config.rollouts.missing()) is not None:
        notes.append(f"rollouts.engine={config.rollouts.engine}: {missing}; without it the run does not start")
    notes += [*config_warnings(config), *_told_uneven(config, shapes)]
    replicas = data_parallel_size * config.parallel.context_parallel_size
    stages = [
        stage_bytes(Load(config, stage, replicas, micro_batches, length), **shapes, gpu_bytes=gpu_bytes)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    return Plan(world_size, data_parallel_size, micro_batches, length, **shapes, stages=stages, notes=notes)


def _told_uneven(config: RunConfig, shapes: dict[str, ModelShape]) -> list[str]:
    """Layers by stage, of a model whose stages differ."""
    told = []
    for role, shape in shapes.items():
        stages = shape.stage_layers(config.parallel)
        if len({count for chunks in stages for count in chunks}) > 1:
            counts = ", ".join(" + ".join(map(str, chunks)) for chunks in stages)
            told.append(f"{role} layers by pipeline stage: {counts}")
    return told


def together(config: RunConfig, length: int) -> int:
    """Rollouts in a micro-batch, each of `length` tokens."""
    training = config.training
    if training.micro_batch_tokens is None:
        return training.micro_batch_size
    return max(1, training.micro_batch_tokens // length)


def left_of_budget(config: RunConfig, length: int) -> int:
    """Tokens of a packed micro-batch that so many rollouts of `length` leave."""
    budget, multiple = config.training.micro_batch_tokens, length_multiple(config.parallel)
    return 0 if budget is None else budget // multiple * multiple - together(config, length) * length


def most_micro_batches(config: RunConfig, data_parallel_size: int, length: int) -> int:
    """Of a data-parallel rank and step: packed ones are so many when every rollout is as long as it may be."""
    multiple = count_multiple(config.parallel)
    count = -(-config.training.global_batch_size // (together(config, length) * data_parallel_size))
    return -(-count // multiple) * multiple


def _check_layout(config: RunConfig, source: str, shape: ModelShape) -> None:
    check_layout(
        vars(shape.fields),
        source,
        tp=config.parallel.tensor_model_parallel_size,
        split=shape.split(config.parallel),
    )


def sequence_length(config: RunConfig, shapes: Mapping[str, ModelShape]) -> tuple[int, list[str]]:
    """Tokens of the longest rollout, prompt included; and a note where its prompt is assumed."""
    new, most = config.rollouts.max_new_tokens, config.prompts.max_prompt_tokens
    if most is not None:
        return most + new, []
    room = shapes["student"].context - new if "student" in shapes else ASSUMED_PROMPT_TOKENS
    assumed = max(0, min(ASSUMED_PROMPT_TOKENS, room))
    return assumed + new, [
        f"prompts are taken as {counted(assumed, 'token')} at most; set prompts.max_prompt_tokens to bound them"
    ]


def _too_long(config: RunConfig, shapes: dict[str, ModelShape], length: int) -> list[str]:
    """What does not fit into a model's context."""
    new, own = config.rollouts.max_new_tokens, config.evaluation.max_new_tokens
    prompt = length - new
    mistakes = [
        f"rollouts.max_new_tokens={new}: with prompts of up to {counted(prompt, 'token')} a sequence has "
        f"{length}, more than the {role}'s context of {shape.context}"
        if prompt
        else f"rollouts.max_new_tokens={new}: leaves no room for a prompt in the {role}'s context of {shape.context}"
        for role, shape in shapes.items()
        if length > shape.context or (not prompt and length == shape.context)
    ]
    context = min((shape.context for shape in shapes.values()), default=None)
    if config.evaluation.path is not None and own is not None and context is not None and own > context:
        mistakes.append(f"evaluation.max_new_tokens={own}: more than the models' context of {context}")
    return mistakes
