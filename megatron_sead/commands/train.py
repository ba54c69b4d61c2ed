"""``sead train --config FILE [key=value ...]``: one training run; as a process of its own, as ranks that it starts, or
as one of those that torchrun has started (``torchrun -m megatron_sead.train``).

``--check`` and ``--dry-run`` need neither ranks nor torch: they tell what is wrong, and what a run would need.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_sead.commands.cli import App, one_line_errors_on_ranks
from megatron_sead.commands.machine import GPU_MEMORY, HOST_MEMORY, machine_of
from megatron_sead.commands.ranks import start_ranks
from megatron_sead.config.checks import OWNER_FILE, check_output, config_warnings
from megatron_sead.config.environment import environment_number
from megatron_sead.config.run import RunConfig, load_config
from megatron_sead.config.settings_file import repeated_overrides
from megatron_sead.errors import ArgumentError, UserError, kept
from megatron_sead.files.durable import refused_by_the_disk
from megatron_sead.launch.ownership import refuse_if_owned
from megatron_sead.launch.rank_failures import ending_together

if TYPE_CHECKING:
    from megatron_sead.planning.fit import Machine
    from megatron_sead.planning.plan import Plan

app = App()
log = logging.getLogger("megatron_sead.train")


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="YAML file with the run's settings")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value ...", help="settings that win, as training.lr=1e-5")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="only check settings, layout and files; silent if fine")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check, and print parameters and bytes per rank")] = False,
    trace: Annotated[
        bool, typer.Option("--trace", help="--dry-run, and a step of single ranks on fake CUDA tensors: no GPU needed")
    ] = False,
    trace_ranks: Annotated[
        str | None, typer.Option(help="ranks to trace, as 0,16; default: the first of the first and last stage")
    ] = None,
    trace_rates: Annotated[
        Path | None, typer.Option(help="YAML file with a machine's rates; default: megatron_sead/planning/rates.yaml")
    ] = None,
    world_size: Annotated[
        int | None,
        typer.Option(min=1, help="ranks for --check, --dry-run and --trace; default: NNODES x NPROC, if set"),
    ] = None,
    gpu_memory: Annotated[str, GPU_MEMORY] = "80GB",
    host_memory: Annotated[str, HOST_MEMORY] = "2000GB",
    nproc_per_node: Annotated[
        int | None, typer.Option(min=1, help="start so many ranks on this machine; default: this process is the rank")
    ] = None,
) -> None:
    """Distil the teacher into the student, or with --dry-run print what that would take."""
    with one_line_errors_on_ranks():
        settings, machine = load_config(config, overrides or []), machine_of(gpu_memory, host_memory)
        repeated = repeated_overrides(overrides or [])
        if check or dry_run or trace:
            ranks = world_size or nproc_per_node or _planned_world_size(settings)
            chosen = _chosen_ranks(trace_ranks, ranks, settings) if trace else []
            with_trace = partial(_trace, settings, chosen, trace_rates) if trace else None
            _examine(settings, ranks, machine, show=dry_run or trace, trace=with_trace)
            for line in repeated:
                print(f"note: {line}")
        elif nproc_per_node is not None:
            start_ranks(nproc_per_node, "megatron_sead.train", ["--config", str(config), *(overrides or [])])
        else:
            _configure_logging(settings.device)
            for line in repeated:
                log.info("%s", line)
            _train(settings)


def _examine(
    config: RunConfig,
    world_size: int,
    machine: Machine,
    *,
    show: bool,
    trace: Callable[[Plan], None] | None = None,
) -> None:
    """Look at everything, whatever is found on the way; then tell all that is wrong.

    Args:
        show: print the plan, and refuse one that the machine does not hold.
        trace: is called with a plan that holds.
    """
    from megatron_sead.planning.fit import require_fit
    from megatron_sead.planning.plan import make_plan, print_plan
    from megatron_sead.planning.preflight import check_inputs

    mistakes: list[str] = []
    with kept(mistakes):
        plan = make_plan(config, world_size, machine.gpu_bytes)
        if show:
            print_plan(plan, config)
        else:
            for line in config_warnings(config):
                print(f"note: {line}")
        if trace is not None:
            trace(plan)
        if show:
            require_fit(config, plan, machine)
    with kept(mistakes):
        for line in check_inputs(config, weights_may_come_later=show):
            print(f"note: {line}")
    with kept(mistakes):
        check_output(config)
        refuse_if_owned(config.output / OWNER_FILE, f"output={config.output}")
    if mistakes:
        raise UserError("\n".join(dict.fromkeys(mistakes)))


def _chosen_ranks(text: str | None, world_size: int, config: RunConfig) -> list[int]:
    """
    Raises:
        UserError: something else than ranks.
    """
    if text is None:
        return sorted({0, world_size - world_size // config.parallel.pipeline_model_parallel_size})
    parts = [part.strip() for part in text.split(",")]
    ranks = [int(part) for part in parts if part.isascii() and part.isdigit()]
    if len(ranks) < len(parts) or max(ranks) >= world_size:
        raise ArgumentError("trace_ranks", text, f"must be ranks from 0 to {world_size - 1}, as 0,{world_size - 1}")
    return sorted(set(ranks))


def _trace(config: RunConfig, ranks: list[int], rates: Path | None, plan: Plan) -> None:
    """Two steps of each rank on fake CUDA tensors, and what they tell.

    Raises:
        RuntimeError: ranks would not meet.
    """
    warnings.filterwarnings("ignore")
    _configure_logging(config.device)
    logging.getLogger("megatron_sead").setLevel(logging.ERROR)  # of numbers that are made up
    from megatron_sead.planning.rates import load_rates
    from megatron_sead.tracing.extend import trace_run
    from megatron_sead.tracing.report import print_trace

    traced = trace_run(config, plan, ranks, load_rates(rates))
    print_trace(traced, plan)
    if traced.disagreements:
        raise RuntimeError("ranks would not meet: see DISAGREE above")


def _planned_world_size(config: RunConfig) -> int:
    parallel = config.parallel
    fewest = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    per_node = environment_number("NPROC")
    planned = None if per_node is None else per_node * (environment_number("NNODES") or 1)
    return environment_number("WORLD_SIZE") or planned or fewest


def _train(config: RunConfig) -> None:
    # Here, not at the top: torch and Megatron take seconds to import, and mistakes are told before
    if config.device == "cpu":
        from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

        adapt_to_cpu()  # before anything imports Megatron
    from megatron_sead.training.loop import run

    if not {"", os.getcwd()} & set(sys.path):  # a policy of one's own, where `python -m` would find it too
        sys.path.append(os.getcwd())
    with refused_by_the_disk(lambda reason: _disk_refuses(config.output, reason)), ending_together():
        run(config)


def _disk_refuses(output: Path, reason: str) -> UserError:
    return UserError(
        f"output={output}: {reason}; whole checkpoints are as they were, and once this is mended the same command "
        "continues"
    )


def _configure_logging(device: str) -> None:
    """This package speaks, on the first rank at least; the libraries only when something is wrong."""
    rank = environment_number("RANK", 0, least=0)
    logging.basicConfig(
        level=logging.WARNING,
        format="%(asctime)s %(message)s" if rank == 0 else f"%(asctime)s rank {rank}: %(message)s",
        datefmt="%H:%M:%S",
    )
    logging.getLogger("megatron_sead").setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    if device == "cpu":  # that Apex, Transformer Engine and CUDA settings are missing is no news there
        warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.")
