"""What every command shares: a user's mistake ends in one line on stderr and exit code 2, never in a traceback."""

from __future__ import annotations

import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from megatron_sead.config.environment import expand_path
from megatron_sead.errors import UserError
from megatron_sead.launch.processes import end_with_parent
from megatron_sead.launch.rank_failures import fail, leave
from megatron_sead.launch.streams import forgive_streams


class App(typer.Typer):
    """Typer, whose commands expand ``~`` and ``$NAME`` in paths, and can say anything on any terminal."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(add_completion=False, pretty_exceptions_enable=False, **settings)

    def command(self, *names: Any, **settings: Any) -> Callable[[Any], Any]:
        add = super().command(*names, **settings)

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            add(_expanding_paths(function))
            return function

        return register

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forgive_streams()
        return super().__call__(*args, **kwargs)


def _expanding_paths(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def with_expanded(**arguments: Any) -> Any:
        with one_line_errors_on_ranks() if "RANK" in os.environ else one_line_errors():
            arguments = {name: _expanded(value) for name, value in arguments.items()}
        return function(**arguments)

    return with_expanded


def _expanded(value: Any) -> Any:
    if isinstance(value, list):
        return [_expanded(item) for item in value]
    return expand_argument(value) if isinstance(value, Path) else value


def expand_argument(path: Path | str) -> Path:
    """A path from the command line, expanded.

    Raises:
        UserError: it holds what is not expanded; says what.
    """
    try:
        return Path(expand_path(path))
    except ValueError as error:
        raise UserError(f"{str(path)!r} {error}") from None


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Commands of one process run their body in this."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


@contextmanager
def one_line_errors_on_ranks() -> Iterator[None]:
    """The same for commands that torchrun may have started: all ranks end, and the first error is told once.

    A mistake in one line, with exit code 2; anything else with its traceback, and exit code 1. Ranks that torchrun
    started end when it does.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent()
    try:
        yield
        sys.stdout.flush()
    except UserError as error:
        fail(2, f"error: {error}", error)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _stdout_is_closed():
            leave(1)  # whoever read it has seen enough
        rank = os.environ.get("RANK")
        fail(1, (f"rank {rank} failed:\n" if rank else "") + traceback.format_exc().rstrip(), error)


def _stdout_is_closed() -> bool:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        return True
    return False
