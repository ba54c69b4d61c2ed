"""Runs that the plan chooses, and what it says of runs that nobody has made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_sead.config.settings_file import settings_from
from megatron_sead.errors import UserError
from megatron_sead.planning.candidates import Cluster, read_pair
from megatron_sead.planning.fit import Machine
from megatron_sead.planning.rates import load_rates
from megatron_sead.scaling.choosing import chosen
from megatron_sead.scaling.folder import write_study
from megatron_sead.scaling.predicting import predict_study
from megatron_sead.scaling.records import numbers_of, read_records, write_records
from megatron_sead.scaling.report import write_report
from megatron_sead.scaling.study import Study, base_config, parse_run, parse_wish, whole_config

ROOT = Path(__file__).parents[2]


def study(*strong: str) -> Study:
    shapes = ["student.path=examples/shapes/olmo3-7b", "teacher.path=examples/shapes/olmo3-32b"]
    values: dict[str, Any] = {"config": "examples/configs/sead_7b.yaml", "settings": shapes, "lengths": "2000,16384"}
    return settings_from(Study, values | {"runs": {"strong": list(strong)}}, [])


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_wish_becomes_layouts_of_so_many_ranks_that_fit() -> None:
    asked = study("ranks=16 best=2 batch=96", "batch=96 tp=8 dp=2")
    base = base_config(asked)
    made = chosen(asked, base, read_pair(base, asked.lengths), Cluster(1, Machine(), load_rates()))
    *found, given = map(parse_run, made.runs.strong)
    assert (len(found), given.text) == (2, "tp=8 dp=2 batch=96")
    assert [run.ranks for run in found] == [16, 16] and found[0] != found[1]
    assert not any(key.startswith("rollouts.") for run in found for key in run.settings)  # they are replayed


def test_a_layout_beside_a_wish_is_refused() -> None:
    with pytest.raises(UserError, match="tp: cannot be given beside ranks"):
        parse_wish("ranks=8 tp=2")


def test_predictions_are_labelled_and_what_does_not_fit_is_told(tmp_path: Path) -> None:
    asked = study("batch=96 tp=8 dp=4", "batch=96 tp=8 dp=8", "batch=96 dp=32", "tp=8 sp=maybe")
    base = whole_config(asked)
    write_study(asked, tmp_path / "out")
    made = predict_study(asked, read_pair(base, asked.lengths), Cluster(1, Machine(), load_rates()))
    write_records(tmp_path / "out", made)
    said, found = write_report(tmp_path / "out", plots=False), read_records(tmp_path / "out")
    assert "is predicted to be fastest of 2 layouts" in said
    assert "**These are predictions, not measurements**" in (tmp_path / "out" / "scaling.md").read_text()
    assert "of a GPU's" in found["dp32-batch96"]["reason"]
    assert found["tp8-spmaybe"]["reason"].startswith("parallel.sequence_parallel='maybe': must be")
    four, eight = (numbers_of(found[name]) for name in ("tp8-dp4-batch96", "tp8-dp8-batch96"))
    assert sum(four.phases.values()) == pytest.approx(four.seconds) and four.seconds > eight.seconds
    assert four.tokens == pytest.approx(96 * 1892, rel=0.01)  # the mean of 2,000 after the cut at 16,384
