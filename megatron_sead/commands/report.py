"""``sead report RUN [RUN ...] [--output FILE]``: runs as one HTML file to look at, mail and print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import UserError

app = App()


@app.command()
def main(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="directories of runs, in whatever state")],
    output: Annotated[
        Path | None, typer.Option(help="file to write; default: report.html in the run's directory, if it is one run")
    ] = None,
) -> None:
    """Curves, token by token rollouts and what looks wrong, in one file without a server or network.

    Several runs are compared: those that differ in their seed alone are a group, drawn as a band.
    """
    with one_line_errors():
        from megatron_sead.html_report.write import NAME, write_report

        if output is None and len(runs) > 1:
            raise UserError("--output is not given: several runs have no directory of their own for their report")
        place = runs[0] / NAME if output is None else output
        write_report(runs, place)
        print(f"{place}: {place.stat().st_size / 1e6:.1f} MB")
