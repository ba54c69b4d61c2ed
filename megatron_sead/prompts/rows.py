"""Rows of a prompt set, from a JSONL, JSON or parquet file or a hub data set, each with a place to name it by."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_sead.config import PromptSettings
from megatron_sead.errors import UserError


@dataclass(frozen=True)
class Row:
    """One row as it stands in the data set."""

    place: str  # "FILE, line 3"
    fields: dict[str, Any]


def read_rows(settings: PromptSettings) -> list[Row]:
    """All rows of ``settings.path``, in order.

    Raises:
        UserError: a missing, unreadable or empty file, a line that is not a JSON object (with its number), a hub data
            set that cannot be loaded.
    """
    path = Path(settings.path)
    is_file = path.suffix in (".jsonl", ".json", ".parquet") or path.exists()
    if is_file and not path.is_file():
        problem = "is a directory" if path.is_dir() else "no such file"
        raise UserError(f"prompts file {path}: {problem}; must be a JSONL or parquet file, or a hub data set's name")
    if not is_file:
        rows = _from_hub(settings)
    elif path.suffix == ".parquet":
        rows = _from_parquet(path)
    else:
        rows = _from_json(path)
    if not rows:
        raise UserError(f"prompts file {path}: holds no prompts")
    return rows


def _from_json(path: Path) -> list[Row]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text at byte {error.start}"
        raise UserError(f"prompts file {path}: cannot be read: {reason}") from None
    if text.lstrip().startswith("["):
        return _from_array(path, text)
    rows = []
    # Not splitlines(): JSON strings may hold line separators such as U+2028, which end no line of a JSONL file
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            fields = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: not valid JSON: {error}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{place}: must be a JSON object, not {type(fields).__name__}")
        rows.append(Row(place, fields))
    return rows


def _from_array(path: Path, text: str) -> list[Row]:
    try:
        items = json.loads(text)
    except ValueError as error:
        raise UserError(f"prompts file {path}: not valid JSON: {error}") from None
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict):
            raise UserError(f"{path}, item {number}: must be a JSON object, not {type(item).__name__}")
    return _numbered(items, str(path), "item")


def _from_parquet(path: Path) -> list[Row]:
    from datasets import Dataset

    try:
        return _numbered(Dataset.from_parquet(str(path), keep_in_memory=True), str(path), "row")
    except Exception as error:  # datasets wraps whatever pyarrow raises
        cause = error.__cause__ or error
        raise UserError(f"prompts file {path}: not a parquet file: {' '.join(str(cause).split())}") from None


def _from_hub(settings: PromptSettings) -> list[Row]:
    from datasets import load_dataset
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells every retry; one line at the end is enough
    try:
        return _numbered(
            load_dataset(settings.path, settings.subset, split=settings.split), settings.path, f"{settings.split} row"
        )
    except Exception as error:  # no network, no such data set, subset or split: many types, one meaning for the user
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"prompts.path={settings.path}: no such file, and the hub data set cannot be loaded "
            f"({type(error).__name__}: {reason})"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)


def _numbered(items: Iterable[dict[str, Any]], source: str, unit: str) -> list[Row]:
    return [Row(f"{source}, {unit} {number}", dict(item)) for number, item in enumerate(items, 1)]
