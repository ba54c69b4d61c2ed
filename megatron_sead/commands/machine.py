"""What a run's machines have, as commands are told."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import typer

from megatron_sead.errors import ArgumentError

if TYPE_CHECKING:
    from megatron_sead.planning.fit import Machine

GPU_MEMORY = typer.Option(envvar="GPU_MEMORY", help="of a GPU, which the run must fit: 80, 80GB, 81920MiB")
HOST_MEMORY = typer.Option(envvar="HOST_MEMORY", help="of a node's host memory: 2000, 2TB, 512GiB")
SIZE = re.compile(r"(\d+(?:\.\d*)?|\.\d+) ?(?:([MGT])(?:i?B)?)?", re.ASCII | re.IGNORECASE)
UNITS = {"M": 2**20, "G": 2**30, "T": 2**40}  # as memory is sold
LARGEST_GPU, LARGEST_HOST = 2**42, 2**47  # more is a mistake in the unit


def machine_of(gpu_memory: str, host_memory: str) -> Machine:
    """From the two options.

    Raises:
        UserError: one is not the size of a memory.
    """
    from megatron_sead.planning.fit import Machine

    return Machine(
        _bytes("gpu_memory", gpu_memory, LARGEST_GPU, "80 or 80GB"),
        _bytes("host_memory", host_memory, LARGEST_HOST, "2000 or 2TB"),
    )


def _bytes(option: str, text: str, largest: int, example: str) -> int:
    parts = SIZE.fullmatch(text.strip())
    size = 0 if parts is None else int(float(parts[1]) * UNITS[(parts[2] or "G").upper()])
    if not 0 < size <= largest:
        raise ArgumentError(
            option,
            repr(text) if not text.strip() else text,
            f"must be a size in GB, as {example}; or in MB or TB; more than zero, at most {largest // 2**30} GB "
            f"(a GB has 2^30 bytes; the variable {option.upper()} says the same)",
        )
    return size
