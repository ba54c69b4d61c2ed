"""The page: one run whole, or several beside each other, as HTML that holds everything it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from megatron_sead import __version__
from megatron_sead.html_report import comparison
from megatron_sead.html_report.figure import Figure
from megatron_sead.html_report.figures import FIGURES
from megatron_sead.html_report.findings import Finding, findings
from megatron_sead.html_report.run_directory import Run
from megatron_sead.html_report.summary import AccuracyTable, accuracy_tables, facts
from megatron_sead.html_report.tables import (
    Table,
    all_settings,
    as_csv,
    as_latex,
    as_markdown,
    differences_from_defaults,
    differing_settings,
    plan_beside_measured,
    starts,
)
from megatron_sead.html_report.token_figures import Records, read_records, token_figures
from megatron_sead.html_report.token_view import MOST_BYTES, token_view
from megatron_sead.wording import counted

MARKER = "megatron_sead report"  # in the head of every report: only a file with it is written over
MOST_NAMES = 5  # of runs, in a remark
ASSETS = files("megatron_sead.html_report") / "assets"
GROUPS = (
    (
        "learning-figures",
        "Learning",
        ("learning", "divergences", "divergences-by-zone", "entropies", "entropies-by-zone"),
    ),
    ("token-figures", "Which tokens teach", ("mass", "sorted-divergence", "joint-entropy", "overlap")),
    ("course", "How it went", ("curriculum", "open-prompts", "loss", "stopping", "lengths", "mismatch")),
    ("cost", "Time and memory", ("seconds", "speed", "memory")),
)


@dataclass
class Sheet:
    """A box of the summary."""

    title: str
    facts: list[tuple[str, str]]


@dataclass
class Part:
    """A section of tables."""

    id: str
    title: str
    tables: list[Table]
    text: str = ""
    copies: list[tuple[str, str]] = field(default_factory=list)  # for copying: name and text


@dataclass
class FigureGroup:
    """A section of figures."""

    id: str
    title: str
    figures: list[Figure]


@dataclass
class Page:
    """All that the template shows."""

    title: str
    subtitle: str
    remarks: list[str] = field(default_factory=list)
    sheets: list[Sheet] = field(default_factory=list)
    accuracies: list[AccuracyTable] = field(default_factory=list)
    tables: list[Part] = field(default_factory=list)
    findings: list[tuple[str, Finding]] = field(default_factory=list)  # of a run
    figure_groups: list[FigureGroup] = field(default_factory=list)
    rollouts: dict[str, Any] | None = None
    rollouts_note: str = ""
    appendices: list[Part] = field(default_factory=list)
    several: bool = False

    @property
    def figures(self) -> list[Figure]:
        """In order."""
        return [figure for group in self.figure_groups for figure in group.figures]

    @property
    def figure_ids(self) -> set[str]:
        """What a rule may point to."""
        return {figure.id for figure in self.figures}

    @property
    def sections(self) -> list[tuple[str, str]]:
        """Of the navigation: id and name."""
        found = [("summary", "Summary")] if self.sheets or self.remarks else []
        found += [(part.id, part.title) for part in self.tables]
        found += [("findings", "What looks wrong")] if self.findings else []
        found += [(group.id, group.title) for group in self.figure_groups]
        found += [("rollouts", "Rollouts")] if self.rollouts else []
        return found + [(part.id, part.title) for part in self.appendices]


def report(runs: Sequence[Run]) -> str:
    """The HTML of one run, or of several."""
    return render(page_of(runs[0]) if len(runs) == 1 else page_of_several(runs))


def page_of(run: Run) -> Page:
    """One run, whole."""
    records = read_records(run)
    figures = {figure.id: figure for figure in [draw(run) for draw in FIGURES] + token_figures(run, records)}
    page = Page(run.name, _subtitle(run), remarks=run.remarks)
    page.sheets = [Sheet("What was run", facts(run))]
    page.accuracies = accuracy_tables(run)
    page.findings = [(run.name, finding) for finding in findings(run)]
    page.figure_groups = [FigureGroup(name, title, [figures[i] for i in ids]) for name, title, ids in GROUPS]
    _add_rollouts(page, [(run, records)])
    measured = plan_beside_measured(run)
    page.appendices = [Part("settings", "Settings", [differences_from_defaults(run), all_settings(run)])]
    page.appendices.append(Part("machine", "Machine", [starts(run), *([measured] if measured else [])]))
    return page


def page_of_several(runs: Sequence[Run]) -> Page:
    """Several, beside each other."""
    compared = comparison.compare(runs)
    page = Page(f"{counted(len(runs), 'run')} compared", "; ".join(compared.groups), several=True)
    page.remarks = _remarks_of(runs) + compared.remarks
    page.tables = [
        Part(
            "methods",
            "Methods",
            [compared.table, *compared.tables],
            compared.text,
            [(f"As {name}", write(compared.table)) for name, write in COPIES],
        )
    ]
    page.findings = [(run.name, f) for run in runs for f in findings(run) if f.verdict == "look"]
    page.figure_groups = [FigureGroup("curves", "Learning curves", compared.figures)]
    _add_rollouts(page, [(run, read_records(run)) for run in runs])
    page.appendices = [
        Part("settings", "Settings", [differing_settings(compared.groups), *_settings_of(compared.groups)])
    ]
    return page


def _remarks_of(runs: Sequence[Run]) -> list[str]:
    """Each remark once, with the runs that it is about."""
    about: dict[str, list[str]] = {}
    for run in runs:
        for remark in run.remarks:
            about.setdefault(remark, []).append(run.name)
    return [
        f"{'Every run' if len(names) == len(runs) else _listed(names)}: {remark}" for remark, names in about.items()
    ]


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMES
    return ", ".join(names) if more <= 1 else f"{', '.join(names[:MOST_NAMES])} and {more} others"


COPIES = (("Markdown", as_markdown), ("LaTeX", as_latex), ("CSV", as_csv))


def _settings_of(groups: Mapping[str, Sequence[Run]]) -> list[Table]:
    """All of each group's, which its first run stands for."""
    found = []
    for name, (run, *_) in groups.items():
        table = all_settings(run)
        found.append(Table(f"{name}: {table.name}", table.head, table.rows, folded=True))
    return found


