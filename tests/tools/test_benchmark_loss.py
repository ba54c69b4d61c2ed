"""The benchmark's numbers are sane, and a wrong loss shows. How fast anything is, is not tested."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

TOOL = Path(__file__).parents[2] / "tools" / "benchmark_loss.py"
sys.path.insert(0, str(TOOL.parent))

from benchmark_loss import app, command_line, fitting  # noqa: E402  (the tools are commands, not a package)
from loss_benchmark import meters  # noqa: E402
from loss_benchmark.cases import FUSED, LOGITS, Case, Computes  # noqa: E402
from loss_benchmark.losses import COPY, OWN, PRODUCTS  # noqa: E402
from loss_benchmark.report import markdown, plot, print_tables  # noqa: E402

# A list LOSSES as a user may add one: a softmax over the rank's own columns only, right at TP 1 and wrong at TP 2; a
# forward divergence that passes for both; and one whose package is not there.
ADDED = """
from loss_benchmark.cases import LOGITS, Computes, Loss
from loss_benchmark.losses import _divergence


def local_softmax(inputs):
    return lambda: _divergence(inputs.student, inputs.teacher, *inputs.weights(Computes())).backward()


def forward_only(inputs):
    forward, reverse = inputs.weights(Computes())
    return lambda: _divergence(inputs.student, inputs.teacher, forward, 0 * reverse).backward()


