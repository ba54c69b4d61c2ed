"""Writing a report: in place of an earlier report, and of nothing else."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from megatron_sead.errors import UserError
from megatron_sead.files.durable import refused_by_the_disk, replace_text
from megatron_sead.html_report.page import MARKER, report
from megatron_sead.html_report.run_directory import Run, read_run

NAME = "report.html"
HEAD = 4096  # bytes in which the marker stands

log = logging.getLogger(__name__)


def write_report(directories: Sequence[Path], output: Path) -> None:
    """The report of one run or several.

    Raises:
        UserError: a directory is no run's, or is given twice, the output is a file that was not written here, or the
            disk refuses.
    """
    places = [os.path.realpath(directory) for directory in directories]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise UserError(f"{directories[number]}: is given twice; a run is compared with others")
    try:
        require_ours(output)
        runs = [read_run(directory) for directory in directories]
    except OSError as error:  # as of a folder that others own
        raise UserError(f"{error.filename or output}: {error.strerror}") from error
    _tell_apart(runs)
    text = report(runs)
    with refused_by_the_disk(lambda told: UserError(f"{output}: {told}"), writes_alone=True):
        output.parent.mkdir(parents=True, exist_ok=True)
        # Half of a character that a model wrote becomes its number, which browsers show as a replacement
        replace_text(output, text, errors="xmlcharrefreplace")


def _tell_apart(runs: list[Run]) -> None:
    """Runs of one name get that of their folder before it, and a number where that is not enough."""
    for name in {run.name for run in runs}:
        alike = [run for run in runs if run.name == name]
        for run in alike if len(alike) > 1 else ():
            run.name = f"{Path(os.path.realpath(run.directory)).parent.name}/{name}"
    for number, run in enumerate(runs, 1):
        if any(run.name == other.name for other in runs[: number - 1]):
            run.name += f" ({number})"


def write_at_the_end(directory: Path) -> Path | None:
    """The report of a run that has just ended, in its directory. None, with a warning, where that fails: the run is
    done, and the command makes the report again."""
    output = directory / NAME
    try:
        write_report([directory], output)
    except Exception as error:
        log.warning("%s is not written: %s", output, " ".join(str(error).split()) or type(error).__name__)
        return None
    return output


def require_ours(output: Path) -> None:
    """Refuse to write over what is no report.

    Raises:
        UserError: it is something else.
    """
    if output.is_dir():
        raise UserError(f"{output}: is a directory; name a file")
    if not os.path.lexists(output):
        return
    if output.exists() and not output.is_file():  # a pipe, which would be waited for
        raise UserError(f"{output}: is no file; choose another output")
    marked = f'content="{MARKER}"'.encode()
    try:
        with open(output, "rb") as file:
            ours = not output.is_symlink() and marked in file.read(HEAD)
    except OSError:
        ours = False
    if not ours:
        raise UserError(f"{output}: exists and is no report of this tool; choose another output, or move it away")
