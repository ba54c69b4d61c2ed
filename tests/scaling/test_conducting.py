"""Runs one after another: what is done stays done, what fails is told, and nothing of others is touched."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sead.config.checks import OWNER_FILE
from megatron_sead.config.settings_file import dump_settings, settings_from
from megatron_sead.errors import UserError
from megatron_sead.launch import CONTINUES
from megatron_sead.launch.ownership import sole_owner
from megatron_sead.planning.fit import Machine
from megatron_sead.rollouts.records import read_records
from megatron_sead.scaling.conducting import Place, conduct
from megatron_sead.scaling.folder import require_place
from megatron_sead.scaling.records import numbers_of
from megatron_sead.scaling.records import read_records as raw_records
from megatron_sead.scaling.report import write_report
from megatron_sead.scaling.starting import reason_in
from megatron_sead.scaling.study import Study

ROOT = Path(__file__).parents[2]
# Stands for a run's ranks: leaves what they would, or fails
RANKS = """
import json, sys, yaml
from pathlib import Path
config = yaml.safe_load(open(sys.argv[1]))
ranks, output, recorded = int(sys.argv[2]), Path(config["output"]), Path(config["rollouts"]["path"], "rollouts")
if config["parallel"]["pipeline_model_parallel_size"] > 1:
    print("some line")
    sys.exit("error: stages are out of order")
lines = []
for step in range(config["training"]["steps"]):
    tokens = sum(len(json.loads(l)["response_token_ids"]) for l in open(recorded / f"step-{step}.jsonl"))
    tokens *= 2 if config["training"]["lr"] == 7 else 1
    lines.append({"step": step, "seconds": 5.0 + step, "response_tokens": tokens, "loss": 1.0, "grad_norm": 1.0})
(output / "metrics.jsonl").write_text("".join(json.dumps(line) + chr(10) for line in lines))
(output / "ranks").mkdir(exist_ok=True)
for rank in range(ranks):
    told = {"rank": rank, "world_size": ranks, "micro_batches": [1] * 9, "padded_tokens": [999] * 9, "collectives": []}
    told |= {"cpu_seconds": [1.0] * 9, "tensors_peak": {"host": 1}, "resident_peak": 2}
    (output / "ranks" / f"rank-{rank:05}.json").write_text(json.dumps(told))
