"""Layouts beside each other: ``sead scaling run --study FILE --output DIR``; ``predict`` instead of ``run`` needs no
machine; ``report DIR`` makes tables and plots again."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.commands.machine import GPU_MEMORY, HOST_MEMORY, machine_of
from megatron_sead.config.checks import OWNER_FILE
from megatron_sead.config.settings_file import load_settings
from megatron_sead.errors import UserError
from megatron_sead.files.durable import refused_by_the_disk
from megatron_sead.wording import counted

if TYPE_CHECKING:
    from megatron_sead.config.run import RunConfig
    from megatron_sead.planning.candidates import Cluster, Pair
    from megatron_sead.planning.fit import Machine
    from megatron_sead.scaling.conducting import Place
    from megatron_sead.scaling.study import Study

app = App(no_args_is_help=True, help=__doc__)

STUDY = typer.Option(help="YAML file: the run, the rollouts, and lists of layouts")
OVERRIDES = typer.Argument(metavar="key=value ...", help="settings of the study that win, as steps=10")


@app.command()
def run(
    study: Annotated[Path, STUDY],
    output: Annotated[Path, typer.Option(help="directory for records, tables and plots; a study begun there goes on")],
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="start each run by srun, within an allocation")] = False,
    ranks_per_node: Annotated[
        int | None, typer.Option(min=1, help="default: the GPUs here; on a CPU any number of processes")
    ] = None,
    most_ranks: Annotated[
        int | None, typer.Option(min=1, help="leave runs of more ranks for another time; default: refuse them")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="measure again what has failed")] = False,
    gpu_memory: Annotated[str, GPU_MEMORY] = "80GB",
    host_memory: Annotated[str, HOST_MEMORY] = "2000GB",
) -> None:
    """Measure every layout on the same rollouts, one after another, and write tables and plots.

    A layout that is done is not run again, one that fails is told and the rest goes on. On several nodes: --slurm, or
    the same command on each with NNODES, NODE_RANK and MASTER_ADDR, and an output that all see.
    """
    with one_line_errors():
        from megatron_sead.commands.scaling_launch import find_cluster
        from megatron_sead.scaling.choosing import chosen, has_wishes
        from megatron_sead.scaling.conducting import Place, conduct
        from megatron_sead.scaling.study import Study, base_config

        asked = load_settings(Study, study, overrides or [])
        base, machine = base_config(asked), machine_of(gpu_memory, host_memory)
        if has_wishes(asked):
            asked = chosen(asked, base, *_known(asked, base, machine))
        cluster = find_cluster(slurm, ranks_per_node, base.device)
        place = Place(
            output.absolute(), cluster.command, cluster.most_ranks, machine, cluster.node == 0, now=most_ranks
        )
        with _ended_by_signals():
            if place.writes:
                _conduct_and_report(asked, place, retry)
            else:
                conduct(asked, place, retry=retry)


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """A scheduler's SIGTERM and a closing terminal end a study as Ctrl-C does, and its ranks with it."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup has it ignored
            signal.signal(number, stop)
    try:
        yield
    except KeyboardInterrupt:
        print("stopped; the same command goes on with what is not measured yet", file=sys.stderr)
        sys.exit(130)


def _conduct_and_report(study: Study, place: Place, retry: bool) -> None:
    from megatron_sead.launch.ownership import sole_owner
    from megatron_sead.scaling.conducting import conduct
    from megatron_sead.scaling.folder import require_place
    from megatron_sead.scaling.report import write_report

    require_place(study, place.output)
    name = f"--output {place.output}"
    with refused_by_the_disk(lambda told: UserError(f"{name}: {told}")), sole_owner(place.output / OWNER_FILE, name):
        found = conduct(study, place, retry=retry)
        print(write_report(place.output))
    failed = [record for record in found if record.get("reason") is not None]
    if failed and len(failed) == len(found):
        told = "the only run" if len(found) == 1 else f"all {len(found)} runs"
        print(f"error: nothing was measured: {told} failed; --retry measures again what failed", file=sys.stderr)
        sys.exit(1)
    if failed:
        print(f"{len(failed)} of {counted(len(found), 'run')} failed; --retry measures again what failed")


