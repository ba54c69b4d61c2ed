"""Every setting of a run: typed, validated, from one YAML file and dotted ``key=value`` overrides. No torch here.

What a valid configuration still needs to fit (ranks, output directory) is in ``checks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.rollouts import RolloutSettings, TransformersRollouts
from megatron_sead.config.settings import LocalPath, PathOrHubName, Settings
from megatron_sead.config.settings_file import dump_settings, load_settings
from megatron_sead.distillation.annealing import CompetenceTracker, Shape, annealing_coefficient
from megatron_sead.distillation.curriculum import Curriculum, Mode, gate_problem
from megatron_sead.distillation.policies import POLICIES, name_problem
from megatron_sead.distillation.policy_interface import PolicyOptions, Tail, ZoneCLoss
from megatron_sead.distillation.zone_shares import DEFAULT_SHARES, Shares, shares_problem

# What a checkpoint keeps a fingerprint of; all but the prompts' and rollouts' files are of both models
InputName = Literal[
    "student", "teacher", "tokenizer", "templates", "prompts", "evaluation", "rollouts", "engine", "grader"
]


def _default(function: Callable[..., Any], name: str) -> Any:
    """A setting's default stands where it is used."""
    return signature(function).parameters[name].default


def _policy_name(name: str) -> str:
    if problem := name_problem(name):
        raise ValueError(problem)
    return name


class ModelSettings(Settings):
    """A model as a Hugging Face directory, and how it is spoken to."""

    path: LocalPath = Field(description="Hugging Face directory: config.json, safetensors, tokenizer")
    tokenizer: LocalPath | None = Field(None, description="tokenizer directory or sentencepiece file; default: path")
    chat_template: LocalPath | None = Field(None, description="Jinja file that replaces the model's own chat template")
    system_prompt: str | None = Field(None, description="system message put before every prompt")
    stop_token_ids: list[int] | None = Field(None, description="tokens that end a response; default: the model's own")


class TeacherSettings(ModelSettings):
    """The frozen teacher. Its prompt may differ from the student's: only response positions are compared."""

    prompt_field: str | None = Field(
        None, description="field with the teacher's own prompt, e.g. one with the solution"
    )
    offload: bool = Field(True, description="keep the teacher's weights off the GPU while it is not scoring")


SMALLEST, LARGEST = 1e-30, 1e30  # what Adam computes from it in fp32 is neither 0 nor infinite


