"""A run's processes: started, waited for, ended, and what they say of a failure."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from pathlib import Path

from megatron_sead.launch import CONTINUES
from megatron_sead.launch.processes import END_WITH_PARENT

PATIENCE = 30.0  # seconds in which a run that is told to end does so


class RunFailed(Exception):
    """A run's processes ended badly; the message says how."""


def set_aside(folder: Path) -> None:
    """What an earlier attempt at a run left gets another name: its files would be taken for the new one's, and the
    run refuses a folder that was moved since. Nothing is deleted, for others may have put something there."""
    if folder.exists():
        names = (folder.with_name(f"{folder.name}.{number}") for number in itertools.count(1))
        folder.rename(next(place for place in names if not place.exists()))


def run_ranks(command: list[str], log: Path, minutes: float) -> None:
    """Start a run's ranks and wait. They end with this process, in whatever way that ends.

    Args:
        log: gets what they print.

    Raises:
        RunFailed: they failed, or took longer than that.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", END_WITH_PARENT: "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(timeout=60 * minutes)
        except subprocess.TimeoutExpired:
            raise RunFailed(f"took longer than timeout_minutes={minutes:g}") from None
        finally:
            _end(process)
    if process.returncode:
        raise RunFailed(reason_in(log.read_text(encoding="utf-8", errors="replace"), process.returncode))


def _end(process: subprocess.Popen[bytes]) -> None:
    for wanted in (signal.SIGINT, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, wanted)
            try:
                process.wait(timeout=PATIENCE)
            except subprocess.TimeoutExpired:
                continue


def reason_in(log: str, code: int) -> str:
    """One line: what the run told of its failure; else its last line. A study's runs have no checkpoints, whatever the
    launcher says."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    named = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (told or named or lines or [f"ended with exit code {code}"])[-1 if not told else 0].removesuffix(CONTINUES)[
        :500
    ]
