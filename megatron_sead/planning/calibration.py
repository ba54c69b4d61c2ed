"""Rates of a machine from the metrics of runs on it: factors that bring the predicted phases to the measured ones."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from megatron_sead.config.checks import check_world_size
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.errors import ArgumentError, UserError
from megatron_sead.planning.lengths import Lengths, recorded
from megatron_sead.planning.rates import Rates
from megatron_sead.planning.remembered import remembered_shape
from megatron_sead.planning.seconds import MEASURED, Prediction, predict
from megatron_sead.wording import counted

WARM_UP = 2  # first steps of a run, which compile and fill caches
PRIOR = 0.02  # how much a factor of e costs, in units of a relative error of 1: what no run shows stays as it was
SWEEPS, STEPS = 80, 24
LARGEST = math.log(1000)  # of a factor


Equation = tuple[dict[str, float], float, float]  # seconds by rate, measured seconds, weight


@dataclass(frozen=True)
class MeasuredRun:
    """A run that has taken steps, by its directory."""

    path: Path
    config: RunConfig
    world: int
    lengths: Lengths
    seconds: dict[str, float]  # medians of a step, by the names of metrics.jsonl
    steps: int

    def predicted(self, rates: Rates) -> Prediction:
        """What would have been said of it."""
        student, teacher = (remembered_shape(getattr(self.config, role), role) for role in ("student", "teacher"))
        return predict(self.config, self.world, student, teacher, rates, self.lengths)


@dataclass(frozen=True)
class Calibrated:
    """Rates, and how well they tell the runs that they are from."""

    rates: Rates
    factors: dict[str, float]  # seconds by what a rate limits, over those before; of the rates that changed
    runs: list[MeasuredRun]


def read_run(told: str, device: str) -> MeasuredRun:
    """A run's directory, and its number of ranks, as ``RUN@RANKS``. Of a run that was started again the last start's
    steps, since the layout may have changed with it.

    Args:
        device: whose rates are wanted.

    Raises:
        UserError: no run there, one without enough steps, of another device, or with another number of ranks.
    """
    name, _, ranks = told.rpartition("@")
    if not name or not ranks.isascii() or not ranks.isdigit():
        raise ArgumentError("calibrate", told, "must be a run's directory and its number of ranks, as runs/first@8")
    path = Path(name).expanduser()
    for file in ("config.yaml", "metrics.jsonl"):
        if not (path / file).is_file():
            raise ArgumentError("calibrate", told, f"{path} has no {file}: not the directory of a run that took steps")
    config = load_config(path / "config.yaml", [])
    first, started = _last_start(path)
    try:
        check_world_size(config, int(ranks))
    except UserError as error:
        raise ArgumentError("calibrate", told, str(error)) from None
    if started not in (None, int(ranks)):
        raise ArgumentError("calibrate", told, f"that run's last start had {counted(started, 'rank')}")
    if config.device != device:
        raise ArgumentError("calibrate", told, f"that run's device is {config.device}, and {device} is planned for")
    seconds, steps = _medians(path / "metrics.jsonl", first + WARM_UP)
    return MeasuredRun(path, config, int(ranks), recorded(path, config.rollouts.max_new_tokens), seconds, steps)


def _last_start(path: Path) -> tuple[int, int | None]:
    """The step with which it began, and its ranks, if that was written."""
    try:
        start = json.loads((path / "starts.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        return int(start["step"]), int(start["ranks"])
    except (OSError, ValueError, IndexError, KeyError, TypeError):
        return 0, None


def _medians(file: Path, first: int) -> tuple[dict[str, float], int]:
    try:
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    names = (*MEASURED, "step_seconds")
    known = {line.get("step", place): line for place, line in enumerate(lines) if isinstance(line, dict)}
    steps = [
        line for step, line in known.items() if isinstance(step, int) and step >= first and not line.get("skipped")
    ]
    steps = [line for line in steps if all(isinstance(line.get(name), int | float) for name in names)]
    if not steps:
        raise UserError(
            f"{file}: has no step after the first {WARM_UP} of its last start, which warm up; let it take more"
        )
    return {name: median(float(line[name]) for line in steps) for name in names}, len(steps)


def calibrate(rates: Rates, runs: list[MeasuredRun]) -> Calibrated:
    """Find factors on the seconds that each rate limits, so that every phase of every run is told as well as can be.

    A phase counts by its share of the step. Factors that the runs say nothing of stay near 1. Rates of the machine come
    from the passes of the models; with these, factors on rollouts and updates, which follow the same rates, from those.
    """
    machine = _fitted([e for run in runs for e in _equations(run, rates, ("score_seconds", "train_seconds"))])
    found = scaled(rates, machine)
    own = _fitted([e for run in runs for e in _equations(run, found, ("rollout_seconds", "sync_seconds"))])
    return Calibrated(scaled(found, own), machine | own, runs)


def _fitted(equations: list[Equation]) -> dict[str, float]:
    """Factors by the names of rates."""
    names = sorted({rate for parts, _, _ in equations for rate in parts})
    logs = dict.fromkeys(names, 0.0)
    width = LARGEST
    for _ in range(SWEEPS):
        before = dict(logs)
        for name in names:
            logs[name] = _best(name, logs, width, equations)
        moved = max((abs(logs[n] - before[n]) for n in names), default=0.0)
        width = max(0.05, min(LARGEST, 3 * moved))
        if moved < 1e-4:
            break
    return {name: math.exp(value) for name, value in logs.items()}


def _equations(run: MeasuredRun, rates: Rates, metrics: tuple[str, ...]) -> list[Equation]:
    prediction, whole = run.predicted(rates), run.seconds["step_seconds"]
    found: list[Equation] = []
    for metric in metrics:
        phases = MEASURED[metric]
        parts: defaultdict[str, float] = defaultdict(float)
        for term in prediction.terms:
            if term.phase in phases:
                for rate, seconds in term.parts.items():
                    parts[rate] += seconds
        measured = run.seconds[metric]
        if parts and measured > 0:
            found.append((dict(parts), measured, measured / whole))
    return found


def _loss(logs: dict[str, float], equations: list[Equation]) -> float:
    total = sum((PRIOR * value) ** 2 for value in logs.values())
    for parts, measured, weight in equations:
        told = sum(math.exp(logs[rate]) * seconds for rate, seconds in parts.items())
        total += weight * (told / measured - 1) ** 2
    return total


def _best(name: str, logs: dict[str, float], width: float, equations: list[Equation]) -> float:
    """The value of one factor's logarithm for which the loss is least, others as they are: by golden sections."""
    ratio = (math.sqrt(5) - 1) / 2
    low, high = max(-LARGEST, logs[name] - width), min(LARGEST, logs[name] + width)
    for _ in range(STEPS):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if _loss(logs | {name: left}, equations) < _loss(logs | {name: right}, equations):
            high = right
        else:
            low = left
    return (low + high) / 2


def scaled(rates: Rates, factors: dict[str, float]) -> Rates:
    """Rates with which what each limits takes so many times as long."""
    changed = {}
    for name, factor in factors.items():
        value = getattr(rates, name)
        changed[name] = value / factor if name.endswith(("_tflops", "_gb")) else value * factor
    return rates.model_copy(update=changed)
