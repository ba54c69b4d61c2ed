"""How often models are right: ``sead evaluate --model DIR --benchmark math500=FILE --output DIR [key=value ...]``.

On several GPUs with ``--nproc-per-node N``, or as ranks of ``sead launch ... tools/evaluate.py ...``.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from megatron_sead.commands.cli import App
from megatron_sead.commands.measuring import RANKS_HELP, measuring, told_in_one_line
from megatron_sead.commands.ranks import start_ranks
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import require_written_here

app = App()
# What tells a process that it is one of torchrun's ranks
RANK_VARIABLE = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|NAME)|MASTER_(ADDR|PORT)|TORCHELASTIC_.*")


@app.command()
def main(
    model: Annotated[
        list[str],
        typer.Option(
            metavar="[LABEL=]PLACE",
            help="Hugging Face directory, or a run's (RUN: its student-hf; RUN@STEP: that checkpoint); several are "
            "compared with the first",
        ),
    ],
    output: Annotated[Path, typer.Option(help="folder for every answer with its grade, and for the results")],
    benchmark: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=PLACE]",
            help="math500, minerva_math, olympiadbench, amc23, aime24, aime25, gsm8k, or NAME=FILE of your own; PLACE "
            "is a file, its folder or a hub data set; default: the first six",
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="folder with a folder a benchmark, as math500/test.jsonl; default: the hub")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file: a training run's, or one with model, rollouts, prompts, ..."),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value ...", help="as rollouts.engine=vllm or limit=20")
    ] = None,
    nproc_per_node: Annotated[int | None, typer.Option(min=1, help=RANKS_HELP)] = None,
) -> None:
    """Ask models benchmarks, keep every answer with its grade, and compare. Resumes where it stopped."""
    with told_in_one_line():
        from megatron_sead.evaluation.benchmarks import choose_benchmarks
        from megatron_sead.evaluation.evaluate import evaluate_models, load_evaluate_settings
        from megatron_sead.evaluation.models import choose_models
        from megatron_sead.evaluation.report import FILES, print_results, tabulate, write_results
        from megatron_sead.files.replaceable import require_replaceable

        models = choose_models(model, output)
        benchmarks = choose_benchmarks(benchmark or [], data)
        settings = load_evaluate_settings(config, overrides or [], models[0].place)
        require_replaceable(output, FILES)
        if nproc_per_node is not None:
            options = {"--model": model, "--benchmark": benchmark, "--output": [output], "--data": [data]}
            options |= {"--config": [config]}
            pairs = [(name, value) for name, values in options.items() for value in values or () if value is not None]
            given = [str(part) for pair in pairs for part in pair]
            start_ranks(nproc_per_node, "megatron_sead.commands.sead", ["evaluate", *given, "--", *(overrides or [])])
        with measuring(settings.device, output, output / "evaluate.lock", output) as ranks:
            outcome = evaluate_models(settings, models, benchmarks, output, ranks, convert)
            if ranks.rank == 0:
                results = tabulate(outcome, benchmarks)
                write_results(results, models, settings, output)
                print_results(results)
                print(f"{output}: {', '.join(FILES)}, and every answer with its grade")
            ranks.on_first(lambda: None)  # the others leave when all is written


def convert(checkpoint: Path, directory: Path) -> None:
    """Write a checkpoint's model as a Hugging Face directory, unless an earlier call has. In a process of its own:
    conversion runs Megatron as on a CPU, and gives its memory back.

    Raises:
        UserError: what `sead convert megatron-to-hf` refuses; something else stands there.
    """
    if directory.exists():
        require_written_here(directory)
        return
    print(f"converting {checkpoint} to {directory}", file=sys.stderr)
    command = [sys.executable, "-m", "megatron_sead.commands.sead", "convert", "megatron-to-hf"]
    command += ["--input", str(checkpoint), "--output", str(directory)]
    alone = {name: value for name, value in os.environ.items() if not RANK_VARIABLE.fullmatch(name)}
    done = subprocess.run(command, env=alone, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["the conversion ended early"]
        raise UserError(f"{checkpoint}: {lines[-1].removeprefix('error: ')}")
