"""What a process of its own has traced, once for all tests, whichever of pytest's workers they run in."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.tracing.cases import ROOT_ENVIRONMENT


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By case."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    told = folder / "traced.jsonl"
    with open(folder / "traced.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not told.exists():
            told.write_text(_trace_all(str(folder / "shapes")), encoding="utf-8")
    lines = [json.loads(line) for line in told.read_text(encoding="utf-8").splitlines() if line.startswith("{")]
    return {line["case"]: line for line in lines}


def _trace_all(folder: str) -> str:
    command = [sys.executable, "-W", "ignore", "-m", "tests.tracing.cases", folder]
    ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | ROOT_ENVIRONMENT, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout
