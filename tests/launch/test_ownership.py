"""An output has one owner: a second is refused in one line, a dead one's place is taken and told."""

from __future__ import annotations

import fcntl
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.errors import UserError
from megatron_sead.launch import ownership, processes
from megatron_sead.launch.ownership import refuse_if_owned, sole_owner

CONTEXT = multiprocessing.get_context("fork")


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "a" / "owner.lock"


def hold(lock: Path, pipe: Any) -> None:
    try:
        with sole_owner(lock, "output=a"):
            pipe.send("owns")
            pipe.recv()
    except UserError as error:
        pipe.send(str(error))
    pipe.send("gave up")


def start_owner(lock: Path) -> tuple[Any, Any, str]:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(lock, theirs))
    process.start()
    theirs.close()
    return process, ours, ours.recv()


def kill(process: Any) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_a_second_owner_is_refused_by_either_path_and_the_first_is_undisturbed(lock: Path, tmp_path: Path) -> None:
    process, pipe, said = start_owner(lock)
    assert said == "owns"
    before = lock.read_bytes()
    (tmp_path / "link").symlink_to(lock.parent)
    for path in (lock, tmp_path / "link" / lock.name):
        with pytest.raises(UserError, match=rf"^output=a: in use by process {process.pid} on \S+ \(since .*stop it"):
            sole_owner(path, "output=a").__enter__()
        with pytest.raises(UserError, match=rf"process {process.pid} on"):
            refuse_if_owned(path, "output=a")
    assert lock.read_bytes() == before
    pipe.send("end")
    assert pipe.recv() == "gave up"
    process.join()
    assert not lock.exists()
    assert not lock.parent.parent.exists(), "empty folders that it made are gone"
    refuse_if_owned(lock, "output=a")


def test_a_killed_owner_is_taken_over_and_told(lock: Path, caplog: pytest.LogCaptureFixture) -> None:
    process, _, _ = start_owner(lock)
    kill(process)
    assert lock.exists()
    refuse_if_owned(lock, "output=a")
    with caplog.at_level(logging.WARNING), sole_owner(lock, "output=a"):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
    assert f"output=a: process {process.pid} on" in caplog.text
    assert "taken over" in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"pid": 1}', b"\xff\x00", b"[" * 4096])
def test_a_file_that_says_nothing_is_decided_by_the_lock(lock: Path, content: bytes) -> None:
    lock.parent.mkdir(parents=True)
    lock.write_bytes(content)
    with sole_owner(lock, "output=a"):
        pass
    lock.write_bytes(content)
    with lock.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"^output=a: in use by another process; "):
            sole_owner(lock, "output=a").__enter__()
    assert lock.read_bytes() == content


def test_a_link_in_the_place_of_the_file_is_refused_and_what_it_names_stays(lock: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    lock.parent.mkdir(parents=True)
    lock.symlink_to(theirs)
    with pytest.raises(UserError, match=r"^output=a: cannot be written \(.*owner\.lock\): "):
        sole_owner(lock, "output=a").__enter__()
    assert theirs.read_text() == "precious"


def test_of_many_that_start_at_once_one_owns(lock: Path) -> None:
    owners = []
    threads = [threading.Thread(target=lambda: owners.append(start_owner(lock))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said == "owns" for _, _, said in owners) == [False] * 5 + [True]
    for process, _, _ in owners:
        kill(process)


def record_of(lock: Path, **changes: Any) -> None:
    lock.parent.mkdir(parents=True)
    lock.write_text(json.dumps(ownership._myself() | changes))


def test_an_owner_on_another_machine_lives_while_it_renews_its_file(
    lock: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ownership, "BEAT", 0.2)
    monkeypatch.setattr(ownership, "SILENCE", 0.8)
    record_of(lock, host="node-7", machine="another", pid=12)
    ended = threading.Event()
    with lock.open("r+b") as file:
        renewing = threading.Thread(target=ownership._renew, args=(file.fileno(), ended))
        renewing.start()
        with pytest.raises(UserError, match="in use by process 12 on node-7"):
            sole_owner(lock, "output=a").__enter__()
        ended.set()
        renewing.join()
    with sole_owner(lock, "output=a"):
        assert "process 12 on node-7" in caplog.text


def test_without_locks_a_process_is_known_by_its_number_and_its_start(
    lock: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(ownership.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(ownership.fcntl, "flock", unsupported)
    record_of(lock)
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} on"):
        sole_owner(lock, "output=a").__enter__()
    lock.write_text(json.dumps(ownership._myself() | {"process_started": 1.0}))  # the number was given out again
    with sole_owner(lock, "output=a"):
        pass


def test_a_disk_that_refuses_is_told(lock: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(ownership.errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match=r"^output=a: cannot be written \(.*owner.lock\): No space left"):
            sole_owner(lock, "output=a").__enter__()
    assert not lock.exists()
    lock.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^output=a: cannot be written \(.*owner.lock\): Is a directory"):
        sole_owner(lock, "output=a").__enter__()


def child_of_child(pipe: Any) -> None:
    pipe.send((os.getpid(), processes.started(os.getpid())))
    time.sleep(60)


def parent_of(pipe: Any) -> None:
    def child() -> None:
        processes.end_with_parent()
        CONTEXT.Process(target=child_of_child, args=(pipe,)).start()
        child_of_child(pipe)

    CONTEXT.Process(target=child).start()
    time.sleep(60)


def test_a_process_ends_with_its_parent_and_so_does_what_it_forked() -> None:
    ours, theirs = CONTEXT.Pipe()
    parent = CONTEXT.Process(target=parent_of, args=(theirs,))
    parent.start()
    descendants = [ours.recv(), ours.recv()]
    assert all(processes.started(pid) == since for pid, since in descendants)
    kill(parent)
    deadline = time.monotonic() + 10
    while any(processes.started(pid) == since for pid, since in descendants):
        assert time.monotonic() < deadline
        time.sleep(0.05)
