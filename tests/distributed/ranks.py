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

import gc
import io
import multiprocessing
import multiprocessing.connection
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch


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
        call = _pack((function, args, kwargs))
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
                self.stop()
                raise AssertionError("\n".join([f"ranks {sorted(waiting)} did not answer in time", *_errors(answers)]))
            for rank in [rank for rank in waiting if self._pipes[rank] in ready]:
                answers[rank] = self._receive(rank)
                waiting.discard(rank)
            if any(answer and not answer[0] for answer in answers):
                deadline = min(deadline, time.monotonic() + 5.0)  # the others may wait for this one for ever
        if errors := _errors(answers):
            raise AssertionError("\n".join(errors))
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
            # Not daemons: writing a checkpoint takes child processes. A rank ends when its pipe closes.
            process = context.Process(target=_serve, args=(rank, self.size, meeting_point, theirs))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return _unpack(self._pipes[rank].recv_bytes())
        except EOFError:
            return False, f"(the process died with exit code {self._processes[rank].exitcode})"


def _errors(answers: list[Any]) -> list[str]:
    return [f"rank {rank} raised:\n{answer[1]}" for rank, answer in enumerate(answers) if answer and not answer[0]]


def _pack(value: Any) -> bytes:
    # Not pickle: Megatron-Core 0.19 makes tensors pickle by a name of its own, which the test's process may lack.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank: int, size: int, meeting_point: str, pipe: Connection) -> None:
    """A rank's life: join the others, then answer calls until the pipe closes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    warnings.filterwarnings("ignore")
    from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

    adapt_to_cpu()
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        try:
            function, args, kwargs = _unpack(call)
            answer = _pack((True, function(*args, **kwargs)))
        except BaseException:
            answer = _pack((False, traceback.format_exc()))
        _free_what_was_trained()
        gc.collect()  # models and contexts are cycles; with them go their process groups, and the groups' threads
        pipe.send_bytes(answer)


def _free_what_was_trained() -> None:
    """Open the cycle of a model in training, which passes through C++ and which Python's collector therefore leaves.

    A weight's hook holds the model, whose configuration holds the optimizer, whose views of the weights hold the hooks.
    With it stay process groups whose threads wake up a hundred times a second: after twenty runs they take a core.
    """
    from megatron.core.distributed import DistributedDataParallel

    for model in gc.get_referrers(DistributedDataParallel):
        if type(model) is DistributedDataParallel:
            model.grad_accs.clear()
            model.config.grad_scale_func = None
