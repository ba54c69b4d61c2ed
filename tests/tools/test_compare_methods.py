"""A comparison of methods: the runs it asks for, how it chooses learning rates, what it goes on with and writes.

Runs are written without training: what a run does is tested elsewhere.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sead.config.run import dump_config, load_config
from megatron_sead.prompts.rows import read_rows
from tests.html_report.directories import write_run

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))

from compare_methods import app  # noqa: E402  (the tools are commands, not a package)
from method_study import running  # noqa: E402
from method_study.study import Asked, Study  # noqa: E402

STUDY: dict[str, Any] = {
    "config": str(ROOT / "examples/configs/sead_tiny.yaml"),
    "settings": ["parallel.tensor_model_parallel_size=1"],
    "horizons": [20, 40],
    "seeds": [0, 1],
    "rates": {"tried": [1e-3, 2e-3], "steps": 10, "seeds": [100], "problems_of_each_level": 3},
    "methods": {"opd": ["policy.name=opd", "curriculum.mode=none"], "sead": ["policy.name=sead"]},
    "readings": {"sead-eq4": {"of": "sead", "settings": ["policy.zone_c=eq4"]}},
}


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Those that were asked for, in order. A learning rate is the better the closer it is to 4e-3 (OPD) or 1.5e-3."""
    asked_for: list[Asked] = []

    def run(study: Study, asked: Asked) -> None:
        config = load_config(study.config, asked.settings)
        right = 4e-3 if config.policy.name == "opd" else 1.5e-3
        accuracy = 1 - abs(config.training.lr - right) * 100
        shutil.rmtree(asked.output, ignore_errors=True)
        write_run(asked.output, steps=config.training.steps, seed=config.seed, accuracy=accuracy, token_steps=())
        (asked.output / "config.yaml").write_text(dump_config(config))
        asked_for.append(asked)

    monkeypatch.setattr(running, "_run", run)
    return asked_for


def compare(folder: Path, *arguments: str, **changes: Any) -> int:
    """The exit code."""
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | changes))
    with pytest.raises(SystemExit) as ended:
        app([str(folder / "study.yaml"), str(folder / "work"), *arguments], prog_name="compare_methods")
    return int(ended.value.code or 0)


def test_every_method_gets_the_best_of_rates_beyond_those_that_were_tried(tmp_path: Path, runs: list[Asked]) -> None:
    assert compare(tmp_path, "--write", str(tmp_path / "out")) == 0
    trials = [asked.output.name for asked in runs if asked.output.parent.name == "rates"]
    beyond = ["opd-0.004-seed100", "opd-0.008-seed100", "sead-0.0005-seed100"]
    assert sorted(trials) == sorted([f"{m}-{r}-seed100" for m in ("opd", "sead") for r in (0.001, 0.002)] + beyond)
    rates = {a.output.name: load_config(Path(STUDY["config"]), a.settings).training for a in runs[len(trials) :]}
    assert {name.partition("-seed")[0]: t.lr for name, t in rates.items()} == {
        "opd": 4e-3,
        "sead": 1e-3,
        "sead-eq4": 1e-3,
    }
    assert all(t.min_lr == pytest.approx(t.lr / 10) for t in rates.values())
    assert len(runs) == len(trials) + 2 * 3 + 2 * 2  # readings at the first horizon alone


def test_trials_are_measured_on_problems_that_they_do_not_train_on(tmp_path: Path, runs: list[Asked]) -> None:
    compare(tmp_path)
    config = load_config(Path(STUDY["config"]), runs[0].settings)
    train, apart = (
        [json.loads(line) for line in Path(str(path)).read_text().splitlines()]
        for path in (config.prompts.path, config.evaluation.path)
    )
    every = (ROOT / "examples/tiny/prompts.jsonl").read_text().splitlines()
    assert sorted(row["id"] for row in train + apart) == sorted(json.loads(line)["id"] for line in every)
    assert [sum(row["level"] == level for row in apart) for level in "12345"] == [3] * 5
    last = load_config(Path(STUDY["config"]), runs[-1].settings)
    assert (last.prompts.path, last.evaluation.path) == ("examples/tiny/prompts.jsonl", "examples/tiny/heldout.jsonl")


