"""One output, one process that writes it: a second start is refused, and what a dead one left is taken over.

The owner holds the kernel's lock on a small file, which ends with the process in whatever way that ends. What the file
says is for people, and for file systems whose locks do not reach other machines: there the owner is seen to live by
the file's time, which it renews.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_sead.errors import UserError
from megatron_sead.launch.processes import started

BEAT = 5.0  # seconds between two renewals of the file's time
SILENCE = 4 * BEAT  # without one, an owner on another machine is dead
PATIENCE = 2.0  # seconds in which a process that is ending, or one that only looks, lets go of the lock
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what file systems without locks answer
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")

log = logging.getLogger(__name__)


@contextmanager
def sole_owner(lock: Path, name: str) -> Iterator[None]:
    """Own what `lock` stands for while the body runs. The file and folders that this makes go again, if still empty.

    Args:
        lock: a file for this purpose alone, in a folder that may not exist yet.
        name: of what is owned, for messages: the setting or option and its value.

    Raises:
        UserError: another process owns it (names it), or the disk refuses.
    """
    try:
        made = _make_folders(lock.parent)
        descriptor = _acquire(lock, name)
    except OSError as error:
        raise UserError(f"{name}: cannot be written ({error.filename or lock}): {error.strerror}") from error
    ended = threading.Event()
    threading.Thread(target=_renew, args=(descriptor, ended), name="owner", daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):  # not empty: something was written
            for folder in made:
                folder.rmdir()


def refuse_if_owned(lock: Path, name: str) -> None:
    """What `sole_owner` would say, without owning anything. Only of processes on machines that share locks.

    Raises:
        UserError: another process owns it.
    """
    with contextlib.suppress(OSError):
        descriptor = os.open(lock, os.O_RDONLY)
        try:
            if _is_locked(descriptor, fcntl.LOCK_SH):
                raise UserError(_refusal(name, _read(descriptor)))
        finally:
            os.close(descriptor)


def _acquire(lock: Path, name: str) -> int:
    """The descriptor that holds the lock."""
    deadline = time.monotonic() + PATIENCE
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)  # what a link names is not ours
        try:
            held = _is_locked(descriptor, fcntl.LOCK_EX)
            if not held and _is_at(descriptor, lock):
                _take(descriptor, lock, name, certain=held is False)
                return descriptor
            if held and time.monotonic() > deadline:
                raise UserError(_refusal(name, _read(descriptor)))
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # held, or removed by its owner between our opening and locking it
        time.sleep(0.1)


def _take(descriptor: int, lock: Path, name: str, *, certain: bool) -> None:
    earlier = _read(descriptor)
    if earlier is not None:
        if _lives(earlier, lock, certain=certain):
            raise UserError(_refusal(name, earlier))
        log.warning("%s: %s ended without giving it up; taken over", name, _describe(earlier))
    elif os.fstat(descriptor).st_size:
        log.warning("%s: %s does not say who owned it, and nobody does now; taken over", name, lock)
    mine = _myself()
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(mine).encode(), 0)
    except OSError:
        with contextlib.suppress(OSError):
            lock.unlink()
        raise
    if not certain:  # without locks two may have come this far: who wrote last has it
        time.sleep(1)
        with open(lock, "rb") as file:
            last = _read(file.fileno())
        if last != mine:
            raise UserError(_refusal(name, last))


def _is_locked(descriptor: int, kind: int) -> bool | None:
    """Take the lock, unless another process has it: True if so, None where the file system has no locks."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return False


def _is_at(descriptor: int, lock: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(lock))
    except FileNotFoundError:
        return False


def _lives(owner: dict[str, Any], lock: Path, *, certain: bool) -> bool:
    """Is an earlier owner alive whose lock is not seen here?"""
    if owner["machine"] == _machine():
        return not certain and started(owner["pid"]) == owner["process_started"]
    log.warning("%s: last owned by %s; waiting %.0f s for a sign of it", lock, _describe(owner), SILENCE)
    before, deadline = _time_of(lock), time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(BEAT / 5)
        if _time_of(lock) != before:
            return True
    return False


def _time_of(lock: Path) -> int:
    with open(lock, "rb") as file:  # opened anew: a network file system then asks its server
        return os.fstat(file.fileno()).st_mtime_ns


def _renew(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(descriptor)


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "since": datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        "process_started": started(os.getpid()),
        "machine": _machine(),
    }


def _machine() -> str:
    """Identity of the running kernel: several containers may share a host's name, and a machine keeps its name when it
    restarts."""
    try:
        return BOOT_ID.read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()


def _read(descriptor: int) -> dict[str, Any] | None:
    """What an owner wrote; None if that is nothing, or not to be read."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
    except (ValueError, RecursionError):
        return None
    return owner if isinstance(owner, dict) and owner.keys() >= _myself().keys() else None


def _refusal(name: str, owner: dict[str, Any] | None) -> str:
    return f"{name}: in use by {_describe(owner)}; wait for it to end, or stop it first"


def _describe(owner: dict[str, Any] | None) -> str:
    return f"process {owner['pid']} on {owner['host']} (since {owner['since']})" if owner else "another process"


def _make_folders(folder: Path) -> list[Path]:
    """Those that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing
