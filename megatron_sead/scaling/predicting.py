"""Records of runs that nobody has made: seconds and memory as the plan predicts them. No torch here."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from datetime import date
from typing import Any

from megatron_sead.config.settings_file import flatten
from megatron_sead.errors import UserError
from megatron_sead.planning.candidates import Cluster, Pair
from megatron_sead.planning.fit import require_fit
from megatron_sead.planning.plan import make_plan
from megatron_sead.planning.search import predicted
from megatron_sead.planning.seconds import PHASES, Prediction
from megatron_sead.scaling.conducting import asked_runs, layout_of
from megatron_sead.scaling.study import RunOfStudy, Study, whole_config

SOURCE = "seconds are of the plan's formulas at the rates of its file, of which `benchmarks/gpu_h100.md` measured some"


def predict_study(study: Study, pair: Pair, cluster: Cluster) -> list[dict[str, Any]]:
    """A record a run."""
    return [_record(run, study, pair, cluster) for run in asked_runs(study).values()]


def _record(run: RunOfStudy, study: Study, pair: Pair, cluster: Cluster) -> dict[str, Any]:
    base = whole_config(study)
    refused, ranks = run.refused(base), run.ranks
    config = base if refused else run.config(base)
    settings = {k: v for k, v in flatten(config.model_dump(mode="json")).items() if k != "output"}
    settings |= run.settings if refused else {}
    record: dict[str, Any] = {"name": run.name, "text": run.text, "kind": "predicted", "ranks": ranks}
    record |= {"layout": layout_of(run, config), "settings": settings, "date": date.today().isoformat()}
    record |= {"source": SOURCE, "rates": cluster.rates.model_dump()}
    record["student"] = {"vocabulary": pair.student.vocabulary, "layers": pair.student.layers}
    try:
        if refused:
            raise UserError(refused)
        plan = make_plan(config, ranks, cluster.machine.gpu_bytes)
        require_fit(config, plan, cluster.machine)
        told = predicted(config, pair, replace(cluster, world=ranks))
    except UserError as error:
        record["reason"] = "; ".join(str(error).splitlines())
        return record
    tokens = config.training.global_batch_size * pair.lengths.mean
    record["predicted"] = numbers(told, tokens)
    record["plan"] = {"peak_bytes": max(stage.peak[1] for stage in plan.stages)}
    return record


def numbers(told: Prediction, tokens: float) -> dict[str, Any]:
    """As `records.Numbers` has them."""
    shares: defaultdict[str, float] = defaultdict(float)
    for term in told.terms:
        shares[term.binds] += term.seconds / told.seconds
    phases = {phase: told.of_phase(phase) for phase in PHASES if told.of_phase(phase)}
    return {
        "seconds": told.seconds,
        "tokens": tokens,
        "tokens_per_second": tokens / told.seconds,
        "phases": phases,
        "bubble": told.bubble,
        "micro_batches": told.micro_batches,
        "binds": told.binds[0],
        "shares": dict(sorted(shares.items(), key=lambda item: -item[1])),
    }
