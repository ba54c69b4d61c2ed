"""Bytes on a rank, phase by phase of a step. No torch: all terms are written out, and held against traces (`tracing`).

A phase's peak is what is there all the time, and what the phase adds. Sizes are those of tensors: what torch's
allocator loses to fragmentation, and what libraries hold, is an allowance on top (`fit`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_sead.config.checks import scores_whole_step
from megatron_sead.config.micro_batches import length_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.models.weights import PlacedWeight
from megatron_sead.planning.activations import Batch, Layers, Layout
from megatron_sead.planning.engines import engine_at_start, engine_bytes, reference_bytes
from megatron_sead.planning.heads import Heads
from megatron_sead.planning.host import Saving, pinned, pinned_slabs, saving
from megatron_sead.planning.shapes import ModelShape

FP32 = 4
SCORED = 8 * FP32 + 1 + 2 * FP32 + 1  # bytes that are known of a response token once it is scored and weighed


@dataclass(frozen=True)
class Load:
    """What a rank of a pipeline stage works on."""

    config: RunConfig
    stage: int
    replicas: int  # of its weights: data-parallel ranks, and those that share their sequences
    micro_batches: int  # a data-parallel rank and step
    length: int  # of the longest rollout

    @property
    def batch(self) -> Batch:
        """A full micro-batch of the longest rollouts; of sequences that ranks share, this rank's part."""
        training, multiple = self.config.training, length_multiple(self.config.parallel)
        new, ranks = self.config.rollouts.max_new_tokens, self.config.parallel.context_parallel_size
        prompt = self.length - new
        if training.micro_batch_tokens is not None:
            return Batch(1, training.micro_batch_tokens // multiple * multiple // ranks, prompt, new, packed=True)
        rows, length = training.micro_batch_size, -(-self.length // multiple) * multiple
        if ranks > 1:
            return Batch(1, rows * length // ranks, prompt, new, packed=True)
        return Batch(rows, length, prompt, new, packed=False)

    @property
    def layout(self) -> Layout:
        parallel, training = self.config.parallel, self.config.training
        width = 2 if training.precision == "bf16" else FP32
        return Layout(
            parallel.tensor_model_parallel_size,
            parallel.sequence_parallel,
            width,
            training.recompute_granularity,
            parallel.context_parallel_size,
        )

    @property
    def is_last(self) -> bool:
        return self.stage == self.config.parallel.pipeline_model_parallel_size - 1

    @property
    def chunks(self) -> int:
        return self.config.parallel.virtual_pipeline_model_parallel_size or 1

    @property
    def outputs(self) -> int:
        """Passes in flight of chunks that send their result on, which stays until it has its gradient."""
        return round(self.in_flight * self.chunks) - self.is_last

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
    saving_host: int = 0  # while a checkpoint is written, on ranks that write
    saving_host_of_others: int = 0
    on_cpu: bool = False  # what is said of the device is on the host

    @property
    def peak(self) -> tuple[str, int]:
        """The phase that needs most, and how much."""
        name = max(self.phases, key=lambda phase: self.phases[phase])
        return name, self.phases[name]

    def host(self, *, writes: bool) -> int:
        """Of a rank that writes checkpoints, or of another: what stays there, and a save beside it; on a CPU all."""
        saving = self.saving_host if writes else self.saving_host_of_others
        if self.on_cpu:
            saving = max(self.peak[1], self.resident + saving)
        return self.teacher_weights_host + self.teacher_hidden_host + saving


def stage_bytes(load: Load, student: ModelShape, teacher: ModelShape, gpu_bytes: int) -> StageBytes:
    """Count a stage.

    Args:
        gpu_bytes: of the GPU, of which the rollout engine may be told to take a share.
    """
    config, layout, batch = load.config, load.layout, load.batch
    width, parallel = layout.width, config.parallel
    count, teacher_count = (shape.rank_parameters(load.stage, parallel) for shape in (student, teacher))
    shard = -(-count // load.replicas) if config.training.use_distributed_optimizer else count
    moments = 2 * FP32 * shard
    state = moments + (FP32 * shard if width < FP32 else 0)  # bf16 adds the main weights
    students, teachers = Layers(student, layout, batch), Layers(teacher, layout, batch)
    head = width * teacher.padded_vocabulary // layout.tp * teacher.hidden if load.is_last else 0
    on_cpu = config.device == "cpu"  # one memory: nothing is offloaded, nothing pinned
    offload = config.teacher.offload and not on_cpu
    kept = head if offload else teacher_count * width
    gathered = students.whole if layout.sequence_parallel else 0  # Megatron's buffer
    # Megatron's models hold what their chunks received last, the student's with its gradient
    inputs = (load.chunks - (load.stage == 0)) * students.stream
    received = 2 * inputs + (len(teacher.stage_layers(parallel)[load.stage]) - (load.stage == 0)) * teachers.stream
    resident = count * (width + FP32) + state + kept + gathered + received
    windows = student.windows(load.stage, parallel)
    waiting = int(load.in_flight * students.waiting(windows)) + load.outputs * students.stream
    heads = Heads(students, teachers, config.training.scratch_bytes)
    scoring, loss = (heads.scoring(), heads.loss(_active(config))) if load.is_last else (0, 0)
    first = load.micro_batches > 1 and scores_whole_step(config)  # else the training pass scores
    training = students.backward(windows), loss, 0 if first else scoring
    hidden = heads.own * teacher.hidden * width
    save = _saving(load, student)
    engine = engine_bytes(config, student, load.length, gpu_bytes)
    asked, scored = batch.step_bytes * load.micro_batches, SCORED * batch.responses * load.micro_batches * load.is_last
    added = {
        "start": _start(load, student, teacher, teacher_count * width - kept) - moments,
        "rollouts": max(engine, engine_at_start(config, gpu_bytes) - moments),
        "teacher": asked + teacher_count * width - kept + _teacher_pass(load, teachers),
        "student scores": asked + (scored + max(_student_pass(load, students), scoring)) * first,
        "training pass": asked + scored + waiting + max(training) - inputs,  # which have no gradients yet
        "optimizer": asked + scored + shard * FP32,  # Adam over lists of tensors needs one more of each
        "saving": save.gpu,
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
        teacher_weights_host=_pinned_weights(load, teacher) if offload else 0,
        teacher_hidden_host=(hidden if on_cpu else pinned(hidden)) * load.micro_batches * load.is_last,
        saving_host=save.writer,
        saving_host_of_others=save.others,
        on_cpu=on_cpu,
    )


def _saving(load: Load, student: ModelShape) -> Saving:
    """Gradients of the first stage's first chunk are reduced piece by piece, which is how a save gathers them."""
    parts = student.placed(load.stage, load.config.parallel)
    chunks = [[p.weight.rank_elements(load.layout.tp) for p in parts if p.chunk == chunk] for chunk in _chunks(parts)]
    return saving(
        chunks,
        load.layout.width,
        load.replicas,
        distributed=load.config.training.use_distributed_optimizer,
        in_buckets=load.replicas > 1 and load.stage == 0 and load.config.device == "cuda",
    )


def _chunks(parts: list[PlacedWeight]) -> list[int]:
    return sorted({part.chunk for part in parts})


def _forward(load: Load, layers: Layers, *, frozen: bool) -> int:
    """A chunk's input is there to the end: what was received is counted already, and it is that of a single layer."""
    single = set(layers.shape.stage_layers(load.config.parallel)[load.stage]) == {1}
    received = load.stage > 0
    return layers.forward(frozen=frozen) - (single or received) * layers.stream


def _teacher_pass(load: Load, layers: Layers) -> int:
    """With the result of the micro-batch before, which the schedule holds until the next one is there; and on the last
    stage the final hidden states, whole and those of the response tokens."""
    forward = _forward(load, layers, frozen=True)
    if not load.is_last:
        return forward + layers.stream
    row = layers.layout.width * layers.shape.hidden
    rows = layers.whole * (2 if layers.copies else 1) + row * layers.batch.responses
    return layers.whole + max(forward, rows)


def _student_pass(load: Load, layers: Layers) -> int:
    """As the teacher's; a part of the sequence of the final hidden states."""
    return _forward(load, layers, frozen=False) + layers.stream * (load.stage == 0)  # received gradients are gone


def _start(load: Load, student: ModelShape, teacher: ModelShape, teacher_weights: int) -> int:
    """The check of both models on a text, one row; and on the first rank transformers' model, a layer at a time."""
    multiple = length_multiple(load.config.parallel)
    length, ranks = -(-student.probe_tokens // multiple) * multiple, load.layout.cp
    batch = Batch(1, length // ranks, 1, student.probe_tokens - 1, packed=ranks > 1)
    students, teachers = (Layers(shape, load.layout, batch) for shape in (student, teacher))
    scoring = Heads(students, teachers, load.config.training.scratch_bytes).scoring() if load.is_last else 0
    reference = 0
    if load.stage == 0:
        reference = max(reference_bytes(shape, student.probe_tokens, load.layout.width) for shape in (student, teacher))
    passes = teacher_weights + _teacher_pass(load, teachers), _student_pass(load, students) + scoring
    return max(*passes, reference)


def _active(config: RunConfig) -> float:
    """Share of the response tokens that have a weight."""
    return sum(config.zones.shares[1:]) / 100 if config.policy.name == "sead" else 1.0


def _pinned_weights(load: Load, teacher: ModelShape) -> int:
    parts = teacher.placed(load.stage, load.config.parallel)
    elements = [p.weight.rank_elements(load.layout.tp) for p in parts if p.parameter != "output_layer.weight"]
    return pinned_slabs([load.layout.width * count for count in elements])
