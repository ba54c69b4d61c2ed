"""Real gloo ranks for tests: processes that are started once a module and run one function after another.

    @pytest.fixture(scope="module")
    def ranks() -> Iterator[RankPool]:
        with RankPool(4) as pool:
            yield pool

    def test_sum(ranks):
        assert ranks.run(sum_of_ranks) == [6, 6, 6, 6]  # one result a rank

The function is looked up by name in the ranks, so it stands at the top of a module. Ranks have Megatron-Core adapted
to the CPU, one thread, and a default process group; layouts come and go with `initialize_parallel` and
`destroy_parallel(keep_world=True)`. Importing Megatron takes seconds: prefer one pool to several.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class RankPool:
    """`size` ranks. After a failure that leaves a rank hanging or dead, the next `run` starts new ones."""

    def __init__(self, size: int, timeout: float = 120.0) -> None:
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def run(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
        """What `function(*args, **kwargs)` returns on each rank.

        Raises:
            AssertionError: it raised on some rank, or ran past the timeout. Holds that rank's traceback.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        deadline = time.monotonic() + self.timeout
        answers: list[Any] = [None] * self.size
        waiting = set(range(self.size))
        while waiting:
            ready = multiprocessing.connection.wait(
                [self._pipes[rank] for rank in waiting], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                self._fail(f"ranks {sorted(waiting)} did not answer within {self.timeout:.0f} s")
            for rank in [rank for rank in waiting if self._pipes[rank] in ready]:
                answers[rank] = self._receive(rank)
                waiting.discard(rank)
            if any(answer and not answer[0] for answer in answers):
                deadline = min(deadline, time.monotonic() + 5.0)  # the others may wait for this one for ever
        failed = [rank for rank in range(self.size) if not answers[rank][0]]
        if failed:
            raise AssertionError(f"rank {failed[0]} raised:\n{answers[failed[0]][1]}")
        return [answer[1] for answer in answers]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        meeting_point = str(Path(tempfile.mkdtemp(prefix="ranks-")) / "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.size, meeting_point, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return pickle.loads(self._pipes[rank].recv_bytes())
        except EOFError:
            return False, f"(the process died with exit code {self._processes[rank].exitcode})"

    def _fail(self, message: str) -> None:
        errors = []
        for rank, pipe in enumerate(self._pipes):
            if pipe.poll():
                ok, answer = self._receive(rank)
                errors += [] if ok else [f"rank {rank} raised:\n{answer}"]
        self.stop()
        raise AssertionError("\n".join([message, *errors]))


def _serve(rank: int, size: int, meeting_point: str, pipe: Connection) -> None:
    """A rank's life: join the others, then answer calls until the pipe closes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    warnings.filterwarnings("ignore")
    from megatron_sead.training.cpu_adaptor import adapt_to_cpu

    adapt_to_cpu()
    import torch

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, args, kwargs = pickle.loads(call)
            answer = pickle.dumps((True, function(*args, **kwargs)))
        except BaseException:
            answer = pickle.dumps((False, traceback.format_exc()))
        pipe.send_bytes(answer)
