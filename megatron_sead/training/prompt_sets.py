"""Prompts once a node: its first rank reads and tokenizes them, the others map what it wrote."""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from megatron_sead.checkpoints.manifest import from_all_ranks
from megatron_sead.errors import UserError
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.prompts.table import PromptTable, write_table

T = TypeVar("T")


def prompts_once_a_node(load: Callable[[], Iterable[Prompt]], group: dist.ProcessGroup) -> PromptTable:
    """What `load` yields on the first rank of each node. Collective; no file is left.

    Args:
        group: gloo, all ranks.

    Raises:
        UserError: on every rank: what `load` refuses on one, or a folder for temporary files that refuses.
    """
    hosts = from_all_ranks(socket.gethostname(), group)
    mine = hosts[dist.get_rank(group)]
    is_first = hosts.index(mine) == dist.get_rank(group)
    written: Path | None = None
    try:
        outcome, refusal = _attempt(lambda: write_table(load()) if is_first else None, mine)
        written = outcome
        paths = _agreed(outcome, refusal, group)
        table, refusal = _attempt(lambda: PromptTable(paths[hosts.index(mine)] or Path()), mine)
        _agreed(None, refusal, group)
        assert table is not None
        return table
    finally:
        if written is not None:
            written.unlink(missing_ok=True)


def _attempt(action: Callable[[], T], host: str) -> tuple[T | None, UserError | None]:
    try:
        return action(), None
    except UserError as error:
        return None, error
    except OSError as error:
        place = f"TMPDIR={tempfile.gettempdir()} on {host}"
        reason = f"{error.strerror or error}; it holds the prompts for all ranks of the node while they start"
        return None, UserError(f"{place}: {reason}")


def _agreed(value: T, refusal: UserError | None, group: dist.ProcessGroup) -> list[T]:
    """Every rank's value; or, on every rank, the first refusal."""
    outcomes = from_all_ranks((value, refusal), group)
    for _, told in outcomes:
        if told is not None:
            raise told
    return [value for value, _ in outcomes]
