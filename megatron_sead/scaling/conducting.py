"""One run after another, each in processes of its own. What is done is not run again; what fails is written down."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megatron_sead
from megatron_sead.config.checks import OWNER_FILE
from megatron_sead.config.run import RunConfig, dump_config
from megatron_sead.config.settings_file import flatten
from megatron_sead.errors import UserError
from megatron_sead.files.durable import replace_text
from megatron_sead.launch.ownership import refuse_if_owned
from megatron_sead.planning.fit import Machine, require_fit
from megatron_sead.planning.plan import make_plan
from megatron_sead.reporting.machine import machine
from megatron_sead.scaling import records
from megatron_sead.scaling.folder import write_study
from megatron_sead.scaling.models import require_made_from, write_random_model
from megatron_sead.scaling.rank import FOLDER as RANKS
from megatron_sead.scaling.starting import RunFailed, run_ranks, set_aside
from megatron_sead.scaling.study import WATCHED_STEPS, RunOfStudy, Study, base_config, parse_run, require_lengths

Launch = Callable[[Path, int, int], list[str] | None]  # config, ranks, number of the run -> command; None: not here
ROLES = ("student", "teacher")


@dataclass
class Place:
    """Where and on what a study is measured."""

    output: Path
    launch: Launch
    most_ranks: int | None  # that the machines hold; None: as many processes as are asked for
    now: int | None = field(default=None, kw_only=True)  # runs of more ranks are left for another time
    machine: Machine
    writes: bool = True  # False on all nodes but the first
    say: Callable[[str], None] = print


def asked_runs(study: Study) -> dict[str, RunOfStudy]:
    """Runs of all experiments, by name, each once, in their order."""
    runs = (parse_run(text) for texts in study.runs.lists().values() for text in texts)
    return {run.name: run for run in runs}


def conduct(study: Study, place: Place, *, retry: bool = False) -> list[dict[str, Any]]:
    """Measure what is not measured yet. Returns the records of all runs that have one.

    Args:
        retry: measure again what has failed.

    Raises:
        UserError: a mistake in the study, before anything runs; a record is of other settings; or ranks that somebody
            else started are at a run.
    """
    base = base_config(study)
    require_lengths(study, base)
    asked = {name: _asked(run, base, study, place.output) for name, run in asked_runs(study).items()}
    for run in (own.run for own in asked.values()):
        if place.most_ranks is not None and place.most_ranks < run.ranks <= (place.now or run.ranks):
            raise UserError(f"{run.text!r}: takes {run.ranks} ranks, and there are {place.most_ranks}")
    done = _known(asked, base, study, place.output)
    if place.writes:
        write_study(study, place.output)
    for number, (name, own) in enumerate(asked.items()):
        head = f"[{number + 1}/{len(asked)}] {own.run.text}"
        if place.now is not None and name not in done and own.run.ranks > place.now:
            place.say(f"{head}: takes {own.run.ranks} ranks; left for a larger allocation")
            continue
        if name in done and (done[name].get("reason") is None or not retry):
            before = "measured before" if done[name].get("reason") is None else "before; not tried again"
            place.say(f"{head}: {_told(done[name])} ({before})")
            continue
        if place.writes:
            refuse_if_owned(own.config.output / OWNER_FILE, f"output={own.config.output}")
        record = _measure(own, study, place, number)
        if record is not None:
            records.write_records(place.output, [record])
            place.say(f"{head}: {_told(record)}")
            done[name] = record
    return [done[name] for name in asked if name in done]


@dataclass(frozen=True)
class _Asked:
    """A run, and what it comes to in this folder."""

    run: RunOfStudy
    config: RunConfig  # the study's, where the run is refused
    settings: dict[str, Any]  # for its record
    refused: str | None  # why its settings do not go together


def _asked(run: RunOfStudy, base: RunConfig, study: Study, output: Path) -> _Asked:
    if reason := run.refused(base):
        return _Asked(run, base, flatten(base.model_dump(mode="json")) | run.settings, reason)
    config = _config_of(run, base, study, output)
    return _Asked(run, config, _settings(run, config, base, output), None)


def _known(asked: dict[str, _Asked], base: RunConfig, study: Study, output: Path) -> dict[str, dict[str, Any]]:
    """Records of runs as they are asked for; failures of settings that were corrected since are forgotten.

    Raises:
        UserError: a record, or a model that was made, is of something else.
    """
    done = records.read_records(output)
    for name, own in asked.items():
        if name in done and _is_failure_of_other_settings(done[name], own.settings):
            del done[name]
        elif name in done:
            _require_same(done[name], own.settings, output)
        for role in ROLES if own.run.models and not own.refused else ():
            require_made_from(getattr(base, role).path, getattr(own.config, role).path, _seed_of(role, study))
    return done


def _told(record: dict[str, Any]) -> str:
    if record.get("reason") is not None:
        return f"failed: {record['reason']}"
    own = records.numbers_of(record)
    return f"{own.seconds:.3g} s a step, {own.tokens_per_second:,.0f} tokens a second"


def _config_of(run: RunOfStudy, base: RunConfig, study: Study, output: Path) -> RunConfig:
    """The run's settings, with all that the study sets."""
    config = run.config(base)
    values = {"output": output / "runs" / run.name}
    folder = study.recorded or output / "rollouts" / _key_of_rollouts(config, run, study)
    changed = config.model_copy(update=values)
    changed.rollouts = config.rollouts.model_copy(update={"path": folder})
    if run.models:
        for role in ROLES:
            model = getattr(config, role)
            setattr(changed, role, model.model_copy(update={"path": output / "models" / _key_of_model(role, run)}))
    return changed


