"""Data sets that are folders: shards of parquet or JSON lines, or what ``datasets.save_to_disk`` writes. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sead.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = {"parquet": (".parquet",), "JSON": (".jsonl", ".ndjson", ".jsonlines", ".json")}
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}  # JSON, and no rows
SPLITS = ("train", "test", "validation", "valid", "val", "dev", "eval")  # as the names of shards begin
VALID = "must hold parquet files or JSON lines, or what datasets.save_to_disk writes"


def is_saved(folder: Path) -> bool:
    """Whether ``datasets.save_to_disk`` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def load_saved(folder: Path, split: str, source: str) -> Dataset:
    """Maps its files; nothing is copied.

    Args:
        split: of a folder that holds several.
        source: setting and value, for messages.

    Raises:
        UserError: it is damaged, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # pyarrow's, datasets' own, or what JSON raises
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{source}: what datasets.save_to_disk wrote there cannot be loaded: {reason[:200]}") from None
    if not isinstance(data, DatasetDict):
        return data
    if split not in data:
        raise UserError(f"{source}: has no split {split!r}; it has {', '.join(map(repr, data)) or 'none'}")
    return data[split]


def shards(folder: Path, split: str, source: str) -> list[Path]:
    """A folder's data files, in the order of their names: those of the split, where names begin with splits.

    Raises:
        UserError: none, none of the split, or files of both forms.
    """
    found = {form: _files(folder, suffixes) for form, suffixes in FORMS.items()}
    if not any(found.values()):
        raise UserError(f"{source}: is a directory without data files; {VALID}")
    named = {form: [file for file in files if _is_of(file, folder, [split])] for form, files in found.items()}
    if any(named.values()):
        found = named
    else:
        other = next((file for files in found.values() for file in files if _is_of(file, folder, SPLITS)), None)
        if other is not None:
            raise UserError(f"{source}: holds {other.relative_to(folder)}, and no file of the split {split!r}")
    if all(found.values()):
        one, another = (files[0].relative_to(folder) for files in found.values())
        raise UserError(f"{source}: holds both {one} and {another}; name a file, or a folder with files of one form")
    return found["parquet"] or found["JSON"]


def require_outside(output: Path, path: str, setting: str) -> None:
    """What is written must not become one of the files that are read.

    Raises:
        UserError: the output lies in the folder of a data set.
    """
    if os.path.isdir(path) and output.resolve().is_relative_to(Path(path).resolve()):
        raise UserError(
            f"output={output}: lies in {setting}={path}, a folder whose files are read; choose another place"
        )


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in suffixes
        and file.name not in DESCRIPTIONS
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    )


def _is_of(file: Path, folder: Path, splits: Sequence[str]) -> bool:
    """train-00000-of-00002.parquet, train.jsonl and train/0.parquet are of the split train; trained.jsonl is not."""
    begins = re.compile(rf"({'|'.join(map(re.escape, splits))})(?![A-Za-z])", re.IGNORECASE)
    return any(begins.match(part) for part in file.relative_to(folder).parts)
