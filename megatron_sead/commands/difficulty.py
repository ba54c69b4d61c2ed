"""How hard each prompt is for a model: ``sead difficulty --model DIR --prompts FILE --output FILE``, or with the
settings of a training run ``sead difficulty --config RUN.yaml --output FILE``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.errors import ArgumentError
from megatron_sead.files.durable import DISK_REFUSES
from megatron_sead.files.outputs import require_free
from megatron_sead.launch.ownership import sole_owner

app = App()


@app.command()
def main(
    output: Annotated[Path, typer.Option(help="JSONL file to write: the prompts, each with its difficulty")],
    model: Annotated[Path | None, typer.Option(help="Hugging Face directory of the initial student")] = None,
    prompts: Annotated[str | None, typer.Option(help="prompt file or hub data set")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file: a training run's, or one with model, prompts, rollouts, samples, ..."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value ...", help="as samples=8 or rollouts.temperature=0.7")
    ] = None,
) -> None:
    """Write K rollouts a prompt, grade them, and store 1 - pass rate beside each prompt. Resumes where it stopped."""
    with one_line_errors():
        from megatron_sead.evaluation.difficulty import estimate, load_estimate_settings, partial_path

        given = [f"model.path={model}"] if model is not None else []
        given += [f"prompts.path={prompts}"] if prompts is not None else []
        settings = load_estimate_settings(config, given + (overrides or []))
        require_free(output)
        if output.suffix.lower() == ".parquet":
            raise ArgumentError("output", output, "JSON lines are written, not parquet; choose a name in .jsonl")
        try:
            with sole_owner(output.with_name(f"{output.name}.lock"), f"--output={output}"):
                estimate(settings, output)
        except KeyboardInterrupt:
            print(f"interrupted; the same command continues from {partial_path(output)}", file=sys.stderr)
            raise typer.Exit(130) from None
        except OSError as error:
            if error.errno not in DISK_REFUSES:
                raise
            reason = f"cannot be written ({error.filename}): {error.strerror}"
            raise ArgumentError("output", output, reason) from error
