"""Four gloo ranks, started once and given one function after another."""

from __future__ import annotations

import multiprocessing
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

SIZE = 4
GROUPS = {
    "1": [[0], [1], [2], [3]],
    "2": [[0, 1], [2, 3]],
    "4": [[0, 1, 2, 3]],
    "columns": [[0, 2], [1, 3]],  # crosses "2": together they span all ranks
}

Groups = dict[str, ProcessGroup]


def _serve(rank: int, store: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, SIZE), rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    groups: Groups = {}
    for name, members in GROUPS.items():
        for ranks in members:
            group = dist.new_group(ranks)
            if rank in ranks:
                groups[name] = group
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            pipe.send((function(groups, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Context manager; `run` calls a module-level function `function(groups, *arguments)` on all four."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(SIZE):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, str(folder / "store"), theirs), daemon=True)
            process.start()
            self._pipes.append(mine)
            self._processes.append(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.send(None)
        for process in self._processes:
            process.join(10)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Results by rank; numpy arrays and plain values travel, tensors do not."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        answers = [pipe.recv() for pipe in self._pipes]
        errors = [error for _, error in answers if error is not None]
        assert not errors, errors[0]
        return [result for result, _ in answers]
