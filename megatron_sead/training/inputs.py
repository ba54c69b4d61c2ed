"""What a run computes from: a fingerprint of every input, which its checkpoints keep.

A resumed run is exact only with the inputs that it began with, and most changes would show nowhere: other answers,
a row more, a template with another line. So a resume compares, before any model is built, and names what has changed.
What is compared is what computing depends on, not files: the prompts as token ids, not their text; the tensors of a
model, not how they are shared out among files.
"""

from __future__ import annotations

import json
import logging
import zlib
from base64 import b64encode
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sead.checkpoints.manifest import checksum, from_first_rank
from megatron_sead.checkpoints.store import CheckpointStore
from megatron_sead.checkpoints.weight_checksums import weight_checksums
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError
from megatron_sead.grading.grader import GRADER_VERSION
from megatron_sead.models.family import read_config_fields
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.prompts.tokenizer import ModelTokenizer
from megatron_sead.rollouts.records import record_path
from megatron_sead.rollouts.registry import packages_of
from megatron_sead.training.input_changes import CHECKSUM, Fingerprint, differences

log = logging.getLogger(__name__)

GRADING_PACKAGES = ("math-verify", "latex2sympy2-extended", "sympy")


@dataclass(frozen=True)
class Inputs:
    """The inputs of this start of a run."""

    record: Fingerprint  # goes into its checkpoints
    changes: list[str]  # since the newest checkpoint, in words: those that checkpoints.allow_changed_inputs allows
    heldout_changed: bool  # accuracy before the run was measured on other prompts, or in another way


def settle_inputs(
    config: RunConfig,
    tokenizers: tuple[ModelTokenizer, ModelTokenizer],
    prompts: Sequence[Prompt],
    heldout: list[Prompt],
    store: CheckpointStore,
    group: dist.ProcessGroup,
) -> Inputs:
    """Take the fingerprint of everything, and compare it with the newest checkpoint's, if there is one. Collective.

    What costs nothing is compared first, then the weights. Other settings of the evaluation are no change of its
    file: `MAY_CHANGE_ON_RESUME` lists them, and the initial student is measured again.

    Args:
        tokenizers: student's and teacher's.
        group: gloo, all ranks.

    Raises:
        UserError: on every rank: inputs have changed that checkpoints.allow_changed_inputs does not name; says which,
            where they are, and how they differ.
    """
    now = _on_first_rank(lambda: fingerprint(config, *tokenizers, prompts, heldout), group)
    name, then = store.recorded_inputs()
    same_evaluation = True
    if then is not None:
        same_evaluation = then.get("evaluation") == now.get("evaluation")
        cheap = then | {role: _without_weights(then.get(role)) for role in ("student", "teacher")}
        _on_first_rank(lambda: _compare(config, name, cheap, now, prompts, heldout), group)
    for role in ("student", "teacher"):
        now[role]["weights"] = weight_checksums(getattr(config, role).path, group)
    changes: list[str] = []
    if then is not None:
        changes = _on_first_rank(lambda: _compare(config, name, then, now, prompts, heldout), group)
        if dist.get_rank(group) == 0:
            for text in changes:
                log.warning("checkpoints.allow_changed_inputs: continuing %s with other inputs: %s", name, text)
    return Inputs(now, changes, not same_evaluation)


def _without_weights(model: Any) -> Any:
    return {name: value for name, value in model.items() if name != "weights"} if isinstance(model, dict) else model


def _on_first_rank(action: Callable[[], Any], group: dist.ProcessGroup) -> Any:
    """Do something on the first rank and return its result, or raise its UserError, on every rank."""
    outcome = None
    if dist.get_rank(group) == 0:
        try:
            outcome = action()
        except UserError as error:
            outcome = error
    outcome = from_first_rank(outcome, group)
    if isinstance(outcome, UserError):
        raise outcome
    return outcome


def _compare(
    config: RunConfig, name: str, then: Fingerprint, now: Fingerprint, prompts: Sequence[Prompt], heldout: list[Prompt]
) -> list[str]:
    """The allowed changes, in words. Raises UserError for those that are not allowed."""
    try:
        if not all(isinstance(value, dict) for value in then.values()):
            raise TypeError
        if then.get("evaluation", {}).get("settings") != now.get("evaluation", {}).get("settings"):
            then = {key: value for key, value in then.items() if key != "evaluation"}
        changed = differences(then, now, prompts, heldout)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        raise UserError(f"{config.output}: the inputs that checkpoint {name} names cannot be read") from None
    if (text := changed.pop("software", None)) is not None:
        log.info("%s: %s since checkpoint %s", config.output, text, name)
    where = _places(config)
    texts = {key: f"{key} ({where[key]}): {text}" for key, text in changed.items()}
    refused = [key for key in texts if key not in config.checkpoints.allow_changed_inputs]
    if refused:
        allowed = [*config.checkpoints.allow_changed_inputs, *refused]
        raise UserError(
            f"output={config.output}: inputs are not those of checkpoint {name}: "
            f"{'; '.join(texts[key] for key in refused)}; bring them back, or go on with what is there now by "
            f"checkpoints.allow_changed_inputs='[{', '.join(allowed)}]'"
        )
    return list(texts.values())


