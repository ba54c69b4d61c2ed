"""Does a valid configuration fit: its ranks, its output directory, its purpose? No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sead.config.micro_batches import count_multiple
from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.config.settings_file import flatten
from megatron_sead.distillation.curriculum import gate
from megatron_sead.distillation.policies import POLICIES
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import overlap, require_written_here
from megatron_sead.wording import counted

OWNER_FILE = "owner.lock"  # in the run directory, while a run writes there
# What else a run writes there, beside config.yaml
WRITTEN: tuple[str, ...] = ("metrics.jsonl", "summary.json", "checkpoints", "rollouts", "not-finite", "tensorboard")
WRITTEN += ("student-hf", "tokens", "starts.jsonl", "heldout.json", "report.html", "wandb")

# What may change when a run is resumed in its own directory: how it computes and what it writes, not what it computes.
MAY_CHANGE_ON_RESUME = (
    "output",
    "device",
    "parallel.",
    "training.micro_batch_size",
    "training.micro_batch_tokens",
    "training.scratch_bytes",
    "training.recompute_granularity",
    "training.attention_backend",
    "training.max_skipped_steps",
    "teacher.offload",
    "checkpoints.",
    "evaluation.",
    "reporting.",
)


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Dotted keys whose values differ, in the order of the schema."""
    before, after = (flatten(config.model_dump(mode="json")) for config in (old, new))
    return [key for key in before | after if before.get(key) != after.get(key)]


def check_output(config: RunConfig) -> None:
    """Refuse an output directory that overlaps an input, or holds another run or files that no run wrote.

    A run may be resumed with what MAY_CHANGE_ON_RESUME lists.

    Raises:
        UserError: names the input, the file, or the first setting that differs, with both values.
    """
    if config.output.exists() and not config.output.is_dir():
        raise UserError(f"output={config.output}: is a file; must be a directory, or not exist yet")
    _require_apart_from_inputs(config)
    recorded = config.output / "config.yaml"
    if not recorded.exists():
        _refuse_files_of_others(config.output)
        return
    if (config.output / "student-hf").exists():  # is replaced at the end, which may be days away
        require_written_here(config.output / "student-hf")
    try:
        old = load_config(recorded, [])
    except UserError as error:
        raise UserError(f"output={config.output}: holds a run whose config.yaml is not valid here: {error}") from None
    may_change = MAY_CHANGE_ON_RESUME + tuple(f"rollouts.{name}" for name in config.rollouts.MAY_CHANGE_ON_RESUME)
    fixed = [key for key in config_differences(old, config) if not key.startswith(may_change)]
    if fixed:
        raise UserError(f"output={config.output}: holds another run: {_told_differences(old, config, fixed)}")


def _told_differences(old: RunConfig, new: RunConfig, keys: list[str]) -> str:
    there, here = (flatten(config.model_dump(mode="json")) for config in (old, new))
    told = ", ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in keys)
    student = old.output / "student-hf"
    if keys == ["training.steps"] and (new.output / "student-hf").is_dir():
        return (
            f"{told}: it is finished, and its learning rate, alpha and curriculum ran over so many steps; to train its "
            f"student further, start a new run from it: student.path={student} output=ANOTHER"
        )
    return f"{told}; choose another output, or the same settings to resume it"


def _require_apart_from_inputs(config: RunConfig) -> None:
    """Refuse inputs among the files that a run writes. Elsewhere in the output directory they may lie."""
    inputs: dict[str, str | Path | None] = {"prompts.path": config.prompts.path}
    inputs |= {"evaluation.path": config.evaluation.path, "rollouts.path": config.rollouts.recorded}
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        inputs |= {f"{role}.{name}": getattr(model, name) for name in ("path", "tokenizer", "chat_template")}
    for setting, given in inputs.items():
        if given is not None and any(overlap(config.output / name, Path(given)) for name in WRITTEN):
            raise UserError(
                f"output={config.output}: overlaps {setting}={given}, which is read; choose an output that is neither "
                "in it nor has it among the files that a run writes"
            )


def _refuse_files_of_others(output: Path) -> None:
    for name in WRITTEN:
        if (output / name).exists() or (output / name).is_symlink():
            raise UserError(
                f"output={output}: holds {name}, which a run would write, and no config.yaml of a run; "
                "choose another output, or move it away"
            )


