"""Time and memory of conversion at full size: ``python tools/benchmark_conversion.py --workdir DIR --write FILE``.

Makes a random model of a shape, converts it there and back, each beside ``cp`` of the same bytes to the same disk, in
alternating rounds; all are flushed (fsync), and both read their input from the disk. The way back must give the bytes
that were there.
"""

from __future__ import annotations

import filecmp
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from megatron_sead.commands.cli import App, one_line_errors
from megatron_sead.commands.conversion_console import prepare_megatron
from megatron_sead.files.durable import flush_file
from megatron_sead.files.outputs import require_free

ROOT = Path(__file__).parents[1]
COMMAND = Path(__file__).with_name("convert_checkpoint.py")


@dataclass
class Measured:
    """Of one round and direction."""

    direction: str
    seconds: float  # the whole command, start of Python included
    copy_seconds: float
    peak_gb: float  # resident memory of the command
    gb: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.copy_seconds


def main(
    workdir: Annotated[Path, typer.Option(help="on the disk to measure; needs three times the model")],
    shape: Annotated[Path, typer.Option(help="directory with a config.json")] = ROOT / "examples/shapes/olmo3-7b",
    layers: Annotated[int | None, typer.Option(min=1, help="fewer than the shape has")] = None,
    rounds: Annotated[int, typer.Option(min=1)] = 2,
    write: Annotated[Path | None, typer.Option(help="new files: WRITE.json and WRITE.md")] = None,
) -> None:
    """Measure, print, and write the figures with the machine."""
    with one_line_errors():
        for suffix in (".md", ".json") if write is not None else ():
            require_free(write.with_suffix(suffix))
    with one_line_errors(), tempfile.TemporaryDirectory(dir=workdir, prefix="conversion-") as folder:
        source, middle, back = (Path(folder) / name for name in ("hf", "megatron", "back"))
        # in a process of its own: the system would count this one's memory as that of the commands that it starts
        maker = multiprocessing.get_context("spawn").Process(target=make_model, args=(shape, source, layers))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise RuntimeError(f"the model was not made: exit code {maker.exitcode}")
        measured = []
        for _ in range(rounds):
            measured.append(measure("hf-to-megatron", source, middle))
            measured.append(measure("megatron-to-hf", middle, back))
            for path in sorted(source.glob("*.safetensors")):
                assert filecmp.cmp(path, back / path.name, shallow=False), f"{path.name} came back with other bytes"
            shutil.rmtree(middle)
            shutil.rmtree(back)
    report(measured, f"{shape.name}, {layers or 'all'} layers", write)


def make_model(shape: Path, directory: Path, layers: int | None) -> None:
    """A model directory of this configuration with random bf16 weights."""
    prepare_megatron()
    from true_shapes.model import write_weights

    directory.mkdir()
    config = json.loads((shape / "config.json").read_text())
    if layers is not None:
        config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (directory / "config.json").write_text(json.dumps(config))
    write_weights(directory)


def measure(direction: str, source: Path, output: Path) -> Measured:
    copied = output.with_name("copied")
    flush(source, forget=True)
    began = time.perf_counter()
    subprocess.run(["cp", "-r", source, copied], check=True)
    flush(copied)
    copy_seconds = time.perf_counter() - began
    shutil.rmtree(copied)
    flush(source, forget=True)
    began = time.perf_counter()
    command = [sys.executable, COMMAND, direction, "--input", source, "--output", output]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    if status:
        raise RuntimeError(f"{direction} failed with status {os.waitstatus_to_exitcode(status)}")
    size = sum(path.stat().st_size for path in source.iterdir())
    return Measured(direction, seconds, copy_seconds, peak(usage), size / 1e9)


def flush(directory: Path, *, forget: bool = False) -> None:
    for path in directory.iterdir():
        flush_file(path, forget=forget)  # what one reader left in memory must not help the next


def peak(usage: resource.struct_rusage) -> float:
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def report(measured: list[Measured], what: str, write: Path | None) -> None:
    lines = ["| direction | GB | seconds | cp + fsync | ratio | peak memory, GB |", "|---|---|---|---|---|---|"]
    for m in measured:
        lines.append(
            f"| {m.direction} | {m.gb:.1f} | {m.seconds:.1f} | {m.copy_seconds:.1f} | {m.ratio:.2f} | {m.peak_gb:.2f} |"
        )
    versions = {name: version(name) for name in ("torch", "megatron-core")}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions}
    Console().print("\n".join(lines), markup=False)
    if write is not None:
        about = {"model": what, "date": date.today().isoformat(), "machine": machine}
        write.with_suffix(".json").write_text(json.dumps(about | {"rounds": [asdict(m) for m in measured]}, indent=1))
        heading = f"# Conversion\n\n{what}, bf16; {json.dumps(machine)}; {about['date']}. Rounds in their order.\n\n"
        write.with_suffix(".md").write_text(heading + "\n".join(lines) + "\n")


if __name__ == "__main__":
    app = App()
    app.command()(main)
    app()
