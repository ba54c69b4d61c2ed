"""How hard each prompt is for a model: ``sead difficulty --model DIR --prompts FILE --output FILE``, or with the
settings of a training run ``sead difficulty --config RUN.yaml --output FILE``.

On several GPUs with ``--nproc-per-node N``, or as ranks of ``sead launch ... tools/estimate_difficulty.py ...``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_sead.commands.cli import App
from megatron_sead.commands.measuring import RANKS_HELP, measuring, told_in_one_line
from megatron_sead.commands.ranks import start_ranks
from megatron_sead.errors import ArgumentError
from megatron_sead.files.outputs import require_free

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
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help=RANKS_HELP)] = None,
) -> None:
    """Write K rollouts a prompt, grade them, and store 1 - pass rate beside each prompt. Resumes where it stopped."""
    with told_in_one_line():
        from megatron_sead.evaluation.difficulty import answers_path, estimate, load_estimate_settings

        given = [f"model.path={model}"] if model is not None else []
        given += [f"prompts.path={prompts}"] if prompts is not None else []
        given += overrides or []
        settings = load_estimate_settings(config, given)
        require_free(output)
        if output.suffix.lower() == ".parquet":
            raise ArgumentError("output", output, "JSON lines are written, not parquet; choose a name in .jsonl")
        if nproc_per_node is not None:
            options = ["--output", str(output)] + ([] if config is None else ["--config", str(config)])
            start_ranks(nproc_per_node, "megatron_sead.commands.sead", ["difficulty", *options, "--", *given])
        lock = output.with_name(f"{output.name}.lock")
        with measuring(settings.device, output, lock, answers_path(output)) as ranks:
            estimate(settings, output, ranks)