def fingerprint(
    config: RunConfig,
    student: ModelTokenizer,
    teacher: ModelTokenizer,
    prompts: Sequence[Prompt],
    heldout: list[Prompt],
) -> Fingerprint:
    """All inputs but the weights, which `weight_checksums` reads. The names are those of
    `checkpoints.allow_changed_inputs`; ``software`` is told when it changes, and may."""
    with_templates = config.prompts.template == "chat"
    found: Fingerprint = {
        "student": {"config": _architecture(config.student.path)},
        "teacher": {"config": _architecture(config.teacher.path)},
        "tokenizer": {role: _tokenizer(tokenizer) for role, tokenizer in _roles(student, teacher)},
        "templates": {role: _templates(tokenizer, with_templates) for role, tokenizer in _roles(student, teacher)},
        "prompts": _table(prompts, ("answers", "difficulty", "student_token_ids", "teacher_token_ids")),
        "grader": {"grader": GRADER_VERSION} | versions(*GRADING_PACKAGES),
        "software": versions("torch", "megatron-core", "tokenizers"),
    }
    rollouts = config.rollouts
    packages = packages_of(rollouts)
    if heldout:
        packages += packages_of(rollouts.writing)
        found["evaluation"] = {
            "settings": config.evaluation.model_dump(mode="json", exclude={"teacher"}),
            "prompts": _table(heldout, ("answers", "level", "student_token_ids", "teacher_token_ids")),
        }
    found["engine"] = versions(*packages)
    if rollouts.recorded is not None:
        found["rollouts"] = _records(rollouts.recorded, config.training.steps)
    return found


def _places(config: RunConfig) -> dict[str, str]:
    """Where each input is: the setting and its value."""
    student, teacher, evaluation = config.student, config.teacher, config.evaluation
    return {
        "student": f"student.path={student.path}",
        "teacher": f"teacher.path={teacher.path}",
        "tokenizer": f"{student.tokenizer or student.path}, {teacher.tokenizer or teacher.path}",
        "templates": f"{student.chat_template or student.path}, {teacher.chat_template or teacher.path}",
        "prompts": f"prompts.path={config.prompts.path}",
        "evaluation": f"evaluation.path={evaluation.path}",
        "rollouts": f"rollouts.path={config.rollouts.recorded}",
        "engine": f"rollouts.engine={config.rollouts.engine}",
        "grader": "grading",
    }


def _roles(student: ModelTokenizer, teacher: ModelTokenizer) -> Iterable[tuple[str, ModelTokenizer]]:
    return (("student", student), ("teacher", teacher))


def _architecture(hf_dir: Path) -> dict[str, Any]:
    fields = read_config_fields(hf_dir)
    plain: dict[str, Any] = json.loads(json.dumps(fields, default=lambda v: asdict(v) if is_dataclass(v) else str(v)))  # type: ignore[arg-type]
    return plain


def _tokenizer(tokenizer: ModelTokenizer) -> dict[str, Any]:
    """What encoding and decoding depend on. Decoding each token by itself also shows which tokens are special."""
    codec, names = tokenizer.codec, tokenizer.token_names
    return {
        "tokens": _checksum(sorted(names.items())),
        "merges": _checksum(codec.merges()),
        "rules of splitting": _checksum(sorted(codec.rules().items()), default=repr),
        "decoding": _checksum([tokenizer.decode([token]) for token in sorted(names)]),
    }


def _templates(tokenizer: ModelTokenizer, with_template: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"stop_token_ids": list(tokenizer.stop_token_ids)}
    if with_template:
        found |= {"chat template": _checksum(tokenizer.chat_template), "system prompt": tokenizer.system_prompt}
    return found


def _table(prompts: Sequence[Prompt], columns: tuple[str, ...]) -> dict[str, Any]:
    """A number a prompt and column, in order, so that a resume can say which prompts have changed."""
    numbers = {name: bytearray() for name in ("id", *columns)}
    for prompt in prompts:
        for name, column in numbers.items():
            column += zlib.crc32(_json(getattr(prompt, name))).to_bytes(4, "little")
    packed = {name: b64encode(column).decode() for name, column in numbers.items()}
    return {"count": len(prompts), "columns": packed}


def _records(path: Path, steps: int) -> dict[str, str]:
    """Checksums of the recorded rollouts that the run will read, by file."""
    folder = record_path(path, 0).parent
    files = [(folder if folder.is_dir() else path) / f"step-{step}.jsonl" for step in range(steps)]
    return {file.name: f"{CHECKSUM}{checksum(file)[1]:08x}" for file in files if file.is_file()}


def versions(*packages: str) -> dict[str, str]:
    """Of installed packages."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _checksum(value: Any, default: Any = None) -> str:
    return f"{CHECKSUM}{zlib.crc32(_json(value, default)):08x}"


def _json(value: Any, default: Any = None) -> bytes:
    return json.dumps(value, default=default).encode()
