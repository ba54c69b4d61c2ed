"""Several runs: what is a group, what its numbers are, and how they are told."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from megatron_sead.commands.report import app
from megatron_sead.evaluation.statistics import difference_of_groups
from megatron_sead.html_report.comparison import compare
from megatron_sead.html_report.page import report
from megatron_sead.html_report.run_directory import Run, read_run
from megatron_sead.html_report.summary import rates
from megatron_sead.html_report.tables import Table, as_csv, as_latex, as_markdown, defaults, differing_settings
from megatron_sead.reporting.token_records import token_record_path, write_token_record
from tests.html_report.directories import token_record, write_run
from tests.html_report.test_report import Seen


def runs_in(tmp_path: Path, accuracies: dict[str, float] | None = None) -> list[Run]:
    named = accuracies or {"sead": 0.75, "opd": 0.5}
    return [
        read_run(write_run(tmp_path / f"{policy}-{seed}", policy=policy, seed=seed, accuracy=accuracy))
        for policy, accuracy in named.items()
        for seed in (0, 1, 2)
    ]


def test_runs_that_differ_in_their_seed_alone_are_a_group_named_by_its_method(tmp_path: Path) -> None:
    compared = compare(runs_in(tmp_path))
    assert {name: [run.name for run in group] for name, group in compared.groups.items()} == {
        "sead": ["sead-0", "sead-1", "sead-2"],
        "opd": ["opd-0", "opd-1", "opd-2"],
    }


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (("opd-seed0", "opd-seed1"), "opd"),
        (("opd_v2-10", "opd_v2-11"), "opd_v2"),
        (("a", "b"), "a"),
        (("alone-seed3",), "alone-seed3"),
    ],
)
def test_a_group_that_many_settings_set_apart_is_named_by_its_runs(
    names: tuple[str, ...], group: str, tmp_path: Path
) -> None:
    runs = [read_run(write_run(tmp_path / name, seed=seed)) for seed, name in enumerate(names)]
    other = read_run(write_run(tmp_path / "other", policy="opd"))
    other.settings |= {f"training.{name}": 1 for name in ("lr", "min_lr", "steps", "weight_decay")}
    assert list(compare([*runs, other]).groups) == [group, "other"]


def test_differences_are_those_of_the_runs_answers(tmp_path: Path) -> None:
    runs = runs_in(tmp_path)
    first, second = compare(runs).table.rows
    matrices = [np.array([rates(run, "after", "greedy") for run in group]) for group in (runs[:3], runs[3:])]
    expected = difference_of_groups(matrices[1], matrices[0])
    assert first[2].startswith("0.750 [") and second[2].startswith("0.500 [")
    assert second[4] == f"{expected.mean:+.3f} [{expected.low:+.3f}, {expected.high:+.3f}]"
    assert (first[4], first[6], second[6]) == ("", "", "lower")


def test_methods_that_answer_alike_are_within_noise(tmp_path: Path) -> None:
    compared = compare(runs_in(tmp_path, {"sead": 0.75, "opd": 0.75}))
    assert compared.table.rows[1][6] == "within noise"


def test_runs_of_one_seed_count_as_one(tmp_path: Path) -> None:
    """A run that is there three times would narrow its method's interval."""
    once = [read_run(write_run(tmp_path / f"run-{seed}", seed=seed, accuracy=0.5 + 0.1 * seed)) for seed in (0, 1)]
    again = [read_run(write_run(tmp_path / f"again-{number}", seed=1, accuracy=0.6)) for number in (0, 1)]
    alone, repeated = compare(once), compare([*once, *again])
    assert repeated.table.rows[0][1:] == alone.table.rows[0][1:] and alone.table.rows[0][1] == "2"
    (told,) = [remark for remark in repeated.remarks if "more than once" in remark]
    assert told.startswith("Run more than once (method, seed): run-0, 1. ")
    assert not [remark for remark in alone.remarks if "more than once" in remark]


