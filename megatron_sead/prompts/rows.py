"""Rows of a prompt set, from a JSONL, JSON or parquet file or a hub data set, each with a place to name it by.

Imports no torch: a run, a check before it and an estimate of difficulty read with the same code. What a file is, its
first bytes say, not its name.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sead.config.run import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.exact_json import fault, loads
from megatron_sead.prompts.row_mistakes import RowMistakes

if TYPE_CHECKING:
    import pyarrow

log = logging.getLogger(__name__)

VALID = "must be a JSONL, JSON or parquet file"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
SUFFIXES = [".jsonl", ".json", ".ndjson", ".jsonlines", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".xlsx"]
SUFFIXES += [".gz", ".zip", ".zst", ".xz", ".bz2", ".yaml", ".pkl"]
PACKED = "which is not unpacked here; unpack it first"
SIGNATURES = (  # how files begin that are something else
    (b"\x1f\x8b", f"compressed with gzip, {PACKED}"),
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd, {PACKED}"),
    (b"\xfd7zXZ\x00", f"compressed with xz, {PACKED}"),
    (b"BZh", f"compressed with bzip2, {PACKED}"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),  # as datasets.save_to_disk writes
    (b"\x80\x04", "a pickle"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was never fetched (git lfs pull)"),
    (b"<", "HTML or XML: perhaps the page about the file was saved in its place"),
)


ABSENT: Any = object()


@dataclass(frozen=True)
class Row:
    """One row as it stands in the data set. Numbers of a JSON file with a point or an exponent are Decimal."""

    place: str  # "FILE, line 3"
    fields: dict[str, Any]

    def value(self, name: str, default: Any = ABSENT) -> Any:
        """What stands under a name, or, where there is no such field, under the names between its dots: in objects,
        also those written as JSON into a text, and by number, from 0, in lists.

        Raises:
            KeyError: there is none, and no default; its argument tells in words what there is.
        """
        if name in self.fields:
            return self.fields[name]
        value: Any = self.fields
        path = name.split(".")
        for depth, part in enumerate(path):
            value = _written_object(value)
            if isinstance(value, dict) and part in value:
                value = value[part]
            elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
                value = value[int(part)]
            elif default is not ABSENT:
                return default
            else:
                raise KeyError(_what_there_is(value, ".".join(path[:depth])))
        return value


def _written_object(value: Any) -> Any:
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return loads(value)
        except ValueError:
            return value
    return value


def _what_there_is(value: Any, name: str) -> str:
    held = f"{name!r} with " if name else ""
    if isinstance(value, dict):
        return held + (", ".join(map(repr, value)) or "nothing in it")
    if isinstance(value, list):
        return f"{held}{len(value)} items, named by their numbers from 0"
    return f"{name!r}, which is {type(value).__name__} and has no fields"


def read_rows(
    settings: PromptSettings, setting: str = "prompts.path", mistakes: RowMistakes | None = None
) -> list[Row]:
    """All rows of ``settings.path``, in order.

    Args:
        setting: the setting that names the path, for messages.
        mistakes: collects those of single rows, which are left out; the caller refuses them. None: they are refused
            here.

    Raises:
        UserError: a missing, unreadable or empty file, one that is something else (says what), a line that is not a
            JSON object (with its number), a name given twice in an object, a lone surrogate in any field, a hub data
            set that cannot be loaded, a subset of a file.
    """
    found = RowMistakes() if mistakes is None else mistakes
    source = f"{setting}={settings.path}"
    if setting == "prompts.path" and settings.subset is not None and not is_hub_name(settings.path):
        raise UserError(f"prompts.subset={settings.subset}: only a hub data set has subsets, and {source} is a file")
    if is_hub_name(settings.path):
        rows = _from_hub(settings, source, found)
    else:
        rows = _from_file(Path(settings.path), source, found)
    if mistakes is None:
        found.refuse()
    if not rows and not found:
        raise UserError(f"{source}: holds no prompts")
    return rows


def is_hub_name(path: str) -> bool:
    """Whether a path names a hub data set: no file is there, and it does not look like the misspelt name of one."""
    place = Path(path)
    if HUB_NAME.fullmatch(path) is None or os.path.exists(path):  # of a name that is too long, pathlib's raises
        return False
    named_as_file = difflib.get_close_matches(place.suffix.lower(), SUFFIXES, 1, 0.75)
    return not named_as_file and not ("/" in path and place.parent.is_dir())


def _from_file(path: Path, source: str, mistakes: RowMistakes) -> list[Row]:
    content = _content(path, source)
    if content.startswith(b"PAR1"):
        return _from_parquet(path, source, mistakes)
    if not content:
        raise UserError(f"{source}: holds no prompts: the file is empty (0 bytes)")
    beginning = content[:1000].removeprefix(b"\xef\xbb\xbf").lstrip()
    for start, kind in SIGNATURES:
        if beginning.startswith(start):
            raise UserError(f"{source}: is {kind}; {VALID}")
    if path.suffix.lower() == ".parquet":
        raise UserError(f"{source}: not a parquet file, which would begin with the bytes PAR1")
    text = _text(content, source)
    if text.lstrip().startswith("["):
        return _from_array(path, text, source, mistakes)
    if path.suffix.lower() in (".csv", ".tsv") and not text.lstrip().startswith("{"):
        raise UserError(f"{source}: is a table of {path.suffix.lower()[1:].upper()}; {VALID}")
    return _from_lines(path, text, mistakes)


def _content(path: Path, source: str) -> bytes:
    try:
        if path.is_dir():
            raise UserError(f"{source}: is a directory; {VALID}, one file")
        if path.exists() and not path.is_file():
            raise UserError(f"{source}: is a device or a pipe; {VALID}")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{source}: no such file; {VALID}, or a hub data set's name (owner/name)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{source}: cannot be read: {reason}") from None


def _text(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        likely = "; it begins like UTF-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        raise UserError(f"{source}: not UTF-8 text at byte {error.start} (line {line}){likely}") from None


def _from_lines(path: Path, text: str, mistakes: RowMistakes) -> list[Row]:
    rows: list[Row] = []
    # Not splitlines(): JSON strings may hold line separators such as U+2028, which end no line of a JSONL file
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        with mistakes.kept(place):
            try:
                fields = loads(line)
            except ValueError as error:
                if not rows and not mistakes and _is_one_value(text):
                    raise UserError(
                        f"{path}: is one JSON object over several lines; must have an object a line, or be an array"
                    ) from None
                raise UserError(f"{place}: not valid JSON: {error}") from None
            rows.append(_row(fields, place))
    return rows


def _is_one_value(text: str) -> bool:
    try:
        loads(text)
    except ValueError:
        return False
    return True


def _from_array(path: Path, text: str, source: str, mistakes: RowMistakes) -> list[Row]:
    try:
        items = loads(text)
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON: {error}") from None
    return _rows(items, f"{path}, item", mistakes)


def _rows(values: Iterable[Any], unit: str, mistakes: RowMistakes) -> list[Row]:
    rows = []
    for number, value in enumerate(values, 1):
        place = f"{unit} {number}"
        with mistakes.kept(place):
            rows.append(_row(value, place))
    return rows


def _row(fields: Any, place: str) -> Row:
    if not isinstance(fields, dict):
        raise UserError(f"{place}: must be a JSON object, not {type(fields).__name__}")
    if (found := fault(fields)) is not None:
        field = next((f"field {name!r} " for name, value in fields.items() if fault({name: value}) is not None), "")
        raise UserError(f"{place}: {field}{found}")
    return Row(place, fields)


def _from_parquet(path: Path, source: str, mistakes: RowMistakes) -> list[Row]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            table = file.read()
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{source}: not a whole parquet file: {_one_line(error)}") from None
    return _from_table(table, f"{path}, row", mistakes)


def _from_hub(settings: PromptSettings, source: str, mistakes: RowMistakes) -> list[Row]:
    from datasets import load_dataset
    from huggingface_hub.utils import logging as hub_logging

    log.info("%s: no such file here; loading the hub data set of this name", source)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells every retry; one line at the end is enough
    try:
        data = load_dataset(settings.path, settings.subset, split=settings.split)
        table = data.with_format("arrow")[:]
    except Exception as error:  # no network, no such data set, subset or split: many types, one meaning for the user
        raise UserError(
            f"{source}: no such file, and the hub data set cannot be loaded "
            f"({type(error).__name__}: {_one_line(error)[:200]})"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
    return _from_table(table, f"{settings.path}, {settings.split} row", mistakes)


def _from_table(table: pyarrow.Table, unit: str, mistakes: RowMistakes) -> list[Row]:
    twice = {name for name in table.column_names if table.column_names.count(name) > 1}
    if twice:
        raise UserError(f"{unit} 1: has two columns {min(twice)!r}")
    columns = {name: _values(table[name], name, unit) for name in table.column_names}
    rows: Iterable[tuple[Any, ...]] = zip(*columns.values(), strict=True)
    return _rows((dict(zip(columns, row, strict=True)) for row in rows), unit, mistakes)


def _values(column: pyarrow.ChunkedArray, name: str, unit: str) -> list[Any]:
    """Single precision is read by its shortest decimal: 0.1, not 0.10000000149011612."""
    import pyarrow

    as_text = _without_single(column.type, pyarrow.string())
    if as_text != column.type:
        column = column.cast(as_text).cast(_without_single(column.type, pyarrow.float64()))
    values: list[Any] = []
    try:
        for value in column:
            values.append(value.as_py())
    except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, a time that Python has none for
        raise UserError(f"{unit} {len(values) + 1}: {name!r} cannot be read: {_one_line(error)}") from None
    return values


def _without_single(kind: pyarrow.DataType, instead: pyarrow.DataType) -> pyarrow.DataType:
    import pyarrow

    for is_list, list_of in (
        (pyarrow.types.is_list, pyarrow.list_),
        (pyarrow.types.is_large_list, pyarrow.large_list),
    ):
        if is_list(kind):
            return list_of(_without_single(kind.value_type, instead))
    return instead if pyarrow.types.is_float32(kind) else kind


def _one_line(error: Exception) -> str:
    cause = error.__cause__ or error
    return " ".join(str(cause).split()) or type(cause).__name__
