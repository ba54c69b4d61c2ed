"""Raw records of runs, ``records/NAME.json``, and the numbers in them. No torch here.

Whatever is reported is computed here, from records alone.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_sead.config.checks import MAY_CHANGE_ON_RESUME
from megatron_sead.errors import UserError
from megatron_sead.files.durable import replace_text
from megatron_sead.scaling.raw import require_record
from megatron_sead.scaling.study import parse_run

FOLDER = "records"
PHASES = ("rollout", "score", "train", "sync", "other")
LAYOUT = ("tp", "pp", "vpp", "cp", "dp", "sp")


@dataclass(frozen=True)
class Step:
    """One step whose time counts."""

    number: int
    seconds: float  # from the end of the step before to its own
    tokens: int  # of responses, each once
    phases: dict[str, float]  # seconds; their sum is `seconds`


@dataclass
class Numbers:
    """What a record says, per step unless it says otherwise."""

    name: str
    text: str  # of the run, as "tp=2 dp=2"
    kind: str  # measured or predicted
    ranks: int
    layout: dict[str, Any]
    reason: str | None = None  # why there are no numbers
    batch: int = 0  # rollouts
    vocabulary: int = 0
    layers: int = 0  # of the student
    tokens: float = 0.0  # of responses
    all_tokens: float = 0.0  # prompts included
    padding: float = 0.0  # share of what went through the student that was padding
    seconds: float = 0.0  # of the typical step
    fastest: float = 0.0
    slowest: float = 0.0
    tokens_per_second: float = 0.0  # response tokens, of all ranks together
    phases: dict[str, float] = field(default_factory=dict)  # of the typical step
    cpu_seconds: float = 0.0  # of all ranks together; 0 on a GPU
    memory: int = 0  # bytes of tensors at the peak, of the rank that needs most
    planned_memory: int = 0
    resident: int = 0  # bytes of that rank's process at the peak
    bubble: float = 0.0  # share of the training pass, by the schedule and the step's own micro-batches
    micro_batches: float = 0.0  # a data-parallel rank
    groups: dict[str, tuple[float, float]] = field(default_factory=dict)  # by group: calls and bytes a rank
    loss: list[float | None] = field(default_factory=list)  # of every step
    grad_norm: list[float | None] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    binds: str | None = None  # what most predicted seconds go to
    shares: dict[str, float] = field(default_factory=dict)  # of the step, by what binds

    @property
    def per_rank(self) -> float:
        """Response tokens a second and rank, of the ranks that there were."""
        return self.tokens_per_second / self.ranks

    @property
    def shape(self) -> str:
        """ "TP 2 x DP 4", as a person says it."""
        sizes = [(n, self.layout.get(n)) for n in ("tp", "pp", "cp", "dp")]
        parts = [f"{name.upper()} {size}" for name, size in sizes if size and size > 1] or ["1 rank"]
        extra = [f"VPP {v}" for v in [self.layout.get("vpp")] if v] + ["SP"] * bool(self.layout.get("sp"))
        return " x ".join(parts) + "".join(f", {word}" for word in extra)


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """All records of a study, by name.

    Raises:
        UserError: a file that holds no record.
    """
    found = {}
    for path in sorted((folder / FOLDER).glob("*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            require_record(record)
            if record["name"] != path.stem:
                raise ValueError(f"name: {record['name']!r}, and the file has another")
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: is not readable as the record of a run: {error}") from None
        found[path.stem] = record
    return found


def write_records(folder: Path, found: Iterable[dict[str, Any]]) -> None:
    """In place of earlier ones of the same runs."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for record in found:
        replace_text(folder / FOLDER / f"{record['name']}.json", json.dumps(record, indent=1) + "\n")


def numbers_of(record: dict[str, Any]) -> Numbers:
    """The numbers of one record."""
    own = Numbers(
        record["name"],
        record["text"],
        record["kind"],
        record["ranks"],
        record["layout"],
        reason=record.get("reason"),
        settings=record["settings"],
        notes=list(record.get("notes", [])),
        planned_memory=record.get("plan", {}).get("peak_bytes", 0),
        vocabulary=record.get("student", {}).get("vocabulary", 0),
        layers=record.get("student", {}).get("layers", 0),
    )
    if own.reason is not None:
        return own
    own.batch = record["settings"].get("training.global_batch_size", 0)
    if own.kind == "predicted":
        for name, value in record["predicted"].items():
            setattr(own, name, value)
        return own
    counted = counted_steps(record["steps"], record["warm_up"], record["watched"])
    step = typical(counted)
    own.seconds, own.phases, own.tokens = step.seconds, step.phases, step.tokens
    own.fastest, own.slowest = min(s.seconds for s in counted), max(s.seconds for s in counted)
    own.tokens_per_second = step.tokens / step.seconds
    own.loss = [step.get("loss") for step in record["steps"]]
    own.grad_norm = [step.get("grad_norm") for step in record["steps"]]
    _of_ranks(own, record, step.number)
    return own


