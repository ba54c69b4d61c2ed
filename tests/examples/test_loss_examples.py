"""The page docs/loss.md and the three programs that it shows: what is written there runs, and learns what it should."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.ranks import RankPools

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "loss.md"
EXAMPLES = ROOT / "examples" / "loss"
BLOCK = re.compile(r"(?:^<!-- from (?P<source>\S+) -->\n)?^```python\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1")


def run(*command: str | Path) -> str:
    """What a program printed that must end well."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_runs_from_top_to_bottom() -> None:
    """In one namespace, as in a notebook; the page's own assertions are the test. Excerpts of the programs excepted."""
    blocks = [match for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")) if not match["source"]]
    assert blocks
    namespace: dict[str, Any] = {}
    for number, block in enumerate(blocks, 1):
        exec(compile(block["code"], f"{PAGE.name}, block {number}", "exec"), namespace)


def test_excerpts_are_what_the_programs_say() -> None:
    excerpts = [match for match in BLOCK.finditer(PAGE.read_text(encoding="utf-8")) if match["source"]]
    assert {match["source"] for match in excerpts} == {f"examples/loss/{path.name}" for path in EXAMPLES.glob("*.py")}
    for match in excerpts:
        source = (ROOT / match["source"]).read_text(encoding="utf-8")
        indents = {re.match(" *", line)[0] for line in source.splitlines()}  # type: ignore[index]
        assert any(textwrap.indent(match["code"], indent) in source for indent in indents), match["code"]


def test_the_plain_torch_loop_lowers_the_reverse_divergence() -> None:
    """Of each step's own rollouts, so it varies: means of five steps; measured 0.87."""
    output = run(sys.executable, EXAMPLES / "torch_loop.py", "--steps", "16")
    divergences = [float(line.split()[-1]) for line in output.splitlines() if line.startswith("step")]
    assert len(divergences) == 16
    assert sum(divergences[-5:]) < 0.95 * sum(divergences[:5])


def what_megatron_loop_prints(port: int, *arguments: str) -> str:
    """On a rank, which the program finds as torchrun starts it."""
    torch.distributed.destroy_process_group()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.MonkeyPatch.context() as patch:
        patch.setenv("MASTER_ADDR", "127.0.0.1")
        patch.setenv("MASTER_PORT", str(port))
        patch.setattr(sys, "argv", ["megatron_loop.py", *arguments])
        runpy.run_path(str(EXAMPLES / "megatron_loop.py"), run_name="__main__")
    return printed.getvalue()


def losses_of(prints: str) -> list[float]:
    return [float(line.split()[-1]) for line in prints.splitlines() if line.startswith("step")]


@pytest.mark.mcore_lane
def test_megatron_loop_learns_the_same_whatever_the_tensor_parallelism(pools: RankPools) -> None:
    """A later step's loss depends on all gradients before it, of which a wrong one under TP would show.

    fp32 and eight updates of Adam, which turns a gradient near zero into a whole step; measured 4e-7.
    """
    options = ("--steps", "8")
    alone = run(*TORCHRUN, EXAMPLES / "megatron_loop.py", *options)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    together = pools.of(2).run(what_megatron_loop_prints, port, "--tensor", "2", *options)
    whole, split = losses_of(alone), losses_of("".join(together))
    assert len(whole) == 8
    assert split == pytest.approx(whole, rel=1e-5)
    assert whole[-1] < 0.85 * whole[0]


def trl_python() -> str:
    """An interpreter that has TRL: the one that MEGATRON_SEAD_TRL_PYTHON names, or this one."""
    named = os.environ.get("MEGATRON_SEAD_TRL_PYTHON")
    if named:
        return named
    if importlib.util.find_spec("trl") is None:
        pytest.skip("needs trl==1.16.0, here or in the interpreter that MEGATRON_SEAD_TRL_PYTHON names")
    return sys.executable


@pytest.fixture(scope="module")
def trl_histories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, float]]]:
    results = tmp_path_factory.mktemp("trl") / "results.json"
    run(trl_python(), Path(__file__).with_name("trl_comparison.py"), results)
    histories: dict[str, list[dict[str, float]]] = json.loads(results.read_text(encoding="utf-8"))
    return histories


@pytest.mark.parametrize(("ours", "trls"), [("opd", "trl_reverse"), ("forward_kl", "trl_forward")])
def test_with_one_divergence_the_trl_subclass_is_trls_own_trainer(
    trl_histories: dict[str, list[dict[str, float]]], ours: str, trls: str
) -> None:
    """Both sum in fp32, in different orders; measured 1.2e-5 on gradient norms after two updates."""
    for step, (mine, theirs) in enumerate(zip(trl_histories[ours], trl_histories[trls], strict=True)):
        for name in ("loss", "grad_norm", "entropy", "num_tokens"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-4), (step, name)


def test_the_trl_loss_is_divided_by_the_tokens_that_teach(trl_histories: dict[str, list[dict[str, float]]]) -> None:
    """The mean over a random half of the same rollouts is near that over all; divided by all it would be half."""
    half, whole = trl_histories["random_half"][0], trl_histories["opd"][0]
    assert half["num_tokens"] == whole["num_tokens"]
    assert half["loss"] != whole["loss"]
    assert half["loss"] == pytest.approx(whole["loss"], rel=0.25)


def test_sead_in_trl_lowers_the_reverse_divergence(trl_histories: dict[str, list[dict[str, float]]]) -> None:
    """Of each step's own rollouts, so they vary: means of six steps."""
    divergences = [entry["reverse_kl"] for entry in trl_histories["sead"]]
    first, last = sum(divergences[:6]) / 6, sum(divergences[-6:]) / 6
    assert last < 0.85 * first
