"""Check 1: the Triton kernels' own test cases, on the GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.gpu.check import CUDA, Report

CASES = Path(__file__).parents[1] / "distillation" / "triton_cases.py"


def triton_kernels(report: Report) -> None:
    """Without a GPU two cases alone, in Triton's interpreter, which is slow."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", str(CASES)]
    environment = dict(os.environ)
    if not CUDA:
        environment["TRITON_INTERPRET"] = "1"
        command += ["-k", "test_single_sums or test_one_row"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    (report.folder / "triton_cases.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    lines = done.stdout.splitlines()
    report.add(summary=lines[-1:], failed=[line[:200] for line in lines if line.startswith(("FAILED", "ERROR"))])
    report.expect("cases", done.returncode == 0, "every case within the tests' tolerance")