def counted_steps(steps: Sequence[dict[str, Any]], warm_up: int, watched: int) -> list[Step]:
    """Steps after the warm-up and before those that are watched. A step lasts from the end of the one before, so that
    what is written after a step counts."""
    found = []
    for before, after in pairwise(steps[: len(steps) - watched]):
        if after["step"] < warm_up:
            continue
        seconds = after["seconds"] - before["seconds"]
        phases = {name: after.get(f"{name}_seconds", 0.0) for name in PHASES[:-1]}
        phases["other"] = seconds - sum(phases.values())
        found.append(Step(after["step"], seconds, after["response_tokens"], phases))
    return found


def typical(steps: Sequence[Step]) -> Step:
    """The step whose seconds a token are the median, of an even number the lower of both: all that is told of a step is
    of this one, so that phases add up and tokens by seconds are the tokens a second."""
    return sorted(steps, key=lambda step: step.seconds / step.tokens)[(len(steps) - 1) // 2]


def _of_ranks(own: Numbers, record: dict[str, Any], step: int) -> None:
    ranks, timed = record["processes"], slice(record["warm_up"], len(record["steps"]) - record["watched"])
    own.memory = max(rank.get("allocated_peak") or sum(rank["tensors_peak"].values()) for rank in ranks)
    own.resident = max(rank["resident_peak"] for rank in ranks)
    own.micro_batches = ranks[0]["micro_batches"][step]
    own.bubble = bubble(own.layout["pp"], own.layout.get("vpp") or 1, own.micro_batches)
    if "gpu" not in ranks[0]:
        own.cpu_seconds = sum(rank["cpu_seconds"][step] for rank in ranks)
    shared = own.layout["tp"] * own.layout["pp"]  # ranks that see the same tokens; others have their own
    padded = sum(sum(rank["padded_tokens"][timed]) for rank in ranks) / shared
    recorded = record["recorded"][timed]
    own.all_tokens = record["recorded"][step]["all"]
    own.padding = 1 - sum(tokens["all"] for tokens in recorded) / padded
    for rank in ranks:
        sent: defaultdict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
        for kind in rank["collectives"]:
            calls, size = sent[kind["group"]]
            sent[kind["group"]] = calls + kind["calls"], size + kind["bytes"]
        for group, (calls, size) in sent.items():
            before = own.groups.get(group, (0.0, 0.0))
            own.groups[group] = max(before[0], calls), max(before[1], size)


def bubble(stages: int, virtual: int, micro_batches: float) -> float:
    """Share of a training pass in which a stage of an interleaved 1F1B schedule waits, if all micro-batches take as
    long."""
    return (stages - 1) / (virtual * micro_batches + stages - 1) if stages > 1 else 0.0


def efficiency(runs: Iterable[Numbers]) -> dict[str, float]:
    """By name: tokens a second and rank over those of the best run of the fewest ranks."""
    whole = [run for run in runs if run.reason is None]
    fewest = min((run.ranks for run in whole), default=0)
    base = max((run.per_rank for run in whole if run.ranks == fewest), default=1.0)
    return {run.name: run.per_rank / base for run in whole}


def best_by_ranks(runs: Iterable[Numbers]) -> list[Numbers]:
    """The fastest run of each number of ranks, fewest ranks first."""
    best: dict[int, Numbers] = {}
    for run in runs:
        if run.reason is None and (run.ranks not in best or run.tokens_per_second > best[run.ranks].tokens_per_second):
            best[run.ranks] = run
    return [best[ranks] for ranks in sorted(best)]


def furthest(values: Sequence[float | None], reference: Sequence[float | None]) -> float:
    """The largest relative difference of two curves; infinite where one has no number."""
    differences = [0.0]
    for value, other in zip(values, reference, strict=True):
        if value is None or other is None:
            differences.append(float("inf"))
        elif value != other:
            differences.append(abs(value - other) / max(abs(value), abs(other)))
    return max(differences)


def phases_of(runs: Sequence[Numbers]) -> list[str]:
    """Names of phases, those of a measured step first."""
    found = dict.fromkeys(name for run in runs for name in run.phases)
    return [n for n in PHASES if n in found] + [n for n in found if n not in PHASES]


def workload(settings: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for runs that compute the same, however they do."""
    return tuple(sorted((k, str(v)) for k, v in settings.items() if not k.startswith(MAY_CHANGE_ON_RESUME)))


def same_workload(runs: Sequence[Numbers]) -> list[list[Numbers]]:
    """Runs that compute the same, together: those of the fewest ranks first, as their reference."""
    found: dict[Any, list[Numbers]] = {}
    for run in sorted(runs, key=lambda run: run.ranks):
        if run.loss:
            found.setdefault((workload(run.settings), run.batch, length_of(run)), []).append(run)
    return [group for group in found.values() if len(group) > 1]


def length_of(run: Numbers) -> float | None:
    """Mean tokens of a response that the run was asked for; None: the study's."""
    return parse_run(run.text).length
