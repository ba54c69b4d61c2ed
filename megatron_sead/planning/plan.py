"""What a run will need, from its configuration alone: layout, parameters and bytes per rank. No torch, no GPU.

Sizes come from each model's ``config.json``. Weights, gradients and optimizer state are exact; activations are an
estimate of what the backward pass keeps (the terms are in `_activation_bytes`), without allocator and library overhead.
"""

from __future__ import annotations

from dataclasses import dataclass
from dataclasses import field as dataclass_field
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sead.config.checks import check_world_size, config_warnings
from megatron_sead.config.micro_batches import check_token_budget, count_multiple
from megatron_sead.config.run import ModelSettings, ParallelSettings, RunConfig
from megatron_sead.errors import UserError, kept
from megatron_sead.models.family import read_config_fields
from megatron_sead.models.layout import check_layout
from megatron_sead.models.token_ids import require_same_rows
from megatron_sead.models.weights import named_weights, placed_weights
from megatron_sead.planning.tokenizer_files import require_model_directory
from megatron_sead.wording import counted

ASSUMED_PROMPT_TOKENS = 1024  # where prompts.max_prompt_tokens is not set


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a dense decoder."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    context: int
    fields: Any = dataclass_field(repr=False)  # of `config_fields`, as attributes

    @property
    def query_width(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_width(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """Of the Hugging Face checkpoint: true vocabulary, no padding."""
        return sum(named.weight.elements for named in named_weights(self.fields))

    def rank_parameters(self, stage: int, parallel: ParallelSettings) -> int:
        """On one tensor-parallel rank of a pipeline stage, padded vocabulary rows included."""
        tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
        chunks = parallel.virtual_pipeline_model_parallel_size or 1
        weights = placed_weights(self.fields, pp, chunks)
        return sum(placed.weight.rank_elements(tp) for placed in weights if placed.pp_rank == stage)


@dataclass(frozen=True)
class StageBytes:
    """Bytes on one rank of a pipeline stage; the host fields are in its share of the node's memory."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    teacher_parameters: int
    teacher_weights: int
    teacher_hidden_host: int  # at most: every response as long as rollouts.max_new_tokens
    scratch: int

    @property
    def device_total(self) -> int:
        """Everything at once: an upper bound where teacher.offload takes the teacher off before training."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.teacher_weights + self.scratch


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
    console.print(
        f"{counted(plan.world_size, 'rank')} = tensor {parallel.tensor_model_parallel_size} x pipeline "
        f"{parallel.pipeline_model_parallel_size} x data {plan.data_parallel_size}; a step: "
        f"{counted(config.training.global_batch_size, 'rollout')}, {_told_micro_batches(plan, config)} a data-parallel "
        f"rank, at most {plan.sequence_length:,} tokens a rollout",
        highlight=False,
    )
    models = Table("model", "layers", "hidden", "heads", "KV heads", "MLP", "vocabulary", "parameters")
    for name, shape in (("student", plan.student), ("teacher", plan.teacher)):
        sizes = (shape.layers, shape.hidden, shape.heads, shape.kv_heads, shape.ffn, shape.vocabulary, shape.parameters)
        models.add_row(name, *(f"{size:,}" for size in sizes))
    console.print(models)
    table = Table("per rank", *(f"stage {i}" for i in range(len(plan.stages))))
    for label, field in ROWS:
        values = [getattr(stage, field) for stage in plan.stages]
        table.add_row(label, *(f"{v:,}" if "parameters" in label else size_of(v) for v in values))
    console.print(table)
    for note in plan.notes:
        console.print(f"note: {note}", highlight=False, soft_wrap=True, markup=False)


def _told_micro_batches(plan: Plan, config: RunConfig) -> str:
    count, budget = plan.micro_batches, config.training.micro_batch_tokens
    if budget is None:
        return f"{counted(count, 'micro-batch')} of {config.training.micro_batch_size}"
    return f"at most {counted(count, 'micro-batch')} of {budget:,} tokens"


ROWS = (
    ("student parameters", "parameters"),
    ("weights", "weights"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("activations (estimate)", "activations"),
    ("loss scratch", "scratch"),
    ("teacher parameters", "teacher_parameters"),
    ("teacher weights", "teacher_weights"),
    ("device, all at once", "device_total"),
    ("host: teacher hidden states", "teacher_hidden_host"),
)


def size_of(count: float) -> str:
    """Bytes as a person reads them."""
    if count == 0:
        return "-"
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / 2**20:.2f} MiB"


def make_plan(config: RunConfig, world_size: int) -> Plan:
    """Check the layout against both models and count bytes per rank.

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
            shapes[role] = read_shape(model, role)
            _check_layout(config, f"{role}.path={model.path}", shapes[role])
    with kept(mistakes):
        require_same_rows(config.student.path, config.teacher.path)
    length, notes = _sequence_length(config, shapes)
    mistakes += _too_long(config, shapes, length)
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))
    micro_batches = _most_micro_batches(config, data_parallel_size, length)
    if (missing := config.rollouts.missing()) is not None:
        notes.append(f"rollouts.engine={config.rollouts.engine}: {missing}; without it the run does not start")
    notes += config_warnings(config)
    stages = [
        _stage_bytes(config, shapes["student"], shapes["teacher"], stage, data_parallel_size, micro_batches, length)
        for stage in range(config.parallel.pipeline_model_parallel_size)
    ]
    return Plan(world_size, data_parallel_size, micro_batches, length, **shapes, stages=stages, notes=notes)


def _most_micro_batches(config: RunConfig, data_parallel_size: int, length: int) -> int:
    """Of a data-parallel rank and step: packed ones are so many when every rollout is as long as it may be."""
    training, multiple = config.training, count_multiple(config.parallel)
    together = training.micro_batch_size
    if training.micro_batch_tokens is not None:
        together = max(1, training.micro_batch_tokens // length)
    count = -(-training.global_batch_size // (together * data_parallel_size))
    return -(-count // multiple) * multiple


def _check_layout(config: RunConfig, source: str, shape: ModelShape) -> None:
    check_layout(
        vars(shape.fields),
        source,
        tp=config.parallel.tensor_model_parallel_size,
        pp=config.parallel.pipeline_model_parallel_size,
        virtual=config.parallel.virtual_pipeline_model_parallel_size,
    )


def _sequence_length(config: RunConfig, shapes: dict[str, ModelShape]) -> tuple[int, list[str]]:
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


def read_shape(model: ModelSettings, role: str) -> ModelShape:
    """Shape of a Hugging Face directory's model.

    Raises:
        UserError: no such directory, no readable config.json, or what `config_fields` refuses.
    """
    require_model_directory(model, role)
    fields = read_config_fields(model.path)
    return ModelShape(
        layers=fields["num_layers"],
        hidden=fields["hidden_size"],
        heads=fields["num_attention_heads"],
        kv_heads=fields["num_query_groups"],
        head_dim=fields["kv_channels"],
        ffn=fields["ffn_hidden_size"],
        vocabulary=fields["vocab_size"],
        context=fields["max_position_embeddings"],
        fields=SimpleNamespace(**fields),
    )


def _stage_bytes(
    config: RunConfig,
    student: ModelShape,
    teacher: ModelShape,
    stage: int,
    data_parallel_size: int,
    micro_batches: int,
    length: int,
) -> StageBytes:
    training, parallel = config.training, config.parallel
    width = 2 if training.precision == "bf16" else 4
    count = student.rank_parameters(stage, parallel)
    teacher_count = teacher.rank_parameters(stage, parallel)
    # Adam's two fp32 moments; bf16 adds the fp32 main weights
    state = count * (12 if training.precision == "bf16" else 8)
    if training.use_distributed_optimizer:
        state = -(-state // data_parallel_size)
    is_last = stage == parallel.pipeline_model_parallel_size - 1
    response_tokens = training.global_batch_size // data_parallel_size * config.rollouts.max_new_tokens
    return StageBytes(
        parameters=count,
        weights=count * width,
        gradients=count * 4,  # fp32, whatever the weights are
        optimizer=state,
        activations=_activation_bytes(config, student, stage, micro_batches, length, width),
        teacher_parameters=teacher_count,
        teacher_weights=teacher_count * width,
        teacher_hidden_host=response_tokens * teacher.hidden * width if is_last else 0,
        scratch=training.scratch_bytes if is_last else 0,
    )


def _activation_bytes(
    config: RunConfig, shape: ModelShape, stage: int, micro_batches: int, length: int, width: int
) -> int:
    """What the backward pass keeps on a rank while the most micro-batches are in flight (1F1B: pp - stage).

    Per token and layer, in elements. Split over tp only with sequence parallelism, six hidden-wide: the two inputs, the
    two block outputs before and after their norms. Split over tp: q, k, v; q and k normalised and rotated; the
    attention's output; gate, up and their product. Full recompute keeps one layer's input and rebuilds one layer at a
    time; selective rebuilds the attention core, which flash attention does anyway.
    """
    parallel = config.parallel
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    tokens = config.training.micro_batch_tokens or config.training.micro_batch_size * length
    hidden = shape.hidden // (tp if parallel.sequence_parallel else 1)
    widths = 4 * (shape.query_width + shape.key_width) + 3 * shape.ffn
    layer = tokens * (6 * hidden + widths // tp) * width
    in_flight = float(min(micro_batches, pp - stage))
    virtual = parallel.virtual_pipeline_model_parallel_size
    if virtual is not None:  # interleaving keeps (pp - 1) / virtual more (Narayanan et al. 2021, section 2.2)
        in_flight = min(float(micro_batches), pp - stage + (pp - 1) / virtual)
    layers = shape.layers // pp
    if config.training.recompute_granularity == "full":
        return int(in_flight * layers * tokens * hidden * width) + layer
    return int(in_flight * layers * layer)
