"""Rates from the metrics of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_sead.config.run import RunConfig, dump_config, load_config
from megatron_sead.errors import UserError
from megatron_sead.planning.calibration import MeasuredRun, calibrate, read_run, scaled
from megatron_sead.planning.rates import CPU_RATES, Rates, load_rates
from megatron_sead.planning.seconds import MEASURED

ROOT = Path(__file__).parents[2]
TP, PP = (f"parallel.{name}_model_parallel_size" for name in ("tensor", "pipeline"))
BASE = load_rates(CPU_RATES)
OTHER = scaled(
    BASE, {"kernel_microseconds": 2.0, "memory_gb": 0.6, "collective_microseconds": 4.0, "decode_calls": 1.7}
)


def tiny(*overrides: str) -> RunConfig:
    models = [f"{role}.path={ROOT / 'examples/tiny' / role}" for role in ("student", "teacher")]
    return load_config(ROOT / "examples/configs/sead_tiny.yaml", [*models, *overrides])


def write_run(folder: Path, config: RunConfig, world: int, rates: Rates) -> str:
    """A run on a machine with these rates, whose every step takes what is predicted. Returns how it is named."""
    (folder / "rollouts").mkdir(parents=True)
    record = {"prompt_token_ids": [1] * 20, "response_token_ids": [1] * 25}
    (folder / "rollouts/step-0.jsonl").write_text(json.dumps(record) + "\n")
    (folder / "config.yaml").write_text(dump_config(config))
    line = dict.fromkeys((*MEASURED, "step_seconds"), 9.0)
    (folder / "metrics.jsonl").write_text((json.dumps(line) + "\n") * 3)
    told = read_run(f"{folder}@{world}", "cpu").predicted(rates)
    line = {metric: sum(map(told.of_phase, phases)) for metric, phases in MEASURED.items()}
    line["step_seconds"] = sum(line.values())
    first = dict.fromkeys(line, 9.0)
    lines = [first, first, line, {**first, "skipped": True}, line]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    return f"{folder}@{world}"


def step(run: MeasuredRun, rates: Rates) -> float:
    """What is told, over what was measured."""
    told = run.predicted(rates)
    return (told.seconds - told.of_phase("saves")) / run.seconds["step_seconds"]


def test_two_layouts_tell_the_seconds_of_a_third(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", tiny(f"{TP}=1"), 1, OTHER)
    two = write_run(tmp_path / "two", tiny(f"{TP}=2", "training.micro_batch_size=8"), 2, OTHER)
    third = read_run(
        write_run(tmp_path / "third", tiny(f"{TP}=1", f"{PP}=2", "training.micro_batch_size=16"), 2, OTHER), "cpu"
    )
    found = calibrate(BASE, [read_run(one, "cpu"), read_run(two, "cpu")])
    assert not 0.9 < step(third, BASE) < 1.1
    assert step(third, found.rates) == pytest.approx(1, abs=0.05)
    assert all(step(run, found.rates) == pytest.approx(1, abs=0.03) for run in found.runs)


def test_rates_that_a_run_says_nothing_of_stay(tmp_path: Path) -> None:
    found = calibrate(BASE, [read_run(write_run(tmp_path, tiny(f"{TP}=1"), 1, OTHER), "cpu")])
    for name in ("collective_microseconds", "node_link_gb", "host_link_gb", "disk_gb", "bf16_tflops"):
        assert getattr(found.rates, name) == pytest.approx(getattr(BASE, name), rel=0.02)


def test_the_first_and_skipped_steps_do_not_count(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path, tiny(f"{TP}=1"), 1, BASE), "cpu")
    assert run.steps == 2 and step(run, BASE) == pytest.approx(1)


def test_of_a_run_that_was_started_again_the_last_starts_steps_count(tmp_path: Path) -> None:
    """Another layout took those before."""
    told = write_run(tmp_path, tiny(f"{TP}=2"), 2, BASE)
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[2])
    slow = {name: 9 * seconds for name, seconds in line.items()}
    lines = [slow | {"step": step} for step in range(12)] + [line | {"step": step} for step in range(12, 16)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    starts = [{"step": 0, "ranks": 1}, {"step": 10, "ranks": 2}]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in starts))
    run = read_run(told, "cpu")
    assert run.steps == 4 and step(run, BASE) == pytest.approx(1)
    with pytest.raises(UserError, match=r"calibrate=.*@4: that run's last start had 2 ranks"):
        read_run(f"{tmp_path}@4", "cpu")
    with pytest.raises(UserError, match="that run's device is cpu, and cuda is planned for"):
        read_run(told, "cuda")


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    told = write_run(tmp_path, tiny(), 2, BASE)
    for wrong, part in (
        (str(tmp_path), "number of ranks"),
        (f"{tmp_path / 'none'}@2", "has no config.yaml"),
        (f"{tmp_path}@3", "3 ranks: must be a multiple of 2"),
    ):
        with pytest.raises(UserError, match=part) as caught:
            read_run(wrong, "cpu")
        assert "\n" not in str(caught.value)
    (tmp_path / "metrics.jsonl").write_text("{}\n" * 5)
    with pytest.raises(UserError, match="has no step after the first 2"):
        read_run(told, "cpu")
