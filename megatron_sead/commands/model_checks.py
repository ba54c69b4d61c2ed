"""Commands of ``sead convert`` that look at models: verify, roundtrip, inspect, truncate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.commands.conversion_console import prepare_megatron, progress_bar
from megatron_sead.wording import counted

if TYPE_CHECKING:
    from megatron_sead.checkpoints.inspection import Inspection
    from megatron_sead.checkpoints.layerwise import Agreement
    from megatron_sead.checkpoints.verification import TensorComparison

DIFFERENT = 1  # exit code: both models were read, and they are not the same
LISTED = 20  # tensors that differ, named one by one

checks = App()


@checks.command()
def verify(
    hf: Annotated[Path, typer.Option(help="Hugging Face directory")],
    megatron: Annotated[Path, typer.Option(help="converted checkpoint, or a training run's directory")],
    tokens: Annotated[
        int | None,
        typer.Option(min=0, help="of text; 0: compare tensors alone (default: past the window and YaRN's length)"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 file (default: Python's own documentation)")] = None,
    iteration: Annotated[int | None, typer.Option(help="step of a run (default: the latest that is whole)")] = None,
) -> None:
    """Is the Megatron checkpoint the same model as the Hugging Face directory? Exit code 0: yes, 1: no.

    Every tensor is compared by SHA-256. Then both models read a text, transformers' own and ours, in fp32 and layer
    by layer, so that memory holds one layer; it must be longer than the sliding window and than YaRN's original length.

    What the numbers look like: a random model, 8 layers of width 512 in bf16, window 64, YaRN from 256, 512 tokens.
    Number of tensors that differ; states of the first layer that does (of the worst, where none does);
    log-probabilities, largest difference and mean.

    \b
    checkpoint                  tensors  states   log-probabilities
    the same model              0        7.7e-07  1.4e-06  2.4e-07
    window off by one           0        2.5e-01  4.3e-01  4.1e-02
    YaRN on no layer            0        1.5e-01  3.1e-01  5.3e-02
    YaRN on every layer         0        6.3e-01  1.4e+00  2.0e-01
    a layer's q and k swapped   2        4.6e-01  8.9e-01  1.4e-01
    its gate and up swapped     2        4.4e-01  9.4e-01  1.7e-01
    a bit of an exponent        1        3.1e-01  6.7e-01  1.1e-01
    a weight's lowest bit       1        2.1e-05  2.6e-05  1.4e-06

    So the hash alone shows a small change of a weight, and the text alone a wrong reading of the configuration.
    """
    with one_line_errors():
        prepare_megatron()
        from megatron_sead.checkpoints.finding import find_checkpoint
        from megatron_sead.checkpoints.layerwise import compare_on_text, read_tokens
        from megatron_sead.checkpoints.model_files import HuggingFaceModel, MegatronModel
        from megatron_sead.checkpoints.verification import compare_tensors, meaning_differences
        from megatron_sead.config.parallel import ParallelSettings
        from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

        with HuggingFaceModel(hf) as ours, MegatronModel(find_checkpoint(megatron, iteration)) as theirs:
            probe = None if tokens == 0 else read_tokens(ours, tokens, text)
            config = meaning_differences(ours.source, theirs.source)
            for line in config:
                print(f"config: {line}")
            if ours.shapes != theirs.shapes:
                print("not the same model: other shapes, tensors cannot be compared")
                sys.exit(DIFFERENT)
            with progress_bar("tensors") as advance:
                comparison = compare_tensors(ours, theirs, advance)
            same = tell_tensors(comparison) and not config
            if probe is not None:
                parallel = initialize_parallel(ParallelSettings(), "cpu", seed=0)
                try:
                    with progress_bar("text") as advance:
                        agreement = compare_on_text(ours, theirs, probe, parallel, advance)
                finally:
                    destroy_parallel()
                same = tell_agreement(agreement) and same
        print("the same model" if same else "not the same model")
        sys.exit(0 if same else DIFFERENT)


@checks.command()
def roundtrip(
    source: Annotated[Path, typer.Option("--input", help="Hugging Face directory")],
    workdir: Annotated[
        Path | None, typer.Option(help="for two copies of the model, deleted afterwards (default: beside the input)")
    ] = None,
) -> None:
    """To Megatron's format and back, and every bit compared. Exit code 0: all are the same, 1: not."""
    with one_line_errors():
        prepare_megatron()
        from megatron_sead.checkpoints.verification import round_trip

        with progress_bar("roundtrip") as advance:
            trip = round_trip(source, workdir, advance)
        compared = trip.tensors
        table = plain_table("", "compared", "different", "seconds")
        table.add_row("to Megatron", "", "", f"{trip.outward_seconds:.1f}")
        table.add_row("back", "", "", f"{trip.back_seconds:.1f}")
        table.add_row("tensors", f"{compared.tensors} ({decimal(compared.bytes)})", str(len(compared.differences)), "")
        table.add_row("config.json", "by meaning", str(len(trip.config)), "")
        files = len(trip.companions) + len(trip.damaged_companions)
        table.add_row("other files", str(files), str(len(trip.damaged_companions)), "")
        print_table(table)
        lines = [*map(str, compared.differences), *(f"config: {line}" for line in trip.config)]
        for line in [*lines, *(f"{name}: is missing or has changed" for name in trip.damaged_companions)]:
            print(line)
        print(f"fingerprint {compared.fingerprint}")
        sys.exit(0 if trip.exact else DIFFERENT)


