"""Rows of a prompt set, from JSONL, JSON or parquet files or a hub data set, each with a place to name it by.

Imports no torch: a run, a check before it and an estimate of difficulty read with the same code. What a file is, its
first bytes say, not its name.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.exact_json import fault, loads
from megatron_sead.prompts.folders import is_saved, load_saved, shards
from megatron_sead.prompts.row_mistakes import RowMistakes
from megatron_sead.wording import counted

if TYPE_CHECKING:
    import pyarrow
    from datasets import Dataset

log = logging.getLogger(__name__)

VALID = "must be a JSONL, JSON or parquet file, or a folder of such"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
SUFFIXES = [".jsonl", ".json", ".ndjson", ".jsonlines", ".parquet", ".csv", ".tsv", ".txt", ".arrow", ".xlsx"]
SUFFIXES += [".gz", ".zip", ".zst", ".xz", ".bz2", ".yaml", ".pkl"]
BEGINNING = 2**16  # bytes of a file that say what it is
AT_ONCE = 4096  # rows of a table that are in memory together
PACKED = "which is not unpacked here; unpack it first"
SIGNATURES = (  # how files begin that are something else
    (b"\x1f\x8b", f"compressed with gzip, {PACKED}"),
    (b"\x28\xb5\x2f\xfd", f"compressed with zstd, {PACKED}"),
    (b"\xfd7zXZ\x00", f"compressed with xz, {PACKED}"),
    (b"BZh", f"compressed with bzip2, {PACKED}"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet"),
    (b"ARROW1", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream; of those that datasets.save_to_disk wrote name the folder"),
    (b"\x80\x04", "a pickle"),
    (b"version https://git-lfs", "a Git LFS pointer: the file itself was never fetched (git lfs pull)"),
    (b"<", "HTML or XML: perhaps the page about the file was saved in its place"),
)


BYTE_ORDER_MARK = b"\xef\xbb\xbf"
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


Found = tuple[str, Any]  # a row's place, and its fields; or the ValueError with which they could not be read


def read_rows(
    settings: PromptSettings, setting: str = "prompts.path", mistakes: RowMistakes | None = None
) -> list[Row]:
    """All rows that `stream_rows` finds.

    Args:
        mistakes: collects those of single rows; the caller refuses them. None: they are refused here.

    Raises:
        UserError: whatever it refuses.
    """
    found = RowMistakes() if mistakes is None else mistakes
    rows = list(stream_rows(settings, setting, found))
    if mistakes is None:
        found.refuse()
    return rows


def stream_rows(
    settings: PromptSettings, setting: str = "prompts.path", mistakes: RowMistakes | None = None
) -> Iterator[Row]:
    """The rows of ``settings.path``, in order. Of a file of lines or parquet, few are in memory at a time.

    Args:
        setting: the setting that names the path, for messages.
        mistakes: collects those of single rows, which are left out; the caller refuses them. None: the first is raised.

    Raises:
        UserError: a folder without data files, a missing, unreadable or empty file, one that is something else (says
            what), a line that is not a JSON object (with its number), a name given twice in an object, a lone surrogate
            in any field, a hub data set that cannot be loaded, a subset of a file.
    """
    source, is_hub = f"{setting}={settings.path}", is_hub_name(settings.path)
    if settings.subset is not None and not is_hub:
        group = setting.partition(".")[0]
        kind = "folder" if os.path.isdir(settings.path) else "file"
        raise UserError(f"{group}.subset={settings.subset}: only a hub data set has subsets, and {source} is a {kind}")
    nothing = True
    for place, fields in _from_hub(settings, source) if is_hub else _from_disk(settings, setting):
        nothing, row = False, None
        with nullcontext() if mistakes is None else mistakes.kept(place):
            row = _row(fields, place)
        if row is not None:
            yield row
    if nothing:
        raise UserError(f"{source}: holds no prompts")


def is_hub_name(path: str) -> bool:
    """Whether a path names a hub data set: no file is there, and it does not look like the misspelt name of one."""
    place = Path(path)
    if HUB_NAME.fullmatch(path) is None or os.path.exists(path):  # of a name that is too long, pathlib's raises
        return False
    named_as_file = difflib.get_close_matches(place.suffix.lower(), SUFFIXES, 1, 0.75)
    return not named_as_file and not ("/" in path and place.parent.is_dir())


def _from_disk(settings: PromptSettings, setting: str) -> Iterator[Found]:
    path, source = Path(settings.path), f"{setting}={settings.path}"
    if not os.path.isdir(path):  # pathlib's raises for a name that is too long
        yield from _from_file(path, source)
    elif is_saved(path):
        yield from _from_dataset(load_saved(path, settings.split, source), f"{path}, row")
    else:
        files = shards(path, settings.split, source)
        log.info("%s: reads %s, from %s on", source, counted(len(files), "file"), files[0].relative_to(path))
        for file in files:
            yield from _from_file(file, f"{setting}={file}")


def _from_file(path: Path, source: str) -> Iterator[Found]:
    content = _content(path, source, BEGINNING)
    if content.startswith(b"PAR1"):
        return _from_parquet(path, source)
    if not content:
        raise UserError(f"{source}: holds no prompts: the file is empty (0 bytes)")
    beginning = content.removeprefix(BYTE_ORDER_MARK).lstrip()
    for start, kind in SIGNATURES:
        if beginning.startswith(start):
            raise UserError(f"{source}: is {kind}; {VALID}")
    if path.suffix.lower() == ".parquet":
        raise UserError(f"{source}: not a parquet file, which would begin with the bytes PAR1")
    if beginning.startswith(b"["):
        return _from_array(path, source)
    if path.suffix.lower() in (".csv", ".tsv") and not beginning.startswith(b"{"):
        raise UserError(f"{source}: is a table of {path.suffix.lower()[1:].upper()}; {VALID}")
    return _from_lines(path, source)


def _content(path: Path, source: str, size: int = -1) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{source}: is a device or a pipe; {VALID}")
        with open(path, "rb") as file:
            return file.read(size)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{source}: no such file; {VALID}, or a hub data set's name (owner/name)") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{source}: cannot be read: {reason}") from None


def _text(content: bytes, source: str, line: int = 1, offset: int = 0) -> str:
    """Args: line, offset: where the content begins in its file."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line += content.count(b"\n", 0, error.start)
        utf16 = offset == 0 and content.startswith((b"\xff\xfe", b"\xfe\xff"))
        likely = "; it begins like UTF-16" if utf16 else ""
        raise UserError(f"{source}: not UTF-8 text at byte {offset + error.start} (line {line}){likely}") from None


