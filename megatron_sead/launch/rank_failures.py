"""When one rank fails, all end within seconds, and the failure is told once, by the rank that met it first.

Peers of a failed rank wait in a collective: for ever with NCCL, and with gloo they fail as well, with errors of their
own that hide the first. So a rank that fails writes so into the store through which the ranks met, if no other has
before it, and leaves at once; a thread in each rank reads it there. Process groups are not destroyed on the way:
that would wait for the peers.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn

from megatron_sead.launch.processes import started

if TYPE_CHECKING:
    from torch.distributed import TCPStore

INTERVAL = 0.5  # seconds between two looks into the store
TELLING = 2.0  # seconds that the others leave the first to tell; at the first exit a launcher ends them all
ECHO = 5.0  # seconds in which whoever caused an error in a collective has said so
LOST = 20.0  # seconds without the store after which whoever holds it is gone
ECHOES = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe")  # in errors that a lost peer causes


@contextmanager
def ending_together() -> Iterator[None]:
    """Watch the other ranks while the body runs, which ends with a collective over all ranks. Imports torch."""
    if not _has_peers():
        yield
        return
    watch = _Watch()
    watch.start()
    yield  # after an exception the thread goes on: another rank may fail first
    watch.finish()


def fail(code: int, message: str, error: BaseException) -> NoReturn:
    """End this rank, and with it all others.

    Args:
        code: that all ranks exit with.
        message: for stderr, if no other rank has failed before.
    """
    first = _first_failure(code, message, error) if _has_peers() else None
    if first is None or first["rank"] == _rank():
        with suppress(OSError):
            print(message, file=sys.stderr, flush=True)
        if first is not None and _number("LOCAL_WORLD_SIZE", 1) < _number("WORLD_SIZE", 1):
            time.sleep(TELLING)  # this node's launcher may hold the store, in which other nodes' ranks must read
        leave(code)
    _leave_after(first)


def _first_failure(code: int, message: str, error: BaseException) -> dict[str, Any] | None:
    """Of all ranks; None if the store cannot be reached."""
    try:
        store = _connect(timedelta(seconds=ECHO))
        if _may_be_echo(error):
            _await_cause(store)
        return _claim(store, _rank(), code, message)
    except Exception:  # whatever keeps this from being known must not keep the error from being told
        return None


def _may_be_echo(error: BaseException | None) -> bool:
    """Is it, or what led to it, an error that a lost peer causes?"""
    while error is not None:
        if any(sign in str(error) for sign in ECHOES):
            return True
        error = error.__cause__ or error.__context__
    return False


def _await_cause(store: TCPStore) -> None:
    """Returns when a failure is known, or after ECHO seconds."""
    deadline = time.monotonic() + ECHO
    while time.monotonic() < deadline and not store.check([_key("failure")]):
        _claim_for_the_dead(store)
        time.sleep(INTERVAL / 2)


def _claim(store: TCPStore, rank: int, code: int, message: str) -> dict[str, Any]:
    """Make this the first failure, unless there is one: that is returned."""
    failure = {"rank": rank, "node": os.environ.get("GROUP_RANK"), "code": code, "line": message.splitlines()[-1]}
    first: dict[str, Any] = json.loads(store.compare_set(_key("failure"), "", json.dumps(failure)))
    return first


def _claim_for_the_dead(store: TCPStore) -> None:
    """A rank of this node that was killed cannot say so. Its launcher tells the user; this ends the others."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    first = _rank() - _number("LOCAL_RANK", 0)
    for rank in range(first, first + _number("LOCAL_WORLD_SIZE", 1)):
        if rank != _rank() and store.check([_key(f"process/{rank}")]):
            pid, since = json.loads(store.get(_key(f"process/{rank}")))
            if started(pid) != since and not store.check([_key("done")]):
                _claim(store, rank, 1, f"rank {rank} (process {pid}) was ended from outside")


class _Watch:
    """The thread that ends this rank when another has failed."""

    def __init__(self) -> None:
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="peers", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        """All ranks have come to the end: whoever leaves now has not failed."""
        self._finished.set()
        self._thread.join(LOST)

    def _run(self) -> None:
        store, seen = None, time.monotonic()
        while not self._finished.wait(INTERVAL):
            try:
                if store is None:
                    store = _connect(timedelta(seconds=LOST))
                    store.set(_key(f"process/{_rank()}"), json.dumps([os.getpid(), started(os.getpid())]))
                _claim_for_the_dead(store)
                seen = time.monotonic()
                if store.check([_key("done")]):
                    return
                if store.check([_key("failure")]):
                    _leave_after(json.loads(store.get(_key("failure"))))
            except RuntimeError:  # torch.distributed.DistError among them
                if time.monotonic() - seen > LOST and not self._finished.is_set():
                    self._leave_without_store()
                store = None
        if store is not None:
            store.set(_key("done"), "")

    def _leave_without_store(self) -> NoReturn:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        print(f"error: rank {_rank()}: {place}, where the ranks met, is gone; ending", file=sys.stderr, flush=True)
        leave(1)


def _leave_after(first: dict[str, Any]) -> NoReturn:
    """Quietly on the node that has told; one line on every other."""
    if first["node"] != os.environ.get("GROUP_RANK") and _number("LOCAL_RANK", 0) == 0:
        print(f"error: rank {first['rank']} failed on another node: {first['line']}", file=sys.stderr, flush=True)
    time.sleep(TELLING)
    leave(first["code"])


def leave(code: int) -> NoReturn:
    """End this process now: no other thread, no process group is waited for."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # closed, or a full disk
            stream.flush()
    os._exit(code)


def _connect(timeout: timedelta) -> TCPStore:
    """A connection of its own: one that is shared would be taken while another thread waits for a key."""
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return TCPStore(address, port, is_master=False, timeout=timeout, wait_for_workers=False)


def _has_peers() -> bool:
    """Whether torchrun, or a launcher that sets the same variables, started this rank."""
    return _number("WORLD_SIZE", 1) > 1 and {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def _rank() -> int:
    return _number("RANK", 0)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else default


def _key(name: str) -> str:
    run, attempt = (os.environ.get(f"TORCHELASTIC_{part}", "") for part in ("RUN_ID", "RESTART_COUNT"))
    return f"megatron_sead/{run}/{attempt}/{name}"
