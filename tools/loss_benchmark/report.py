"""Results as a table on the terminal, as markdown, as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HEADER = (
    "implementation",
    "computes",
    "median ms",
    "least ms",
    "÷ floor",
    "peak, units",
    "scratch MB",
    "collectives",
    "gradient error",
    "of ceiling",
)
NOTES = (
    "A step is forward and backward of the sum over all tokens. Times: the slower rank's, over interleaved rounds; "
    "÷ floor compares medians.",
    "Floors: over the logits, a copy of both shards (into at most 2,048 rows, written again and again); fused, the "
    "four matrix products of the tokens that have a weight, at most 2,048 at a time. Into memory that exists already.",
    "One unit is one fp32 [tokens, vocabulary / TP] tensor. Peak: resident memory of the whole process beyond what was "
    "there before the call (on CUDA: the allocator's), gradients included; scratch is the peak without the gradients.",
    "Gradient error: relative 2-norm against fp64 on the same inputs and of the same function, all ranks' shards; the "
    "worse of hidden states and head in the fused form.",
    "Of ceiling (CUDA): bytes that must move (both shards read twice, the gradient written) or operations of the four "
    "products, a second, over those of a large copy or a large bf16 product measured in the same run.",
)


def header(result: dict[str, Any]) -> tuple[str, ...]:
    """Columns; the last only where ceilings were measured."""
    return HEADER if "ceilings" in result else HEADER[:-1]


def group_title(case: dict[str, Any]) -> str:
    """Of the rows that were measured on the same tensors."""
    shape = f"T = {case['tokens']:,}, V = {case['vocab']:,}" + (
        f", h = {case['hidden']:,}" if case["form"] == "fused" else ""
    )
    share = f", {case['share']:.0%} of the tokens active" if case["form"] == "fused" else ""
    return f"{case['form']}, {case['dtype']}, TP {case['tp']}, {shape}{share}"


def groups(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows by case, in order."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(group_title(row["case"]), []).append(row)
    return found


def cells(row: dict[str, Any]) -> list[str]:
    """One row of the table; what was not measured is blank, and a reason stands in the place of the numbers."""
    if "reason" in row and "median_seconds" not in row:
        return [row["name"], row["computes"], row["reason"], *[""] * (len(HEADER) - 3)]

    def shown(key: str, form: str, scale: float = 1.0) -> str:
        return form.format(row[key] * scale) if row.get(key) is not None else ""

    error = "not finite" if row.get("gradient_error", 0) is None else shown("gradient_error", "{:.1e}")
    return [
        row["name"],
        row["computes"],
        shown("median_seconds", "{:.1f}", 1e3),
        shown("min_seconds", "{:.1f}", 1e3),
        shown("over_floor", "{:.2f}"),
        shown("peak_units", "{:.2f}"),
        shown("scratch_bytes", "{:,.0f}", 1e-6),
        shown("collectives", "{:d}", 1),
        error,
        shown("of_ceiling", "{:.0%}"),
    ]


def print_tables(result: dict[str, Any], console: Console) -> None:
    """A table for each case, all with the same columns."""
    for title, rows in groups(result["rows"]).items():
        table = Table(*header(result), title=title, title_justify="left", title_style="bold")
        for column in table.columns[2:]:
            column.justify = "right"
        for row in rows:
            table.add_row(*cells(row)[: len(table.columns)])
        console.print(table)
    for line in absences(result):
        console.print(line, style="dim")


def absences(result: dict[str, Any]) -> list[str]:
    """One line for everything that is not in the tables."""
    return [f"absent: {name}: {reason}" for name, reason in result["absent"].items()]


def markdown(result: dict[str, Any]) -> str:
    """The same with what it depends on."""
    m = result["machine"]
    columns = header(result)
    lines = [
        "# The loss, beside its peers and the floors",
        "",
        f"{result['date']}, {m['device']}, {m['cores']} cores used, load {m['load_average_15_minutes']}. "
        + ", ".join(f"{name} {value}" for name, value in result["versions"].items())
        + ".",
        "",
        *(f"- {note}" for note in NOTES),
        *(f"- {line}" for line in absences(result)),
        f"- `{result['command']}`",
    ]
    for title, rows in groups(result["rows"]).items():
        lines += ["", f"## {title}", ""]
        for row in (columns, ["---", "---", *["---:"] * (len(columns) - 2)], *map(cells, rows)):
            lines.append("| " + " | ".join(row[: len(columns)]) + " |")
    return "\n".join([*lines, ""])


def plot(result: dict[str, Any], path: Path) -> None:
    """Times over the floor's and peaks, against tokens: a column for each form and TP, the first dtype, all active."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtype = result["settings"]["dtypes"][0]
    rows = [row for row in result["rows"] if row["case"]["dtype"] == dtype and row["case"]["share"] == 1]
    columns = list(dict.fromkeys((row["case"]["form"], row["case"]["tp"]) for row in rows))
    figure, axes = pyplot.subplots(2, max(1, len(columns)), figsize=(4.5 * max(1, len(columns)), 8), squeeze=False)
    names = list(dict.fromkeys(row["name"] for row in rows))
    losses = [name for name in names if not name.startswith("floor")]
    colours = {name: pyplot.get_cmap("tab20").colors[2 * number % 19] for number, name in enumerate(losses)}
    for column, (form, tp) in enumerate(columns):
        own = [row for row in rows if (row["case"]["form"], row["case"]["tp"]) == (form, tp)]
        for axis, key, label in zip(
            axes[:, column], ("over_floor", "peak_units"), ("time ÷ floor", "peak, fp32 [T, V/tp] tensors"), strict=True
        ):
            for name in names:
                points = [(row["case"]["tokens"], row[key]) for row in own if row["name"] == name and row.get(key)]
                if points:
                    style = {"color": colours[name]} if name in colours else {"color": "black", "linestyle": "--"}
                    axis.plot(*zip(*points, strict=True), marker="o", label=name, **style)
            axis.set(xscale="log", yscale="log", xlabel="tokens", title=f"{form}, {dtype}, TP {tp}")
            axis.set_ylabel(label if column == 0 else "")
            axis.grid(alpha=0.3)
        if axes[0, column].get_legend_handles_labels()[0]:
            axes[0, column].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
