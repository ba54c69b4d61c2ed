"""Random layouts and methods of a short run of the tiny pair: valid ones, as the configuration itself says.

Not hypothesis, which has no budget of time, and which would shrink a failure through minutes of runs: a draw is a
handful of settings, and says them all.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace
from random import Random

from megatron_sead.config.run import load_config
from megatron_sead.distillation.policies import POLICIES
from megatron_sead.errors import UserError
from megatron_sead.planning.plan import make_plan
from tests.training.launching import ROOT, SHORT, TINY

RANKS = (1, 2, 2, 2, 3, 4, 4, 4, 4)
PACKED = (112, 160, 320, 900)  # tokens; the first holds little more than the longest rollout, the last most of a step


# How the 4 layers of a model may lie
WHOLE: dict[str, object] = {}
INTERLEAVED: dict[str, object] = {"virtual_pipeline_model_parallel_size": 2}
STAGES = (
    WHOLE,
    *[INTERLEAVED] * 5,
    *({name: layers} for name in ("first_stage_layers", "last_stage_layers") for layers in (1, 2, 3)),
    *({"first_stage_layers": first, "last_stage_layers": last} for first, last in ((1, 3), (3, 1), (2, 1))),
)


@dataclass(frozen=True)
class Part:
    """The steps that one layout trains."""

    ranks: int
    settings: list[str]
    stopped_at: int | None = None  # in this step comes a signal, and another layout goes on


@dataclass(frozen=True)
class Draw:
    """One run: under one layout, or begun under one and continued under another."""

    method: list[str]  # what every layout must agree on
    parts: list[Part]

    def told(self, replay: list[str], output: str) -> str:
        """Commands that do the same again, in the repository's root."""
        lines = [_command(1, [*replay, *self.method], f"{output}-expected")]
        for part in self.parts:
            lines.append(_command(part.ranks, [*replay, *self.method, *part.settings], output))
            if part.stopped_at is not None:
                lines[-1] += f"  # SIGINT in step {part.stopped_at}, then"
        return "\n".join(lines)


def draws(seed: int, steps: int, replay: list[str], layouts_of_a_method: int = 3) -> Iterator[Draw]:
    """Without end. Draws that share a method come one after another, so that its expected run is done once.

    Args:
        replay: settings of every run.
    """
    random = Random(seed)
    while True:
        method = _method(random)
        if not _valid(1, [*replay, *method]):
            continue
        for _ in range(layouts_of_a_method):
            parts = [_part(random, [*replay, *method])]
            if random.random() < 0.25:
                first = replace(parts[0], stopped_at=random.randrange(steps - 1))
                parts = [first, _part(random, [*replay, *method])]
            whole = f"training.use_distributed_optimizer={random.choice(('true', 'true', 'false'))}"
            yield Draw(method, [replace(part, settings=[*part.settings, whole]) for part in parts])


def _part(random: Random, common: list[str]) -> Part:
    while True:
        ranks = random.choice(RANKS)
        settings = [*_parallel(random, ranks), *_computing(random)]
        if _valid(ranks, [*common, *settings]):
            return Part(ranks, settings)


def _method(random: Random) -> list[str]:
    """What is learnt: half of the draws have the paper's policy, with its zones taken in each way."""
    settings: dict[str, object] = {
        "policy.name": random.choice(("sead", random.choice(list(POLICIES)))),
        "policy.zone_c": random.choice(("mix", "mix", "eq4")),
        "zones.scope": random.choice(("global", "global", "sequence")),
        "zones.thresholds": random.choice(("global_step", "global_step", "running", "absolute")),
        "zones.rescue_threshold": random.choice(("null", "null", "0.5")),
        "annealing.driver": random.choice(("step", "larger")),
        "training.normalizer": random.choice(("active", "active", "valid", "sequence")),
        "training.mask_truncated": random.choice(("false", "false", "true")),
        "training.importance_cap": random.choice(("null", "null", "2.0")),
        "training.clip_grad": random.choice(("1.0", "1.0", "0.0", "0.1")),
        "training.weight_decay": random.choice(("0.0", "0.1")),
    }
    return _as_settings(settings)


def _parallel(random: Random, ranks: int) -> list[str]:
    """How ranks share the models. What is left of them is data parallel."""
    settings: dict[str, object] = {}
    for kind in random.sample(("tensor_model", "pipeline_model", "context"), 3):
        size = random.choice([n for n in range(1, ranks + 1) if ranks % n == 0])
        settings[f"{kind}_parallel_size"] = size
        ranks //= size
    if settings["tensor_model_parallel_size"] != 1:
        settings["sequence_parallel"] = random.choice(("true", "false"))
    if settings["pipeline_model_parallel_size"] != 1:
        student = random.choice(STAGES)
        teacher = random.choice((WHOLE, INTERLEAVED) if student == INTERLEAVED else STAGES)
        settings |= student | {f"teacher_{name}": value for name, value in teacher.items()}
    return _as_settings({f"parallel.{name}": value for name, value in settings.items()})


def _computing(random: Random) -> list[str]:
    """How a rank computes what is its share."""
    settings: dict[str, object] = {
        "training.recompute_granularity": random.choice(("null", "selective", "full")),
        "training.scratch_bytes": random.choice((2**28, 2**20)),
        "teacher.offload": random.choice(("true", "false")),
    }
    if random.random() < 0.5:
        settings |= {"training.micro_batch_size": 1, "training.micro_batch_tokens": random.choice(PACKED)}
    else:
        settings["training.micro_batch_size"] = random.choice((1, 2, 4, 8, 16, 32))
    return _as_settings(settings)


def _as_settings(settings: dict[str, object]) -> list[str]:
    """As a command takes them, without what is null."""
    return [f"{name}={value}" for name, value in settings.items() if value != "null"]


def _valid(ranks: int, overrides: list[str]) -> bool:
    try:
        make_plan(load_config(TINY, [*SHORT, *overrides]), ranks)
    except UserError:
        return False
    return True


def _command(ranks: int, settings: list[str], output: str) -> str:
    words = [*SHORT, *settings, f"output={output}"]
    config = TINY.relative_to(ROOT)
    return f"python -m megatron_sead.train --config {config} --nproc-per-node {ranks} {shlex.join(words)}"
