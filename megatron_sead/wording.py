"""Words of messages that more than one part needs."""

from collections.abc import Sequence


def counted(number: int, noun: str) -> str:
    """ "1 rank", "2 ranks", "2 batches"."""
    plural = noun + ("es" if noun.endswith(("ch", "s", "x")) else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def first_of(texts: Sequence[str], most: int = 3, separator: str = ", ") -> str:
    """ "a, b, c and 7 more"."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more
