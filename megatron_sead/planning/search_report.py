"""What a search, an explanation and a calibration tell, on stdout."""

from __future__ import annotations

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from megatron_sead.planning.calibration import Calibrated
from megatron_sead.planning.candidates import Cluster, Pair
from megatron_sead.planning.fit import FRAGMENTATION, LIBRARIES
from megatron_sead.planning.plan import size_of
from megatron_sead.planning.search import Found
from megatron_sead.planning.seconds import MEASURED, PHASES, Prediction
from megatron_sead.wording import counted


def _console() -> Console:
    return Console(width=None if Console().is_terminal else 120)


def _say(text: str) -> None:
    _console().print(text, highlight=False, soft_wrap=True, markup=False)


def print_found(found: Found, pair: Pair, cluster: Cluster, rows: int) -> None:
    """A row a layout, the fastest first; the settings of each, to be pasted; and what binds."""
    _say(
        f"predicted, not measured: {counted(cluster.world, 'rank')} with {size_of(cluster.machine.gpu_bytes)}, "
        f"responses {pair.lengths.source} (mean {pair.lengths.mean:,.0f} tokens); the fastest of each layout, of "
        f"{counted(found.tried, 'candidate')} in {counted(len(found.candidates), 'layout')} that fit; GiB: the peak, "
        f"{FRAGMENTATION:.0%} for fragmentation, and {LIBRARIES / 2**30:g} GiB for libraries"
    )
    shown = found.candidates[:rows]
    phases = [phase for phase in PHASES if any(c.prediction.of_phase(phase) for c in shown)]
    table = Table("", "TP x PP x DP", "seconds", *phases, "bubble", "GiB", box=SIMPLE, padding=0, pad_edge=False)
    for number, candidate in enumerate(shown, 1):
        parallel, told = candidate.config.parallel, candidate.prediction
        virtual = parallel.virtual_pipeline_model_parallel_size
        stages = f"{parallel.pipeline_model_parallel_size}" + (f"({virtual})" if virtual else "")
        context = parallel.context_parallel_size
        shared = [f"CP {context}"] if context > 1 else []
        table.add_row(
            str(number),
            " x ".join([str(parallel.tensor_model_parallel_size), stages, *shared, str(candidate.replicas)]),
            f"{told.seconds:,.2f}",
            *(f"{told.of_phase(phase):,.2f}" for phase in phases),
            f"{told.bubble:.0%}",
            f"{candidate.needed / 2**30:.1f}",
        )
    _console().print(table)
    for number, candidate in enumerate(shown, 1):
        name, share = candidate.prediction.binds
        _say(f"{number}: {name} {share:.0%}; {' '.join(candidate.settings)}")


def print_bounds(found: Found, doubled: Found | str, cluster: Cluster) -> None:
    """What stands in the way of a faster step, and what twice the GPUs would bring."""
    best = found.candidates[0].prediction
    name, share = best.binds
    _say(f"what binds: {name}, {share:.0%} of the step")
    if found.missed is not None:
        seconds, settings, why = found.missed
        _say(f"memory: {seconds:,.2f} s or more would do with {' '.join(settings)}, which does not fit: {why}")
    if isinstance(doubled, str):
        _say(f"{cluster.world * 2:,} ranks: {doubled}")
        return
    then = doubled.candidates[0]
    gain = best.seconds / then.prediction.seconds
    _say(
        f"{cluster.world * 2:,} ranks: {then.prediction.seconds:,.2f} s, {gain:.2f} times as fast "
        f"({gain / 2:.0%} of twice), with {' '.join(then.settings)}; then {then.prediction.binds[0]} binds"
    )


def print_terms(prediction: Prediction) -> None:
    """Every term with its formula, and the sum."""
    table = Table(
        "phase", "term", "seconds", "formula", "binds", title="predicted seconds of a step", title_justify="left"
    )
    for term in prediction.terms:
        table.add_row(term.phase, term.name, f"{term.seconds:.4g}", term.formula, term.binds)
    for phase in PHASES:
        if (seconds := prediction.of_phase(phase)) > 0:
            table.add_row(phase, "sum", f"{seconds:.4g}", "", "", end_section=phase == PHASES[-1])
    table.add_row("step", "sum", f"{prediction.seconds:.4g}", "terms above, one after the other", prediction.binds[0])
    _console().print(table)


def print_calibration(calibrated: Calibrated) -> None:
    """What changed, and each run's phases as measured and as the new rates tell them."""
    changed = {name: getattr(calibrated.rates, name) for name in calibrated.factors}
    _say("rates by the runs' metrics: " + " ".join(f"{name}={value:.4g}" for name, value in changed.items()))
    table = Table("run", "steps", *(name.removesuffix("_seconds") for name in MEASURED), "step", "told / measured")
    for run in calibrated.runs:
        prediction = run.predicted(calibrated.rates)
        cells = []
        for metric, phases in MEASURED.items():
            told = sum(prediction.of_phase(phase) for phase in phases)
            cells.append(f"{run.seconds[metric]:.3f} {told:.3f}")
        whole = prediction.seconds - prediction.of_phase("saves")
        step = run.seconds["step_seconds"]
        table.add_row(str(run.path), str(run.steps), *cells, f"{step:.3f} {whole:.3f}", f"{whole / step:.2f}")
    _console().print(table)
