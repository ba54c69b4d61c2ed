"""Models between Hugging Face's format and Megatron-Core's: ``sead convert COMMAND --help``.

Tensors stream from one format to the other: less than a gigabyte of memory does for 32B, and no GPU is used.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from megatron_sead.commands.cli import App, expand_argument, one_line_errors
from megatron_sead.commands.conversion_console import prepare_megatron, progress_bar
from megatron_sead.commands.model_checks import checks
from megatron_sead.errors import ArgumentError
from megatron_sead.files.names import no_directory
from megatron_sead.files.outputs import require_apart
from megatron_sead.reporting.machine import peak_resident
from megatron_sead.wording import counted, first_of

if TYPE_CHECKING:
    from megatron_sead.checkpoints.conversion import Conversion

app = App(no_args_is_help=True, help=__doc__)
app.add_typer(checks)

Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace OUTPUT, if all in it is ours")]


class Dtype(StrEnum):
    bf16 = "bf16"
    fp32 = "fp32"


@app.command()
def hf_to_megatron(
    source: Annotated[str, typer.Option("--input", help="Hugging Face directory, or a model's name on the hub")],
    output: Annotated[Path, typer.Option(help="directory of the checkpoint; appears when it is whole")],
    dtype: Annotated[Dtype | None, typer.Option(help="of the checkpoint (default: as the input)")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a Megatron-Core distributed checkpoint (torch_dist) that loads under any TP x PP x VPP x SP layout.

    The configuration, tokenizer and chat template lie beside it. Megatron-Core 0.16 and newer read it.
    """
    with one_line_errors():
        prepare_megatron()
        from megatron_sead.checkpoints.conversion import huggingface_to_megatron
        from megatron_sead.models.builder import DTYPES

        chosen = None if dtype is None else DTYPES[dtype.value]
        directory = local_directory(source)
        with progress_bar("hf-to-megatron") as advance:
            began = time.monotonic()
            done = huggingface_to_megatron(directory, output, dtype=chosen, overwrite=overwrite, advance=advance)
        tell(done, output, time.monotonic() - began)


@app.command()
def megatron_to_hf(
    source: Annotated[Path, typer.Option("--input", help="converted checkpoint, or a training run's directory")],
    output: Annotated[Path, typer.Option(help="directory of the model; appears when it is whole")],
    iteration: Annotated[int | None, typer.Option(help="step of a run (default: the latest that is whole)")] = None,
    max_shard_size: Annotated[str, typer.Option(help="of a safetensors file, such as 500MB or 5GB")] = "5GB",
    overwrite: Overwrite = False,
) -> None:
    """Write a complete Hugging Face directory that transformers and vLLM load as it is.

    From a converted checkpoint, or from a run under any layout; of a run's checkpoint, the model's weights alone, with
    the tokenizer, chat template, system prompt and stop tokens of the run.
    """
    with one_line_errors():
        prepare_megatron()
        from megatron_sead.checkpoints.conversion import megatron_to_huggingface
        from megatron_sead.checkpoints.finding import find_checkpoint

        limit = parse_size(max_shard_size)
        require_apart(output, [source])  # a run's directory holds the checkpoint that is read
        checkpoint, told = find_checkpoint(source, iteration), list[str]()
        finish = tokenizer_of_run(checkpoint, output, told)
        with progress_bar("megatron-to-hf") as advance:
            began = time.monotonic()
            done = megatron_to_huggingface(
                checkpoint, output, max_shard_bytes=limit, overwrite=overwrite, advance=advance, finish=finish
            )
        for line in told:
            print(line)
        tell(done, output, time.monotonic() - began)


def tokenizer_of_run(checkpoint: Path, output: Path, told: list[str]) -> Callable[[Path], None] | None:
    """What to do with a written model so that it has the tokenizer and prompts of the run that the checkpoint is of.

    None: the checkpoint is of no run.

    Args:
        told: gets a line for each change.

    Raises:
        UserError: the run's tokenizer or chat template is no longer where it was, or where `output` is.
    """
    from megatron_sead.checkpoints.model_files import find_model_source, recorded_student
    from megatron_sead.prompts.export import export_tokenizer
    from megatron_sead.prompts.tokenizer import load_tokenizer

    student = recorded_student(checkpoint)
    if student is None or find_model_source(checkpoint) != student.path:  # student-hf, which has it all already
        return None
    require_apart(output, [place for place in (student.tokenizer, student.chat_template) if place is not None])
    tokenizer = load_tokenizer(student, "student")
    return lambda directory: told.extend(export_tokenizer(tokenizer, student, directory))


def local_directory(source: str) -> Path:
    """The directory itself, or the hub's model, downloaded: safetensors, configuration and tokenizer alone.

    Raises:
        UserError: no such directory, and no such model on the hub.
    """
    source = str(expand_argument(source))
    if Path(source).is_dir():
        return Path(source)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source) or source.startswith("."):
        reason = f"{no_directory(Path(source))}; it is to be a Hugging Face directory or a hub name, org/model"
        raise ArgumentError("input", source, reason)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"])
        )
    except Exception as error:  # its many errors have no common class, and each means that the model is not to be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        reason = f"no such directory, and the hub does not give it ({reason})"
        raise ArgumentError("input", source, reason) from None


def parse_size(text: str) -> int:
    """Bytes, from 500MB or 5GB.

    Raises:
        UserError: something else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) == 0:
        raise ArgumentError("max_shard_size", text, "must be a size such as 500MB or 5GB")
    return int(float(match[1]) * 1000 ** " KMGT".index(match[2].upper() or " "))


def tell(done: Conversion, output: Path, seconds: float) -> None:
    if done.ignored:
        print(f"left out {counted(len(done.ignored), 'tensor')} that no model needs: {first_of(done.ignored)}")
    for name in done.all_zero:
        print(f"warning: {name} is all zeros in {done.source}", file=sys.stderr)
    print(
        f"{output}: {done.tensors} tensors, {done.parameters:,} parameters in {done.dtype}, {done.bytes / 1e9:.2f} GB, "
        f"{seconds:.1f} s, at most {peak_resident() / 1e9:.2f} GB of memory"
    )