def data_parallel_size(parallel: ParallelSettings, world_size: int) -> int:
    """How many data-parallel replicas the ranks make.

    Raises:
        UserError: ranks that the layout does not divide.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    model_ranks = tp * pp * parallel.context_parallel_size
    if world_size < 1 or world_size % model_ranks:
        raise UserError(
            f"{counted(world_size, 'rank')}: must be a multiple of {model_ranks}, which is tensor {tp} x pipeline {pp} "
            f"x context {parallel.context_parallel_size} (parallel.*)"
        )
    return world_size // model_ranks


def check_world_size(config: RunConfig, world_size: int) -> int:
    """Data-parallel size of the run on so many ranks.

    Raises:
        UserError: ranks that the layout does not divide, or a batch that the data-parallel ranks cannot share.
    """
    parallel, training = config.parallel, config.training
    pp, replicas = parallel.pipeline_model_parallel_size, data_parallel_size(parallel, world_size)
    if training.micro_batch_tokens is not None:
        if training.global_batch_size < replicas:
            raise UserError(
                f"training.global_batch_size={training.global_batch_size}: must be at least {replicas}, the "
                "data-parallel size: each replica trains on a rollout or more"
            )
        return replicas
    virtual = parallel.virtual_pipeline_model_parallel_size
    unit = training.micro_batch_size * replicas * count_multiple(parallel)
    if training.global_batch_size % unit:
        below = training.global_batch_size // unit * unit
        valid = f"{below} or {below + unit}" if below else f"{unit}"
        raise UserError(
            f"training.global_batch_size={training.global_batch_size}: must be a multiple of {unit}, for example "
            f"{valid}: micro_batch_size {training.micro_batch_size} x data-parallel size {replicas}"
            + (f" x {pp} pipeline stages, since virtual stages need whole groups" if virtual is not None else "")
        )
    return replicas


def scores_whole_step(config: RunConfig) -> bool:
    """Does the student score all tokens of a step before it trains on any? Of running thresholds: at the first step."""
    policy, zones = POLICIES.get(config.policy.name), config.zones
    if policy is not None and policy.needs_whole_step:
        return True
    return (policy is None or policy.reads_zones) and zones.scope == "global" and zones.thresholds != "absolute"


def check_batch(config: RunConfig, difficulties: Sequence[float | None]) -> None:
    """Check that there are enough prompts for a step, which asks different ones.

    Args:
        difficulties: one a prompt of prompts.path.

    Raises:
        UserError: names both settings.
    """
    batch, samples = config.training.global_batch_size, config.rollouts.samples_per_prompt
    dropped = sum(difficulty == 1 for difficulty in difficulties) if config.curriculum.drop_unsolved else 0
    usable, needed = len(difficulties) - dropped, batch // samples
    if needed > usable:
        without = f", {dropped} more never solved (curriculum.drop_unsolved)" if dropped else ""
        raise UserError(
            f"training.global_batch_size={batch}: a step asks {needed} different prompts "
            f"(rollouts.samples_per_prompt={samples}), and prompts.path={config.prompts.path} has {usable}{without}; "
            f"must be at most {usable * samples}"
        )


def config_warnings(config: RunConfig) -> list[str]:
    """Settings that are valid and probably not meant, one line each; for the run's log and the plan."""
    training, lines = config.training, []
    half_spacing = 2.0**-14  # of bf16 (8 significant bits) at 0.02, a usual weight: 2^-6 <= 0.02 < 2^-5
    furthest = training.lr * training.steps  # an Adam step moves a weight by about the learning rate
    if training.precision == "bf16" and furthest < half_spacing:
        lines.append(
            f"training.lr={training.lr:g} is below bf16's resolution: in {counted(training.steps, 'step')} a weight "
            f"moves by {furthest:.1e} at most, and bf16 rounds away what is under {half_spacing:.1e} at a weight of "
            "0.02; most weights that write the rollouts will never change"
        )
    if training.lr_warmup_steps >= training.steps:
        lines.append(
            f"training.lr_warmup_steps={training.lr_warmup_steps} is not under training.steps={training.steps}: the "
            "learning rate only rises, and does not reach training.lr"
        )
    if (opening := opening_step(config)) is None or opening > training.steps / 2:
        lines.append(
            f"{opening_line(config)}: later than half of the run, when the learning rate has fallen; the hardest "
            f"prompts will teach little, or nothing ({OPENS_EARLIER[config.curriculum.mode]})"
        )
    return lines


def needs_scores_of_whole_step(config: RunConfig) -> bool:
    """Does every step but the first score all tokens with the student before it trains? With several micro-batches that
    is a forward pass more."""
    policy, zones = POLICIES.get(config.policy.name), config.zones
    reads_zones = policy is None or policy.reads_zones  # one of the user's own is given zones
    of_step = zones.scope == "global" and zones.thresholds == "global_step"
    return (policy is not None and policy.needs_whole_step) or (reads_zones and of_step)


def weighted_share(config: RunConfig) -> float:
    """Share of the response tokens that a policy gives a weight, about: all of one that is not known."""
    name = config.policy.name
    if name in ("sead", "zones"):
        return sum(config.zones.shares[1:]) / 100
    return config.policy.keep_share if name.startswith("tip_") or name == "random_half" else 1.0


OPENS_EARLIER = {
    "gated": "curriculum.c0=0.5 and curriculum.k=3 open at 26 % of the run",
    "competence_cdf": "by its definition it admits the last prompts as the run ends; a larger c0 admits more",
    "mastery": "pass rates may open it earlier; curriculum.patience is the most steps that it waits for each tier",
}


def opening_step(config: RunConfig) -> int | None:
    """First step, counted from 0, that may ask prompts of every difficulty; None: none of the run's steps may.

    mastery opens by pass rates, so the latest such step counts. sorted asks easy prompts first and never opens: 0.
    """
    curriculum, steps = config.curriculum, config.training.steps
    opening = 0
    if curriculum.mode == "gated":
        opening = next((t for t in range(steps) if gate(curriculum.c0, curriculum.k, t / steps) >= 1), steps)
    if curriculum.mode == "competence_cdf" and curriculum.c0 < 1:
        opening = steps
    if curriculum.mode == "mastery":
        opening = (curriculum.tiers - 1) * curriculum.patience
    return opening if opening < steps else None


def opening_line(config: RunConfig) -> str:
    """From when on prompts of every difficulty may be asked, in words, for the run's log."""
    mode, steps, opening = config.curriculum.mode, config.training.steps, opening_step(config)
    name = f"curriculum.mode={mode}"
    if mode == "gated":
        name += f", c0={config.curriculum.c0:g}, k={config.curriculum.k:g}"
    if mode == "sorted":
        return f"{name}: prompts are asked once each, from easy to hard"
    if opening is None:
        return f"{name}: prompts of every difficulty are open at none of {counted(steps, 'step')}"
    latest = ", at the latest" if mode == "mastery" else ""
    return f"{name}: prompts of every difficulty are open from step {opening} of {steps} on{latest}"
