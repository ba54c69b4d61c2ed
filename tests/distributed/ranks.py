"""Real gloo ranks for tests: processes that live as long as the tests, and run one function after another.

    def test_sum(pools):
        assert pools.of(4).run(sum_of_ranks) == [6, 6, 6, 6]  # one result a rank

The function is looked up by name in the ranks, so it stands at the top of a module. Ranks have Megatron-Core adapted
to the CPU, one thread, and a default process group, a new one where the function before took it down or failed;
layouts come and go with `initialize_parallel` and `destroy_parallel(keep_world=True)`.

They are forked from a process that has imported what they need (`tests.distributed.imported`), which takes
seconds, once.
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
import torch.distributed as dist

ANSWER_OF_THE_OTHERS = 5.0  # seconds that ranks have after one has failed: they may wait for it for ever


def forkserver() -> Any:
    """A multiprocessing context, whose processes have imported Megatron and what a run needs."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.imported"])
    return context


class RankPool:
    """`size` ranks. After a failure that leaves a rank hanging or dead, the next `run` starts new ones."""

    def __init__(self, size: int, timeout: float = 240.0) -> None:
        self.size = size
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._worlds = 0  # how many default process groups these ranks have had
        self._has_world = False

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
        if not self._has_world:
            self._worlds += 1
        call = _pack((self._worlds, function, args, kwargs))
        for pipe in self._pipes:
            pipe.send_bytes(call)
        answers = self._answers()
        self._has_world = all(answer["well"] and answer["world"] for answer in answers)
        if errors := _errors(answers):
            raise AssertionError("\n".join(errors))
        return [answer["value"] for answer in answers]

    def stop(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._processes, self._pipes, self._has_world = [], [], False

    def _start(self) -> None:
        context = forkserver()
        meeting_point = tempfile.mkdtemp(prefix="ranks-")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            # Not daemons: writing a checkpoint takes child processes. A rank ends when its pipe closes.
            process = context.Process(target=_serve, args=(rank, self.size, meeting_point, theirs))
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def _answers(self) -> list[dict[str, Any]]:
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
            if any(answer and not answer["well"] for answer in answers):
                deadline = min(deadline, time.monotonic() + ANSWER_OF_THE_OTHERS)
        if any(answer["dead"] for answer in answers):
            self.stop()
        return answers

    def _receive(self, rank: int) -> dict[str, Any]:
        try:
            return _unpack(self._pipes[rank].recv_bytes()) | {"dead": False}
        except (EOFError, ConnectionResetError):
            self._processes[rank].join(5)
            told = f"(the process died with exit code {self._processes[rank].exitcode})"
            return {"well": False, "value": told, "world": False, "dead": True}


class RankPools:
    """A pool of each size, started when first asked for."""

    def __init__(self, timeout: float = 240.0) -> None:
        self.timeout = timeout
        self._pools: dict[int, RankPool] = {}

    def of(self, size: int) -> RankPool:
        """The pool of so many ranks."""
        return self._pools.setdefault(size, RankPool(size, self.timeout))

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()


def _errors(answers: list[Any]) -> list[str]:
    return [f"rank {rank} raised:\n{a['value']}" for rank, a in enumerate(answers) if a and not a["well"]]


def _pack(value: Any) -> bytes:
    # Not pickle: Megatron-Core 0.19 makes tensors pickle by a name of its own, which the test's process may lack.
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpack(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _serve(rank: int, size: int, meeting_point: str, pipe: Connection) -> None:
    """A rank's life: answer calls until the pipe closes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    warnings.filterwarnings("ignore")
    import tests.distributed.imported  # noqa: F401  (where the forkserver could not)

    torch.set_num_threads(1)
    gc.freeze()  # what was imported is not looked through after every call
    joined = 0
    while True:
        try:
            call = pipe.recv_bytes()
        except EOFError:
            return
        answer: dict[str, Any]
        try:
            world, function, args, kwargs = _unpack(call)
            if world != joined:
                _join(Path(meeting_point) / str(world), rank, size)
                joined = world
            answer = {"well": True, "value": function(*args, **kwargs)}
        except BaseException:
            answer = {"well": False, "value": traceback.format_exc()}
        packed = _pack(answer | {"world": dist.is_initialized()})
        del answer
        _free_what_was_trained()
        gc.collect()  # models and contexts are cycles; with them go their process groups, and the groups' threads
        pipe.send_bytes(packed)


def _join(meeting_point: Path, rank: int, size: int) -> None:
    """A new default process group, in place of whatever was left."""
    from megatron_sead.parallel.groups import destroy_parallel

    destroy_parallel()
    dist.init_process_group("gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=size)
    dist.barrier()  # a function that takes the group down at once would do so while others are still joining it


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
