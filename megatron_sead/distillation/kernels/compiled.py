"""The kernels on a CPU with a C++ compiler: `rows.cpp`, compiled for this processor at the first call that is worth it.

Each process compiles its own, in a second, and leaves no file: a cache could be stale, or of another processor. Only
large blocks come here: it is the size of a call that decides, never its turn.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from megatron_sead.distillation.scratch import plain_on_cpu

log = logging.getLogger(__name__)

# Shapes as in `eager`

TYPES = (torch.float32, torch.bfloat16, torch.float16)  # in the order of `rows.cpp`
LEAST_ELEMENTS = 2**22  # rows * columns: some 50 ms of eager work
SOURCE = Path(__file__).with_name("rows.cpp")
COMPILERS = ("g++", "clang++", "c++")  # whichever is there; the environment's CXX goes before them
# no reordering of sums or products but within the loops that ask for it: NaN and infinity keep their meaning
FLAGS = ("-O3", "-std=c++17", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
X86_FLAGS = ("-mprefer-vector-width=512",)  # compilers take half of it by default, for the clock of older processors


def serves(rows: int, real: int, *logits: torch.Tensor) -> bool:
    """Is a call over so many rows of these tensors [n, V] computed here?"""
    return (
        rows * real >= LEAST_ELEMENTS
        and all(_has_plain_rows(part) and part.dtype == logits[0].dtype for part in logits)
        and _library() is not None
    )


def _has_plain_rows(logits: torch.Tensor) -> bool:
    return plain_on_cpu(logits) and logits.dtype in TYPES and logits.stride(-1) == 1


def pair_sums(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, real: int, *, with_columns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    maxima, sums = _empty(len(rows), 2), _empty(len(rows), 6)
    columns = rows.new_zeros(len(rows), 2) if with_columns else None
    logits = student, student.stride(0), teacher, teacher.stride(0)
    _call("pair_sums", *logits, rows.contiguous(), len(rows), real, maxima, sums, columns)
    return maxima, sums, columns


def single_sums(logits: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    maxima, sums = _empty(len(logits), 1), _empty(len(logits), 2)
    _call("single_sums", logits, logits.stride(0), len(logits), real, maxima, sums)
    return maxima, sums


def write_gradient(
    out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor, real: int
) -> None:
    logits = student, student.stride(0), teacher, teacher.stride(0)
    _call("write_gradient", out, out.stride(0), *logits, coefficients.float().contiguous(), len(out), real)


def _empty(*shape: int) -> torch.Tensor:
    """Whatever the process's default type and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _call(kernel: str, first: torch.Tensor, *others: torch.Tensor | int | None) -> None:
    """A function of `rows.cpp`, for the type of its first tensor: numbers as they are, of tensors their memory."""
    library = _library()
    assert library is not None
    arguments = [
        ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument
        for argument in (TYPES.index(first.dtype), first, *others, torch.get_num_threads())
    ]
    integers = [ctypes.c_int64(argument) if isinstance(argument, int) else argument for argument in arguments]
    library[kernel](*integers)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """None, and a line in the log, where it cannot be compiled."""
    compiler = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    try:
        if compiler is None:
            raise OSError(f"none of {', '.join(COMPILERS)} is installed")
        return _compile(compiler)
    except (OSError, ValueError) as error:  # ValueError: quotes in CXX that do not close
        log.warning("no C++ compiler, so the loss runs ten times slower, eagerly: %s", error)
        return None


def _compile(compiler: str) -> ctypes.CDLL:
    """
    Raises:
        OSError: the compiler cannot be run or has failed, or the temporary folder must not hold programs.
    """
    flags = [*FLAGS, *(X86_FLAGS if platform.machine() in ("x86_64", "AMD64") else ())]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "rows.so")
        command = [*shlex.split(compiler), *flags, str(SOURCE), "-o", str(library)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise OSError(f"{compiler}: {' '.join(result.stderr.split())[:200]}")
        return ctypes.CDLL(str(library))  # stays mapped when its file is gone
