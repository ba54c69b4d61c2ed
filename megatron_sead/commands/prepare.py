"""A training file of a released set: ``sead prepare --input FILE_OR_HUB_NAME --output FILE.jsonl [key=value ...]``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_sead.commands.cli import App, expand_argument, one_line_errors
from megatron_sead.errors import ArgumentError
from megatron_sead.files.durable import refused_by_the_disk
from megatron_sead.launch.ownership import sole_owner

app = App()


@app.command()
def main(
    source: Annotated[
        str, typer.Option("--input", help="prompt file (JSONL, JSON, parquet), a folder of such, or hub data set")
    ],
    output: Annotated[Path, typer.Option(help="JSONL file to write; beside it what was dropped, and provenance")],
    benchmarks: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE ...", help="sets that must not be trained on: files, or hub data sets (split test)"),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Hugging Face directory whose tokens are counted; longer prompts are dropped")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="key=value ...",
            help="of the prompts group, as answer_field=reward_model.ground_truth or max_prompt_tokens=2048; "
            "drop_instruction, benchmark_field, overlap_ngram, overlap_share",
        ),
    ] = None,
) -> None:
    """Leave out duplicates, rows without a usable answer, benchmark problems, and prompts that are too long."""
    with one_line_errors():
        from megatron_sead.preparation.prepare import prepare
        from megatron_sead.preparation.settings import load_prepare_settings

        given = overrides or []
        # The shell has expanded a pattern: what follows --benchmarks and is no setting is a benchmark, too
        held_out = [*(benchmarks or []), *(text for text in given if benchmarks and "=" not in text)]
        settings = load_prepare_settings(source, model, [text for text in given if "=" in text or not benchmarks])
        if output.suffix.lower() in (".parquet", ".json"):
            raise ArgumentError("output", output, "JSON lines are written; choose a name in .jsonl")
        try:
            with (
                refused_by_the_disk(lambda reason: ArgumentError("output", output, reason)),
                sole_owner(output.with_name(f"{output.name}.lock"), f"--output={output}"),
            ):
                prepare(settings, [str(expand_argument(path)) for path in held_out], output)
        except KeyboardInterrupt:
            print("interrupted; nothing was written, and the same command starts anew", file=sys.stderr)
            raise typer.Exit(130) from None
