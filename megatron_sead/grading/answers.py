r"""What can be said about two answers without computer algebra: numerals, words, choices, equal texts."""

from __future__ import annotations

import re
from fractions import Fraction

from megatron_sead.grading import numerals
from megatron_sead.grading.notation import as_text, has_dots, standard, unwrapped, without_unit
from megatron_sead.grading.units import units_differ

LONGEST_ANSWER = 1000  # characters; no benchmark's answer comes near, and a repeating model's box can
_AGREED = {"true": "yes", "false": "no"}
_WORDS = re.compile(r"[A-Za-z][A-Za-z' -]+")
_CLOCK = re.compile(r"\d{1,2}:\d\d(?!\d)[^+*/^]*")
_LETTER_UNIT = re.compile(r"(?<=[\d}]) [msghLNJWVAKCF]$")
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALED = re.compile(rf"([\d.,-]+)\s*({'|'.join(_SCALES)})(?:\s(?:[a-z]{{3,}}))*", re.IGNORECASE)
_CHOICE = re.compile(
    r"(?:(?i:option|choice|answer)\s+)?(?:\(\s*([A-Z])\s*\)|([A-Z])(?:\)|[.:](?=\s|$)|$))[.:]?\s*+((?![,;+*/^=<>_]|and\b|or\b).*)"
)
_PART = re.compile(r"\(([a-z]|i{2,3}|iv|vi{0,3})\)(?=\s*[^\s,;)+*/^-])")
_CHOICE_BEHIND = re.compile(r"(.*[^\s,;])\s+\(([A-Z])\)")


def exactly_same(reference: str, given: str) -> bool | None:
    """Whether two answers are the same number, words or text; None when only computer algebra can tell."""
    if max(len(reference), len(given)) > LONGEST_ANSWER:
        return reference.strip() == given.strip()
    left, right = as_text(reference), as_text(given)
    if left == right or not left or not right:
        return bool(left and right)
    for verdict in (_same_in_base, _same_number, _same_words, _same_brackets, _same_time, _same_choice):
        same = verdict(reference, given)
        if same is not None:
            return same
    return None


def integer(answer: str) -> int | None:
    r"""The integer that an answer is: 27, 27.0, 1,000, 1{,}000, $27$, 336^\circ. None when it is anything else."""
    return numerals.integer(standard(answer))


def split_choice(answer: str) -> tuple[str, str] | None:
    r"""The letter of a choice and its value: ("C", "24") for ``\textbf{(C) }24``, ("C", "") for (C). Or None."""
    text = unwrapped(answer)
    if (match := _CHOICE.fullmatch(text)) is not None:
        return match[1] or match[2], match[3].strip()
    match = _CHOICE_BEHIND.fullmatch(text)
    return None if match is None else (match[2], match[1])


def split_answers(answer: str) -> list[str]:
    r"""Parts between commas, semicolons and the words "and", "or" that no bracket encloses. "(1, 2)" is one part."""
    if integer(answer) is not None:
        return [answer]
    text = re.sub(r"\\text\s*\{\s*,?\s*(?:and|or)\s*\}|\s(?:and|or)\s", ",", answer)
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
        elif character in ",;" and depth <= 0 and not (i and text[i - 1] == "\\"):  # \, and \; are spaces
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


def split_parts(answer: str) -> list[tuple[str, str]] | None:
    """The labels and contents of an answer in parts, as (a) 5 (b) 6; None for anything else."""
    _, *pieces = _PART.split(text := unwrapped(answer))
    labels, contents = (
        pieces[::2],
        [re.sub(r"^and\b|\band$|[,;\s]+$", "", piece.strip()).strip() for piece in pieces[1::2]],
    )
    whole = text.startswith("(") and len(labels) > 1 and all(contents) and labels[0] in ("a", "i")
    return list(zip(labels, contents, strict=True)) if whole else None


def split_sequence(answer: str) -> list[str] | None:
    r"""The parts of a list that dots abbreviate, dots among them: 1, 2, \ldots, n. None for anything without dots."""
    return split_answers(as_text(answer).removeprefix(r"\{").removesuffix(r"\}")) if has_dots(answer) else None


def _same_in_base(reference: str, given: str) -> bool | None:
    r"""2516_8 is 2516 in base eight, and neither 2516_9 nor 2516, which Math-Verify sees in all of them."""
    left, right = numerals.digits_and_base(as_text(reference)), numerals.digits_and_base(as_text(given))
    if left is None and right is None:
        return None
    return (left or (as_text(reference), "10")) == (right or (as_text(given), "10"))


def _same_number(reference: str, given: str) -> bool | None:
    if units_differ(standard(reference), standard(given)):
        return False
    (asked, asked_percent), (value, value_percent) = _number(reference), _number(given)
    if value is None and asked is not None:  # where a number is asked for, a letter behind a space is a unit
        value, value_percent = _number(_LETTER_UNIT.sub("", standard(given)))
    if asked is None or value is None:
        return None
    if asked_percent == value_percent:
        return asked == value
    if asked_percent:  # "in percent": the sign may be left out
        return value in (asked, asked / 100)
    return value == asked * 100 or (value == asked and abs(asked) >= 1)


def _number(answer: str) -> tuple[Fraction | None, bool]:
    if (scaled := _SCALED.fullmatch(unwrapped(answer))) is not None:
        value = numerals.exact_value(scaled[1].strip())
        return (None if value is None else value * _SCALES[scaled[2].lower()]), False
    text = without_unit(answer)
    number = text.removesuffix(r"\%")
    return numerals.exact_value(number.strip()), number != text


def _same_words(reference: str, given: str) -> bool | None:
    left, right = unwrapped(reference).casefold(), unwrapped(given).casefold()
    if not (_WORDS.fullmatch(left) and _WORDS.fullmatch(right)):
        return None
    left, right = _AGREED.get(left, left), _AGREED.get(right, right)
    if left == right:
        return True
    surely_words = r"\text" in standard(reference) + standard(given) or {left, right} <= {"yes", "no"}
    return False if surely_words else None


def _same_brackets(reference: str, given: str) -> bool | None:
    r"""A set {1, 2} is no pair (1, 2), and no interval; what Math-Verify would take for one another."""
    texts = as_text(reference), as_text(given)
    sets = [text.startswith(r"\{") and text.endswith(r"\}") and "(" not in text for text in texts]
    pairs = [text[0] in "([" and text[-1] in ")]" for text in texts]
    return False if any(sets) and any(pairs) else None


def _same_time(reference: str, given: str) -> bool | None:
    return False if all(_CLOCK.fullmatch(as_text(answer)) for answer in (reference, given)) else None


def _same_choice(reference: str, given: str) -> bool | None:
    """By their letters; where both letters have a value too, that is still to be compared."""
    asked, chosen = split_choice(reference), split_choice(given)
    if asked is None or chosen is None:
        return None
    return None if asked[0] == chosen[0] and asked[1] and chosen[1] else asked[0] == chosen[0]
