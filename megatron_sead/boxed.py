r"""Where LaTeX solutions mark their answer: ``\boxed{...}``. Prompts and grading both read boxes."""

from __future__ import annotations

import re
from collections.abc import Iterator

_BOX = re.compile(r"\\(?:boxed|fbox|framebox)(?![a-zA-Z])\s*")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# Without braces TeX boxes one token; writers mean the number, the letter or the rest of the formula.
_BARE = re.compile(r"[-+]?\d(?:[\d.,/]*\d)?(?:\\?%)?|[A-Za-z](?=[\s$.,;]|\\[)\]]|$)|\\[a-zA-Z]+.*?(?=\$|\\[)\]]|\n|$)")
_JOINT = re.compile(
    r"\}?(?:[\s$]|\\[()\[\],; ]|\\q?quad)*(?:,|;|\\text\s*\{\s*,?\s*(?:and|or)\s*\}|(?:and|or)\b|\\(?:lor|land)\b)"
    r"(?:[\s$,]|\\[()\[\],; ]|\\q?quad|(?:and|or)\b|[a-zA-Z](?:_\{?\d\}?)?\s*=)*"
)


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` (or ``\fbox{...}``) that closes holds, braces balanced; None without one."""
    contents = boxed(text)
    return contents[-1] if contents else None


def boxed(text: str) -> list[str]:
    r"""What every outermost box holds that closes, in order. ``\boxed 5`` and ``\boxed {5}`` hold 5 too."""
    contents: list[str] = []
    inside = 0
    for _, start, end in _boxes(text):
        if end is not None and start >= inside:
            contents.append(text[start:end])
            inside = end
    return contents


def boxed_together(text: str) -> list[str]:
    r"""The last boxes between which only "and", "or" or a comma stands: ``\boxed{2}$ or $x = \boxed{3}``."""
    run: list[str] = []
    following = len(text)
    for mark, start, end in reversed(list(_boxes(text))):
        if end is None or (run and _JOINT.fullmatch(text, end, following) is None):
            break
        run.append(text[start:end])
        following = mark
    return run[::-1] if len({content.strip() for content in run}) > 1 else run[:1]


def box_cut_off(text: str) -> bool:
    r"""Whether the text ends inside of its last box: what would have followed is not known."""
    boxes = list(_boxes(text))
    return bool(boxes) and boxes[-1][2] is None


def _boxes(text: str) -> Iterator[tuple[int, int, int | None]]:
    """Where each box and its content start, and where that ends, or None for one that never closes."""
    closing = _closing_braces(text)
    for mark in _BOX.finditer(text):
        start = mark.end()
        if start == len(text):
            yield mark.start(), start, None
        elif text[start] == "{":
            yield mark.start(), start + 1, closing.get(start)
        elif (bare := _BARE.match(text, start)) is not None:
            yield mark.start(), start, bare.end()


def _closing_braces(text: str) -> dict[int, int]:
    r"""Which brace closes which; ``\{`` and ``\}`` are none."""
    closing: dict[int, int] = {}
    open_braces: list[int] = []
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            open_braces.append(brace.start())
        elif brace[0] == "}" and open_braces:
            closing[open_braces.pop()] = brace.start()
    return closing
