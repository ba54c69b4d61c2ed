"""The one exception that means: the user must change something."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """A mistake in what the user gave: a setting, a file, a layout.

    The message is one line that names the setting or file, its value, and what would be valid; mistakes that were found
    together have a line each. Commands print it and exit with code 2; a traceback would only hide it. Programming
    errors are ordinary exceptions.

    Args:
        remedy: an argument of what was called, such as ``overwrite``, that would let it go on. A command that has an
            option for it says so.
    """

    def __init__(self, message: str, *, remedy: str | None = None) -> None:
        super().__init__(message)
        self.remedy = remedy


class ArgumentError(UserError):
    """A mistake in an argument of a function. A command that takes the argument as an option names the option instead.

    Args:
        name: of the argument.
        value: of the argument.
        reason: what is wrong with it.
    """

    def __init__(self, name: str, value: object, reason: str) -> None:
        super().__init__(f"{name}={value}: {reason}")
        self.args = (name, value, reason)  # of which pickle makes it again, on another rank
        self.name, self.value, self.reason = name, value, reason

    def __str__(self) -> str:
        return f"{self.name}={self.value}: {self.reason}"


@contextmanager
def kept(mistakes: list[str]) -> Iterator[None]:
    """Keep what the body finds, a line each, and go on: mistakes are told all at once."""
    try:
        yield
    except UserError as error:
        mistakes += str(error).splitlines()


class NotFiniteNumbers(UserError):
    """A model's numbers came out NaN or infinite: its weights are at fault, or what it was given."""
