"""What a study asks: its settings, and runs written as "tp=2 dp=4 batch=64". No torch here."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

from pydantic import Field

from megatron_sead.config.rollouts import ReplayRollouts
from megatron_sead.config.run import RunConfig
from megatron_sead.config.settings import LocalPath, Settings
from megatron_sead.config.settings_file import dotted_keys, read_yaml, settings_from
from megatron_sead.errors import ArgumentError, UserError
from megatron_sead.planning.lengths import read_lengths

P = "parallel."
SIZES = {  # words of a run that multiply to its ranks; dp is what is left
    "tp": f"{P}tensor_model_parallel_size",
    "pp": f"{P}pipeline_model_parallel_size",
    "cp": f"{P}context_parallel_size",
}
SHORT = SIZES | {
    "vpp": f"{P}virtual_pipeline_model_parallel_size",
    "sp": f"{P}sequence_parallel",
    "batch": "training.global_batch_size",
    "micro": "training.micro_batch_size",
    "tokens": "training.micro_batch_tokens",
}
MODEL_WORDS = ("vocabulary", "layers")  # of models made for the run, with random weights
WORDS = (*SIZES, "dp", "vpp", "sp", "batch", "micro", "tokens", "length", *MODEL_WORDS)
OURS = ("output", "rollouts.engine", "rollouts.path", "training.steps")  # what the study sets itself
WATCHED_STEPS = 1  # at the end, whose collectives and memory are looked at, and whose time is not counted


class Experiments(Settings):
    """Lists of runs, each of which answers a question. A run that stands in several is measured once."""

    TITLES: ClassVar[dict[str, str]] = {
        "strong": "Strong scaling: the same batch on more ranks",
        "weak": "Weak scaling: the batch grows with the ranks",
        "tokens": "A step against its tokens",
        "length": "A step against the length of responses",
        "vocabulary": "A step against the vocabulary",
        "layers": "A step against the layers",
    }
    strong: list[str] = Field([], description="the same batch on different layouts")
    weak: list[str] = Field([], description="batch=N beside each layout, N in proportion to the ranks")
    tokens: list[str] = Field([], description="batch=N grows, the layout stays")
    length: list[str] = Field([], description="length=N, mean tokens of a response, grows")
    vocabulary: list[str] = Field([], description="vocabulary=N grows; the models are random ones of that size")
    layers: list[str] = Field([], description="layers=N grows; the models are random ones of that depth")

    def lists(self) -> dict[str, list[str]]:
        """By experiment, those that ask for something."""
        return {name: runs for name in self.TITLES if (runs := getattr(self, name))}


class Study(Settings):
    """What is measured, or predicted."""

    MAY_CHANGE: ClassVar[tuple[str, ...]] = ("runs.", "timeout_minutes")

    config: LocalPath = Field(description="YAML file of the training run that every layout is a variation of")
    settings: list[str] = Field([], description="key=value settings of all runs, on top of config's")
    warm_up: int = Field(2, ge=1, description="first steps of each run, whose time is not counted")
    steps: int = Field(5, ge=1, description="steps whose time is counted; one more is watched at the end")
    seed: int = Field(0, ge=0, description="of lengths and tokens of synthetic rollouts")
    lengths: str = Field(
        "2000,16384",
        description="tokens of responses: MEAN,P99 of a log-normal distribution, a run's directory, or a file with a "
        "number a line; rollouts.max_new_tokens cuts",
    )
    recorded: LocalPath | None = Field(
        None, description="run directory whose rollouts are replayed; null: synthetic ones, of `lengths`"
    )
    timeout_minutes: float = Field(120.0, gt=0, description="after which a run is ended and counts as failed")
    runs: Experiments = Experiments()

    @property
    def all_steps(self) -> int:
        """Of a run."""
        return self.warm_up + self.steps + WATCHED_STEPS

    def problems(self) -> Iterator[str]:
        if not self.runs.lists():
            yield f"runs: none are asked for; name layouts under {', '.join(Experiments.TITLES)}"
        if self.recorded is not None:
            for name in ("length", "vocabulary"):
                if getattr(self.runs, name):
                    yield f"runs.{name}: needs synthetic rollouts; recorded={self.recorded} must be null"
        for name, runs in self.runs.lists().items():
            for text in runs:
                try:
                    wish = parse_wish(text)
                    parse_run(text if wish is None else wish.rest)
                except UserError as error:
                    yield f"runs.{name}: {error}"


@dataclass(frozen=True)
class RunOfStudy:
    """One run: a layout, and what else differs from the study's config."""

    text: str  # canonical: the same run is the same text, in whatever order it was written
    dp: int
    settings: dict[str, str] = field(default_factory=dict)  # by full key
    length: float | None = None  # mean tokens of a response
    models: dict[str, int] = field(default_factory=dict)  # vocabulary, layers

    @property
    def name(self) -> str:
        """A folder's."""
        plain = "-".join(word.replace("=", "") for word in self.text.split() if "." not in word)
        if "." not in re.sub(r"=\S*", "", self.text):
            return plain
        return f"{plain}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    @property
    def sizes(self) -> dict[str, int]:
        """Whose product is the number of ranks."""
        return {word: int(self.settings[key]) for word, key in SIZES.items()} | {"dp": self.dp}

    @property
    def ranks(self) -> int:
        """Of the run, over all nodes."""
        return math.prod(self.sizes.values())

    def refused(self, base: RunConfig) -> str | None:
        """Why its settings and the base's do not go together, in one line; None: they do."""
        try:
            self.config(base)
        except UserError as error:
            return "; ".join(str(error).splitlines())
        return None

    def config(self, base: RunConfig) -> RunConfig:
        """The base with this run's settings.

        Raises:
            UserError: values that do not go together.
        """
        return settings_from(RunConfig, base.model_dump(mode="json"), [f"{k}={v}" for k, v in self.settings.items()])


