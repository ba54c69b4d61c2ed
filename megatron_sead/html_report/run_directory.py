"""A run directory as plain values, in whatever state it is: running, interrupted, damaged, of an older version.

Nothing here raises for what a directory holds or lacks. What could not be read is a sentence in `Run.remarks`, which
the report shows; a value that is no finite number is None.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from megatron_sead.config.checks import OWNER_FILE
from megatron_sead.config.settings_file import flatten
from megatron_sead.errors import UserError
from megatron_sead.reporting.starts import STARTS
from megatron_sead.reporting.token_records import LARGEST, read_token_record, recorded_steps, token_record_path
from megatron_sead.wording import counted

Number = float | None
MOST_STEPS = 10**9
FILES = ("config.yaml", "metrics.jsonl", "summary.json", STARTS)  # one of them makes a directory one of a run


@dataclass(frozen=True)
class Accuracy:
    """A share of right answers."""

    mean: float
    error: float  # standard; 0 where it is not known
    prompts: int  # 0: not known


@dataclass
class Run:
    """What is known of a run."""

    name: str
    directory: Path
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key
    steps: list[int] = field(default_factory=list)  # ascending
    columns: dict[str, list[Number]] = field(default_factory=dict)  # of metrics.jsonl, one value a step
    summary: dict[str, Any] = field(default_factory=dict)
    heldout: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    token_steps: list[int] = field(default_factory=list)  # that have a record of tokens
    running: bool = False  # by its lock, or by a process that died with it
    remarks: list[str] = field(default_factory=list)

    def column(self, name: str) -> list[Number]:
        """One value a step; None where it is not known."""
        return self.columns.get(name, [None] * len(self.steps))

    def known(self, name: str) -> list[float]:
        """The values that are known, in order."""
        return [value for value in self.column(name) if value is not None]

    def setting(self, key: str, default: Any = None) -> Any:
        """The run's own setting."""
        return self.settings.get(key, default)

    def tokens(self, step: int) -> dict[str, Any] | None:
        """The record of a step's tokens; None, with a remark, where it cannot be read."""
        try:
            return read_token_record(token_record_path(self.directory, step))
        except UserError as error:
            self.remarks.append(str(error))
            return None

    def accuracy(self, when: str, kind: str = "greedy") -> Accuracy | None:
        """Of "before", "after" or "teacher"; None where it was not measured."""
        return _accuracy(_inner(self.summary, "evaluation", when, kind))

    def by_level(self, when: str, kind: str = "greedy") -> dict[str, Accuracy]:
        """The same of each level, in order."""
        levels = _inner(self.summary, "evaluation", when, f"{kind}_by_level")
        named = levels.items() if isinstance(levels, dict) else ()
        return {level: found for level, value in named if (found := _accuracy(value)) is not None}

    def of_last_start(self, *keys: str) -> Any:
        """What the last start of the run told; None where it told nothing."""
        return _inner(self.starts[-1], *keys) if self.starts else None

    @property
    def planned_steps(self) -> int:
        """Of the whole run, as far as is known."""
        asked = self.setting("training.steps")
        return asked if isinstance(asked, int) and asked > 0 else len(self.steps)

    @property
    def finished(self) -> bool:
        """Has it come to its end?"""
        return bool(self.summary)


