"""Are the files of a run there and whole? Looks at sizes, headers and first lines; loads no model, imports no torch."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_sead.config import ModelSettings, PromptSettings, RunConfig
from megatron_sead.errors import UserError

FIRST_LINES = 100


def check_inputs(config: RunConfig, *, weights_may_come_later: bool = False) -> list[str]:
    """Look for everything that would stop the run when it reads its files. Returns what is not there yet, if it may.

    The run itself reads files whole and checks more: every prompt, every tensor, chat templates and stop tokens.

    Raises:
        UserError: the first problem, and how many more there are.
    """
    missing = _missing_weights(config.student, "student") + _missing_weights(config.teacher, "teacher")
    problems = [] if weights_may_come_later else list(missing)
    problems += _damaged_weights(config.student) + _damaged_weights(config.teacher)
    problems += _tokenizer_problems(config)
    needs_difficulty = config.curriculum.mode != "none"
    problems += _prompt_problems(config.prompts.path, "prompts.path", config.prompts, needs_difficulty)
    if config.evaluation.path is not None:
        problems += _prompt_problems(config.evaluation.path, "evaluation.path", config.prompts, needs_difficulty=False)
    if config.rollouts.path is not None and not config.rollouts.path.is_dir():
        problems.append(f"rollouts.path={config.rollouts.path}: no such directory")
    if problems:
        raise UserError(problems[0] + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""))
    return missing


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


def _tokenizer_problems(config: RunConfig) -> list[str]:
    """A directory with tokenizer.json or a sentencepiece model, or such a file itself; the same tokens for both."""
    problems, found = [], []
    for model, role in ((config.student, "student"), (config.teacher, "teacher")):
        place = model.tokenizer or model.path
        setting = f"{role}.tokenizer" if model.tokenizer else f"{role}.path"
        candidates = [place] if place.is_file() else [place / "tokenizer.json", place / "tokenizer.model"]
        file = next((c for c in candidates if c.is_file()), None)
        if file is None:
            problems.append(f"{setting}={place}: no tokenizer there: needs tokenizer.json or tokenizer.model")
            continue
        try:
            found.append(_tokens_of(file))
        except (ValueError, KeyError, TypeError):
            problems.append(f"{file}: not a valid tokenizer: must be JSON with a 'model' that has a 'vocab'")
    if len(found) == 2 and found[0] != found[1]:
        problems.append(
            f"teacher {config.teacher.tokenizer or config.teacher.path} and student "
            f"{config.student.tokenizer or config.student.path} have different tokenizers: tokens, merges and added "
            "tokens must be the same"
        )
    return problems


def _tokens_of(file: Path) -> object:
    """What must be equal. Versions write merges as "a b" or ["a", "b"], and added tokens in one place or in two."""
    if file.suffix != ".json":
        return file.read_bytes()
    values = json.loads(file.read_text(encoding="utf-8"))
    tokens = {token["content"]: token["id"] for token in values.get("added_tokens") or []}
    vocabulary = values["model"]["vocab"]
    if isinstance(vocabulary, list):  # a unigram model: [token, score], the place is the id
        return tokens, vocabulary
    merges = values["model"].get("merges") or []
    return tokens | vocabulary, [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]


def _prompt_problems(path: str, setting: str, fields: PromptSettings, needs_difficulty: bool) -> list[str]:
    file = Path(path)
    if file.suffix not in (".jsonl", ".json", ".parquet") and not file.exists():
        return []  # a hub name; the run downloads it
    if not file.is_file():
        return [f"{setting}={path}: no such file"]
    if file.suffix == ".parquet":
        return []
    try:
        with file.open(encoding="utf-8-sig") as stream:
            lines = [(number, line) for number, line in enumerate(islice(stream, FIRST_LINES), 1) if line.strip()]
    except UnicodeDecodeError as error:
        return [f"{setting}={path}: not UTF-8 text at byte {error.start}"]
    if not lines:
        return [f"{setting}={path}: holds no prompts"]
    if lines[0][1].lstrip().startswith("["):
        return []  # one JSON array, which the run reads whole
    for number, line in lines:
        problem = _row_problem(line, fields, needs_difficulty)
        if problem is not None:
            return [f"{setting}={path}, line {number}: {problem}"]
    return []


def _row_problem(line: str, fields: PromptSettings, needs_difficulty: bool) -> str | None:
    try:
        row = json.loads(line)
    except ValueError as error:
        return f"not valid JSON: {error}"
    if not isinstance(row, dict):
        return "not a JSON object"
    for setting, name in (("prompt_field", fields.prompt_field), ("answer_field", fields.answer_field)):
        if name not in row:
            return f"has no {name!r}, which prompts.{setting} names; it has {', '.join(map(repr, row))}"
    if needs_difficulty and row.get(fields.difficulty_field) is None:
        return (
            f"has no {fields.difficulty_field!r}, which the curriculum needs; "
            "add it with tools/estimate_difficulty.py, or set curriculum.mode=none"
        )
    return None
