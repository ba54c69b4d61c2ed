"""What a run would need, without a GPU: ``sead plan --config FILE [--world-size N] [key=value ...]``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.commands.machine import GPU_MEMORY, HOST_MEMORY, machine_of
from megatron_sead.config.run import load_config
from megatron_sead.planning.fit import require_fit
from megatron_sead.planning.plan import make_plan, print_plan

app = App()


@app.command()
def main(
    config: Annotated[Path, typer.Option(help="YAML file with the run's settings")],
    world_size: Annotated[int, typer.Option(min=1, help="ranks of the run, over all nodes")] = 32,
    gpu_memory: Annotated[str, GPU_MEMORY] = "80GB",
    host_memory: Annotated[str, HOST_MEMORY] = "2000GB",
    overrides: Annotated[list[str] | None, typer.Argument(metavar="key=value ...")] = None,
) -> None:
    """Print layout, parameters and bytes per rank, and refuse a run that does not fit. Needs both models' config.json
    and nothing else of them."""
    with one_line_errors():
        settings, machine = load_config(config, overrides or []), machine_of(gpu_memory, host_memory)
        plan = make_plan(settings, world_size, machine.gpu_bytes)
        print_plan(plan, settings)
        require_fit(settings, plan, machine)