"""


PREDICTED = {"seconds": 1.0, "tokens": 9.0, "tokens_per_second": 9.0, "phases": {}, "bubble": 0.0, "micro_batches": 1}
PREDICTED |= {"binds": "products", "shares": {}}


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def study(*strong: str, **values: Any) -> Study:
    settings = ["training.global_batch_size=8", "training.micro_batch_size=2", "rollouts.max_new_tokens=12"]
    given: dict[str, Any] = {"config": "examples/configs/sead_tiny.yaml", "settings": settings, "lengths": "6,40"}
    given |= {"warm_up": 1, "steps": 2, "runs": {"strong": list(strong)}}
    return settings_from(Study, given | values, [])


class Launches:
    """Counts what is started."""

    def __init__(self, folder: Path) -> None:
        self.program, self.started = folder / "ranks.py", list[int]()
        self.program.write_text(RANKS)

    def __call__(self, config: Path, ranks: int, number: int) -> list[str]:
        self.started.append(number)
        return [sys.executable, str(self.program), str(config), str(ranks)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "study", Launches(tmp_path), None, Machine(), say=lambda line: None)


def measure(asked: Study, place: Place, **options: bool) -> dict[str, dict[str, Any]]:
    require_place(asked, place.output)
    conduct(asked, place, **options)
    return raw_records(place.output)


def test_a_run_that_fails_is_told_in_a_line_and_the_rest_goes_on(place: Place) -> None:
    found = measure(study("pp=2", "tp=3", "dp=2", "dp=2 training.lr=7"), place)
    assert found["pp2"]["reason"] == "stages are out of order"
    assert found["tp3"]["reason"].startswith("parallel.tensor_model_parallel_size=3: does not divide")
    (doubled,) = (r for name, r in found.items() if name.startswith("dp2-"))
    assert "counted" in doubled["reason"] and "response tokens of" in doubled["reason"]
    own = numbers_of(found["dp2"])
    assert (own.reason, own.seconds, own.ranks) == (None, 1.0, 2)
    assert "tp=3" in write_report(place.output) + (place.output / "scaling.md").read_text()
    again = json.loads((place.output / "scaling.json").read_text())["experiments"]["strong"]
    assert [line["name"] for line in again if line["reason"] is None] == ["dp2"]


def test_a_run_whose_settings_do_not_go_together_fails_alone(place: Place) -> None:
    found = measure(study("batch=9", "tp=2 sp=maybe", "tp=2 layers=8 training.micro_batch_size=3", "dp=1"), place)
    assert found["batch9"]["reason"].startswith("training.global_batch_size=9: must be divisible by")
    assert found["tp2-spmaybe"]["reason"].startswith("parallel.sequence_parallel='maybe': must be")
    assert [name for name, record in found.items() if record.get("reason") is None] == ["dp1"]
    measure(study("batch=9", "dp=1"), place)
    assert write_report(place.output).startswith("1 rank is fastest of 1 layout")


def test_a_study_without_strong_scaling_is_not_said_to_be_unmeasured(place: Place) -> None:
    measure(study(runs={"weak": ["dp=1", "dp=2 batch=16"]}), place)
    said = write_report(place.output)
    assert said == "Numbers of 2 runs; layouts are compared in strong scaling, of which the study has none."


def test_what_is_done_is_not_run_again_and_what_failed_only_when_asked(place: Place) -> None:
    measure(study("dp=1", "pp=2"), place)
    before, said = (place.output / "records" / "dp1.json").read_bytes(), list[str]()
    measure(study("dp=1", "pp=2"), replace(place, say=said.append))
    assert said[0].endswith("tokens a second (measured before)")
    assert said[1] == "[2/2] pp=2: failed: stages are out of order (before; not tried again)"
    launches: Any = place.launch
    assert launches.started == [0, 1]
    measure(study("dp=2", "pp=2", "dp=1"), place)
    assert launches.started == [0, 1, 0]
    measure(study("dp=2", "pp=2", "dp=1"), place, retry=True)
    assert launches.started == [0, 1, 0, 1]
    assert (place.output / "records" / "dp1.json").read_bytes() == before


def test_all_layouts_see_the_same_rollouts_and_a_larger_batch_begins_with_the_smaller(place: Place) -> None:
    measure(study("dp=1", "dp=2", "batch=16"), place)
    folders = sorted((place.output / "rollouts").iterdir())
    assert [folder.name.rpartition("-")[0] for folder in folders] == ["batch16-most12", "batch8-most12"]
    large, small = (read_records(folder / "rollouts" / "step-1.jsonl") for folder in folders)
    assert large[:8] == small
    assert {len(r.response_token_ids) for r in large} > {12} and not all(r.finished for r in large)
    assert all(r.finished == (r.response_token_ids[-1] == 0) for r in large)  # the pair's stop token


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"lengths": "7,12"}, "holds another study: lengths is '6,40' there and '7,12' here"),
        ({"warm_up": 2}, "holds another study: warm_up is 1 there and 2 here"),
    ],
)
def test_the_folder_of_another_study_is_refused(place: Place, change: dict[str, Any], told: str) -> None:
    measure(study("dp=1"), place)
    with pytest.raises(UserError, match=told):
        measure(study("dp=1", **change), place)
    measure(study("dp=2"), place)


def test_what_is_refused_has_changed_nothing(place: Place, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lengths=9,1"):
        measure(study("dp=1", lengths="9,1"), place)
    assert not place.output.exists()
    measure(study("dp=1"), place)
    before = (place.output / "study.yaml").read_bytes()
    with pytest.raises(UserError, match="takes 8 ranks"):
        measure(study("dp=8"), replace(place, most_ranks=4))
    assert (place.output / "study.yaml").read_bytes() == before


def test_where_nothing_was_measured_a_corrected_study_goes_on(place: Place) -> None:
    """With rollouts of its own: those of the study that was wrong have other lengths."""
    assert measure(study("pp=2"), place)["pp2"]["reason"]
    settings = ["training.global_batch_size=4", "training.micro_batch_size=2", "rollouts.max_new_tokens=12"]
    (failed,) = measure(study("pp=2", settings=settings, lengths="3,6"), place).values()
    assert failed["settings"]["training.global_batch_size"] == 4
    assert len(measure(study("dp=1", settings=settings, lengths="2,4"), place)) == 2
    folders = [
        {len(r.response_token_ids) for step in range(4) for r in read_records(f / f"rollouts/step-{step}.jsonl")}
        for f in (place.output / "rollouts").glob("batch4-*")
    ]
    assert len(folders) == 2 and min(map(max, folders)) <= 5 < max(map(max, folders))  # tokens of the longest


@pytest.mark.parametrize("reason", [None, "does not fit"])
def test_nothing_is_measured_beside_predictions(place: Place, reason: str | None) -> None:
    measure(study("dp=1"), place)
    path = place.output / "records" / "dp1.json"
    made = json.loads(path.read_text()) | {"kind": "predicted", "predicted": PREDICTED, "reason": reason}
    path.write_text(json.dumps(made | {"settings": made["settings"] | {"training.lr": 7}}))
    with pytest.raises(UserError, match=r"dp1.json: is a prediction"):
        measure(study("dp=1"), place)


def test_a_folder_of_others_is_refused_and_left_as_it_is(place: Place) -> None:
    place.output.mkdir()
    (place.output / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="is there already and holds no study"):
        measure(study("dp=1"), place)
    assert [path.name for path in place.output.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("name", ["study.yaml", "scaling.md", "scaling.json", "strong.svg"])
def test_no_file_of_others_is_replaced(place: Place, name: str) -> None:
    """Not even one of a name that a study has: by its content it is somebody else's."""
    asked = study("dp=1")
    measure(asked, place)
    write_report(place.output)
    path = place.output / name
    path.write_text(text := f"# mine\n{dump_settings(asked)}")
    with pytest.raises(UserError, match=rf"{name}: was not written by this command, or was changed since"):
        measure(asked, place)
    if name != "study.yaml":
        with pytest.raises(UserError, match=name):
            write_report(place.output)
    assert path.read_text() == text


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A configuration to change between two studies."""
    return Path(shutil.copyfile(ROOT / "examples/configs/sead_tiny.yaml", tmp_path / "base.yaml"))


def test_a_record_of_other_settings_is_not_passed_off_as_this_run(place: Place, base: Path) -> None:
    asked = study("dp=1", config=str(base))
    measure(asked, place)
    base.write_text(base.read_text().replace("clip_grad: 1.0", "clip_grad: 2.0"))
    with pytest.raises(UserError, match=r"dp1.json: was measured with other settings \(training.clip_grad 1.0 there"):
        measure(asked, place)


def test_a_model_that_was_made_from_another_is_not_taken_for_this_ones(place: Place, base: Path) -> None:
    asked = study("layers=8", config=str(base))
    measure(asked, place)
    base.write_text(base.read_text().replace("examples/tiny/teacher", "examples/tiny/student"))
    with pytest.raises(UserError, match=r"layers8.json: was measured with other settings \(teacher.made_from"):
        measure(asked, place)
    (place.output / "records" / "layers8.json").unlink()
    with pytest.raises(UserError, match=r"teacher-layers8: was made from .*tiny/teacher.*, not from .*tiny/student"):
        measure(asked, place)


def test_a_study_that_is_moved_goes_on(place: Place, tmp_path: Path) -> None:
    """Its own models are named from its folder on, and no record names a place of the machine."""
    asked = study("tp=1 layers=8")
    (record,) = measure(asked, place).values()
    (place.output / "runs" / "layers8" / "left.mark").touch()
    assert record["settings"]["student.path"] == "models/student-layers8"
    assert record["settings"]["student.made_from"] == "examples/tiny/student"
    moved = replace(place, output=tmp_path / "moved", launch=lambda *_: pytest.fail("it is measured already"))
    place.output.rename(moved.output)
    measure(asked, moved)
    (moved.output / "records" / "layers8.json").unlink()
    launches = Launches(tmp_path)
    assert "reason" not in measure(asked, replace(moved, launch=launches))["layers8"] and launches.started == [0]
    assert not list((moved.output / "runs" / "layers8").glob("*.mark"))  # of the attempt in the old place


def test_more_ranks_than_there_are_are_refused_before_anything_runs(place: Place) -> None:
    small = replace(place, most_ranks=2)
    with pytest.raises(UserError, match="'dp=4': takes 4 ranks, and there are 2"):
        measure(study("dp=1", "dp=4"), small)
    assert not (place.output / "records").exists()


def test_an_earlier_attempt_is_set_aside_and_leaves_no_numbers(place: Place) -> None:
    earlier = place.output / "runs" / "dp1"
    earlier.mkdir(parents=True)
    (earlier / "metrics.jsonl").write_text("of the earlier attempt")
    place.launch = lambda config, ranks, number: [sys.executable, "-c", ""]
    conduct(study("dp=1"), place)
    assert "left no results" in raw_records(place.output)["dp1"]["reason"]
    assert (place.output / "runs" / "dp1.1" / "metrics.jsonl").read_text() == "of the earlier attempt"


def test_ranks_that_are_still_at_a_run_are_no_measurement(place: Place) -> None:
    lock = place.output / "runs" / "dp1" / OWNER_FILE
    with sole_owner(lock, "runs/dp1"), pytest.raises(UserError, match=r"output=.*dp1: in use by process"):
        conduct(study("dp=1"), place)
    assert not (place.output / "records").exists()


def test_a_run_that_takes_too_long_is_ended_and_told(place: Place) -> None:
    place.launch = lambda config, ranks, number: [sys.executable, "-c", "import time; time.sleep(60)"]
    found = measure(study("dp=1", timeout_minutes=0.01), place)
    assert found["dp1"]["reason"] == "took longer than timeout_minutes=0.01"


@pytest.mark.parametrize(
    ("log", "reason"),
    [
        ("a\nerror: first\nerror: second\nmore", "first"),
        ("Traceback (most recent call last):\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\nbye", None),
        ("only words", "only words"),
        (f"error: rank 1 was ended by SIGKILL{CONTINUES}", "rank 1 was ended by SIGKILL"),
        ("", "ended with exit code 9"),
    ],
)
def test_the_reason_is_what_the_run_told(log: str, reason: str | None) -> None:
    assert reason_in(log, 9) == (reason or "torch.OutOfMemoryError: CUDA out of memory")