def test_trials_read_prompts_of_any_form_by_their_own_fields(tmp_path: Path, runs: list[Asked]) -> None:
    rows = [json.loads(line) for line in (ROOT / "examples/tiny/prompts.jsonl").read_text().splitlines()]
    questions = [{"question": row["prompt"], "answer": row["answer"], "kind": row["level"]} for row in rows]
    (tmp_path / "prompts.json").write_text(json.dumps(questions))
    fields = [f"prompts.path={tmp_path}/prompts.json", "prompts.prompt_field=question", "prompts.level_field=kind"]
    assert compare(tmp_path, settings=[*fields, "evaluation.prompt_field=prompt", "evaluation.level_field=level"]) == 0
    config = load_config(Path(STUDY["config"]), runs[0].settings)
    apart = config.evaluation.prompts(config.prompts)
    assert apart is not None and (apart.prompt_field, apart.level_field) == ("question", "kind")
    trained, measured = read_rows(config.prompts), read_rows(apart)
    assert [sum(row.value("kind") == level for row in measured) for level in "12345"] == [3] * 5
    found = [row.fields for row in trained + measured]
    assert sorted(found, key=str) == sorted(questions, key=str)


def test_what_has_ended_is_not_run_again_unless_it_is_another_run(
    tmp_path: Path, runs: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    compare(tmp_path)
    count = len(runs)
    (tmp_path / "work/40/sead-seed1/summary.json").unlink()
    assert compare(tmp_path) == 0 and [a.output.name for a in runs[count:]] == ["sead-seed1"]
    assert compare(tmp_path, settings=["parallel.tensor_model_parallel_size=1", "training.clip_grad=2"]) == 2
    assert "was run with other settings" in capsys.readouterr().err


def test_results_are_data_tables_and_reports_that_replace_nothing(tmp_path: Path, runs: list[Asked]) -> None:
    out = tmp_path / "out"
    assert compare(tmp_path, "--write", str(out)) == 0
    found = json.loads((out / "results.json").read_text())
    assert len(found["runs"]) == 10 and len(found["prompts"]) == len(found["runs"][0]["answers_after"]["greedy"])
    run = next(r for r in found["runs"] if (r["method"], r["steps"], r["seed"]) == ("opd", 40, 1))
    assert run["tokens"] == 40 * 200 and len(run["means_of_tenths"]["pass_rate"]) == 10
    assert run["means_of_tenths"]["zone_a_forward_kl_share"] == [0.1] * 10
    tables = (out / "tables.md").read_text()
    assert "**0.0**" not in tables and "| sead-eq4 |" in tables and tables.count("## 40 steps") == 1
    assert {path.name for path in out.iterdir()} == {"results.json", "tables.md", "report-20.html", "report-40.html"}
    assert ">sead-eq4<" in (out / "report-20.html").read_text()
    count, before = len(runs), (out / "results.json").read_bytes()
    assert compare(tmp_path, "--write", str(out)) == 0  # the same again: nothing is run, and all comes out the same
    assert len(runs) == count and (out / "results.json").read_bytes() == before
    (out / "tables.md").write_text("my notes")
    assert compare(tmp_path, "--write", str(out)) == 2 and (out / "tables.md").read_text() == "my notes"
    assert compare(tmp_path, "--write", str(out), horizons=[20]) == 2  # another study's
    assert compare(tmp_path, "--write", str(out / "results.json")) == 2 and len(runs) == count


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"readings": {"x": {"of": "sed", "settings": []}}}, "readings.x.of=sed: must be one of opd, sead"),
        ({"seeds": [0, 100]}, "100 is among seeds"),
        ({"methods": {}}, "methods"),
        ({"methods": {"../../x": []}}, "methods.../../x: must be a name of letters"),
        ({"horizons": [20, 0]}, "horizons"),
        ({"readings": {"x": {"of": "sead", "settings": ["policy.zone_x=1"]}}}, "policy.zone_x"),
    ],
)
def test_a_study_that_cannot_be_is_refused(
    changes: dict[str, Any], told: str, tmp_path: Path, runs: list[Asked], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare(tmp_path, **changes) == 2
    assert told in capsys.readouterr().err and runs == []