def parse_run(text: str) -> RunOfStudy:
    """
    Raises:
        UserError: a word that is no setting; names the nearest, or all words.
    """
    values: dict[str, str] = {}
    for word in text.split():
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise UserError(f"{text!r}: {word!r}: must be NAME=VALUE, as tp=2 or training.lr=1e-5")
        if key not in WORDS and "." not in key:
            raise UserError(
                f"{text!r}: {key}: no such word; must be one of {', '.join(WORDS)}, or a setting's full key"
            )
        if key in OURS:
            raise UserError(f"{text!r}: {key}: is the study's own to set")
        if key not in WORDS and key not in RUN_KEYS:
            raise UserError(f"{text!r}: {_unknown(key)}")
        if key in values or SHORT.get(key) in values or key in (SHORT.get(short) for short in values):
            raise UserError(f"{text!r}: {key}: is given twice")
        if key in (*SIZES, *SIZES.values(), "dp", "vpp", "batch", "micro", "tokens", "length", *MODEL_WORDS):
            _require_whole(text, key, value)
        values[key] = value
    dp = int(values.get("dp", "1"))
    kept = {k: v for k, v in values.items() if not (k in (*SIZES, "dp") and int(v) == 1)} or {"dp": "1"}
    order = {word: number for number, word in enumerate(WORDS)}
    words = sorted(kept, key=lambda key: (order.get(key, len(order)), key))
    return RunOfStudy(
        " ".join(f"{key}={kept[key]}" for key in words),
        dp,
        _without_parts(values)
        | {SIZES[k]: values.get(k, "1") for k in SIZES}
        | {SHORT.get(k, k): v for k, v in values.items() if k in SHORT or "." in k},
        float(values["length"]) if "length" in values else None,
        {word: int(values[word]) for word in MODEL_WORDS if word in values},
    )


RUN_KEYS = frozenset(dotted_keys(RunConfig))


class Wish(NamedTuple):
    """Runs whose layout the plan chooses."""

    ranks: int
    best: int  # how many of those that it ranks highest
    rest: str  # what else the run says


def parse_wish(text: str) -> Wish | None:
    """None: the text names a layout itself.

    Raises:
        UserError: it does both, or its numbers are none.
    """
    values = {key: value for key, _, value in (word.partition("=") for word in text.split())}
    if "ranks" not in values:
        return None
    for key in ("ranks", "best"):
        _require_whole(text, key, values.get(key, "1"))
    if both := sorted({*SIZES, "dp", "vpp"} & values.keys()):
        raise UserError(f"{text!r}: {both[0]}: cannot be given beside ranks, with which the plan chooses the layout")
    rest = [word for word in text.split() if word.partition("=")[0] not in ("ranks", "best")]
    return Wish(int(values["ranks"]), int(values.get("best", "1")), " ".join(rest))


def _without_parts(values: dict[str, str]) -> dict[str, str]:
    """A run without tensor parallelism splits no sequence, and one without stages has no virtual ones, whatever the
    study's config says."""
    alone = {"sp": ("tp", "false"), "vpp": ("pp", "null")}
    return {SHORT[name]: value for name, (size, value) in alone.items() if values.get(size, "1") == "1"}


def _unknown(key: str) -> str:
    try:
        settings_from(RunConfig, {}, [f"{key}=0"])
    except UserError as error:
        return next(line for line in str(error).splitlines() if line.startswith(f"{key}:"))
    return f"{key}: unknown setting"


def _require_whole(text: str, key: str, value: str) -> None:
    if not re.fullmatch(r"[1-9]\d{0,8}", value, re.ASCII):
        raise UserError(f"{text!r}: {key}={value}: must be a whole number of at least 1")


def require_lengths(study: Study, base: RunConfig) -> None:
    """
    Raises:
        UserError: its `lengths` are none. As a setting, for no command that takes a study has an option of that name.
    """
    try:
        read_lengths(study.lengths, base.rollouts.max_new_tokens, None)
    except ArgumentError as error:
        raise UserError(str(error)) from None


def whole_config(study: Study) -> RunConfig:
    """The run that all are variations of, with its own engine: for predictions of whole steps.

    Raises:
        UserError: as `load_config`.
    """
    return settings_from(RunConfig, read_yaml(study.config), list(study.settings))


def base_config(study: Study) -> RunConfig:
    """The run that all are variations of: nothing is written by it but metrics, and rollouts are replayed.

    Raises:
        UserError: as `load_config`.
    """
    values: dict[str, Any] = whole_config(study).model_dump(mode="json")
    own = set(ReplayRollouts.model_fields)
    values["rollouts"] = {name: value for name, value in values["rollouts"].items() if name in own}
    values["rollouts"] |= {"engine": "replay", "path": "rollouts", "overlap": False, "lag": 0}
    values["training"] |= {"steps": study.all_steps}
    values["curriculum"] |= {"mode": "none"}
    values["checkpoints"] |= {"interval": 0}
    values["evaluation"] = {}
    values["reporting"] |= {"tensorboard": False, "rollouts_interval": 0, "token_steps": 0}
    return settings_from(RunConfig, values, [])
