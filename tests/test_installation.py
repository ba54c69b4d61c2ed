"""What setup.py asks for resolves, on every Python that it admits, to the versions that the constraints name."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sead.config.rollouts import VllmRollouts

ROOT = Path(__file__).parents[1]
UNREACHABLE = ("error sending request", "Could not connect", "dns error", "network connectivity is disabled")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("uv") is None, reason="uv is not installed")


def resolved(python: str, extra: str, constraints: str) -> dict[str, str]:
    """Versions by name, as an installer would take them on Linux."""
    options = ["--python-version", python, "--python-platform", "x86_64-manylinux_2_28", "--extra", extra, "-q"]
    done = subprocess.run(
        [sys.executable, "-m", "uv", "pip", "compile", "setup.py", "--constraints", constraints, *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    if any(sign in done.stderr for sign in UNREACHABLE):
        pytest.skip("no package registry can be reached")
    assert done.returncode == 0, done.stderr
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", done.stdout, re.MULTILINE))


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_gpu_extra_is_a_vllm_that_is_known_to_work(python: str) -> None:
    found = resolved(python, "gpu", "constraints-gpu.txt")
    assert found["vllm"].rpartition(".")[0] in VllmRollouts.VERSIONS
    assert found["megatron-core"] == ("0.16.1" if python == "3.11" else "0.19.2")
    assert {"torch", "transformers", "transformer-engine", "transformer-engine-torch"} <= found.keys()


def test_without_constraints_no_old_vllm_is_taken_in_silence() -> None:
    found = resolved("3.12", "gpu", "/dev/null")
    assert found["vllm"].rpartition(".")[0] in VllmRollouts.VERSIONS


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_tests_extra_resolves(python: str) -> None:
    assert resolved(python, "test", "constraints.txt")["transformers"] == "5.24.0"