def _from_lines(path: Path, source: str) -> Iterator[Found]:
    offset, first = 0, True
    with open(path, "rb") as file:
        # By newlines alone: JSON strings may hold line separators such as U+2028, which end no line of a JSONL file
        for number, content in enumerate(file, 1):
            line = _text(content.removeprefix(BYTE_ORDER_MARK) if number == 1 else content, source, number, offset)
            offset += len(content)
            if line.strip():
                yield f"{path}, line {number}", _fields(line.rstrip("\n"), path if first else None, source)
                first = False


def _fields(line: str, beginning_of: Path | None, source: str) -> Any:
    """Args: beginning_of: the file of which it is the first line; None: it is another."""
    try:
        return loads(line)
    except ValueError as error:
        if beginning_of is not None and _is_one_value(beginning_of, source):
            reason = "is one JSON object over several lines; must have an object a line, or be an array"
            raise UserError(f"{beginning_of}: {reason}") from None
        return ValueError(f"not valid JSON: {error}")


def _is_one_value(path: Path, source: str) -> bool:
    try:
        loads(_text(_content(path, source).removeprefix(BYTE_ORDER_MARK), source))
    except ValueError:
        return False
    return True


def _from_array(path: Path, source: str) -> Iterator[Found]:
    try:
        items = loads(_text(_content(path, source).removeprefix(BYTE_ORDER_MARK), source))
    except ValueError as error:
        raise UserError(f"{source}: not valid JSON: {error}") from None
    return ((f"{path}, item {number}", item) for number, item in enumerate(items, 1))


def _row(fields: Any, place: str) -> Row:
    if isinstance(fields, ValueError):
        raise UserError(f"{place}: {fields}")
    if not isinstance(fields, dict):
        raise UserError(f"{place}: must be a JSON object, not {type(fields).__name__}")
    if (found := fault(fields)) is not None:
        field = next((f"field {name!r} " for name, value in fields.items() if fault({name: value}) is not None), "")
        raise UserError(f"{place}: {field}{found}")
    return Row(place, fields)


def _from_parquet(path: Path, source: str) -> Iterator[Found]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, pre_buffer=False) as file:
            yield from _from_batches(file.iter_batches(AT_ONCE), f"{path}, row", file.schema_arrow.names)
    except (ArrowException, OSError, ValueError) as error:
        raise UserError(f"{source}: not a whole parquet file: {_one_line(error)}") from None


def _from_hub(settings: PromptSettings, source: str) -> Iterator[Found]:
    from datasets import load_dataset
    from huggingface_hub.utils import logging as hub_logging

    log.info("%s: no such file here; loading the hub data set of this name", source)
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells every retry; one line at the end is enough
    try:
        data = load_dataset(settings.path, settings.subset, split=settings.split)
    except Exception as error:  # no network, no such data set, subset or split: many types, one meaning for the user
        raise UserError(
            f"{source}: no such file, and the hub data set cannot be loaded "
            f"({type(error).__name__}: {_one_line(error)[:200]})"
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
    yield from _from_dataset(data, f"{settings.path}, {settings.split} row")


def _from_dataset(data: Dataset, unit: str) -> Iterator[Found]:
    data = data.with_format("arrow")
    batches = (data[start : start + AT_ONCE] for start in range(0, len(data), AT_ONCE))
    yield from _from_batches(batches, unit, data.column_names)


def _from_batches(batches: Iterator[Any], unit: str, names: list[str]) -> Iterator[Found]:
    """Args: batches: pyarrow's tables or record batches."""
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise UserError(f"{unit} 1: has two columns {min(twice)!r}")
    number = 0
    for batch in batches:
        columns = [_values(batch.column(name), name, unit, number) for name in names]
        for row in zip(*columns, strict=True):
            number += 1
            yield f"{unit} {number}", dict(zip(names, row, strict=True))


def _values(column: Any, name: str, unit: str, before: int) -> list[Any]:
    """Single precision is read by its shortest decimal: 0.1, not 0.10000000149011612.

    Args:
        column: pyarrow's array, or chunked array.
        before: rows before it.
    """
    import pyarrow

    as_text = _without_single(column.type, pyarrow.string())
    if as_text != column.type:
        column = column.cast(as_text).cast(_without_single(column.type, pyarrow.float64()))
    values: list[Any] = []
    try:
        for value in column:
            values.append(value.as_py())
    except (ValueError, OverflowError) as error:  # bytes that are no UTF-8, a time that Python has none for
        place = f"{unit} {before + len(values) + 1}"
        raise UserError(f"{place}: {name!r} cannot be read: {_one_line(error)}") from None
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
