"""Methods beside each other on one pair of models, each with a learning rate of its own and several seeds:
``python tools/compare_methods.py STUDY.yaml WORK [--write FOLDER]``.

First every method's learning rate is chosen, on problems taken out of the training prompts and with seeds that do not
count; then every method, horizon and seed is run. WORK keeps the run directories: the same command continues. FOLDER
gets ``results.json``, ``tables.md`` and a report a horizon.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from method_study.results import page, require_place, runs_of, write_results
from method_study.running import best, choose_rates, require_possible, run_methods
from method_study.study import Study
from rich.console import Console

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.config.settings_file import load_settings
from megatron_sead.html_report.write import require_ours, write_report

console = Console(soft_wrap=True)
app = App()


@app.command(help=__doc__)
def main(
    study_file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="what is compared")],
    work: Annotated[Path, typer.Argument(help="folder of the runs; those that have ended there are not run again")],
    write: Annotated[Path | None, typer.Option(help="folder for results.json, tables.md and report-STEPS.html")] = None,
    at_once: Annotated[int, typer.Option(min=1, help="runs at a time, each on a core")] = 2,
) -> None:
    """Run, print, and write."""
    with one_line_errors():
        study, work = load_settings(Study, study_file, []), work.absolute()
        reports = {horizon: write / f"report-{horizon}.html" for horizon in study.horizons} if write else {}
        if write:
            require_place(write, study)
        for report in reports.values():
            require_ours(report)
        require_possible(study, work)
        chosen = choose_rates(study, work, at_once, console.print)
        rates = {method: best(by_rate) for method, by_rate in chosen.items()}
        console.print(f"learning rates: {', '.join(f'{method} {rate:g}' for method, rate in rates.items())}")
        run_methods(study, work, rates, at_once, console.print)
        found = {horizon: runs_of(study, work, horizon, rates) for horizon in study.horizons}
        console.print(page(study, chosen, found), markup=False, highlight=False)
        if write:
            write_results(write, study, chosen, found)
            for horizon, report in reports.items():
                write_report([run.directory for group in found[horizon].values() for run in group], report)


if __name__ == "__main__":
    app()
