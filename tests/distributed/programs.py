"""Programs run as users run them, but forked from a process that has imported what they need, which takes seconds.

At least one test of a program starts it as users do: what it imports, and when, is part of it.
"""

from __future__ import annotations

import os
import runpy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

from tests.distributed.ranks import forkserver

ROOT = Path(__file__).parents[2]


def run_program(program: Path, *arguments: str) -> CompletedProcess[str]:
    """What `subprocess.run` gives for `python program arguments`, captured as text."""
    with tempfile.TemporaryDirectory() as folder:
        code = exit_code(_run, program, arguments, Path(folder))
        told = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return CompletedProcess([str(program), *arguments], code, *told)


def exit_code(function: Callable[..., None], *arguments: Any, timeout: float = 240.0) -> int:
    """Of a process of its own that calls the function; negative: the signal that ended it."""
    process = forkserver().Process(target=function, args=arguments)
    process.start()
    process.join(timeout)
    if process.is_alive():
        process.kill()
        process.join()
    return int(process.exitcode)


def _run(program: Path, arguments: tuple[str, ...], outputs: Path) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(outputs / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    sys.argv = [str(program), *arguments]
    sys.path.insert(0, str(program.parent))
    runpy.run_path(str(program), run_name="__main__")