def _key_of_rollouts(config: RunConfig, run: RunOfStudy, study: Study) -> str:
    """Names all that they are made of: a study may be corrected as long as nothing is measured."""
    inputs = [study.lengths, study.seed, *(g.model_dump(mode="json") for g in (config.student, config.teacher))]
    told = hashlib.sha256(json.dumps([*inputs, config.prompts.model_dump(mode="json")]).encode()).hexdigest()[:8]
    length = "" if run.length is None else f"-length{run.length:g}"
    return f"batch{config.training.global_batch_size}-most{config.rollouts.max_new_tokens}{length}-{told}"


def _seed_of(role: str, study: Study) -> int:
    """Of the weights of a random model."""
    return study.seed + ROLES.index(role)


def _key_of_model(role: str, run: RunOfStudy) -> str:
    return "-".join([role, *(f"{name}{size}" for name, size in sorted(run.models.items()))])


def _changed(record: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Names of settings that are others than when the record was made."""
    there = record["settings"]
    return [key for key in here | there if there.get(key) != here.get(key)]


def _is_failure_of_other_settings(record: dict[str, Any], here: dict[str, Any]) -> bool:
    failed = record["kind"] == "measured" and record.get("reason") is not None
    return failed and bool(_changed(record, here))


def _require_same(record: dict[str, Any], here: dict[str, Any], output: Path) -> None:
    path, there = output / records.FOLDER / f"{record['name']}.json", record["settings"]
    if record["kind"] != "measured":
        raise UserError(f"{path}: is a prediction, beside which nothing is measured; choose another output")
    if changed := _changed(record, here):
        told = ", ".join(f"{key} {there.get(key)!r} there and {here.get(key)!r} here" for key in changed[:3])
        raise UserError(
            f"{path}: was measured with other settings ({told}); choose another output, or move the record away"
        )


def _settings(run: RunOfStudy, config: RunConfig, base: RunConfig, output: Path) -> dict[str, Any]:
    """Flat, as JSON; the run's own folders are not part of them. Models that the study makes are named from its folder
    on, which may be moved, and beside what they were made from."""
    flat = flatten(config.model_dump(mode="json"))
    for role in ROLES if run.models else ():
        flat[f"{role}.path"] = Path(flat[f"{role}.path"]).relative_to(output).as_posix()
        flat[f"{role}.made_from"] = str(getattr(base, role).path)
    return {key: value for key, value in flat.items() if key not in ("output", "rollouts.path")}


def layout_of(run: RunOfStudy, config: RunConfig) -> dict[str, Any]:
    """Its sizes, by their words."""
    parallel = config.parallel
    return run.sizes | {"vpp": parallel.virtual_pipeline_model_parallel_size, "sp": parallel.sequence_parallel}


def _measure(own: _Asked, study: Study, place: Place, number: int) -> dict[str, Any] | None:
    """The record; None where this node has no part in it."""
    run, config, ranks = own.run, own.config, own.run.ranks
    record: dict[str, Any] = {"name": run.name, "text": run.text, "kind": "measured", "ranks": ranks}
    record |= {"layout": layout_of(run, config), "settings": own.settings}
    record |= {"warm_up": study.warm_up, "watched": WATCHED_STEPS}
    record |= {"date": date.today().isoformat(), "machine": machine(), "code": code_fingerprint()}
    record |= {"versions": {name: version(name) for name in ("torch", "megatron-core")}}
    try:
        if own.refused:
            raise UserError(own.refused)
        if place.writes:
            _write_inputs(run, config, study)
        plan = make_plan(config, ranks, place.machine.gpu_bytes)
        require_fit(config, plan, place.machine)
        phase, peak = max((stage.peak for stage in plan.stages), key=lambda p: p[1])
        record["plan"] = {"phase": phase, "peak_bytes": peak}
        record["student"] = {"vocabulary": plan.student.vocabulary, "layers": plan.student.layers}
        command = place.launch(config.output / "study-config.yaml", ranks, number)
        if command is None:
            return None
        record["load"] = [round(os.getloadavg()[0], 1)]
        log = config.output / ("study.log" if place.writes else f"study-{os.uname().nodename}.log")
        run_ranks(command, log, study.timeout_minutes)
        record["load"].append(round(os.getloadavg()[0], 1))
        if place.writes:
            record |= _collected(config, ranks, study)
    except (UserError, RunFailed) as error:
        record["reason"] = "; ".join(str(error).splitlines())
    return record if place.writes else None


def _write_inputs(run: RunOfStudy, config: RunConfig, study: Study) -> None:
    from megatron_sead.scaling.rollouts import drawing, tokens_of, write_rollouts

    if run.models:
        base = base_config(study)
        for role in ROLES:
            source, made = getattr(base, role).path, getattr(config, role).path
            write_random_model(source, made, run.models, _seed_of(role, study))
    assert config.rollouts.recorded is not None
    if study.recorded is None:
        draw = drawing(study.lengths, config.rollouts.max_new_tokens, run.length)
        write_rollouts(config.rollouts.recorded, config, study.all_steps, draw, study.seed)
    tokens_of(config.rollouts.recorded, study.all_steps - 1)
    set_aside(config.output)
    config.output.mkdir(parents=True, exist_ok=True)
    replace_text(config.output / "study-config.yaml", dump_config(config))


def _collected(config: RunConfig, ranks: int, study: Study) -> dict[str, Any]:
    """What the run has left: metrics, ranks' files, and what its rollouts hold.

    Raises:
        RunFailed: something is missing, or the run has counted other tokens than are in its rollouts.
    """
    from megatron_sead.scaling.rollouts import tokens_of

    try:
        text = (config.output / "metrics.jsonl").read_text(encoding="utf-8")
        steps = [json.loads(line) for line in text.splitlines()]
        files = [config.output / RANKS / f"rank-{rank:05}.json" for rank in range(ranks)]
        processes = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    except (OSError, ValueError) as error:
        raise RunFailed(f"left no results: {error}") from None
    if [step["step"] for step in steps] != list(range(study.all_steps)):
        raise RunFailed(f"metrics.jsonl holds {len(steps)} steps, not {study.all_steps}")
    if {process["world_size"] for process in processes} != {ranks}:
        raise RunFailed(f"ran on {processes[0]['world_size']} ranks, not {ranks}")
    assert config.rollouts.recorded is not None
    recorded = []
    for step in steps:
        count, responses, everything = tokens_of(config.rollouts.recorded, step["step"])
        recorded.append({"rollouts": count, "responses": responses, "all": everything})
        if step["response_tokens"] != responses:
            raise RunFailed(f"step {step['step']}: counted {step['response_tokens']} response tokens of {responses}")
    return {"steps": steps, "processes": processes, "recorded": recorded}


def code_fingerprint() -> str:
    """Of this package's source: numbers of other code are not mixed unseen."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _sources() -> Iterator[Path]:
    root = Path(str(megatron_sead.__file__)).parent
    yield from sorted(path for path in root.rglob("*") if path.suffix in (".py", ".cpp"))