def test_runs_of_one_seed_are_one_in_curves_and_budgets_too(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / "a", seed=0, pass_rate=0.2, accuracy=0.2))]
    runs += [read_run(write_run(tmp_path / f"b{number}", seed=1, pass_rate=0.8, accuracy=0.8)) for number in range(3)]
    runs[0].heldout = {}
    compared = compare(runs)
    assert compared.table.rows[0][2] == "0.500 (0.200 to 0.800)"
    assert compared.tables[0].rows[0][1] == "0.500 (0.200 to 0.800)"
    *_, mean = next(f for f in compared.figures if f.id == "compare-pass_rate").choices[-1][1]
    assert set(mean["y"]) == {0.5}


def test_a_curve_goes_on_where_one_of_its_seeds_has_not_come_so_far(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / str(seed), seed=seed, steps=steps, planned=30, pass_rate=rate, accuracy=None))
        for seed, steps, rate in ((0, 30, 0.2), (1, 2, 0.8))
    ]
    *_, mean = next(f for f in compare(runs).figures if f.id == "compare-pass_rate").choices[-1][1]
    assert (mean["x"][0], mean["y"][0]) == (1, 0.5) and (mean["x"][-1], mean["y"][-1]) == (30, 0.2)


def test_prompts_of_the_same_ids_and_other_texts_are_not_paired(tmp_path: Path) -> None:
    runs = runs_in(tmp_path)
    for number, run in enumerate(runs):
        run.heldout["problems"] = "easy" if number < 3 else "hard"
    assert compare(runs).table.rows[1][4] == ""
    for run in runs:  # an older run's only trace of them
        del run.heldout["problems"]
    assert compare(runs).table.rows[1][4] != ""
    runs[0].settings["evaluation.path"] = "others.jsonl"
    assert compare(runs).table.rows[1][4] == ""


def test_answers_that_are_all_right_do_not_make_certainty(tmp_path: Path) -> None:
    row = compare(runs_in(tmp_path, {"sead": 1.0})).table.rows[0]
    assert row[2] == "1.000 [0.912, 1.000]"  # 40 prompts: Wilson


def test_a_run_that_is_not_done_is_in_no_accuracy(tmp_path: Path) -> None:
    runs = runs_in(tmp_path)
    done = compare(runs).table.rows
    running = [
        read_run(write_run(tmp_path / f"{policy}-3", policy=policy, seed=3, accuracy=None))
        for policy in ("sead", "opd")
    ]
    compared = compare([*runs, *running])
    assert compared.table.rows == done
    assert compared.remarks == ["Not finished, or not evaluated, and in no accuracy after training: sead-3, opd-3."]
    first = compare([running[0], *runs[3:]])
    assert [row[1:3] for row in first.table.rows] == [["0", ""], done[1][1:3]] and first.table.rows[1][4] == ""


def test_other_prompts_are_not_paired_and_it_is_said(tmp_path: Path) -> None:
    runs = runs_in(tmp_path)
    runs[4].heldout["prompts"] = ["other"] * 40
    compared = compare(runs)
    assert any("not all recorded their answers to the same" in remark for remark in compared.remarks)
    assert compared.table.rows[1][4] == "" and compared.table.rows[1][2] == "0.500 (0.500 to 0.500)"


def test_runs_without_answers_or_settings_are_compared_by_what_they_have(tmp_path: Path) -> None:
    bare = write_run(tmp_path / "bare", steps=3, accuracy=None, token_steps=())
    (bare / "config.yaml").unlink()
    empty = write_run(tmp_path / "empty", steps=0, accuracy=None, token_steps=())
    runs = [read_run(folder) for folder in (bare, empty, write_run(tmp_path / "whole"))]
    assert list(compare(runs).groups) == ["bare", "empty", "whole"]
    assert "<figure" in report(runs)


def test_a_band_reaches_from_the_lowest_to_the_highest_seed(tmp_path: Path) -> None:
    figures = {figure.id: figure for figure in compare(runs_in(tmp_path)).figures}
    label, traces = figures["compare-pass_rate"].choices[-1]
    assert label == "against steps" and [t.get("name") for t in traces] == [None, None, "sead", None, None, "opd"]
    low, high, mean = (trace["y"] for trace in traces[:3])
    assert low[-1] == pytest.approx(high[-1] - 0.04, abs=2e-3) and mean[-1] == pytest.approx(low[-1] + 0.02, abs=2e-3)
    assert {label for label, _ in figures["compare-pass_rate"].choices} == {
        "against steps",
        "against response tokens",
        "against seconds",
    }