LOSSES = [
    Loss("local softmax", "added", LOGITS, Computes(), local_softmax, 7),
    Loss("forward only", "added", LOGITS, Computes(), forward_only, 7),
    Loss("not here", "added", LOGITS, Computes(), local_softmax, 7, requires=("no_such_package",)),
]
"""
SIZES = ["--vocab", "512", "--tokens", "32", "--hidden", "16", "--share", "1,0.5", "--dtype", "fp32", "--tp", "1,2"]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a whole run with few small cases leaves; without the suffix."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "added.py").write_text(ADDED)
    families = ["--only", "ours,floors,torch,added", "--also", str(folder / "added.py")]
    arguments = [*SIZES, *families, "--rounds", "3", "--cores", "2", "--write", str(folder / "loss")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    return folder / "loss"


@pytest.fixture(scope="module")
def result(written: Path) -> dict[str, Any]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    found: dict[str, Any] = json.loads(written.with_suffix(".json").read_text(), parse_constant=refuse)
    return found


def rows(result: dict[str, Any], name: str, form: str) -> list[dict[str, Any]]:
    found = [row for row in result["rows"] if row["name"] == name and row["case"]["form"] == form]
    assert {row["case"]["tp"] for row in found} == {1, 2}
    return found


@pytest.mark.parametrize(
    ("name", "form"),
    [("ours", LOGITS), ("ours, gradient over the logits", LOGITS), ("ours", FUSED), ("torch, eager", LOGITS)],
)
def test_right_losses_have_small_errors(result: dict[str, Any], name: str, form: str) -> None:
    """fp32 rounding of 512 columns and 16 hidden dimensions: measured at most 6e-7."""
    for row in rows(result, name, form):
        assert 0 < row["gradient_error"] < 2e-6


def test_fused_form_compares_both_gradients(result: dict[str, Any]) -> None:
    assert {tuple(row["gradient_errors"]) for row in rows(result, "ours", FUSED)} == {("hidden", "head")}


def test_wrong_losses_have_large_errors(result: dict[str, Any]) -> None:
    errors = {row["case"]["tp"]: row["gradient_error"] for row in rows(result, "local softmax", LOGITS)}
    assert errors[1] < 2e-6
    assert errors[2] > 0.1
    assert all(row["gradient_error"] > 0.1 for row in rows(result, "forward only", LOGITS))


def test_collectives_are_counted(result: dict[str, Any]) -> None:
    for name in ("ours", "ours, gradient over the logits"):
        assert {row["case"]["tp"]: row["collectives"] for row in rows(result, name, LOGITS)} == {1: 0, 2: 2}
    # maxima, sums forward and backward, loss
    assert {row["case"]["tp"]: row["collectives"] for row in rows(result, "torch, eager", LOGITS)} == {1: 0, 2: 4}


def test_times_and_floors(result: dict[str, Any]) -> None:
    for row in result["rows"]:
        assert 0 < row["min_seconds"] <= row["median_seconds"]
        assert row["samples"] == 3
        assert row["over_floor"] > 0
    for name, form in ((COPY, LOGITS), (PRODUCTS, FUSED)):
        assert all(row["over_floor"] == 1 for row in rows(result, name, form))


def test_memory_counts_gradients_apart(result: dict[str, Any]) -> None:
    if "peak memory" in result["absent"]:
        pytest.skip(result["absent"]["peak memory"])
    for row in rows(result, "ours", LOGITS):
        columns = 512 // row["case"]["tp"]
        assert row["gradient_bytes"] == 32 * columns * 4
        assert row["scratch_bytes"] == max(0, row["peak_bytes"] - row["gradient_bytes"])
    assert all(row["gradient_bytes"] == 0 for row in rows(result, "ours, gradient over the logits", LOGITS))


def test_what_is_absent_says_why(result: dict[str, Any], written: Path) -> None:
    assert result["absent"]["not here"] == "ModuleNotFoundError: No module named 'no_such_package'"
    assert not [row for row in result["rows"] if row["name"] == "not here"]
    assert "absent: not here: ModuleNotFoundError" in written.with_suffix(".md").read_text()


def test_results_say_where_they_come_from(result: dict[str, Any], written: Path) -> None:
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cores"] == 2
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    tables = [line for line in written.with_suffix(".md").read_text().splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in tables}) == 1
    assert sum("w_f·FKL + w_r·RKL" in line for line in tables) == len(result["rows"]) - 6  # all but the floors'


def test_results_without_memory_or_with_a_failure_are_shown(result: dict[str, Any], tmp_path: Path) -> None:
    bare = {key: value for key, value in result["rows"][1].items() if not key.startswith(("peak", "scratch"))}
    failed = {"case": bare["case"], "name": "broken", "computes": "FKL", "reason": "ValueError: no"}
    poor = result | {"rows": [bare, failed, bare | {"name": "infinite", "gradient_error": None}]}
    text = markdown(poor)
    assert "| broken | FKL | ValueError: no |" in text
    assert "not finite" in text
    print_tables(poor, Console(file=(tmp_path / "table").open("w")))
    plot(poor, tmp_path / "plot.png")


def test_memory_is_not_measured_where_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(meters, "RESET", tmp_path / "no" / "such" / "file")
    assert meters.peak_bytes(lambda: None, torch.device("cpu")) is None


def test_a_whole_tensor_is_seen_at_the_peak() -> None:
    peak = meters.peak_bytes(lambda: torch.ones(2**24).sum(), torch.device("cpu"))
    if peak is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    assert 0.9 < peak / 2**26 < 1.3


def test_what_does_not_fit_is_left_out_and_said() -> None:
    losses = list(OWN)
    case = Case(LOGITS, tokens=16_384, vocab=100_352, hidden=16, dtype="fp32", tp=1, share=1.0)
    chosen = fitting(case, losses, {"ours", "torch"}, limit=3 * case.unit)
    assert {losses[index].name: reason for index, reason in chosen.items()} == {
        "ours": "needs about 22 GB",  # both shards, a block to restore from, what a floor would hold, the gradient
        "ours, gradient over the logits": None,
        "torch, eager": "needs about 61 GB",
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--tp", "3"], "--tp 3: must divide --vocab 512"),
        (["--tokens", "0"], "--tokens 0: positive numbers, comma-separated"),
        (["--tokens", "many"], "--tokens many: positive numbers, comma-separated"),
        (["--share", "2"], "--share 2: at most 1"),
        (["--dtype", "fp8"], "--dtype fp8: must be of fp32, bf16"),
        (["--device", "abacus"], "--device abacus: must be of cpu, cuda"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], line: str) -> None:
    done = CliRunner().invoke(app, ["--vocab", "512", *arguments])
    assert (done.exit_code, done.stderr) == (2, f"error: {line}\n")


def test_cases_count_bytes_of_a_rank() -> None:
    case = Case(LOGITS, tokens=1024, vocab=1000, hidden=8, dtype="bf16", tp=2, share=0.1)
    assert (case.columns, case.unit, case.active) == (500, 1024 * 500 * 4, 102)
    assert case.input_bytes == (2 * 1024 + 512) * 500 * 2  # both shards, and the rows to restore the student's from


def test_what_a_loss_computes_can_be_read() -> None:
    assert str(Computes()) == "w_f·FKL + w_r·RKL"
    assert str(Computes(reverse=False, weighted=False, top=3)) == "FKL, top 3"


def test_command_does_not_say_where_the_peers_lie() -> None:
    assert command_line(["--rounds", "2", "--python", "/home/me/bin/python"]) == (
        "python tools/benchmark_loss.py --rounds 2 --python PYTHON"
    )
