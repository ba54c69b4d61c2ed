"""Under torchrun a user's mistake is one line and exit code 2, whichever rank finds it; a bug is told in full."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RANK_PROGRAM = """
import signal, sys, time
import torch.distributed as dist
from megatron_sead.cli import one_line_errors_on_ranks
from megatron_sead.errors import UserError

with one_line_errors_on_ranks():
    dist.init_process_group("gloo")
    match sys.argv[1], dist.get_rank():
        case ("mistake of one", 1) | ("mistake of all", _):
            raise UserError("training.lr=-1: must be positive")
        case "bug", 1:
            raise RuntimeError("a bug")
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


def test_a_bug_is_told_in_full(program: list[str]) -> None:
    done = subprocess.run([*program, "bug"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr
    assert "Root Cause" in done.stderr


def test_a_signal_lets_the_ranks_finish(program: list[str]) -> None:
    process = subprocess.Popen([*program, "signal"], stdout=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "saved 0" in output
    assert "saved 1" in output