@checks.command()
def inspect(
    directory: Annotated[Path, typer.Argument(help="Hugging Face directory, converted checkpoint, or training run")],
) -> None:
    """What a model is and how it is stored. Reads headers alone."""
    with one_line_errors():
        prepare_megatron()
        from megatron_sead.checkpoints.inspection import inspect_directory

        found = inspect_directory(directory)
        table = Table(show_header=False, box=None, pad_edge=False)
        for name, value in described(found):
            table.add_row(name, value)
        print_table(table)


@checks.command()
def truncate(
    source: Annotated[Path, typer.Option("--input", help="Hugging Face directory")],
    layers: Annotated[int, typer.Option(help="to keep, from the first")],
    output: Annotated[Path, typer.Option(help="directory of the model; appears when it is whole")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace OUTPUT, if all in it is ours")] = False,
) -> None:
    """The first layers with embedding, norm and head, bytes unchanged: a small model to try a cluster with."""
    with one_line_errors():
        prepare_megatron()
        from megatron_sead.checkpoints.truncation import truncate as write_truncated

        with progress_bar("truncate") as advance:
            parameters = write_truncated(source, output, layers=layers, overwrite=overwrite, advance=advance)
        print(f"{output}: {counted(layers, 'layer')}, {parameters:,} parameters")


def tell_tensors(comparison: TensorComparison) -> bool:
    """Print it. True: no tensor differs."""
    for difference in comparison.differences[:LISTED]:
        print(difference)
    if len(comparison.differences) > LISTED:
        print(f"... and {len(comparison.differences) - LISTED} more")
    if comparison.rounded:
        print(f"dtypes differ: {comparison.rounded[0]} was converted to {comparison.rounded[1]} to be compared")
    same = comparison.tensors - len(comparison.differences)
    print(f"tensors: {same} of {comparison.tensors} the same, bit for bit ({decimal(comparison.bytes)})")
    print(f"fingerprint of the Hugging Face directory: {comparison.fingerprint}")
    return not comparison.differences


def tell_agreement(agreement: Agreement) -> bool:
    """Print it. True: the models agree as well as arithmetic allows."""
    table = plain_table("hidden states after", "largest difference, relative")
    for stage in agreement.stages:
        table.add_row(stage.name, f"{stage.difference:.1e}")
    print_table(table)
    print(
        f"log-probabilities, {agreement.tokens} tokens x vocabulary: largest difference {agreement.largest:.1e}, "
        f"mean {agreement.mean:.1e}; of the text itself on average {agreement.text[0]:.5f} (transformers) and "
        f"{agreement.text[1]:.5f} (Megatron)"
    )
    if agreement.first_wrong:
        print(f"the first that differs: {agreement.first_wrong}")
    return agreement.same


def described(found: Inspection) -> list[tuple[str, str]]:
    config = found.config
    lines = [
        ("directory", str(found.directory)),
        ("format", found.format),
        ("architecture", found.architecture),
        ("parameters", f"{found.parameters:,}"),
        ("dtype", ", ".join(found.dtypes)),
        ("hidden / feed-forward", f"{config.hidden_size} / {config.ffn_hidden_size}"),
        ("heads / KV heads", f"{config.num_attention_heads} / {config.num_query_groups}, of {config.kv_channels}"),
        ("vocabulary", f"{config.vocab_size}, padded to {config.padded_vocab_size} in Megatron"),
        *found.described,
        ("longest text", f"{config.max_position_embeddings} tokens"),
        ("TP sizes", f"{', '.join(map(str, found.tensor_parallel_sizes))}: {found.tensor_parallel_limit}"),
        ("weights", f"{decimal(found.weight_bytes)}, files: {len(found.files)}"),
        ("on disk", f"{decimal(found.disk_bytes)}{', optimizer included' if found.holds_optimizer else ''}"),
    ]
    if found.step is not None:
        lines.append(("training step", f"{found.step}, of {', '.join(map(str, found.steps))} on disk"))
    if found.megatron_core is not None:
        lines.append(("megatron-core", f"format of {found.megatron_core}"))
    if found.layout is not None and found.step is not None:
        lines.append(("written under", ", ".join(f"{name} {size}" for name, size in found.layout.items())))
    return lines


def plain_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def print_table(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else 160, highlight=False).print(table)
