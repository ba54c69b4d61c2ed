"""What a run would need, without a GPU: ``sead plan --config FILE [--world-size N] [key=value ...]``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.commands.machine import GPU_MEMORY, HOST_MEMORY, machine_of
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.errors import ArgumentError
from megatron_sead.planning.fit import Machine, require_fit
from megatron_sead.planning.plan import make_plan, print_plan

if TYPE_CHECKING:
    from megatron_sead.planning.candidates import Cluster, Pair

app = App()


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="YAML file with the run's settings")],
    world_size: Annotated[int, typer.Option(min=1, help="ranks of the run, over all nodes")] = 32,
    gpu_memory: Annotated[str, GPU_MEMORY] = "80GB",
    host_memory: Annotated[str, HOST_MEMORY] = "2000GB",
    search: Annotated[
        bool, typer.Option("--search", help="rank the layouts that fit by predicted seconds a step")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="every term of the step's predicted seconds, with its formula")
    ] = False,
    rows: Annotated[int, typer.Option(min=1, help="layouts that --search prints")] = 10,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="of responses: MEAN,P99 in tokens, a run's directory, or a file with a number a line; default: a mean "
            "of an eighth of rollouts.max_new_tokens, and that as the 99th percentile"
        ),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option(help="YAML file with a machine's rates; default: rates.yaml of megatron_sead/planning"),
    ] = None,
    rate: Annotated[list[str] | None, typer.Option(help="one of them, as network_gb=25; may be repeated")] = None,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(metavar="RUN@RANKS", help="take rates from this run's metrics; may be repeated"),
    ] = None,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value ...")] = None,
) -> None:
    """Print layout, parameters and bytes per rank, and refuse a run that does not fit; or rank all that do. Needs both
    models' config.json and nothing else of them."""
    with one_line_errors():
        settings, machine = load_config(config, overrides or []), machine_of(gpu_memory, host_memory)
        predicts = search or explain or bool(calibrate)
        for name, given in {"lengths": lengths, "rates": rates, "rate": " ".join(rate or [])}.items():
            if given and not predicts:
                raise ArgumentError(
                    name, str(given), "tells seconds, which --search, --explain and --calibrate do alone"
                )
        if not search:
            plan = make_plan(settings, world_size, machine.gpu_bytes)
            print_plan(plan, settings)
        if predicts:
            pair, cluster = _known(settings, world_size, machine, lengths, rates, rate or [], calibrate or [])
            if search:
                _search(settings, pair, cluster, rows, explain)
            elif explain:
                _explain(settings, pair, cluster)
        if not search:
            require_fit(settings, plan, machine)


def _known(
    config: RunConfig,
    world_size: int,
    machine: Machine,
    lengths: str | None,
    rates: Path | None,
    changes: list[str],
    runs: list[str],
) -> tuple[Pair, Cluster]:
    """Models and machine. Rates that runs show are printed."""
    from megatron_sead.planning.calibration import calibrate, read_run
    from megatron_sead.planning.candidates import Cluster, read_pair
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.planning.search_report import print_calibration

    found = load_rates(rates, changes, device=config.device)
    if runs:
        calibrated = calibrate(found, [read_run(run, config.device) for run in runs])
        print_calibration(calibrated)
        found = calibrated.rates
    return read_pair(config, lengths), Cluster(world_size, machine, found)


def _search(config: RunConfig, pair: Pair, cluster: Cluster, rows: int, explain: bool) -> None:
    from megatron_sead.planning.search import search, twice
    from megatron_sead.planning.search_report import print_bounds, print_found, print_terms

    found = search(config, pair, cluster)
    print_found(found, pair, cluster, rows)
    if explain:
        print_terms(found.candidates[0].prediction)
    print_bounds(found, twice(config, pair, cluster), cluster)


def _explain(config: RunConfig, pair: Pair, cluster: Cluster) -> None:
    from megatron_sead.planning.search import predicted
    from megatron_sead.planning.search_report import print_terms

    print_terms(predicted(config, pair, cluster))
