"""What docs/ says of settings and metrics is what the code says, and nothing is left out."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from megatron_sead.config.run import RunConfig
from megatron_sead.config.settings_file import dotted_keys
from megatron_sead.reporting.metrics import METRICS, NAMES, MetricsWriter

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from write_reference import PAGES, groups, groups_in, metrics_page, settings_page  # noqa: E402


@pytest.mark.parametrize("name", PAGES)
def test_the_page_is_not_old(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    assert text == PAGES[name](), "run: python tools/write_reference.py"


def test_every_setting_has_a_description_and_a_row() -> None:
    page = settings_page()
    for title, group in groups(RunConfig, ""):
        for name, field in group.model_fields.items():
            assert groups_in(field) or field.description, f"{title}.{name} has no description"
    rows = {line.split("`")[1] for line in page.splitlines() if line.startswith("| `")}
    names = {title.split(" ")[0] for title, _ in groups(RunConfig, "")}
    assert rows == set(dotted_keys(RunConfig)) - names


def test_every_metric_is_described_once() -> None:
    assert len(NAMES) == len(METRICS)
    assert all(metric.meaning and metric.computed_in for metric in METRICS)
    for metric in METRICS:
        module = ROOT / "megatron_sead" / f"{metric.computed_in.replace('.', '/')}.py"
        of_several_alike = re.sub(r"^(zone_[abc]_((forward|reverse)_kl_)?|student_|teacher_)|\d$", "", metric.name)
        text = module.read_text()
        timed = f'phase("{metric.name.removesuffix("_seconds")}")'
        assert metric.name in text or of_several_alike in text or timed in text, metric
    assert metrics_page().count("\n| `") == len(METRICS)


def test_a_metric_that_is_not_described_is_not_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, 0)
    with pytest.raises(KeyError, match="new_metric: not in METRICS"):
        writer.write({"step": 0, "new_metric": 1.0})
    writer.close()
    assert (tmp_path / "metrics.jsonl").read_text() == ""
