"""The kernels on any device and type, without a compiler: a few rows at a time, so that scratch stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_sead.distillation.kernels import formulas

BLOCK_ELEMENTS = 2**17  # of a block on a CPU, whose scratch then stays in a core's cache

# Shapes: n tokens, k of them chosen; V columns of this rank, `real` of them tokens


def pair_sums(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, real: int, *, with_columns: bool = False
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    maxima, sums, columns = [], [], []
    for block in _blocks(len(rows), real, student.device):
        pair = student[rows[block], :real], teacher[rows[block], :real]
        of_block, sums_of_block = formulas.pair_sums(*pair)
        maxima.append(of_block)
        sums.append(sums_of_block)
        if with_columns:
            found = (formulas.columns_of(logits, of_block[:, i, None]) for i, logits in enumerate(pair))
            columns.append(torch.stack(list(found), dim=-1))
    return torch.cat(maxima), torch.cat(sums), torch.cat(columns) if with_columns else None


def single_sums(logits: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    parts = [formulas.single_sums(logits[block, :real]) for block in _blocks(len(logits), real, logits.device)]
    maxima, sums = zip(*parts, strict=True)
    return torch.cat(maxima), torch.cat(sums)


def write_gradient(
    out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor, real: int
) -> None:
    for block in _blocks(len(out), real, out.device):
        out[block, :real] = formulas.gradient(student[block, :real], teacher[block, :real], coefficients[block])


def _blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """On devices other than a CPU, rows enough to keep busy."""
    size = max(1, (BLOCK_ELEMENTS if device.type == "cpu" else 2**24) // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, min(start + size, rows))
