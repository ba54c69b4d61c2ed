"""The Triton kernels: in their interpreter, on a GPU where there is one, and compiled for a GPU without having one.

Each in a process of its own: TRITON_INTERPRET is read when triton is first imported, and no other test must see it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]


def run(*arguments: str, interpret: bool) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_INTERPRET")}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    process = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout[-8000:] + process.stderr[-4000:]
    return process.stdout


def test_in_the_interpreter() -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py"), interpret=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py"), interpret=False)


def test_compiled_once_and_with_wide_accesses() -> None:
    """One compilation serves all numbers of rows and columns, and all chunks of a buffer."""
    compiled = json.loads(run(str(HERE / "triton_compilation.py"), interpret=False).splitlines()[-1])
    assert {name: len(codes) for name, codes in compiled.items()} == dict.fromkeys(compiled, 1)
    for kernel in ("_span_kernel", "_gradient_kernel"):
        assert "ld.global.v4.b32" in compiled[kernel][0]
    assert "st.global.v4.b32" in compiled["_gradient_kernel"][0]
