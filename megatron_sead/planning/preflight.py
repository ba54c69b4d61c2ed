"""Are the files of a run there and whole? Looks at sizes and headers, and at every prompt; loads no model, no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sead.config import ModelSettings, RunConfig
from megatron_sead.errors import UserError
from megatron_sead.planning.tokenizer_files import tokenizer_problems
from megatron_sead.prompts.problems import read_problems, repeats
from megatron_sead.prompts.rows import is_hub_name
from megatron_sead.token_ids import embedding_rows


def check_inputs(config: RunConfig, *, weights_may_come_later: bool = False) -> list[str]:
    """Look for everything that would stop the run when it reads its files. Returns what is not there yet, if it may,
    and what is odd but may be meant: a line each.

    The run itself reads files whole and checks more: every tensor, chat templates and prompts' lengths.

    Raises:
        UserError: the first problem, and how many more there are.
    """
    missing = _missing_weights(config.student, "student") + _missing_weights(config.teacher, "teacher")
    problems = [] if weights_may_come_later else list(missing)
    problems += _damaged_weights(config.student) + _damaged_weights(config.teacher)
    problems += _embedding_problems(config.student) + _embedding_problems(config.teacher)
    problems += tokenizer_problems(config)
    prompt_problems, notes = _prompt_problems(config)
    problems += prompt_problems
    if config.rollouts.path is not None and not config.rollouts.path.is_dir():
        problems.append(f"rollouts.path={config.rollouts.path}: no such directory")
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    return missing + notes


def _weight_files(model: ModelSettings) -> list[Path]:
    index = model.path / "model.safetensors.index.json"
    if not index.exists():
        return [model.path / "model.safetensors"]
    try:
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return sorted({model.path / name for name in names})
    except (ValueError, KeyError, AttributeError, TypeError):
        raise UserError(f"{index}: not a valid index: must be JSON with a 'weight_map' of tensors to files") from None


def _missing_weights(model: ModelSettings, role: str) -> list[str]:
    missing = [file.name for file in _weight_files(model) if not file.exists()]
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    return [f"{role}.path={model.path}: {missing[0]}{more} not found"] if missing else []


def _damaged_weights(model: ModelSettings) -> list[str]:
    found = [(file, _safetensors_problem(file)) for file in _weight_files(model) if file.exists()]
    return [f"{file}: {problem}" for file, problem in found if problem is not None]


def _embedding_problems(model: ModelSettings) -> list[str]:
    """Embedding and head have the rows that config.json says."""
    rows, problems = embedding_rows(model.path), []
    for file in _weight_files(model):
        if rows is None or not file.exists() or _safetensors_problem(file) is not None:
            continue
        with file.open("rb") as stream:
            header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            shape = header[name].get("shape") if name in header else None
            if shape and shape[0] != rows:
                problems.append(f"{file}: {name} has {shape[0]} rows; vocab_size in config.json is {rows}")
    return problems


def _safetensors_problem(file: Path) -> str | None:
    """The format: 8 bytes of header length, a JSON header with every tensor's place, then the tensors' bytes."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_size = int.from_bytes(stream.read(8), "little")
        if size < 8 or header_size > size - 8:
            return f"truncated: {size:,} bytes, its header is not whole"
        try:
            header: dict[str, Any] = json.loads(stream.read(header_size))
        except ValueError:
            return "not a safetensors file: its header is no JSON"
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    expected = 8 + header_size + end
    return None if size == expected else f"truncated: {size:,} bytes, its header says {expected:,}"


def _prompt_problems(config: RunConfig) -> tuple[list[str], list[str]]:
    """What the run would refuse in its rows, since the same code reads and checks them; and what to know of them."""
    problems, notes = [], []
    needed = {
        "teacher_prompt_field": config.teacher.prompt_field,
        "needs_difficulty": config.curriculum.mode != "none",
    }
    asked: list[tuple[str, str, dict[str, Any]]] = [("prompts.path", config.prompts.path, needed)]
    if config.evaluation.path is not None:
        asked.append(("evaluation.path", config.evaluation.path, {"limit": config.evaluation.limit}))
    for setting, path, rest in asked:
        if is_hub_name(path):
            notes.append(f"{setting}={path}: no such file here; the run will load the hub data set of this name")
            continue
        try:
            rows = read_problems(config.prompts.model_copy(update={"path": path}), setting, **rest)
        except UserError as error:
            problems.append(str(error))
        else:
            notes += repeats(rows, f"{setting}={path}")
    return problems, notes
