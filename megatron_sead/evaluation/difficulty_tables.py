"""What a measurement of difficulty found, for a terminal: a histogram, and a table by level or source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from megatron_sead.evaluation.groups import Answers, by_group, groups_of
from megatron_sead.evaluation.statistics import pass_rates, summarize
from megatron_sead.prompts.rows import Row
from megatron_sead.wording import counted

WIDTH = 40  # characters of the longest bar
MOST_BINS = 16  # pass rates of more samples share bins


def print_tables(output: Path, rows: Sequence[Row], level_field: str, answers: Answers) -> None:
    """The histogram, a table for each field that groups the rows, and a line on the whole."""
    console = Console()
    for line in histogram(answers):
        console.print(Text(line))
    for name, values in groups_of(rows, [level_field]).items():
        console.print(_table(name, by_group(values, answers)))
    summary = summarize(answers)
    rates = pass_rates(answers)
    console.print(
        f"{output}: {counted(len(answers), 'prompt')}, mean difficulty {1 - summary.accuracy:.3f}, "
        f"{rates.count(0.0)} never solved, {rates.count(1.0)} always; {summary.truncated:.1%} of answers were cut",
        markup=False,  # a path may hold brackets
        soft_wrap=True,
    )


def histogram(answers: Answers) -> list[str]:
    """How many prompts are how hard, a line a bin: 0 is solved always, 1 never."""
    samples = len(answers[0])
    bins = min(samples, MOST_BINS)
    # The bin i holds difficulties in (i - 1, i] / bins: those that are solved always, 0, have one of their own
    counts = Counter(-(-sum(not answer.correct for answer in of_prompt) * bins // samples) for of_prompt in answers)
    most = max(counts.values())
    lines = ["difficulty  prompts"]
    for i in range(bins + 1):
        bar = "█" * -(-counts[i] * WIDTH // most)
        lines.append(f"{i / bins:>10.3f} {counts[i]:>8,}  {bar}".rstrip())
    return lines


def _table(name: str, groups: dict[str, Answers]) -> Table:
    table = Table(title=f"by {name}", title_justify="left")
    table.add_column(name)
    for column in ("prompts", "difficulty", "never solved", "always", "cut", "tokens"):
        table.add_column(column, justify="right")
    for group, answers in groups.items():
        summary, rates = summarize(answers), pass_rates(answers)
        table.add_row(
            Text(group),
            f"{summary.prompts:,}",
            f"{1 - summary.accuracy:.3f}",
            f"{rates.count(0.0):,}",
            f"{rates.count(1.0):,}",
            f"{summary.truncated:.1%}",
            f"{summary.mean_tokens:,.0f}",
        )
    return table
