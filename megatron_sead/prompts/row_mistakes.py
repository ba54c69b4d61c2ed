"""The mistakes of a data set's rows, told together. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sead.errors import UserError
from megatron_sead.wording import counted, first_of

MOST_TOLD = 10  # kinds of mistakes of one data set
MOST_PLACES = 3  # further rows that are named for one kind


class RowMistakes:
    """Collects what is wrong with rows; equal reasons become one line with several places."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}  # by reason

    def __bool__(self) -> bool:
        return bool(self._places)

    @contextmanager
    def kept(self, place: str) -> Iterator[None]:
        """Keep a mistake of the row at `place` ("FILE, line 3"), which its message begins with; the row is left out.

        Raises:
            UserError: it is not the row's.
        """
        try:
            yield
        except UserError as error:
            start = f"{place}: "
            if not str(error).startswith(start):
                raise
            self._places.setdefault(str(error).removeprefix(start), []).append(place)

    def refuse(self) -> None:
        """Tell all mistakes that were kept.

        Raises:
            UserError: there are mistakes, a line each kind.
        """
        found = sorted(self._places.items(), key=lambda item: _number(item[1][0]))
        lines = [f"{places[0]}: {reason}{_also(places[1:])}" for reason, places in found]
        if len(lines) > MOST_TOLD:
            rest = [places for _, places in found[MOST_TOLD:]]
            lines[MOST_TOLD:] = [f"{rest[0][0]}: and {counted(sum(map(len, rest)), 'more row')} with other mistakes"]
        if lines:
            raise UserError("\n".join(lines))


def _number(place: str) -> int:
    return int(place.rpartition(" ")[2])


def _also(places: list[str]) -> str:
    """The other rows of one kind, without the file's name."""
    return f" (also {first_of([place.rpartition(', ')[2] for place in places], MOST_PLACES)})" if places else ""
