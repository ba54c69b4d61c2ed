"""What the benchmark of packed rollouts compares: micro-batches of the same peak. How fast any is, is not tested."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

from benchmark_packed import Form, markdown, ratio

from megatron_sead.reporting.machine import machine


def test_a_packed_form_has_the_budget_of_its_rows() -> None:
    settings = SimpleNamespace(training=SimpleNamespace())
    Form(4, packed=True).take(settings, 100)  # type: ignore[arg-type]
    assert vars(settings.training) == {"micro_batch_size": 1, "micro_batch_tokens": 400}
    Form(4, packed=False).take(settings, 100)  # type: ignore[arg-type]
    assert vars(settings.training) == {"micro_batch_size": 4, "micro_batch_tokens": None}


def test_the_first_step_is_warm_up() -> None:
    form = Form(1, packed=True)
    for seconds in (10.0, 1.0, 2.0, 4.0):
        form.see([7, 9], 100, seconds)
    summary = form.summary()
    assert summary["tokens_a_second"] == {"median": 50.0, "best": 100.0, "steps": 3}
    assert (summary["micro_batches_a_step"], summary["most_tokens"]) == (2, 9)


def test_the_ratio_is_the_median_of_the_steps() -> None:
    packed, rows = Form(1, packed=True, speeds=[1.0, 4.0, 9.0, 2.0]), Form(1, packed=False, speeds=[9.0, 2.0, 1.0, 4.0])
    assert ratio(packed, rows) == 2.0


def test_the_table_has_a_line_a_form() -> None:
    def form(packed: bool, speed: float) -> dict[str, Any]:
        told = {"rows": 1, "packed": packed, "micro_batches_a_step": 9.5, "most_tokens": 1024}
        return told | {"tokens_a_second": {"median": speed, "best": speed, "steps": 3}}

    result = {
        "forms": [form(False, 2000.0), form(True, 5000.0)],
        "ratios": [2.5],
        "settings": {"steps": 4, "rollouts": 96, "hidden": 64, "layers": 4},
        "response_tokens_a_step": 12000,
        "versions": {"torch": "2.13.0"},
        "machine": machine(),
        "date": "2026-01-01",
        "command": "python x",
    }
    lines = markdown(result).splitlines()
    assert "| 1 | rows | 9.5 | 1,024 | 2,000 |  |" in lines
    assert "| 1 | packed | 9.5 | 1,024 | 5,000 | 2.50 |" in lines
