"""Where in a directory the checkpoint is that a user means. No Megatron: finding one loads nothing."""

from __future__ import annotations

from pathlib import Path

from megatron_sead.checkpoints.manifest import FILE_NAME, STEP, Damage, read_manifest
from megatron_sead.errors import ArgumentError, UserError
from megatron_sead.files.names import no_directory


def find_checkpoint(directory: Path, iteration: int | None = None) -> Path:
    """The checkpoint that `directory` is or holds: converted, a step's folder, a run, or a run's ``checkpoints``.

    Args:
        iteration: step to take; None: the latest that is whole.

    Raises:
        UserError: there is none, or not at that step, or none is whole.
    """
    if not directory.is_dir():
        raise UserError(f"{directory}: {no_directory(directory)}")
    if (directory / "metadata.json").exists():
        match = STEP.fullmatch(directory.absolute().name)
        if iteration is not None and iteration != (int(match[1]) if match else 0):
            raise ArgumentError(
                "iteration", iteration, f"{directory} is one checkpoint; give its run's directory instead"
            )
        if (directory / FILE_NAME).exists() and (problem := _incomplete(directory)):
            raise UserError(f"{directory}: not a whole checkpoint: {problem}")
        return directory
    folder = directory / "checkpoints" if (directory / "checkpoints").is_dir() else directory
    steps = {int(match[1]): path for path in folder.iterdir() if (match := STEP.fullmatch(path.name))}
    if not steps:
        raise UserError(
            f"{directory}: holds no checkpoint; must be a Megatron-Core distributed checkpoint (with metadata.json), "
            "or a training run's directory"
        )
    if iteration is not None and iteration not in steps:
        there = ", ".join(map(str, sorted(steps)))
        raise ArgumentError("iteration", iteration, f"{folder} holds none of that step; there are {there}")
    wanted = sorted(steps, reverse=True) if iteration is None else [iteration]
    problems = []
    for step in wanted:
        problem = _incomplete(steps[step])
        if problem is None:
            return steps[step]
        problems.append(f"{steps[step].name}: {problem}")
    raise UserError(f"{folder}: no whole checkpoint ({'; '.join(problems)})")


def _incomplete(directory: Path) -> str | None:
    """Why a run's checkpoint is not whole, by its manifest; sizes alone, contents are checked as they are read."""
    try:
        manifest = read_manifest(directory)
    except Damage as damage:
        return str(damage)
    for name, (size, _) in manifest.files.items():
        path = directory / name
        if not path.exists() or path.stat().st_size != size:
            return f"{name} is missing or has not {size:,} bytes"
    return None
