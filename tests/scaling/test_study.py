"""What a study may ask, and how a mistake in it is told."""

from __future__ import annotations

import random
from pathlib import Path
from statistics import fmean, quantiles
from typing import Any

import pytest

from megatron_sead.config.rollouts import ReplayRollouts
from megatron_sead.config.settings_file import load_settings, settings_from
from megatron_sead.errors import UserError
from megatron_sead.scaling.rollouts import drawing
from megatron_sead.scaling.study import Study, base_config, parse_run, parse_wish

ROOT = Path(__file__).parents[2]


def study(**values: Any) -> Study:
    return settings_from(
        Study, {"config": "examples/configs/sead_tiny.yaml", "runs": {"strong": ["tp=2"]}} | values, []
    )


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_a_run_is_the_same_in_whatever_order_it_is_written() -> None:
    one, other = parse_run("batch=64 pp=2 tp=2 dp=1"), parse_run("tp=2  pp=2 cp=1 batch=64")
    assert (one, one.name) == (other, "tp2-pp2-batch64")
    assert parse_run("dp=1").name == "dp1"


def test_ranks_are_the_product_of_all_sizes() -> None:
    assert parse_run("tp=2 pp=2 dp=3 batch=96").ranks == 12


def test_runs_that_differ_in_a_full_key_have_names_of_their_own() -> None:
    names = {
        parse_run(f"tp=2 {more}").name for more in ("", "training.lr=1e-5", "training.lr=1e-4", "teacher.offload=false")
    }
    assert len(names) == 4 and all("/" not in name and name.startswith("tp2") for name in names)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tp=0", "tp=0: must be a whole number of at least 1"),
        ("tp", "'tp': must be NAME=VALUE"),
        ("tpp=2", "tpp: no such word; must be one of tp, pp"),
        ("training.stepz=3", "training.stepz: unknown setting; did you mean training.steps?"),
        ("training.steps=3", "training.steps: is the study's own to set"),
        ("rollouts.path=x", "rollouts.path: is the study's own to set"),
        ("tp=2 tp=4", "tp: is given twice"),
        ("tp=2 parallel.tensor_model_parallel_size=4", "is given twice"),
        ("parallel.tensor_model_parallel_size=4 tp=2", "is given twice"),
        ("parallel.context_parallel_size=x", "context_parallel_size=x: must be a whole number"),
        ("batch=1e3", "batch=1e3: must be a whole number"),
    ],
)
def test_a_mistake_in_a_run_names_the_run_and_what_would_be_valid(text: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        study(runs={"weak": [text]})
    assert told in str(error.value) and "runs.weak" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_run_does_without_what_its_layout_has_no_use_for() -> None:
    """The 7B run is sequence parallel: on one tensor-parallel rank there is nothing to split."""
    shapes = [f"{role}.path=examples/shapes/olmo3-32b" for role in ("student", "teacher")]
    base = base_config(study(config="examples/configs/sead_7b.yaml", settings=shapes))
    assert base.parallel.sequence_parallel
    split = [parse_run(text).config(base).parallel.sequence_parallel for text in ("dp=8", "tp=2", "tp=2 sp=false")]
    assert split == [False, True, False]


def test_a_study_without_runs_is_refused() -> None:
    with pytest.raises(UserError, match=r"runs: none are asked for; name layouts under strong, weak"):
        study(runs={})


def test_all_runs_replay_rollouts_and_write_no_checkpoints() -> None:
    """Also where the run that they vary has an engine with settings of its own."""
    shapes = [f"{role}.path=examples/shapes/olmo3-32b" for role in ("student", "teacher")]
    config = base_config(study(config="examples/configs/sead_32b.yaml", settings=shapes, warm_up=2, steps=3))
    assert isinstance(config.rollouts, ReplayRollouts) and config.rollouts.max_new_tokens == 16384
    assert (config.training.steps, config.checkpoints.interval, config.curriculum.mode) == (6, 0, "none")


def test_every_shipped_study_is_valid() -> None:
    found = sorted((ROOT / "examples" / "scaling").glob("*.yaml"))
    assert found
    for path in found:
        asked = load_settings(Study, path, [])
        texts = [text for texts in asked.runs.lists().values() for text in texts]
        runs = [parse_run(text) for text in texts if parse_wish(text) is None]
        assert len({run.name for run in runs}) == len({run.text for run in runs})


def test_lengths_have_the_mean_and_the_percentile_that_were_asked_for() -> None:
    chance, draw = random.Random(0), drawing("2000,16384", 10**9)
    drawn = [draw(chance) for _ in range(200_000)]
    assert fmean(drawn) == pytest.approx(2000, rel=0.03)
    assert quantiles(drawn, n=100)[98] == pytest.approx(16384, rel=0.05)


def test_lengths_of_a_file_change_in_proportion_to_another_mean(tmp_path: Path) -> None:
    (tmp_path / "lengths.txt").write_text("10\n20\n30\n")
    draw = drawing(str(tmp_path / "lengths.txt"), 50, mean=40)
    assert {draw(random.Random(seed)) for seed in range(50)} == {20, 40, 51}  # one beyond the longest: it is cut


@pytest.mark.parametrize("told", ["2000,100", "10,200", "nowhere.txt", "0,5"])
def test_lengths_that_no_distribution_has_are_refused(told: str) -> None:
    with pytest.raises(UserError, match="lengths="):
        drawing(told, 100)
