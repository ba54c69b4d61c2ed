"""Is a prompt a problem of a benchmark? The same words after normalisation, or most of its n-grams."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.messages import as_text, conversation
from megatron_sead.prompts.rows import Row, stream_rows

FIELDS = ("problem", "question", "prompt", "messages")  # of the released benchmarks
_SPACING = re.compile(r"\\(?:[,;:!> ]|q?quad\b|left\b|right\b|big[lr]?\b|Big[lr]?\b|displaystyle\b|limits\b)|~")
_FRACTION = re.compile(r"\\[dtc]frac\b")
_SYNONYMS = {r"\cdot": "*", r"\times": "*", "×": "*", "·": "*", "−": "-", "–": "-", r"\le": "≤", r"\leq": "≤"}
_SYNONYMS |= {r"\ge": "≥", r"\geq": "≥", r"\ne": "≠", r"\neq": "≠"}
_SYNONYM = re.compile("|".join(rf"{re.escape(s)}(?![a-zA-Z])" for s in sorted(_SYNONYMS, key=len, reverse=True)))
_WORD = re.compile(r"[^\W\d_]+|\d+|[-+*/^=<>|%≤≥≠!]")


def words(text: str) -> list[str]:
    """What a problem says, without what only sets it: case, spaces, punctuation, dollars, brackets, LaTeX's spacing."""
    text = unicodedata.normalize("NFKC", text)
    text = _FRACTION.sub(r"\\frac", _SPACING.sub(" ", text))
    text = _SYNONYM.sub(lambda match: f" {_SYNONYMS[match[0]]} ", text)
    return _WORD.findall(text.casefold())


@dataclass(frozen=True)
class Overlap:
    """A benchmark's problem that a prompt repeats."""

    is_exact: bool
    share: float  # of the problem's n-grams that are in the prompt
    place: str  # "FILE, line 3"
    text: str


class Benchmarks:
    """Problems that must not be trained on.

    Args:
        n: words of an n-gram.
        share: of a problem's n-grams from which a prompt is its near-duplicate.
    """

    def __init__(self, n: int, share: float) -> None:
        self._n, self._share = n, share
        self._problems: list[tuple[str, str]] = []  # place, text
        self._sizes: list[int] = []  # n-grams
        self._whole: dict[str, int] = {}
        self._holders: dict[str, list[int]] = {}  # n-gram -> problems that have it

    def add(self, place: str, text: str) -> None:
        said = words(text)
        number = len(self._problems)
        self._problems.append((place, text))
        self._whole.setdefault(" ".join(said), number)
        grams = set(self._grams(said))
        self._sizes.append(len(grams))
        for gram in grams:
            self._holders.setdefault(gram, []).append(number)

    def find(self, text: str) -> Overlap | None:
        """The problem that a prompt repeats most of; None: it repeats none."""
        if not self._problems:
            return None
        said = words(text)
        number = self._whole.get(" ".join(said))
        if number is not None:
            return Overlap(True, 1.0, *self._problems[number])
        hits = Counter(number for gram in set(self._grams(said)) for number in self._holders.get(gram, ()))
        if not hits:
            return None
        number, share = max(((n, hits[n] / self._sizes[n]) for n in sorted(hits)), key=lambda pair: pair[1])
        return Overlap(False, share, *self._problems[number]) if share >= self._share else None

    def _grams(self, said: list[str]) -> Iterator[str]:
        return (" ".join(said[start : start + self._n]) for start in range(len(said) - self._n + 1))


def read_benchmark(path: str, field: str | None) -> Iterator[tuple[str, str]]:
    """Place and text of each problem of a file or hub data set (its split "test").

    Args:
        field: that has the problem; None: the first there is of `FIELDS`.

    Raises:
        UserError: as `stream_rows`; a row without the field, or without text in it.
    """
    for row in stream_rows(PromptSettings(path=path, split="test"), "benchmarks"):
        name = field or next((name for name in FIELDS if name in row.fields), None)
        try:
            if name is None:
                raise KeyError(", ".join(map(repr, row.fields)))
            yield row.place, _problem(row, name)
        except KeyError as error:
            wanted = f"no {name!r}, which benchmark_field names" if name else f"none of {', '.join(map(repr, FIELDS))}"
            more = "" if name else "; name the field of the problem with benchmark_field"
            raise UserError(f"{row.place}: has {wanted}; it has {error.args[0]}{more}") from None


def _problem(row: Row, name: str) -> str:
    """The user's words, where it is a conversation."""
    try:
        turns = conversation(row.value(name))
    except ValueError as error:
        raise UserError(f"{row.place}: {name!r} (benchmark_field) {error}") from None
    return as_text(turns[-1:])
