"""What a run's machines have, as commands are told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from megatron_sead.planning.fit import Machine

GPU_MEMORY = typer.Option(min=1, envvar="GPU_MEMORY", help="GB of a GPU, which the run must fit; or GPU_MEMORY")
HOST_MEMORY = typer.Option(min=1, envvar="HOST_MEMORY", help="GB of a node's host memory; or HOST_MEMORY")


def machine_of(gpu_memory: float, host_memory: float) -> Machine:
    """From the two options."""
    from megatron_sead.planning.fit import Machine

    return Machine(int(gpu_memory * 2**30), int(host_memory * 2**30))
