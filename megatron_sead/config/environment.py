"""What commands take from the shell they run in: ``~`` and ``$NAME`` in paths, numbers in variables."""

from __future__ import annotations

import os
import re
from pathlib import PurePath
from typing import Any

from megatron_sead.errors import UserError

VARIABLE = re.compile(r"\$(?:(\w+)|\{(\w+)\})", re.ASCII)
ELSEWHERE = re.compile(r"[\w.+@-]+:[/\\]", re.ASCII)  # https://, s3://, file:///, host:/, C:\


def expand_path(path: Any) -> str:
    """A path or name with ``~``, ``~user``, ``$NAME`` and ``${NAME}`` replaced. Relative ones stay relative.

    Raises:
        ValueError: it holds what is not expanded, or is no path on this machine; says which.
    """
    if path is None:
        raise ValueError("is null, which is also what ~ alone means in YAML; must be a path")
    if not isinstance(path, str | os.PathLike):
        raise ValueError("must be a path, as text")
    text = os.fsdecode(path)
    if not text.strip():
        raise ValueError("is empty; must be a path")
    if text != text.strip() or not text.isprintable():
        raise ValueError("begins or ends with a space, or holds a character that cannot be shown")
    if ELSEWHERE.match(text):
        raise ValueError("is no path on this machine; URLs, other hosts and drive letters are not read")
    expanded = VARIABLE.sub(_value_of, text)
    if "$" in expanded:
        raise ValueError("only $NAME and ${NAME} are expanded, and no other use of $")
    if wild := [character for character in "*?\\" if character in expanded]:
        raise ValueError(f"holds {wild[0]}, which is not expanded; name one file or directory")
    if expanded.startswith("~"):
        expanded = os.path.expanduser(expanded)
    first = next(iter(PurePath(expanded).parts), ".")  # the working directory has no parts
    if first.startswith("~"):  # with ./ before it, too: a path would forget that
        raise ValueError(f"there is no home directory of {first}; give the whole path of a file with such a name")
    return expanded


def _value_of(variable: re.Match[str]) -> str:
    name = variable[1] or variable[2]
    value = os.environ.get(name, "")
    if not value:
        raise ValueError(f"the environment variable {name} is {'empty' if name in os.environ else 'not set'}")
    return value


def environment_number(name: str, default: int | None = None, *, least: int = 1) -> int | None:
    """The whole number in an environment variable; `default` where it is not set.

    Raises:
        UserError: it holds something else, or less than `least`.
    """
    text = os.environ.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text, re.ASCII) or int(text) < least:
        raise UserError(f"{name}={text!r} (environment variable): must be a whole number of at least {least}")
    return int(text)


def check_rank_variables() -> None:
    """Check that a process that was told its rank was also told where to meet the others.

    Raises:
        UserError: a variable that torchrun sets is missing, or holds no number.
    """
    if missing := [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise UserError(
            f"the environment variable RANK is set and {missing[0]} is not; torchrun sets all, or unset RANK"
        )
    for name, least in (("RANK", 0), ("WORLD_SIZE", 1), ("MASTER_PORT", 1)):
        environment_number(name, least=least)