def _subtitle(run: Run) -> str:
    began = [str(start["time"]) for start in run.starts[:1] if "time" in start]
    when = f"begun {began[0].replace('T', ' ')}" if began else "when it began is not recorded"
    state = "finished" if run.finished else "not finished"
    return f"{state}, {when}"


def _add_rollouts(page: Page, found: list[tuple[Run, Records]]) -> None:
    """The token view of all runs together, which share its room."""
    shown: dict[str, Any] = {"rollouts": [], "texts": {}, "recorded": 0}
    for run, records in found:
        view, name = token_view(records, MOST_BYTES // len(found)), run.name if len(found) > 1 else ""
        for rollout in view["rollouts"]:
            rollout["run"] = name
        shown["rollouts"] += view["rollouts"]
        shown["texts"][name] = view["texts"]  # another run may have another tokenizer
        shown["recorded"] += view["recorded"]
    if shown["rollouts"]:
        count = len(shown["rollouts"])
        page.rollouts = shown
        page.rollouts_note = (
            f"{counted(count, 'rollout')}, sampled over the run"
            + (
                f" (of {shown['recorded']} recorded: the file has room for no more)"
                if count < shown["recorded"]
                else ""
            )
            + ". Every token has its zone, both models' entropies and likeliest alternatives, both divergences, and "
            "the weights with which it taught; where the method has no zones, its weights say what taught."
        )


def render(page: Page) -> str:
    """The whole file."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_asset("page.html.jinja"))
    figures = {figure.id: figure.data() for figure in page.figures if not figure.empty}
    return template.render(
        page=page,
        marker=MARKER,
        version=__version__,
        css=_asset("page.css"),
        plotly=_asset("plotly-basic.min.js") if figures else "",
        plots_js=_asset("plots.js"),
        rollouts_js=_asset("rollouts.js") if page.rollouts else "",
        figures=json_in_html(figures),
        rollouts=json_in_html(page.rollouts),
    )


def json_in_html(value: Any) -> str:
    """JSON that may stand in a script element: nothing in it ends the element or begins another, and half characters
    and line separators stand as escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