class TrainingSettings(Settings):
    """Optimisation. Names and meanings are Megatron's."""

    steps: int = Field(ge=1, description="optimizer steps; one update a step, on fresh rollouts")
    global_batch_size: int = Field(ge=1, description="rollouts a step: prompts x samples_per_prompt")
    micro_batch_size: int = Field(1, ge=1, description="rollouts in one forward pass, each padded to the longest")
    micro_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="tokens in one forward pass at most: rollouts of any length, packed without padding; "
        "null: micro_batch_size rollouts",
    )
    precision: Literal["fp32", "bf16"] = Field(
        "bf16", description="of weights and activations; gradients and optimizer state are fp32"
    )
    lr: float = Field(1e-6, gt=0, le=LARGEST, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the last step")
    lr_warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises to lr")
    lr_decay_style: Literal["constant", "linear", "cosine"] = Field(
        "linear", description="how the learning rate falls from lr to min_lr"
    )
    weight_decay: float = Field(0.0, ge=0, le=LARGEST, description="of AdamW, decoupled from the gradient")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="weight of the past in the first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="weight of the past in the second moment")
    adam_eps: float = Field(1e-8, ge=SMALLEST, le=LARGEST, description="added to the root of the second moment")
    clip_grad: float = Field(1.0, ge=0, description="gradient norm above which gradients are scaled down; 0: never")
    use_distributed_optimizer: bool = Field(True, description="split optimizer state over the data-parallel ranks")
    recompute_granularity: Literal["full", "selective"] | None = Field(
        None, description="computed again in the backward pass: whole layers, attention alone, or nothing"
    )
    attention_backend: Literal["torch", "transformer_engine"] = Field(
        "torch", description="whose attention; transformer_engine must be installed, and needs a GPU"
    )
    normalizer: Literal["active", "valid", "sequence"] = Field(
        "active", description="what the summed loss is divided by: tokens with a weight, response tokens, sequences"
    )
    max_skipped_steps: int = Field(
        3, ge=1, description="the run ends when so many steps in a row were skipped: a loss or gradient was not finite"
    )
    importance_cap: float | None = Field(
        None,
        gt=0,
        description="tokens count by student's over engine's probability at temperature 1, up to this; null: all as 1",
    )
    mask_truncated: bool = Field(False, description="rollouts cut at max_new_tokens teach nothing")
    scratch_bytes: int = Field(256 * 2**20, ge=2**20, description="memory for one chunk of logits in the fused loss")

    def problems(self) -> Iterator[str]:
        if self.micro_batch_tokens is not None and self.micro_batch_size != 1:
            yield (
                f"training.micro_batch_tokens={self.micro_batch_tokens}: packs as many rollouts as fit; must be null, "
                f"or training.micro_batch_size left at 1, not {self.micro_batch_size}"
            )
        elif self.global_batch_size % self.micro_batch_size:
            yield (
                f"training.global_batch_size={self.global_batch_size}: must be divisible by "
                f"training.micro_batch_size={self.micro_batch_size}"
            )
        if self.min_lr > self.lr:
            yield f"training.min_lr={self.min_lr:g}: must be at most training.lr={self.lr:g}"


class PolicySettings(Settings):
    """Which policy maps a token's statistics to (w_forward, w_reverse)."""

    name: Annotated[str, AfterValidator(_policy_name)] = Field(
        "sead", description=f"one of {', '.join(POLICIES)}; or package.module:NAME, a function or Policy of your own"
    )
    zone_c: ZoneCLoss = Field(
        PolicyOptions.zone_c, description="sead: mix: alpha*lambda*FKL + (1-alpha)*RKL in zone C; eq4: the first term"
    )
    zone_c_scale: float = Field(PolicyOptions.zone_c_scale, gt=0, description="sead, zones: lambda")
    entropy_gate: float = Field(
        PolicyOptions.entropy_gate, ge=0, description="eopd: nats of teacher entropy from which forward KL joins"
    )
    keep_share: float = Field(
        PolicyOptions.keep_share, gt=0, le=1, description="tip_*, random_half: share of tokens that teach"
    )
    beta: float = Field(PolicyOptions.beta, gt=0, lt=1, description="gkd: the teacher's share of the mixture")
    clip: float = Field(
        PolicyOptions.clip, gt=0, lt=1, description="opd_sampled: how far from 1 the importance ratio may count"
    )
    top_k: int = Field(PolicyOptions.top_k, ge=1, description="top_k: tokens of the teacher that the KL is taken over")
    top_k_tail: Tail = Field(
        PolicyOptions.top_k_tail,
        description="top_k: bucket: all other tokens count as one more; renormalize: they count as nothing",
    )


class ZoneSettings(Settings):
    """Zones A, B, C of the paper's token scale."""

    shares: Shares = Field(DEFAULT_SHARES, description="percent of tokens in A, B, C")
    thresholds: Literal["global_step", "running", "absolute"] = Field(
        "global_step",
        description="where zones begin: quantiles of the step; an average of earlier steps' quantiles; given nats",
    )
    scope: Literal["global", "sequence"] = Field(
        "global", description="tokens over which quantiles are taken: all of the step, or each rollout's own"
    )
    running_decay: float = Field(0.9, ge=0, lt=1, description="running: weight of earlier steps' thresholds")
    teacher_threshold: float = Field(0.8, ge=0, description="absolute: nats of H_t from which a token is in zone C")
    student_threshold: float = Field(0.8, ge=0, description="absolute: nats of H_s above which the rest is in zone B")
    rescue_threshold: float | None = Field(
        None, gt=0, description="nats of reverse KL above which a token of zone A is moved to B; null: never"
    )
    teacher_entropy_floor: float = Field(
        0.01, ge=0, description="nats of H_t under which a zone C that begins there is warned of, once a start"
    )

    def problems(self) -> Iterator[str]:
        if problem := shares_problem(self.shares):
            yield f"zones.shares={list(self.shares)}: {problem}"
        if self.scope == "sequence" and self.thresholds != "global_step":
            yield (
                f"zones.thresholds='{self.thresholds}': must be 'global_step' when zones.scope is 'sequence': "
                "quantiles of a sequence are taken anew in each"
            )


class AnnealingSettings(Settings):
    """Phase scale: alpha(u)."""

    start: float = Field(_default(annealing_coefficient, "start"), ge=0, le=1, description="alpha at u = 0")
    end: float = Field(_default(annealing_coefficient, "end"), ge=0, le=1, description="alpha at u = 1")
    shape: Shape = Field(
        _default(annealing_coefficient, "shape"), description="how alpha falls; constant: it stays at start"
    )
    driver: Literal["step", "competence", "larger"] = Field(
        "step", description="what u is: the share of steps done, how far the pass rate has come, or the larger of both"
    )
    target: float = Field(
        _default(CompetenceTracker, "target"), gt=0, le=1, description="competence: smoothed pass rate at which u = 1"
    )
    smoothing: float = Field(
        _default(CompetenceTracker, "smoothing"), ge=0, lt=1, description="weight of the past in the smoothed pass rate"
    )

    def problems(self) -> Iterator[str]:
        if self.shape != "constant" and self.end > self.start:
            yield f"annealing.end={self.end:g}: must be at most annealing.start={self.start:g}: alpha falls"


class CurriculumSettings(Settings):
    """Prompt scale: which prompts may be asked at a step."""

    mode: Mode = Field(_default(Curriculum, "mode"), description="how prompts are admitted by difficulty; none: all")
    c0: float = Field(
        _default(Curriculum, "c0"), gt=0, le=1, description="gated: c(t) = c0 * (1 + t/T)^k; competence_cdf: at t = 0"
    )
    k: float = Field(_default(Curriculum, "k"), gt=0, le=100, description="gated: how fast the gate opens")
    noise: float = Field(
        _default(Curriculum, "noise"), ge=0, description="sorted: standard deviation added to difficulty before sorting"
    )
    tiers: int = Field(_default(Curriculum, "tiers"), ge=2, description="mastery: number of difficulty tiers")
    mastery_threshold: float = Field(
        _default(Curriculum, "mastery_threshold"),
        gt=0,
        le=1,
        description="mastery: smoothed pass rate that opens the next tier",
    )
    smoothing: float = Field(
        _default(Curriculum, "smoothing"), ge=0, lt=1, description="mastery: weight of the past in that pass rate"
    )
    patience: int = Field(
        _default(Curriculum, "patience"), ge=1, description="mastery: steps after which the next tier opens anyway"
    )
    replay_share: float = Field(
        _default(Curriculum, "replay_share"), ge=0, lt=1, description="mastery: share of a batch from earlier tiers"
    )
    drop_unsolved: bool = Field(
        _default(Curriculum, "drop_unsolved"), description="leave out prompts that the initial student never solved"
    )

    def problems(self) -> Iterator[str]:
        if self.mode == "gated" and (problem := gate_problem(self.c0, self.k)):
            yield f"curriculum.c0={self.c0:g}, curriculum.k={self.k:g}: {problem}"


class CheckpointSettings(Settings):
    """Saving and resuming."""

    interval: int = Field(50, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: int = Field(2, ge=1, description="checkpoints that stay on disk")
    allow_changed_inputs: list[InputName] = Field(
        [], description="inputs that may differ from those of the checkpoint that a run is resumed from"
    )


class EvaluationSettings(Settings):
    """Accuracy on held-out prompts, before and after."""

    OF_PROMPTS: ClassVar = ("subset", "split", "prompt_field", "answer_field", "level_field", "instruction")

    path: PathOrHubName | None = Field(None, description="prompt file with answers, or a hub name")
    subset: str | None = Field(
        None, description="configuration name of a hub data set; default: prompts.subset if that is the same data set"
    )
    split: str | None = Field(None, description="split of a hub data set; default: prompts.split")
    prompt_field: str | None = Field(None, min_length=1, description="field with the problem; default: as in prompts")
    answer_field: str | None = Field(None, min_length=1, description="field with the answer; default: as in prompts")
    level_field: str | None = Field(None, min_length=1, description="field with the level; default: as in prompts")
    instruction: str | None = Field(None, description="text appended to every prompt; default: as in prompts")
    limit: int | None = Field(None, ge=1, description="evaluate on the first so many prompts")
    samples: int = Field(4, ge=0, description="sampled answers a prompt, beside the greedy one")
    temperature: float = Field(1.0, gt=0, description="of the sampled answers")
    max_new_tokens: int | None = Field(None, ge=1, description="default: rollouts.max_new_tokens")
    teacher: bool = Field(True, description="also report the teacher's own accuracy")

    def prompts(self, training: PromptSettings) -> PromptSettings | None:
        """How held-out prompts are read: as those of training, but for what is said here. None: there are none."""
        if self.path is None:
            return None
        own = {name: getattr(self, name) for name in self.OF_PROMPTS}
        given = {name: value for name, value in own.items() if value is not None}
        subset = training.subset if self.path == training.path else None
        return training.model_copy(update={"path": self.path, "subset": subset, **given})


class GradingSettings(Settings):
    """Is this answer right."""

    timeout_seconds: float = Field(
        5.0, gt=0, description="processor time; a comparison that takes longer is killed and counts as wrong"
    )


class ReportingSettings(Settings):
    """What is written beside checkpoints."""

    tensorboard: bool = Field(True, description="also write the metrics as event files, under tensorboard/")
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="also log the metrics to Weights & Biases; offline: under wandb/, for `wandb sync`"
    )
    wandb_project: str = Field("megatron_sead", min_length=1, description="project of Weights & Biases")
    rollouts_interval: int = Field(1, ge=0, description="steps between rollouts/step-N.jsonl files; 0: none")
    token_steps: int = Field(
        20, ge=0, description="steps, evenly spread, whose tokens/step-N.json says what tokens taught; 0: none"
    )
    token_rollouts: int = Field(8, ge=1, description="rollouts of such a step that are recorded token by token")
    token_megabytes: float = Field(
        32, gt=0, description="that these files may take together; of long responses fewer, or the beginning, are kept"
    )


class RunConfig(Settings):
    """One run, whole."""

    output: LocalPath = Field(description="run directory")
    device: Literal["cuda", "cpu"] = Field("cuda", description="cpu: ranks over gloo, for tests and small models")
    seed: int = Field(0, ge=0, description="of prompts' order, sampling and every other draw")
    student: ModelSettings
    teacher: TeacherSettings
    prompts: PromptSettings
    parallel: ParallelSettings = ParallelSettings()
    training: TrainingSettings
    rollouts: RolloutSettings = TransformersRollouts()
    policy: PolicySettings = PolicySettings()
    zones: ZoneSettings = ZoneSettings()
    annealing: AnnealingSettings = AnnealingSettings()
    curriculum: CurriculumSettings = CurriculumSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    grading: GradingSettings = GradingSettings()
    reporting: ReportingSettings = ReportingSettings()

    def problems(self) -> Iterator[str]:
        batch, samples = self.training.global_batch_size, self.rollouts.samples_per_prompt
        if batch % samples:
            yield (
                f"training.global_batch_size={batch}: must be divisible by rollouts.samples_per_prompt={samples}: "
                "it counts rollouts, prompts x samples"
            )
        if self.rollouts.lag and self.training.importance_cap is None:
            yield (
                f"rollouts.lag={self.rollouts.lag}: needs training.importance_cap, for example 2.0: the rollouts are "
                "of an earlier student"
            )
        drawn = self.rollouts.writing.temperature_problem(self.evaluation.temperature)
        if drawn is not None and self.evaluation.path is not None and self.evaluation.samples:
            yield f"evaluation.temperature={self.evaluation.temperature:g}: {drawn}"
        policy = POLICIES.get(self.policy.name)
        if self.zones.thresholds == "running" and policy is not None and not policy.reads_zones:
            readers = " or ".join(name for name, other in POLICIES.items() if other.reads_zones)
            yield (
                f"zones.thresholds='running': only for policy.name {readers}, not '{policy.name}', which needs no zones"
            )
        if self.device == "cpu" and self.training.attention_backend == "transformer_engine":
            yield "training.attention_backend='transformer_engine': needs device cuda, not cpu; use 'torch'"
        if self.prompts.template == "plain":
            for role, model in (("student", self.student), ("teacher", self.teacher)):
                for name in ("system_prompt", "chat_template"):
                    if getattr(model, name) is not None:
                        yield f"{role}.{name}: has no effect with prompts.template 'plain'; use 'chat', or null here"


def load_config(path: Path | None, overrides: list[str]) -> RunConfig:
    """Read a YAML file, apply dotted ``key=value`` overrides (values are YAML: ``a.b=null``), validate.

    Raises:
        UserError: a line a mistake, all of them; each names the key, its value and what would be valid (the nearest key
            for a misspelt one).
    """
    return load_settings(RunConfig, path, overrides)


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML, defaults included; ``load_config`` reads it back to an equal object."""
    return dump_settings(config)
