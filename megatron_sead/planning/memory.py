"""Bytes on a rank, phase by phase of a step. No torch: all terms are written out, and held against traces (`tracing`).

A phase's peak is what is there all the time, and what the phase adds. Sizes are those of tensors: what torch's
allocator loses to fragmentation, and what libraries hold, is an allowance on top (`fit`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_sead.config.micro_batches import length_multiple
from megatron_sead.config.rollouts import TransformersRollouts, VllmRollouts
from megatron_sead.config.run import RunConfig
from megatron_sead.models.slabs import aligned, slabs
from megatron_sead.planning.shapes import ModelShape

# Shapes: t tokens of a micro-batch; u of them that a rank's norms see, t/tp with sequence parallelism; h hidden size;
# q, k query and key width, f feed-forward width, V vocabulary, all on one tensor-parallel rank

FP32 = 4


@dataclass(frozen=True)
class Load:
    """What a rank of a pipeline stage works on."""

    config: RunConfig
    stage: int
    replicas: int
    micro_batches: int  # a data-parallel rank and step
    length: int  # of the longest rollout

    @property
    def tokens(self) -> int:
        """Of a micro-batch, t."""
        training = self.config.training
        return training.micro_batch_tokens or training.micro_batch_size * self.length

    @property
    def responses(self) -> int:
        """Response tokens of a micro-batch, n."""
        return self.tokens * self.config.rollouts.max_new_tokens // self.length

    @property
    def share(self) -> int:
        """Of a micro-batch's tokens, those between the tensor-parallel parts of a layer, u."""
        return self.tokens // length_multiple(self.config.parallel)

    @property
    def width(self) -> int:
        """Bytes of a weight and of an activation."""
        return 2 if self.config.training.precision == "bf16" else FP32

    @property
    def tp(self) -> int:
        return self.config.parallel.tensor_model_parallel_size

    @property
    def is_last(self) -> bool:
        return self.stage == self.config.parallel.pipeline_model_parallel_size - 1

    @property
    def in_flight(self) -> float:
        """Micro-batches whose activations are kept: 1F1B keeps pp - stage; interleaving (pp - 1) / virtual more
        (Narayanan et al. 2021, section 2.2)."""
        parallel = self.config.parallel
        stages, virtual = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size
        most = stages - self.stage + (0 if virtual is None else (stages - 1) / virtual)
        return min(float(self.micro_batches), most)


@dataclass(frozen=True)
class StageBytes:
    """On one rank of a pipeline stage. Host memory is of this rank alone."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int  # that wait for their backward pass
    teacher_parameters: int
    teacher_weights: int
    resident: int  # on the device in every phase
    engine: int  # in the phase of rollouts
    phases: dict[str, int] = field(default_factory=dict)  # device peaks
    teacher_weights_host: int = 0  # pinned
    teacher_hidden_host: int = 0  # pinned; at most: every response as long as rollouts.max_new_tokens
    saving_host: int = 0  # while a checkpoint is written

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and how much."""
        name = max(self.phases, key=lambda phase: self.phases[phase])
        return name, self.phases[name]

    @property
    def host(self) -> int:
        """What is pinned, and a save beside it."""
        return self.teacher_weights_host + self.teacher_hidden_host + self.saving_host


