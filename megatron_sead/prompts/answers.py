"""Reference answers as data sets write them: numbers, lists, GSM8K's rationales, MATH's boxed solutions."""

from __future__ import annotations

import json
from decimal import Decimal
from numbers import Integral, Real
from typing import Any

from megatron_sead.boxed import last_boxed

# What programs write where there is no value. The words "none" and "infinity" may be answers
MISSING = frozenset({"nan", "NaN", "NAN", "NaT", "<NA>", "None", "null", "Null", "NULL", "inf", "-inf", "+inf"})
MOST_DIGITS = 1000


def reference_answers(value: Any) -> tuple[str, ...]:
    r"""What must be given, one string an answer; () when the value holds none.

    ``'["34"]'``, a list of texts that was written as text, is that list; ``[3, 4]`` as text is an interval.
    27.0 is "27" and 1e-5 "0.00001"; true is "true"; "... #### 72" (GSM8K) is "72"; a text with ``\boxed{...}`` is its
    last box; a list holds several.

    Raises:
        ValueError: says what stands there that is no answer: NaN or the text "nan", an object, a list in a list or
            with an empty place.
    """
    value = _written_list(value)
    if not isinstance(value, list | tuple):
        answer = _answer(value)
        return () if answer is None else (answer,)
    answers = []
    for item in value:
        answer = None if isinstance(item, list | tuple) else _answer(item)
        if answer is None:
            raise ValueError(f"a list with {'a list in it' if isinstance(item, list | tuple) else 'an empty place'}")
        answers.append(answer)
    return tuple(answers)


def written_number(value: Real | Decimal) -> str:
    """A number in full, without an exponent and without zeros at its end: the value that was written, unrounded.

    Raises:
        ValueError: no finite number, or one that nobody would write in full.
    """
    number = value if isinstance(value, Decimal) else Decimal(int(value) if isinstance(value, Integral) else str(value))
    if not number.is_finite():
        raise ValueError(f"{value}, which is no finite number")
    if number and (abs(number.adjusted()) > MOST_DIGITS or len(number.as_tuple().digits) > MOST_DIGITS):
        raise ValueError(f"a number of more than {MOST_DIGITS:,} digits")
    text = format(number, "f")
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text if number else "0"


def is_blank(text: str) -> bool:
    """Nothing to see: no text, spaces, or characters without a shape (zero-width spaces, byte-order marks)."""
    return not any(character.isprintable() and not character.isspace() for character in text)


def _written_list(value: Any) -> Any:
    """Texts in a JSON list in a text, as released data sets have them; anything else as it is."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            items = json.loads(value)
        except (ValueError, RecursionError):
            return value
        if items and all(isinstance(item, str) and item.isprintable() for item in items):  # \f of \frac is none
            return items
    return value


def _answer(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Real | Decimal):
        return written_number(value)
    if not isinstance(value, str):
        raise ValueError(
            f"a value of type {type(value).__name__}; must be text, a number, true or false, or a list of those"
        )
    text = value.strip()
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif (box := last_boxed(text)) is not None:
        text = box.strip()
    if text in MISSING:
        meant = f"\\text{{{text}}}"
        raise ValueError(f"the text {text!r}, which programs write for a missing value; if it is meant, write {meant}")
    return None if is_blank(text) else text