def read_run(directory: Path) -> Run:
    """Everything about a run.

    Raises:
        UserError: the directory is not there, or holds nothing of a run.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: is no directory; give the directory of a run")
    if not any((directory / name).is_file() for name in FILES):
        raise UserError(f"{directory}: holds none of {', '.join(FILES)}, so it is no run's directory")
    run = Run(Path(os.path.realpath(directory)).name, directory)
    run.settings = _object(run, "config.yaml", _settings, "settings are not known")
    _read_metrics(run)
    run.running = (directory / OWNER_FILE).exists()
    if (directory / "summary.json").exists():
        run.summary = _object(run, "summary.json", json.loads, "accuracies are not known")
    if (directory / "heldout.json").exists():
        run.heldout = _object(run, "heldout.json", json.loads, "prompts cannot be compared one by one")
    run.starts = _lines(run, STARTS) if (directory / STARTS).exists() else []
    run.token_steps = [step for step in recorded_steps(directory) if not run.steps or step <= run.steps[-1]]
    _remark(run)
    return run


def _settings(text: str) -> Any:
    value = yaml.safe_load(text)
    return flatten(value) if isinstance(value, dict) else value


def _remark(run: Run) -> None:
    """Say what is not there."""
    if not run.steps:
        run.remarks.append("No step is recorded yet: there are no curves.")
    if not run.finished and run.steps:
        state = "It is still running, or its process was killed" if run.running else "It was stopped before its end"
        done = f"{counted(run.steps[-1] + 1, 'step')} of {run.planned_steps} are recorded"
        run.remarks.append(f"{state}: {done}, and accuracy after training is not known.")
    if run.finished and run.accuracy("after") is None:
        run.remarks.append("Nothing was evaluated (evaluation.path was not set), so there are no accuracies.")
    if not run.token_steps:
        run.remarks.append(
            "No tokens are recorded (reporting.token_steps was 0, or the run is of an older version), so there are no "
            "rollouts token by token and no figures of single tokens."
        )
    missing = run.steps[-1] + 1 - len(run.steps) if run.steps else 0
    if missing:
        first = next((place for place, step in enumerate(run.steps) if place != step), len(run.steps))
        run.remarks.append(f"metrics.jsonl has no line of {counted(missing, 'step')}, first of step {first}.")
    seconds = run.known("seconds")
    if any(later < earlier for earlier, later in pairwise(seconds)):
        run.remarks.append("The run's clock went backwards: what is drawn against seconds is not to be trusted.")
    if run.setting("rollouts.engine") == "replay":
        run.remarks.append(
            "Rollouts were replayed, not written by this student: pass rates are those of the recording."
        )


def _read_metrics(run: Run) -> None:
    """Steps in order, each once: of a step that was done again after an interruption the last line counts."""
    found: dict[int, dict[str, Any]] = {}
    for line in _lines(run, "metrics.jsonl"):
        step = line.get("step")
        if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < MOST_STEPS:
            found[step] = line
    run.steps = sorted(found)
    names = dict.fromkeys(name for step in run.steps for name in found[step] if name != "step")
    run.columns = {name: [number(found[step].get(name)) for step in run.steps] for name in names}


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without those that are damaged."""
    found, damaged = [], 0
    for line in (_text(run, name) or "").split("\n"):
        try:
            value = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            damaged += 1
            continue
        if isinstance(value, dict):
            found.append(value)
        damaged += value is not None and not isinstance(value, dict)
    if damaged:
        run.remarks.append(f"{name}: {counted(damaged, 'line')} could not be read and {_are(damaged)} left out.")
    return found


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _object(run: Run, name: str, parse: Callable[[str], Any], otherwise: str) -> dict[str, Any]:
    """What a file holds, which must be one object."""
    text = _text(run, name)
    if text is None:
        return {}
    try:
        value = parse(text)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        run.remarks.append(f"{name} is damaged: {otherwise}.")
        return {}
    return value


def _text(run: Run, name: str) -> str | None:
    try:
        return (run.directory / name).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        run.remarks.append(f"{name} cannot be read: {error.strerror}.")
        return None


def number(value: Any) -> Number:
    """As a float that sums do not overflow with; true is 1."""
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST else None


def _accuracy(value: Any) -> Accuracy | None:
    mean, error, prompts = (number(_inner(value, name)) for name in ("mean", "standard_error", "prompts"))
    if mean is None or not 0 <= mean <= 1:
        return None
    return Accuracy(mean, max(0.0, error or 0.0), int(max(0.0, prompts or 0.0)))


def _inner(value: Any, *keys: str) -> Any:
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
