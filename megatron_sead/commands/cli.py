"""What every command shares: a user's mistake ends in one line on stderr and exit code 2, never in a traceback.

What the package calls arguments are options here, and here alone they are named so.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

from megatron_sead.config.environment import expand_path
from megatron_sead.errors import ArgumentError, UserError
from megatron_sead.launch.processes import end_with_parent
from megatron_sead.launch.rank_failures import fail, leave
from megatron_sead.launch.streams import forgive_streams

ClickException: type[Exception] = typer.BadParameter.__mro__[2]  # Typer exports it under no name
REMEDIES = {  # arguments that let a command go on, in its user's words
    "overwrite": "or give --overwrite to replace it",
    "dtype": "sead convert hf-to-megatron --dtype makes it so",
}
SETTING_AS_OPTION = re.compile(r"--([a-z_]+(?:\.\w+)*)")


class App(typer.Typer):
    """Typer, whose commands expand ``~`` and ``$NAME`` in paths, can say anything on any terminal, and tell a wrong
    option in one line."""

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
        try:
            sys.exit(super().__call__(*args, standalone_mode=False, **kwargs))
        except ClickException as error:
            _tell_usage(error)
            sys.exit(2)


def _tell_usage(error: Any) -> None:
    """One line; all of the help where nothing was given."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return
    context = getattr(error, "ctx", None)
    text = " ".join(error.format_message().split()).rstrip(".")
    option = SETTING_AS_OPTION.fullmatch(getattr(error, "option_name", None) or "")
    if option is not None and context is not None and any(p.name == "overrides" for p in context.command.params):
        setting = option[1]
        if "." in setting or not getattr(error, "possibilities", None):
            text = f"{option[0]}: settings are written without dashes: {setting}=..."
    print(f"error: {text}" + (f"; see {context.command_path} --help" if context else ""), file=sys.stderr)


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
        print(told(error), file=sys.stderr)
        sys.exit(2)


def told(error: UserError) -> str:
    """An error as a command tells it: arguments as options, a line a mistake."""
    text = str(error)
    if isinstance(error, ArgumentError):
        text = f"--{error.name.replace('_', '-')} {error.value}: {error.reason}"
    lines = [f"error: {line}" for line in text.splitlines()] or ["error"]
    return "\n".join(lines) + (f" ({REMEDIES[error.remedy]})" if error.remedy in REMEDIES else "")


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
        fail(2, told(error), error)
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
