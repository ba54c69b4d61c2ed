"""Compiles the Triton kernels for a GPU that need not be there, and prints what came of it: run by test_triton_rows.py.

Every launch is turned into a compilation, as a first launch would do it, with the arguments of real calls.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from megatron_sead.distillation.kernels import triton_rows


class Driver:
    """Of an H100, as far as the compiler asks."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Compiler:
    """In the place of a kernel."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[str, str] = {}  # hash -> PTX

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*args: Any, **kwargs: Any) -> None:
            result = self.kernel.warmup(*args, grid=grid, **kwargs)
            self.compiled[result.hash] = result.asm["ptx"]

        return compile_only


def main() -> None:
    driver.set_active(Driver())
    kernels = {
        name: Compiler(getattr(triton_rows, name)) for name in ("_span_kernel", "_row_kernel", "_gradient_kernel")
    }
    for name, compiler in kernels.items():
        setattr(triton_rows, name, compiler)
    buffer = torch.zeros(40, 1024)
    for first, rows, real in ((0, 1, 1000), (1, 1, 1000), (3, 2, 1024), (7, 16, 16), (0, 33, 1), (5, 35, 1)):
        chunk = buffer[first : first + rows]
        chosen = torch.arange(40)[first : first + rows]
        triton_rows.pair_sums(chunk, chunk, chosen, real, with_columns=True)
        triton_rows.write_gradient(chunk, chunk, chunk, torch.zeros(40, 5)[first : first + rows], real)
    print(json.dumps({name: list(compiler.compiled.values()) for name, compiler in kernels.items()}))


if __name__ == "__main__":
    main()
