"""Under torchrun a user's mistake is one line and exit code 2, whichever rank finds it; a bug is told in full."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_sead.launch import processes
from tests.training.launching import SHORT, TINY

RANK_PROGRAM = """
import os, signal, sys, time
import torch.distributed as dist
from megatron_sead.commands.cli import one_line_errors_on_ranks
from megatron_sead.errors import UserError

with one_line_errors_on_ranks():
    dist.init_process_group("gloo")
    match sys.argv[1], dist.get_rank():
        case ("mistake of one", 1) | ("mistake of all", _):
            raise UserError("training.lr=-1: must be positive")
        case "bug", 1:
            raise RuntimeError("a bug")
        case "killed", 1:
            os.kill(os.getpid(), signal.SIGKILL)
        case "signal", rank:
            stop = []
            signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
            dist.barrier()
            if rank == 0:
                print("started", flush=True)
            while not stop:
                time.sleep(0.05)
            time.sleep(0.5)
            sys.stdout.write(f"saved {rank}\\n")
            sys.stdout.flush()
            sys.exit(0)
    dist.barrier()
"""


@pytest.fixture
def program(tmp_path: Path) -> list[str]:
    (tmp_path / "program.py").write_text(RANK_PROGRAM)
    launcher = [sys.executable, "-m", "megatron_sead.launch", "--standalone", "--nproc-per-node", "2"]
    return [*launcher, str(tmp_path / "program.py")]


@pytest.mark.parametrize("case", ["mistake of one", "mistake of all"])
def test_a_mistake_is_told_once(program: list[str], case: str) -> None:
    done = subprocess.run([*program, case], capture_output=True, text=True, check=False, timeout=120)
    assert done.stderr == "error: training.lr=-1: must be positive\n"
    assert done.returncode == 2


def test_a_bug_is_told_in_full_and_once(program: list[str]) -> None:
    done = subprocess.run([*program, "bug"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert done.stderr.startswith("rank 1 failed:\nTraceback")
    assert done.stderr.endswith("RuntimeError: a bug\n")
    assert done.stderr.count("Traceback") == 1


def test_a_rank_that_was_killed_is_told_in_one_line(program: list[str]) -> None:
    done = subprocess.run([*program, "killed"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert re.fullmatch(r"error: rank 1 \(process \d+\) was ended by SIGKILL: by hand, or .*\n", done.stderr)


def test_a_signal_lets_the_ranks_finish(program: list[str]) -> None:
    """Under nohup a terminal that goes away is none."""
    nohup = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    process = subprocess.Popen([*nohup, *program, "signal"], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "saved 0" in output
    assert "saved 1" in output


def test_absent_nodes_are_named_while_they_are_waited_for_and_ctrl_c_ends_it() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    where = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(port), "--nproc-per-node", "1", "x.py"]
    program = f"""if True:
        import sys
        from megatron_sead.launch import meeting
        from megatron_sead.launch.torchrun import main
        meeting.INTERVAL = 0.2
        sys.exit(main(["--node-rank", sys.argv[1], *{where!r}]))
    """
    for node, other in (("1", "node 0"), ("0", "the 1 other node")):
        process = subprocess.Popen([sys.executable, "-c", program, node], stderr=subprocess.PIPE, text=True)
        assert process.stderr is not None
        assert process.stderr.readline().startswith(f"waiting for {other} at 127.0.0.1:{port}")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
        assert process.returncode == 0
        assert "Traceback" not in errors


LAUNCHED = [
    *(sys.executable, "-m", "megatron_sead.launch", "--standalone", "--nproc-per-node", "2"),
    *("-m", "megatron_sead.train", "--config", str(TINY), *SHORT),
    *("training.global_batch_size=8", "training.micro_batch_size=4", "rollouts.max_new_tokens=8"),
]


def descendants(pid: int) -> set[int]:
    children = {child.pid for child in psutil.Process(pid).children(recursive=True)}
    assert len(children) >= 2
    return children


def test_a_run_directory_has_one_owner_and_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    """Killed in a way that leaves it no time to end its ranks, it leaves none; the same command continues."""
    output = tmp_path / "run"
    command = [*LAUNCHED, f"output={output}", "training.steps=1000", "checkpoints.interval=1"]
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: any((output / "checkpoints").glob("step-*")))
    alone = command[command.index("-m", 2) :]
    second = subprocess.run([sys.executable, *alone], capture_output=True, text=True, check=False, timeout=240)
    assert second.returncode == 2
    told = [line for line in second.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1
    assert re.match(rf"error: output={output}: in use by process \d+ on \S+ \(since ", told[0]), second.stderr
    assert "Traceback" not in second.stderr
    assert first.poll() is None

    started = descendants(first.pid)
    first.kill()
    first.wait()
    wait_for(lambda: not any(processes.started(pid) for pid in started), seconds=10)
    steps = len((output / "metrics.jsonl").read_text().splitlines())
    third = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len((output / "metrics.jsonl").read_text().splitlines()) > steps + 1)
    third.send_signal(signal.SIGINT)
    _, told_by_third = third.communicate(timeout=120)
    assert third.returncode == 0
    assert "ended without giving it up; taken over" in told_by_third
    assert not (output / "owner.lock").exists()


def wait_for(condition: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