def stage_bytes(load: Load, student: ModelShape, teacher: ModelShape, gpu_bytes: int) -> StageBytes:
    """Count a stage.

    Args:
        gpu_bytes: of the GPU, of which the rollout engine may be told to take a share.
    """
    config, width = load.config, load.width
    count, teacher_count = (shape.rank_parameters(load.stage, config.parallel) for shape in (student, teacher))
    shard = -(-count // load.replicas) if config.training.use_distributed_optimizer else count
    state = shard * FP32 * (3 if width == 2 else 2)  # Adam's two moments; bf16 adds the main weights
    head = width * _head(teacher, load) if load.is_last else 0
    kept = head if config.teacher.offload else teacher_count * width
    gathered = width * load.tokens * student.hidden if config.parallel.sequence_parallel else 0  # Megatron's buffer
    # Megatron's models hold what they received last, the student's with its gradient
    received = [width * load.share * (load.stage > 0) * hidden for hidden in (2 * student.hidden, teacher.hidden)]
    resident = count * (width + FP32) + state + kept + gathered + sum(received)
    waiting = int(load.in_flight * _kept_for_backward(load, student))
    output = width * teacher.hidden * (load.tokens if load.is_last else load.share)
    added = {
        "rollouts": _engine(config, student, gpu_bytes),
        "teacher": teacher_count * width - kept + max(_forward(load, teacher, output), _hidden_rows(load, teacher)),
        "student scores": max(
            _forward(load, student, width * load.share * student.hidden) - received[0],
            _scoring(load, student, teacher),
        ),
        "training pass": waiting + max(_layer_backward(load, student), _loss(load, student, teacher)),
        "optimizer": shard * FP32,  # Adam over lists of tensors needs one more of each
    }
    return StageBytes(
        parameters=count,
        weights=count * width,
        gradients=count * FP32,
        optimizer=state,
        activations=waiting,
        teacher_parameters=teacher_count,
        teacher_weights=teacher_count * width,
        resident=resident,
        engine=added["rollouts"],
        phases={phase: resident + size for phase, size in added.items()},
        teacher_weights_host=_pinned_weights(load, teacher) if config.teacher.offload else 0,
        teacher_hidden_host=_pinned(_own_rows(load) * teacher.hidden * width) * load.micro_batches * load.is_last,
        saving_host=count * FP32 * (3 if width == 2 else 2),
    )


# --- Activations ------------------------------------------------------------------------------------------------------


def _layer(load: Load, shape: ModelShape, window: int | None) -> int:
    """What a layer keeps for its backward pass when nothing is computed again.

    Its input and the sum in the middle, and what its norms read or write beside them. Queries and keys before their
    norms; rotated; the projection, which values are a view of, or keys and values once for each query; the attention's
    output. Gate and up, and the product.
    """
    t, u, w, h = load.tokens, load.share, load.width, shape.hidden
    q, k, f = shape.query_width // load.tp, shape.key_width // load.tp, shape.ffn // load.tp
    normalized = w * (q + k) * t if shape.norms_queries else 0
    repeated = q > k and (window is None or load.length <= window or w == FP32)
    keys = 2 * w * q * t if repeated else w * (q + 2 * k) * t + w * k * t
    attention = keys + 2 * w * q * t + FP32 * shape.heads // load.tp * t
    return 4 * w * u * h + normalized + attention + 3 * w * f * t


def _kept_for_backward(load: Load, shape: ModelShape) -> int:
    """By the layers of a stage, of one micro-batch."""
    windows = shape.windows(load.stage, load.config.parallel)
    if load.config.training.recompute_granularity == "full":
        return len(windows) * load.width * load.share * shape.hidden
    return sum(_layer(load, shape, window) for window in windows) + _angles(load, shape)


def _layer_backward(load: Load, shape: ModelShape) -> int:
    """What the backward pass of one layer adds to what is kept: where the layer is computed again, all of it.

    Most is there in the backward of the feed-forward's activation: four times its width.
    """
    added = 4 * load.width * shape.ffn // load.tp * load.tokens
    if load.config.training.recompute_granularity != "full":
        return added
    windows = shape.windows(load.stage, load.config.parallel)
    return max(_layer(load, shape, window) for window in windows) + added + _angles(load, shape)


def _angles(load: Load, shape: ModelShape) -> int:
    """Rotary angles in fp32: of both kinds of layer, where some have a window."""
    kinds = len(set(getattr(shape.fields, "layer_types", None) or ())) and 2
    return max(1, kinds) * FP32 * shape.head_dim * load.length


def _forward(load: Load, shape: ModelShape, output: int) -> int:
    """Most of what one layer has at once, in a pass that keeps nothing: in the feed-forward's activation, while queries
    are rotated, before a projection's output is split over the sequence, or where norms meet the residual stream.

    Args:
        output: bytes of the micro-batch before, which the schedule holds until the next one is there.
    """
    t, w, stream = load.tokens, load.width, load.width * load.share * shape.hidden
    q, k, f = shape.query_width // load.tp, shape.key_width // load.tp, shape.ffn // load.tp
    whole = w * shape.hidden * t + stream if load.config.parallel.sequence_parallel else 0
    most = max(  # besides the embeddings, which are there to the end
        2 * stream + 4 * w * f * t,
        stream + 3 * w * (q + k) * t + (3 * FP32 + w) * q // 2 * t,
        stream + 3 * w * (q + k) * t + whole,
        2 * stream + w * f * t + whole,
        5 * stream,  # input, middle, both projections' sums, a norm's result
    )
    return _angles(load, shape) + output + stream + most


# --- Heads ------------------------------------------------------------------------------------------------------------


def _head(shape: ModelShape, load: Load) -> int:
    return shape.padded_vocabulary // load.tp * shape.hidden


def _states(load: Load, student: ModelShape, teacher: ModelShape) -> int:
    """Hidden states that the heads read: the teacher's, and spread over all positions of a part of the sequence;
    without sequence parallelism the student's at response positions. And the final norm's input and output."""
    rows = _own_rows(load) * teacher.hidden
    if load.config.parallel.sequence_parallel:
        rows += load.share * teacher.hidden
    else:
        rows += load.responses * student.hidden
    return load.width * (rows + 2 * load.share * student.hidden)


def _hidden_rows(load: Load, shape: ModelShape) -> int:
    """Final hidden states: whole, and those of the response tokens."""
    if not load.is_last:
        return 0
    return load.width * shape.hidden * (load.tokens + load.responses)


def _chunk(load: Load, student: ModelShape, teacher: ModelShape, buffers: int, tokens: int) -> tuple[int, int]:
    """Rows of a chunk, as `distillation.heads` cuts them, and bytes of its logits and hidden states."""
    columns = student.padded_vocabulary // load.tp
    a_token = FP32 * (2 * buffers * columns + 4 * (student.hidden + teacher.hidden))
    rows = max(1, min(load.config.training.scratch_bytes // a_token, tokens))
    buffers = min(buffers, -(-tokens // rows))
    states = 2 * load.width * (student.hidden + teacher.hidden)
    return rows, buffers * rows * (2 * FP32 * columns + states)


def _scoring(load: Load, student: ModelShape, teacher: ModelShape) -> int:
    """Of the last stage: the response tokens' scores."""
    if not load.is_last:
        return 0
    _, chunk = _chunk(load, student, teacher, 1, load.responses)
    return _states(load, student, teacher) + chunk


def _loss(load: Load, student: ModelShape, teacher: ModelShape) -> int:
    """Of the last stage: the loss of a micro-batch and its gradients in fp32, of the head and of the hidden states."""
    if not load.is_last:
        return 0
    rows, chunk = _chunk(load, student, teacher, 2 if load.tp > 1 else 1, max(1, int(load.responses * _active(load))))
    gradients = rows * (student.padded_vocabulary // load.tp * load.width + student.hidden * FP32)
    positions = load.share if load.config.parallel.sequence_parallel else load.responses
    gradients += FP32 * (_head(student, load) + positions * student.hidden)
    return _states(load, student, teacher) + chunk + gradients


def _active(load: Load) -> float:
    """Share of the response tokens that have a weight."""
    config = load.config
    return sum(config.zones.shares[1:]) / 100 if config.policy.name == "sead" else 1.0


# --- The engine, and the host -----------------------------------------------------------------------------------------


def _engine(config: RunConfig, student: ModelShape, gpu_bytes: int) -> int:
    """Weights and cache of the rollout engine while it writes."""
    rollouts = config.rollouts
    width = 2 if config.training.precision == "bf16" else FP32
    if isinstance(rollouts, VllmRollouts):
        if rollouts.kv_cache_memory_bytes is not None:
            return student.parameters * width // rollouts.tensor_parallel_size + rollouts.kv_cache_memory_bytes
        return int(rollouts.gpu_memory_utilization * gpu_bytes)
    if isinstance(rollouts, TransformersRollouts):
        length = rollouts.max_new_tokens + (config.prompts.max_prompt_tokens or 0)
        cache = 2 * student.layers * student.key_width * width * length
        return student.parameters * width + rollouts.batch_size * cache
    return 0


def _own_rows(load: Load) -> int:
    """Response positions of a micro-batch whose states a rank keeps, at most: those of its part of the sequence."""
    return min(load.responses, load.share)


def _pinned(size: int) -> int:
    """torch rounds pinned memory up to a power of two."""
    return 1 << (size - 1).bit_length() if size else 0


def _pinned_weights(load: Load, teacher: ModelShape) -> int:
    parts = teacher.placed(load.stage, load.config.parallel)
    sizes = [
        load.width * part.weight.rank_elements(load.tp) for part in parts if part.parameter != "output_layer.weight"
    ]
    return sum(_pinned(sum(aligned(sizes[i]) for i in slab)) for slab in slabs(sizes))
