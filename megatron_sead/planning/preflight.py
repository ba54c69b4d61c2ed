"""Are the files of a run there and whole? Looks at sizes and headers, and at every prompt; loads no model, no torch."""

from __future__ import annotations

import os
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from megatron_sead.config.checks import check_batch
from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.run import ModelSettings, RunConfig
from megatron_sead.errors import UserError, kept
from megatron_sead.files.names import no_directory
from megatron_sead.models.token_ids import embedding_rows
from megatron_sead.models.weight_files import has_weights, locate_tensors, read_header, weight_files
from megatron_sead.planning.tokenizer_files import require_model_directory, tokenizer_problems
from megatron_sead.prompts.problems import Problem, read_problems, repeats, seen_in_training
from megatron_sead.prompts.rows import is_hub_name
from megatron_sead.wording import first_of


def check_inputs(config: RunConfig, *, weights_may_come_later: bool = False) -> list[str]:
    """Look for everything that would stop the run when it reads its files. Returns what is not there yet, if it may,
    and what is odd but may be meant: a line each.

    The run itself reads files whole and checks more: every tensor, chat templates and prompts' lengths.

    Raises:
        UserError: all problems, a line each.
    """
    missing: list[str] = []
    problems: list[str] = []
    for role, model in (("student", config.student), ("teacher", config.teacher)):
        with kept(problems):
            require_model_directory(model, role)
            missing += _missing_weights(model, role)
            problems += _damaged_weights(model) + _embedding_problems(model)
    if not weights_may_come_later:
        problems += missing
        if (lacks := config.rollouts.missing()) is not None:
            problems.append(f"rollouts.engine={config.rollouts.engine!r}: {lacks}")
    problems += tokenizer_problems(config)
    prompt_problems, notes = _prompt_problems(config)
    problems += prompt_problems
    recorded = config.rollouts.recorded
    if recorded is not None and not recorded.is_dir():
        problems.append(f"rollouts.path={recorded}: {no_directory(recorded)}")
    problems += _policy_problems(config.policy.name)
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return missing + notes + _same_model(config)


def _same_model(config: RunConfig) -> list[str]:
    """A note where the teacher is the student's directory and sees the same prompts."""
    student, teacher = config.student, config.teacher
    spoken_to_alike = all(getattr(student, n) == getattr(teacher, n) for n in ("system_prompt", "chat_template"))
    if student.path.resolve() != teacher.path.resolve() or teacher.prompt_field is not None or not spoken_to_alike:
        return []
    return [f"student.path and teacher.path are both {student.path}: every loss will be 0, and nothing is learnt"]


def _policy_problems(name: str) -> list[str]:
    """Check that the module of a policy of one's own can be found. It is not imported: that may bring torch."""
    package = name.partition(":")[0].partition(".")[0]
    if ":" not in name or PathFinder.find_spec(package, [os.getcwd(), *sys.path]) is not None:
        return []
    return [f"policy.name={name}: there is no module {package} here or in PYTHONPATH"]


def _missing_weights(model: ModelSettings, role: str) -> list[str]:
    try:
        missing = [file.name for file in weight_files(model.path) if not file.exists()]
    except UserError as error:
        return [] if has_weights(model.path) else [f"{role}.path={error}"]
    return [f"{role}.path={model.path}: {first_of(missing, 1)} not found"] if missing else []


def _damaged_weights(model: ModelSettings) -> list[str]:
    """What loading would refuse in the weight files; where some are still to come, in those that are there."""
    problems = []
    try:
        files = weight_files(model.path) if has_weights(model.path) else []
        if files and all(file.exists() for file in files):
            locate_tensors(model.path)
            return []
    except UserError as error:
        return [str(error)]
    for file in filter(Path.exists, files):
        try:
            read_header(file)
        except UserError as error:
            problems.append(str(error))
    return problems


def _embedding_problems(model: ModelSettings) -> list[str]:
    """Check that embedding and head have the rows that config.json says."""
    rows = embedding_rows(model.path)
    if rows is None or not has_weights(model.path):
        return []
    try:
        files = [file for file in weight_files(model.path) if file.exists()]
        places = {name: place for file in files for name, place in read_header(file).items()}
    except UserError:
        return []  # told as damage
    return [
        f"{places[name].file}: {name} has {places[name].shape[0]} rows; vocab_size in config.json is {rows}"
        for name in ("model.embed_tokens.weight", "lm_head.weight")
        if name in places and places[name].shape[:1] not in ((), (rows,))
    ]


def _prompt_problems(config: RunConfig) -> tuple[list[str], list[str]]:
    """What the run would refuse in its rows, found by the code that it reads them with; and notes on the rest."""
    problems, notes = [], []
    needed = {
        "teacher_prompt_field": config.teacher.prompt_field,
        "needs_difficulty": config.curriculum.mode != "none",
    }
    asked: list[tuple[str, PromptSettings, dict[str, Any]]] = [("prompts.path", config.prompts, needed)]
    if (heldout := config.evaluation.prompts(config.prompts)) is not None:
        asked.append(("evaluation.path", heldout, {"limit": config.evaluation.limit}))
    found: dict[str, list[Problem]] = {}
    for setting, settings, rest in asked:
        source = f"{setting}={settings.path}"
        if is_hub_name(settings.path):
            notes.append(f"{source}: no such file here; the run will load the hub data set of this name")
            continue
        try:
            found[setting] = read_problems(settings, setting, **rest)
            notes += repeats(found[setting], source)
            if setting == "prompts.path":
                check_batch(config, [problem.difficulty for problem in found[setting]])
            else:
                notes += seen_in_training(found[setting], found.get("prompts.path", []), source)
        except UserError as error:
            problems.append(str(error))
    return problems, notes
