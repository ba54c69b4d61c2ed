r"""The units of two answers: cm and centimeters are one, cm and m two, and so are cm and ``\text{cm}^2``."""

from __future__ import annotations

import re

_NAMES = {
    "mm": "mm millimeter millimetre",
    "cm": "cm centimeter centimetre",
    "m": "m meter metre",
    "km": "km kilometer kilometre",
    "in": "in inch inche",
    "ft": "ft foot feet",
    "yd": "yd yard",
    "mi": "mi mile",
    "s": "s sec second",
    "min": "min minute",
    "h": "h hr hour",
    "day": "day",
    "week": "week",
    "month": "month",
    "year": "yr year",
    "g": "g gram",
    "kg": "kg kilogram",
    "lb": "lb pound",
    "oz": "oz ounce",
    "$": "$ dollar",
    "cent": "cent",
}
_CANONICAL = {name: unit for unit, names in _NAMES.items() for name in names.split()}
_NUMBER = re.compile(r"[-+]?(?:[\d.,\s/]|\\frac\s*\{\d+\}\s*\{\d+\}|\\sqrt\s*\{\d+\}|\\pi(?![a-zA-Z]))+")
_UNIT = re.compile(
    r"(?:\\text\s*\{\s*)?(?P<prefix>sq(?:uare|\.)?\s|cu(?:bic|\.)?\s)?\s*(?P<name>[a-zA-Z]+?)(?P<plural>e?s)?\.?\s*\}?"
    r"\s*(?:\^\s*\{?\s*(?P<power>[23])\s*\}?)?"
)


def units_differ(reference: str, given: str) -> bool:
    """Whether two numbers in standard spelling have two known units that are not the same."""
    left, right = _unit(reference), _unit(given)
    return left is not None and right is not None and left != right


def _unit(text: str) -> tuple[str, str] | None:
    """A number's unit and the unit's power: ("cm", "2")."""
    number = _NUMBER.match(text)
    unit = None if number is None else _UNIT.fullmatch(text, number.end())
    if unit is None:
        return None
    name, plural = unit["name"].lower(), unit["plural"] or ""
    known = next((_CANONICAL[word] for word in (name, name + "e", name + plural) if word in _CANONICAL), None)
    power = unit["power"] or {"s": "2", "c": "3"}.get((unit["prefix"] or " ")[0], "1")
    return None if known is None else (known, power)
