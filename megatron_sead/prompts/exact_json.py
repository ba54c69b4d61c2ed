"""JSON whose numbers keep the value that was written, both ways; what is no sound JSON is said in a few words."""

from __future__ import annotations

import datetime
import json
import math
from collections import Counter
from decimal import Decimal, InvalidOperation
from typing import Any

DEEPEST = 100  # levels of lists and objects in one another
UNSEEN = {
    "\0": "a NUL byte, as in files that were not written whole",
    "\ufeff": "a byte-order mark, as where files were joined",
}


class Ambiguous(dict[str, Any]):
    """An object with a name given twice, of which every reader keeps another one. `fault` tells it with its place."""

    name: str


def loads(text: str) -> Any:
    """Numbers with a point or an exponent, and those too long for an int, are Decimal; NaN and Infinity are floats.

    Raises:
        ValueError: says in one line what is not valid. What `fault` finds is not raised here: the caller knows where.
    """
    try:
        return DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(_syntax_error(text, error)) from None
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} lists or objects in one another") from None


def dumps(value: Any) -> str:
    """One line of JSON. NaN and infinity are null, as JSON has no such numbers; dates and times are text.

    Raises:
        TypeError: a value that JSON has no form for, as bytes.
    """
    if isinstance(value, dict):
        return "{" + ", ".join([f"{dumps(str(name))}: {dumps(inner)}" for name, inner in value.items()]) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join([dumps(item) for item in value]) + "]"
    if isinstance(value, float | Decimal):
        return str(value) if _is_finite(value) else "null"
    if value is None or isinstance(value, bool | int | str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, datetime.date | datetime.time | datetime.timedelta):
        return json.dumps(str(value))
    raise TypeError(type(value).__name__)


def fault(value: Any, depth: int = 0) -> str | None:
    """Why a value should not be worked with or written: in no file of UTF-8, or read differently by every reader."""
    if isinstance(value, str):
        return None if value.isascii() or not _has_lone_surrogate(value) else _about_surrogates(value)
    if isinstance(value, Ambiguous):
        return f"has {value.name!r} twice in one object"
    if not isinstance(value, dict | list | tuple):
        return None
    if depth == DEEPEST:
        return f"has more than {DEEPEST} lists or objects in one another"
    items = [*value, *value.values()] if isinstance(value, dict) else value
    return next((found for item in items if (found := fault(item, depth + 1)) is not None), None)


def holds_no_number(value: Any) -> bool:
    """Is there a NaN or an infinity in it, which JSON cannot hold?"""
    if isinstance(value, float | Decimal):
        return not _is_finite(value)
    if isinstance(value, dict | list | tuple):
        return any(map(holds_no_number, value.values() if isinstance(value, dict) else value))
    return False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    counts = Counter(name for name, _ in pairs)
    ambiguous = Ambiguous(fields)
    ambiguous.name = next(name for name in counts if counts[name] > 1)
    return ambiguous


def _is_finite(value: float | Decimal) -> bool:
    return value.is_finite() if isinstance(value, Decimal) else math.isfinite(value)  # 1e400 is finite


def _decimal(text: str) -> Decimal:
    try:
        return Decimal(text)
    except InvalidOperation:
        raise ValueError(f"the number {text[:40]} is out of all range") from None


def _integer(text: str) -> int | Decimal:
    return int(text) if len(text) < 4000 else Decimal(text)  # Python makes no int of more than 4,300 digits


def _syntax_error(text: str, error: json.JSONDecodeError) -> str:
    place = f"line {error.lineno}, column {error.colno}" if "\n" in text else f"column {error.colno}"
    reason = UNSEEN.get(text[error.pos : error.pos + 1], error.msg)
    return f"{reason} at {place}"


def _has_lone_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _about_surrogates(text: str) -> str:
    character = next(c for c in text if "\ud800" <= c <= "\udfff")
    return f"holds {ascii(character)[1:-1]}, half of a character (a lone surrogate), which no file of UTF-8 can hold"


DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_float=_decimal, parse_int=_integer)
