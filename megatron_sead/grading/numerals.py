r"""The exact values of numerals, as fractions: integers, decimals that end or repeat, quotients, mixed numbers."""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000  # characters; Python refuses to read integers of over 4300 digits
LONGEST_PERIOD = 100  # characters of a decimal with dots in which a period is looked for
_DIGITS = r"\d{1,3}(?:[, ]\d{3})+(?![\d])|\d+"
_INTEGER = re.compile(rf"([+-]?)\s*({_DIGITS})(?:\.0*)?")
_DECIMAL = re.compile(
    rf"([+-]?)\s*({_DIGITS})?(?:\.(\d+)?)?\s*(?:(?:\\times|\\cdot)\s*10\s*\^\s*\{{?\s*([+-]?\d+)\s*\}}?)?"
)
_POWER = re.compile(r"([+-]?)\s*10\s*\^\s*(?:\{\s*([+-]?\d+)\s*\}|(\d+))")
_QUOTIENT = re.compile(
    r"([+-]?)\s*(?:(\d+)\s*)??(?:\\frac\s*(?:\{([^{}]+)\}|(\d))\s*(?:\{([^{}]+)\}|(\d))"
    r"|([\d.,]+)\s*(?:/|\\div)\s*([\d.,]+))"
)
_REPEATING = re.compile(
    r"([+-]?)(\d*)\.(\d*)(?:\\(?:overline|bar)\s*\{?(\d+)\}?|\((\d+)\)"
    r"|\\dot\s*\{?(\d)\}?(?:(\d*)\\dot\s*\{?(\d)\}?)?)"
)
_GOES_ON = re.compile(r"([+-]?)(\d*)\.(\d*?)(?:(\d)\4{2,}|(\d{2,}?)\5+)(?:\.\.\.|\\[lc]?dots)")
_BASED = re.compile(r"\(?\s*([+-]?[\dA-Za-z,. ]*\d[\dA-Za-z,. ]*)\s*\)?\s*_\s*\{?\s*([\da-z ]+?)\s*\}?")
_BASE_NAMES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9",
    "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16",
}  # fmt: skip


def integer(text: str) -> int | None:
    """The integer that a text in standard spelling writes: 27, 27.0, 1,000, 1 000. None when it is anything else."""
    match = _INTEGER.fullmatch(text)
    return None if match is None or len(text) > LONGEST else int(match[1] + _plain(match[2]))


def exact_value(text: str) -> Fraction | None:
    r"""The number that a text in standard spelling writes, as a fraction; None when it is no numeral.

    ``0.(3)``, ``0.\overline{3}`` and ``0.333...`` are 1/3, and 0.333 is 333/1000.
    """
    if len(text) > LONGEST:
        return None
    for read in (_decimal, _power, _quotient, _repeating):
        value = read(text)
        if value is not None:
            return value
    return None


def digits_and_base(text: str) -> tuple[str, str] | None:
    """A numeral with a subscript, as its digits and its base: ("2516", "8"); None when the text is none."""
    match = _BASED.fullmatch(text)
    if match is None:
        return None
    base = match[2].removeprefix("base").strip()
    return re.sub("[, ]", "", match[1]).lstrip("+0").upper() or "0", _BASE_NAMES.get(base, base)


def _decimal(text: str) -> Fraction | None:
    match = _DECIMAL.fullmatch(text)
    if match is None or (match[2] is None and match[3] is None):
        return None
    value = Fraction(f"{_plain(match[2] or '0')}.{match[3] or '0'}")
    return _scaled(_signed(match[1], value), match[4] or "0")


def _power(text: str) -> Fraction | None:
    match = _POWER.fullmatch(text)
    return None if match is None else _scaled(_signed(match[1], Fraction(1)), match[2] or match[3])


def _quotient(text: str) -> Fraction | None:
    match = _QUOTIENT.fullmatch(text)
    if match is None:
        return None
    above, below = _decimal(match[3] or match[4] or match[7]), _decimal(match[5] or match[6] or match[8])
    if above is None or not below:
        return None
    return _signed(match[1], int(match[2] or 0) + above / below)


def _repeating(text: str) -> Fraction | None:
    match = _REPEATING.fullmatch(text) or _GOES_ON.fullmatch(text[:LONGEST_PERIOD])
    if match is None:
        return None
    sign, whole, once, *periods = (group or "" for group in match.groups())
    period = "".join(periods)
    nines = Fraction(int(period), (10 ** len(period) - 1) * 10 ** len(once))
    return _signed(sign, Fraction(f"{whole or '0'}.{once or '0'}") + nines)


def _scaled(value: Fraction, exponent: str) -> Fraction | None:
    return value * Fraction(10) ** int(exponent) if len(exponent) < 5 else None


def _signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign == "-" else value


def _plain(digits: str) -> str:
    return digits.replace(",", "").replace(" ", "")
