"""Tables of settings, versions and starts; and any table as Markdown, LaTeX and CSV, to copy into a paper."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sead.config.run import RunConfig
from megatron_sead.config.settings_file import flatten
from megatron_sead.html_report.figure import told
from megatron_sead.html_report.run_directory import Run, number
from megatron_sead.html_report.summary import duration

TOO_LONG = 200  # characters of a setting's value
IN_LATEX = {c: f"\\{c}" for c in "&%$#_{}"} | {"~": "\\textasciitilde{}", "^": "\\textasciicircum{}"}
IN_LATEX |= {"\\": "\\textbackslash{}", "−": "$-$", "±": "$\\pm$"}
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # which spreadsheets compute


@dataclass(frozen=True)
class Table:
    """Cells as text."""

    name: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    numeric: Sequence[int] = ()  # columns that are numbers
    folded: bool = False
    stack: bool = field(default=True)  # on a narrow screen a row's cells stand below each other


def defaults() -> dict[str, Any]:
    """Every setting's default, by dotted key; of the group that is chosen by default where there are several."""
    schema = RunConfig.model_json_schema()
    return _defaults_of(schema, schema)


def _defaults_of(part: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, described in part.get("properties", {}).items():
        reference = described.get("$ref")
        if "default" in described:
            value = described["default"]
            found |= flatten({name: value}) if isinstance(value, dict) else {name: value}
        elif reference:
            inner = schema["$defs"][reference.rpartition("/")[2]]
            found |= {f"{name}.{key}": value for key, value in _defaults_of(inner, schema).items()}
    return found


def differences_from_defaults(run: Run) -> Table:
    """Settings that are not as they would be if nobody had said anything."""
    usual = defaults()
    rows = [
        (key, value_told(value), value_told(usual[key]) if key in usual else "must be given")
        for key, value in run.settings.items()
        if key not in usual or usual[key] != value
    ]
    return Table("Settings that differ from the defaults", ("setting", "this run", "default"), rows)


def all_settings(run: Run) -> Table:
    """Every one."""
    rows = [(key, value_told(value)) for key, value in run.settings.items()]
    return Table(f"All {len(rows)} settings", ("setting", "value"), rows, folded=True)


def differing_settings(groups: Mapping[str, Sequence[Run]]) -> Table:
    """Those in which runs differ; of a group's runs every value that one has."""
    runs = [run for group in groups.values() for run in group]
    keys = dict.fromkeys(key for run in runs for key in run.settings if key != "output")
    rows = []
    for key in keys:
        values = {
            name: dict.fromkeys(value_told(run.settings[key]) if key in run.settings else "" for run in group)
            for name, group in groups.items()
        }
        if len(set().union(*values.values())) > 1:
            rows.append((key, *(", ".join(of_group) for of_group in values.values())))
    return Table("Settings that differ between the runs", ("setting", *groups), rows)


def value_told(value: Any) -> str:
    """As YAML would have it, cut where it is long."""
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= TOO_LONG else text[:TOO_LONG] + " ..."


def starts(run: Run) -> Table:
    """When, where and how the run was started."""
    rows = []
    for start in run.starts:
        machine = start.get("machine")
        machine = machine if isinstance(machine, dict) else {}
        versions = start.get("versions")
        versions = versions if isinstance(versions, dict) else {}
        place = start.get("gpu") or f"{machine.get('cpu', '')}, {machine.get('cores', '?')} cores"
        named = ", ".join(f"{name} {version}" for name, version in versions.items())
        cells = (start.get("time", ""), start.get("step", ""), f"{start.get('ranks', '?')} x {place}")
        versioned = f"Python {machine.get('python', '?')}, {named}"
        rows.append([*map(str, cells), versioned, str(start.get("command", ""))])
    return Table("Starts", ("time", "from step", "ranks", "versions", "command"), rows)


def plan_beside_measured(run: Run) -> Table | None:
    """What the plan expected, and what was."""
    peak, measured, rows = number(run.of_last_start("plan", "peak_bytes")), run.known("peak_memory"), []
    if peak is not None:
        was = f"{told(max(measured))} GiB" if measured else "not recorded"
        phase = run.of_last_start("plan", "phase")
        rows.append((f"peak memory of the fullest rank ({phase})", f"{told(peak / 2**30)} GiB", was))
    if run.steps and run.known("step_seconds"):
        times = sorted(run.known("step_seconds"))
        rows.append(("a step", "not planned by a dry run", f"{times[len(times) // 2]:.3g} s, median"))
    if run.known("seconds"):
        rows.append(("the whole run", "not planned by a dry run", duration(run.known("seconds")[-1])))
    return Table("Planned and measured", ("quantity", "planned", "measured"), rows) if rows else None


def as_markdown(table: Table) -> str:
    """A pipe table."""
    rows = [table.head, ["---:" if i in table.numeric else "---" for i in range(len(table.head))], *table.rows]
    return "\n".join("| " + " | ".join(_in_markdown(cell) for cell in row) + " |" for row in rows) + "\n"


def _in_markdown(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")


def as_latex(table: Table) -> str:
    """A booktabs table."""
    columns = "".join("r" if i in table.numeric else "l" for i in range(len(table.head)))
    head, *rows = (" & ".join(map(_in_latex, row)) + r" \\" for row in (table.head, *table.rows))
    lines = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *rows, r"\bottomrule"]
    return "\n".join([*lines, r"\end{tabular}"]) + "\n"


def _in_latex(cell: str) -> str:
    return "".join(IN_LATEX.get(character, character) for character in cell.replace("\n", " "))


def as_csv(table: Table) -> str:
    """With a quote before what a spreadsheet would compute, numbers excepted."""
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(
        [_in_csv(cell) for cell in row] for row in (table.head, *table.rows)
    )
    return file.getvalue()


def _in_csv(cell: str) -> str:
    try:
        float(cell)
    except ValueError:
        return f"'{cell}" if cell.startswith(FORMULA_STARTS) else cell
    return cell