def _known(study: Study, base: RunConfig, machine: Machine, rates: Path | None = None) -> tuple[Pair, Cluster]:
    """Models, and a machine of which each run says how many ranks it takes."""
    from megatron_sead.planning.candidates import Cluster, read_pair
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.scaling.study import require_lengths

    require_lengths(study, base)
    return read_pair(base, study.lengths), Cluster(1, machine, load_rates(rates, device=base.device))


def _require_new(output: Path) -> None:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output {output}: exists already; choose another, or move it away")


def _writing(output: Path) -> AbstractContextManager[None]:
    return refused_by_the_disk(lambda told: UserError(f"--output {output}: {told}"), writes_alone=True)


@app.command()
def predict(
    study: Annotated[Path, STUDY],
    output: Annotated[Path, typer.Option(help="new directory for records, tables and plots")],
    overrides: Annotated[list[str] | None, OVERRIDES] = None,
    rates: Annotated[
        Path | None,
        typer.Option(help="YAML file with a machine's rates; default: planning/rates.yaml"),
    ] = None,
    gpu_memory: Annotated[str, GPU_MEMORY] = "80GB",
    host_memory: Annotated[str, HOST_MEMORY] = "2000GB",
) -> None:
    """Predict instead of measuring: seconds and memory of every layout by the plan's formulas, as tables and plots.

    Steps are whole, with rollouts by the config's own engine. Nothing is run, and all is labelled as predicted.
    """
    with one_line_errors():
        from megatron_sead.scaling.choosing import chosen
        from megatron_sead.scaling.folder import write_study
        from megatron_sead.scaling.predicting import predict_study
        from megatron_sead.scaling.records import write_records
        from megatron_sead.scaling.report import write_report
        from megatron_sead.scaling.study import Study, whole_config

        asked = load_settings(Study, study, overrides or [])
        base, machine = whole_config(asked), machine_of(gpu_memory, host_memory)
        pair, cluster = _known(asked, base, machine, rates)
        asked = chosen(asked, base, pair, cluster)
        _require_new(output)
        found = predict_study(asked, pair, cluster)
        with _writing(output):
            write_study(asked, output)
            write_records(output, found)
            print(write_report(output))


@app.command()
def report(
    output: Annotated[Path, typer.Argument(metavar="DIR", help="of a study")],
    plots: Annotated[bool, typer.Option(help="also draw the plots again")] = True,
) -> None:
    """Write the tables and plots again, from the records alone."""
    with one_line_errors():
        from megatron_sead.scaling import folder
        from megatron_sead.scaling.report import write_report

        if not (output / folder.STUDY).is_file():
            raise UserError(f"{output}: holds no study ({folder.STUDY})")
        with _writing(output):
            print(write_report(output, plots=plots))


@app.command()
def rollouts(
    config: Annotated[Path, typer.Option(help="YAML file of the training run that will replay them")],
    output: Annotated[Path, typer.Option(help="new directory, for rollouts.path of a run")],
    lengths: Annotated[str, typer.Option(help="MEAN,P99 of a log-normal distribution, or a file of lengths")],
    steps: Annotated[int, typer.Option(min=1, help="of the run")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="of lengths and tokens")] = 0,
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value ...")] = None,
) -> None:
    """Write synthetic rollouts: random tokens of given lengths, in the format that rollouts.engine=replay reads."""
    with one_line_errors():
        from megatron_sead.config.run import load_config
        from megatron_sead.scaling.rollouts import drawing, write_rollouts

        _require_new(output)
        asked = load_config(config, overrides or [])
        draw = drawing(lengths, asked.rollouts.max_new_tokens)
        with _writing(output):
            write_rollouts(output, asked, steps, draw, seed)
        print(f"{output}: rollouts of {steps} steps")
