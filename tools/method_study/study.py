"""What a comparison of methods asks, and the runs that answer it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megatron_sead.config.run import EvaluationSettings
from megatron_sead.config.settings import LocalPath, Settings


class Rates(Settings):
    """How each method gets its learning rate."""

    tried: list[float] = Field(min_length=1, description="learning rates; more, where the best is the last on a side")
    steps: int = Field(ge=1, description="of each trial")
    seeds: list[int] = Field(min_length=1, description="of the trials; of no run that counts")
    problems_of_each_level: int = Field(ge=1, description="taken out of the training prompts, to measure trials on")


class Reading(Settings):
    """A method that differs from another in a few settings and keeps its learning rate."""

    of: str
    settings: list[str]


class Study(Settings):
    """What is compared."""

    config: LocalPath = Field(description="YAML file of the run that every method is a variation of")
    settings: list[str] = Field([], description="key=value settings of all runs")
    horizons: list[Annotated[int, Field(ge=1)]] = Field(
        min_length=1, description="steps of a run; each has a schedule of its own"
    )
    seeds: list[int] = Field(min_length=1)
    rates: Rates
    methods: dict[str, list[str]] = Field(
        min_length=1, description="settings by name; others are compared with the first"
    )
    readings: dict[str, Reading] = Field({}, description="variations of methods, at the first horizon")

    def problems(self) -> Iterator[str]:
        for group, names in (("methods", self.methods), ("readings", self.readings)):
            for name in names:
                if not re.fullmatch(r"\w[\w.+-]*", name):
                    yield f"{group}.{name}: must be a name of letters, digits, and any of . _ + -: runs are named by it"
        for name, reading in self.readings.items():
            if reading.of not in self.methods:
                yield f"readings.{name}.of={reading.of}: must be one of {', '.join(self.methods)}"
            if name in self.methods:
                yield f"readings.{name}: is the name of a method, too"
        for seed in set(self.seeds) & set(self.rates.seeds):
            yield f"rates.seeds: {seed} is among seeds, too; learning rates are chosen with seeds of their own"
        if len(set(self.seeds)) < len(self.seeds):
            yield f"seeds={self.seeds}: each must stand there once"

    def method_of(self, name: str) -> str:
        """Whose learning rate a method has: its own, or that of the method of which it is a reading."""
        return self.readings[name].of if name in self.readings else name

    def settings_of(self, name: str) -> list[str]:
        """What makes a run one of this method."""
        more = self.readings[name].settings if name in self.readings else []
        return [*self.settings, *self.methods[self.method_of(name)], *more]

    def names_at(self, horizon: int) -> list[str]:
        """Of methods, and at the first horizon of readings."""
        return [*self.methods, *(self.readings if horizon == self.horizons[0] else [])]


@dataclass(frozen=True)
class Asked:
    """A run."""

    output: Path
    settings: list[str]


def trial(study: Study, work: Path, method: str, rate: float, seed: int) -> Asked:
    """A run that tells how well a learning rate does, on problems that no other run is measured on."""
    # Both files are of rows of the training prompts, whatever the data sets of other runs are
    data = [f"prompts.path={work / TRAINING}", f"evaluation.path={work / SELECTION}", "prompts.subset=null"]
    data += [f"evaluation.{name}=null" for name in EvaluationSettings.OF_PROMPTS]
    output = work / "rates" / f"{method}-{rate:g}-seed{seed}"
    return Asked(output, [*_of_run(study, method, rate, seed, study.rates.steps, output), *data])


def counted(study: Study, work: Path, name: str, rate: float, horizon: int, seed: int) -> Asked:
    """A run that is compared with others."""
    output = work / str(horizon) / f"{name}-seed{seed}"
    return Asked(output, _of_run(study, name, rate, seed, horizon, output))


TRAINING, SELECTION = "training-without-selection.jsonl", "selection.jsonl"


def _of_run(study: Study, name: str, rate: float, seed: int, steps: int, output: Path) -> list[str]:
    mine = [f"output={output}", f"seed={seed}", f"training.steps={steps}"]
    return [*study.settings_of(name), *mine, f"training.lr={rate}", f"training.min_lr={rate / 10}"]
