"""A node's first rank reads and tokenizes; the others see the same prompts, and the same refusal."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sead.errors import UserError
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.prompts.table import PromptTable, write_table
from tests.distributed.ranks import RankPool

PROMPTS = [
    Prompt("a", "1+1=", ("2",), 0.25, "sums", (1, 2, 3), (1, 2, 3)),
    Prompt("b\u2028/é", "", ("1", r"\frac12"), None, None, (70_000,), (5,)),
    Prompt("c", "x" * 999, ("3",), 0.0, None, tuple(range(500)), ()),
]


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2, timeout=120) as pool:
        yield pool


def test_a_table_holds_what_was_written() -> None:
    path = write_table(iter(PROMPTS))
    table = PromptTable(path)
    path.unlink()
    assert list(table) == PROMPTS and len(table) == 3 and table.longest == 500
    assert (table[-1], table[:2], table.difficulties) == (PROMPTS[2], PROMPTS[:2], [0.25, None, 0.0])
    assert [table.find(prompt.id) for prompt in PROMPTS] == [0, 1, 2]
    assert table.find("d") is None
    with pytest.raises(IndexError):
        table[3]


def test_nothing_is_left_of_a_table_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Iterator[Prompt]:
        yield PROMPTS[0]
        raise UserError("line 2")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match="line 2"):
        write_table(failing())
    assert not list(tmp_path.iterdir())


def load_on_ranks(folder: str, same_host: bool, refused_on: int | None) -> tuple[list[Prompt] | str, int]:
    """What a rank gets, and how often it read."""
    import socket

    from megatron_sead.training.prompt_sets import prompts_once_a_node

    rank, times = dist.get_rank(), 0

    def load() -> Iterator[Prompt]:
        nonlocal times
        times += 1
        if rank == refused_on:
            raise UserError(f"line 2, on rank {rank}")
        yield from PROMPTS

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", folder)
        patch.setattr(socket, "gethostname", lambda: "host" if same_host else f"host{rank}")
        try:
            return list(prompts_once_a_node(load, dist.group.WORLD)), times
        except UserError as error:
            return str(error), times


def test_prompts_are_read_once_a_node(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(load_on_ranks, str(tmp_path), True, None) == [(PROMPTS, 1), (PROMPTS, 0)]
    assert ranks.run(load_on_ranks, str(tmp_path), False, None) == [(PROMPTS, 1), (PROMPTS, 1)]
    assert ranks.run(load_on_ranks, str(tmp_path), False, 1) == [("line 2, on rank 1", 1)] * 2
    assert ranks.run(load_on_ranks, str(tmp_path), True, 0) == [("line 2, on rank 0", 1), ("line 2, on rank 0", 0)]
    assert not list(tmp_path.iterdir())
    (told, _), (same, _) = ranks.run(load_on_ranks, str(tmp_path / "no"), True, None)
    assert told == same and str(told).startswith(f"TMPDIR={tmp_path / 'no'} on host: ")