def test_the_same_budget_is_that_of_the_run_with_least_of_it(tmp_path: Path) -> None:
    short = read_run(write_run(tmp_path / "short", steps=10, token_steps=(), response_tokens=500))
    long = read_run(write_run(tmp_path / "long", steps=30, token_steps=(), response_tokens=200, policy="opd"))
    budget = compare([short, long]).tables[0]
    assert budget.head[1:] == ["at 10 steps", "at 5,000 response tokens", "at 19 seconds"]
    assert budget.rows[1][1:] == ["0.490", "0.635", "0.490"]  # of opd: steps 9, 23 and 24, 9


def test_settings_that_differ_are_listed(tmp_path: Path) -> None:
    table = differing_settings(compare(runs_in(tmp_path)).groups)
    assert table.head == ("setting", "sead", "opd")
    assert table.rows == [("seed", "0, 1, 2", "0, 1, 2"), ("policy.name", "sead", "opd")]


def test_defaults_are_those_of_the_schema() -> None:
    found = defaults()
    assert (
        found["training.clip_grad"] == 1.0 and found["rollouts.top_p"] == 1.0 and found["zones.shares"] == [50, 40, 10]
    )
    assert "student.path" not in found and found["student.system_prompt"] is None


HARD = Table(
    "t", ("method", "value"), [("a|b\\c_d", "+0.1 [-0.2, 0.3]"), ("=SUM(A1)", "-0.25"), ("100 % & $x$ {y}", "é")]
)


def test_tables_survive_what_they_are_copied_into() -> None:
    lines = as_markdown(HARD).splitlines()
    assert lines[2] == "| a\\|b\\\\c_d | +0.1 [-0.2, 0.3] |" and lines[1] == "| --- | --- |"
    latex = as_latex(HARD)
    assert r"a|b\textbackslash{}c\_d & +0.1 [-0.2, 0.3] \\" in latex and r"100 \% \& \$x\$ \{y\}" in latex
    rows = list(csv.reader(io.StringIO(as_csv(HARD))))
    assert rows[2] == ["'=SUM(A1)", "-0.25"] and rows[1][1] == "'+0.1 [-0.2, 0.3]"


def test_the_page_has_the_table_for_copying_and_every_runs_rollouts(tmp_path: Path) -> None:
    runs = runs_in(tmp_path)
    page = Seen(report(runs))
    assert {r["run"] for r in page.data("rollouts-data")["rollouts"]} == {run.name for run in runs}
    assert sum(tag == "pre" for tag, _ in page.tags) == 3


def test_each_run_has_its_own_tokenizers_texts(tmp_path: Path) -> None:
    runs = runs_in(tmp_path)[:2]
    for run, text in zip(runs, (" one", " another"), strict=True):
        for step in run.token_steps:
            record = token_record(step) | {"token_texts": {"7": text}}
            write_token_record(token_record_path(run.directory, step), record)
    texts = Seen(report(runs)).data("rollouts-data")["texts"]
    assert {name: of["7"] for name, of in texts.items()} == {"sead-0": " one", "sead-1": " another"}


def test_several_runs_need_a_place_and_names_that_tell_them_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [write_run(tmp_path / parent / "run", seed=seed) for seed, parent in enumerate(("a", "b"))]
    with pytest.raises(SystemExit) as ended:
        app([str(folder) for folder in folders], prog_name="sead report")
    assert ended.value.code == 2 and "--output" in capsys.readouterr().err
    for again in (folders[0], folders[0] / ".." / folders[0].name):
        with pytest.raises(SystemExit):
            app([*map(str, folders), str(again), "--output", str(tmp_path / "r.html")], prog_name="sead report")
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {again}: is given twice")
    with pytest.raises(SystemExit):
        app([*map(str, folders), "--output", str(tmp_path / "r.html")], prog_name="sead report")
    found = Seen((tmp_path / "r.html").read_text()).data("rollouts-data")["rollouts"]
    assert {rollout["run"] for rollout in found} == {"a/run", "b/run"}
    assert json.dumps(found)
