"""Collectives as ranks see them, and whether ranks would meet in those that they share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MESSAGES = {"send", "recv_", "recv_any_source_"}


@dataclass(frozen=True)
class Call:
    """One collective, or one end of a message, as a rank sees it."""

    name: str  # of torch's operator
    group: str  # tp, pp, ...
    ranks: tuple[int, ...]
    elements: tuple[int, ...]  # of each tensor, where ranks must agree on it
    dtypes: tuple[str, ...]
    root: int | None  # of a broadcast and the like; the other end of a message; within the group
    bytes: int  # of the whole: all ranks' parts of a gather
    phase: str
    line: str
    op: str = ""  # of a reduction
    sent: tuple[int, ...] = ()  # elements to each rank of an exchange of all with all
    received: tuple[int, ...] = ()  # and from each

    def same(self, other: Call) -> bool:
        """Would they meet?"""
        fields = ("name", "group", "ranks", "elements", "dtypes", "root", "op")
        return all(getattr(self, name) == getattr(other, name) for name in fields)

    def __str__(self) -> str:
        kinds = "/".join(sorted(set(self.dtypes)))
        parts = [self.name, *([f"of {list(self.elements)} {kinds}"] if kinds else []), *([self.op] if self.op else [])]
        if self.sent:
            parts.append(f"of {list(self.sent)} to and {list(self.received)} from its ranks")
        parts += [f"root {self.root}"] if self.root is not None and self.name not in MESSAGES else []
        return " ".join([*parts, f"in group {self.group} at {self.line}"])


def disagreements(by_rank: dict[int, list[Call]]) -> list[str]:
    """Where traced ranks would not meet: of each two the first call that differs, and the first message."""
    found = []
    ranks = sorted(by_rank)
    for number, first in enumerate(ranks):
        for second in ranks[number + 1 :]:
            found += _between(first, by_rank[first], second, by_rank[second])
    return found


def shared(by_rank: dict[int, list[Call]]) -> int:
    """Of how many calls it is known that they meet: more than one traced rank takes part."""
    ranks = set(by_rank)
    return sum(len(ranks & set(call.ranks)) > 1 for call in next(iter(by_rank.values())))


def _between(first: int, theirs: list[Call], second: int, others: list[Call]) -> list[str]:
    """Calls of all groups in which both are, in one order: in another, each would wait for the other."""
    a, b = ([call for call in calls if {first, second} <= set(call.ranks)] for calls in (theirs, others))
    mine, other = ([call for call in calls if call.name not in MESSAGES] for calls in (a, b))
    lines = _first_difference(f"ranks {first} and {second}, shared", mine, other, _meet(first, second))
    for label, ranks in sorted({(call.group, call.ranks) for call in (*a, *b)}):
        for sender, sends, receiver, receives in ((first, a, second, b), (second, b, first, a)):
            out = [c for c in sends if _is_message(c, "send", label, ranks, receiver)]
            back = [c for c in receives if _is_message(c, "recv_", label, ranks, sender)]
            what = f"group {label}, from rank {sender} to rank {receiver}"
            lines += _first_difference(what, out, back, lambda x, y: (x.elements, x.dtypes) == (y.elements, y.dtypes))
    return lines


def _meet(first: int, second: int) -> Callable[[Call, Call], bool]:
    def same(x: Call, y: Call) -> bool:
        if not x.same(y):
            return False
        if not x.sent:
            return True
        one, other = x.ranks.index(first), x.ranks.index(second)
        return x.sent[other] == y.received[one] and y.sent[one] == x.received[other]

    return same


def _is_message(call: Call, name: str, label: str, ranks: tuple[int, ...], peer: int) -> bool:
    return call.name == name and (call.group, call.ranks) == (label, ranks) and ranks[call.root or 0] == peer


def _first_difference(what: str, a: list[Call], b: list[Call], same: Callable[[Any, Any], bool]) -> list[str]:
    for number, (x, y) in enumerate(zip(a, b, strict=False), 1):
        if not same(x, y):
            return [f"{what} call {number}: {x}, and {y}"]
    if len(a) != len(b):
        longer = a if len(a) > len(b) else b
        return [
            f"{what}: {len(a)} calls against {len(b)}; the first without a partner is {longer[min(len(a), len(b))]}"
        ]
    return []
