"""Four gloo ranks with groups of them, for functions that take the groups first: `function(groups, *arguments)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from tests.distributed.ranks import RankPool

SIZE = 4
GROUPS = {
    "1": [[0], [1], [2], [3]],
    "2": [[0, 1], [2, 3]],
    "4": [[0, 1, 2, 3]],
    "columns": [[0, 2], [1, 3]],  # crosses "2": together they span all ranks
}

Groups = dict[str, ProcessGroup]

_groups: Groups = {}  # of this rank


class Ranks:
    """`run` calls a module-level function `function(groups, *arguments)` on all four."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank."""
        return self._pool.run(_run, function, *arguments)


def _run(function: Callable[..., Any], *arguments: Any) -> Any:
    if any(group not in dist.distributed_c10d._world.pg_map for group in _groups.values()) or not _groups:
        _make_groups()  # the first time, and where another test has taken them down
    return function(_groups, *arguments)


def _make_groups() -> None:
    for name, members in GROUPS.items():
        for ranks in members:
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                _groups[name] = group


class CountedCollectives:
    """Records the collectives made in its body: the name of each, and how many numbers it takes."""

    NAMES = ("all_reduce", "all_gather")

    def __enter__(self) -> list[tuple[str, int]]:
        self._real, calls = {name: getattr(dist, name) for name in self.NAMES}, list[tuple[str, int]]()

        def counting(name: str) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                calls.append((name, arguments[name == "all_gather"].numel()))
                return self._real[name](*arguments, **keywords)

            return call

        for name in self.NAMES:
            setattr(dist, name, counting(name))
        return calls

    def __exit__(self, *_: object) -> None:
        for name, function in self._real.items():
            setattr(dist, name, function)
