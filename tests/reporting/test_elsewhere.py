"""The same numbers elsewhere, under the names of metrics.jsonl."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_sead.config.run import load_config
from megatron_sead.errors import UserError
from megatron_sead.reporting.elsewhere import TensorBoard, WeightsAndBiases, require_wandb
from megatron_sead.reporting.metrics import MetricsWriter
from tests.training.launching import SHORT, TINY

STEPS: list[dict[str, Any]] = [
    {"step": 0, "loss": 1.5, "skipped": False},
    {"step": 1, "loss": float("nan"), "skipped": True},
    {"step": 2, "loss": 0.5, "eligible_difficulty": None},
]


def write(directory: Path, elsewhere: Any, steps: list[dict[str, Any]]) -> None:
    writer = MetricsWriter(directory, steps[0]["step"], [elsewhere])
    for line in steps:
        writer.write(line)
    writer.close()


def test_tensorboard_has_finite_numbers_at_their_steps_each_once(tmp_path: Path) -> None:
    write(tmp_path, TensorBoard(tmp_path, 0), STEPS)
    write(tmp_path, TensorBoard(tmp_path, 2), [STEPS[2] | {"loss": 0.25}])
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "skipped"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 1.5), (2, 0.25)]


class FakeRun:
    """What W&B's run is asked."""

    def __init__(self, **given: Any) -> None:
        self.given, self.metrics, self.logged, self.ended = given, [], list[Mapping[str, Any]](), False

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.metrics.append((name, step_metric))

    def log(self, numbers: Mapping[str, Any]) -> None:
        self.logged.append(numbers)

    def finish(self) -> None:
        self.ended = True


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """Runs that a stand-in for the package has begun."""
    runs: list[FakeRun] = []

    def init(**given: Any) -> FakeRun:
        if given["mode"] == "online":
            raise RuntimeError("no API key\nconfigured")
        runs.append(FakeRun(**given))
        return runs[-1]

    fake = SimpleNamespace(init=init, Settings=lambda **given: given, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return runs


def test_wandb_plots_against_our_step_and_gets_what_is_finite(tmp_path: Path, made: list[FakeRun]) -> None:
    write(tmp_path, WeightsAndBiases(tmp_path, "offline", "ours", {"training.lr": 1.0}), STEPS)
    (run,) = made
    assert run.given["project"] == "ours" and run.given["group"] == tmp_path.name and run.given["dir"] == str(tmp_path)
    assert run.metrics == [("step", None), ("*", "step")] and run.ended
    assert run.logged[1:] == [{"step": 1, "skipped": True}, {"step": 2, "loss": 0.5}]


def test_a_service_that_fails_is_told_once_and_the_run_goes_on(
    tmp_path: Path, made: list[FakeRun], caplog: pytest.LogCaptureFixture
) -> None:
    other = WeightsAndBiases(tmp_path, "offline", "ours", {})
    made[0].log = lambda numbers: 1 / 0  # type: ignore[method-assign]
    write(tmp_path, other, STEPS)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3 and not made[0].ended
    assert caplog.text.count("Weights & Biases fails") == 1


def test_what_wandb_refuses_is_one_line(tmp_path: Path, made: list[FakeRun]) -> None:
    with pytest.raises(UserError, match=r"reporting\.wandb='online': cannot begin: no API key configured"):
        WeightsAndBiases(tmp_path, "online", "ours", {})


def test_wandb_is_asked_for_before_anything_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_wandb("off")
    config = load_config(TINY, [*SHORT, "output=x", "reporting.wandb=offline"])
    with pytest.raises(UserError, match="needs the package wandb"):
        require_wandb(config.reporting.wandb)


def test_wandb_itself_keeps_a_run_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    write(tmp_path, WeightsAndBiases(tmp_path, "offline", "ours", {"training.lr": 1.0}), STEPS)
    write(tmp_path, WeightsAndBiases(tmp_path, "offline", "ours", {"training.lr": 1.0}), STEPS[2:])
    kept = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(kept) == 2
    content = kept[0].read_bytes()
    assert all(word in content for word in (b"loss", b"skipped", b"training.lr", tmp_path.name.encode()))
