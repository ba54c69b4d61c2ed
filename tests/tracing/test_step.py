"""Steps on fake CUDA tensors: every kind of layout and setting runs, ranks agree, and faults of a GPU run are found.

All cases run in one process of their own (`cases.py`), which changes torch for good.
"""

from __future__ import annotations

import ast
import math
import re
from typing import Any

import pytest

from megatron_sead.planning.seconds import METRIC_CALLS, ZONE_CALLS
from megatron_sead.tracing.device import compiler
from tests.tracing.cases import MATRIX, PLANS, ROOT, SABOTAGES

pytestmark = pytest.mark.skipif(compiler() is None, reason="a fake CUDA device needs a C++ compiler")

UNKNOWN = {  # operations that a CPU has no kernel for
    "torch_attn._varlen_attn.default",
    "torch_attn._varlen_attn_backward.default",
    "aten._fused_rms_norm_backward.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_flash_attention_backward.default",
}


@pytest.mark.parametrize("case", MATRIX)
def test_a_step_runs_on_fake_tensors(case: str, results: dict[str, dict[str, Any]]) -> None:
    result = results[case]
    assert "failed" not in result, result["failed"]
    for ours, planned, teachers, teachers_planned in result["parameters"]:
        assert (ours, teachers) == (planned, teachers_planned)
    for metrics in result["metrics"]:
        assert math.isfinite(metrics["loss"]) and metrics["active_tokens"] > 0
    assert result["disagreements"] == []
    assert min(result["calls"]) > (10 if len(result["calls"]) > 1 else 0)
    for phases in result["phases"]:
        assert {"teacher", "student scores", "training pass", "optimizer"} <= phases.keys()
        assert min(phases.values()) > 0
    assert set(result["unknown"]) <= UNKNOWN


def test_zones_are_as_large_as_their_shares(results: dict[str, dict[str, Any]]) -> None:
    (metrics,) = results["one rank, no recompute"]["metrics"]
    assert [metrics[f"zone_{zone}_share"] for zone in "abc"] == pytest.approx([0.5, 0.4, 0.1], abs=0.02)


def test_data_parallel_ranks_agree_on_zones_and_metrics_in_as_many_calls_as_planned(
    results: dict[str, dict[str, Any]],
) -> None:
    """Zones are found before training, or, of a policy that looks at none, for the metrics alone."""
    for calls in results["dp2, no distributed optimizer"]["small_calls"]:
        assert calls == {"measure": ZONE_CALLS + METRIC_CALLS}
    last_stage, first_stage = results["tp2, pp2, dp2"]["small_calls"]
    assert last_stage == {"student scores": ZONE_CALLS, "measure": METRIC_CALLS} and first_stage == {}


def documented_waits() -> set[str]:
    """As "file:function", from the first column of the table."""
    return set(re.findall(r"^\| `([\w/]+\.py:\w+)` \|", (ROOT / "docs" / "waits.md").read_text(), re.MULTILINE))


def function_of(line: str) -> str:
    """Of the package's "file:number"; or as it is."""
    name, number = line.split()[0].rsplit(":", 1)
    path = ROOT / "megatron_sead" / name
    if not path.is_file():
        return line
    functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
    around = [f for f in functions if f.lineno <= int(number) <= (f.end_lineno or 0)]
    return f"{name}:{max(around, key=lambda f: f.lineno).name}"


def test_a_step_waits_for_the_gpu_where_the_documentation_says(results: dict[str, dict[str, Any]]) -> None:
    found = {function_of(line): case for case in MATRIX for line in results[case]["waits"]}
    assert found.keys() == documented_waits(), found


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("not moved", "device"),
        ("wrong gather", "distillation/chunks.py"),
        ("freed early", "after its memory was freed"),
        ("teacher left on the host", "device"),
    ],
)
def test_a_fault_raises(name: str, part: str, results: dict[str, dict[str, Any]]) -> None:
    assert name in SABOTAGES
    assert part in (results[name]["error"] or ""), results[name]


def test_a_collective_that_one_rank_leaves_out_is_told(results: dict[str, dict[str, Any]]) -> None:
    """Where none is left out, above, none is told."""
    (line,) = results["a collective left out"]["disagreements"]
    assert line.startswith("ranks 0 and 1") and "group tp at models/olmo3/norms.py" in line


def test_numbers_of_all_layers_follow_from_a_few(results: dict[str, dict[str, Any]]) -> None:
    result = results["extension"]
    assert "failed" not in result, result["failed"]
    exact = ("parameters", "calls", "copies", "copied", "reads")
    # How many tokens teach is rounded for each micro-batch
    for kind, bound in (*((kind, 0) for kind in exact), ("sent", 0.01), ("flops", 0.01), ("peak", 0.01)):
        for key, extended, whole in result[kind]:
            assert extended == pytest.approx(whole, rel=bound, abs=2**10 if bound else 0), (kind, key)
    assert len(result["peak"]) > 5


BOUNDS = {"student scores": 0.015, "saving": 0.02}  # which are the highest phases of no run


@pytest.mark.parametrize("case", PLANS)
def test_a_plan_is_what_a_step_has(case: str, results: dict[str, dict[str, Any]]) -> None:
    assert "failed" not in results[case], results[case]["failed"]
    for phase, (planned, traced) in results[case]["planned"].items():
        assert planned == pytest.approx(traced, rel=BOUNDS.get(phase, 0.01)), phase


@pytest.mark.parametrize("case", PLANS)
def test_the_host_waits_for_no_large_copy_to_the_device(case: str, results: dict[str, dict[str, Any]]) -> None:
    assert results[case]["waited"] == []
