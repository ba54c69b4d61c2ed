"""The models that are evaluated: Hugging Face directories, or steps of a training run, which are converted to one."""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sead.checkpoints.finding import find_checkpoint
from megatron_sead.checkpoints.manifest import FILE_NAME as MANIFEST
from megatron_sead.config.environment import expand_path
from megatron_sead.errors import UserError
from megatron_sead.files.names import no_directory
from megatron_sead.files.outputs import require_apart

LABEL = re.compile(r"[A-Za-z0-9][\w.@-]*", re.ASCII)  # also of a folder
STUDENT = "student-hf"  # a finished run's model


@dataclass(frozen=True)
class Model:
    """A model to evaluate."""

    label: str  # in tables, and of its folder of answers
    place: Path  # as it was given
    checkpoint: Path | None  # of a run, to be converted; None: `place` is a Hugging Face directory

    def directory(self, output: Path) -> Path:
        """Where it is as a Hugging Face directory: of a checkpoint, below the output, named by the checkpoint too."""
        if self.checkpoint is None:
            return self.place
        return output / self.label / f"hf-{self.checkpoint.name}-{_fingerprint(self.checkpoint)}"


def choose_models(given: Sequence[str], output: Path) -> list[Model]:
    """The models that a command names, as ``PLACE`` or ``LABEL=PLACE``.

    Args:
        given: PLACE is a Hugging Face directory, a checkpoint, or a run's directory: its student-hf, or else its newest
            checkpoint, or with ``@STEP`` behind it the checkpoint of that step.
        output: the folder of results, which must lie in none of them.

    Raises:
        UserError: a place that is not there or holds no model, two models of one label.
    """
    models: dict[str, Model] = {}
    for text in given:
        model = _model(text)
        if model.label in models:
            raise UserError(
                f"model {text}: {models[model.label].place} is called {model.label}, too; name them LABEL=PLACE"
            )
        if model.checkpoint is None:
            require_apart(output, [model.place])
        models[model.label] = model
    return list(models.values())


def _model(text: str) -> Model:
    label, equals, place = text.partition("=")
    if not equals or LABEL.fullmatch(label) is None or Path(text).exists():
        label, place = "", text
    try:
        place = expand_path(place)
    except ValueError as error:
        raise UserError(f"model {text}: {error}") from None
    step: int | None = None
    if not Path(place).exists() and (match := re.fullmatch(r"(.+)@(\d{1,12})", place)) is not None:
        place, step = match[1], int(match[2])
    folder = Path(place)
    if not folder.is_dir():
        raise UserError(
            f"model {text}: {no_directory(folder)}; must be a Hugging Face directory or a run's, as DIR or DIR@STEP"
        )
    student = folder / STUDENT
    if step is None and (student / "config.json").is_file():
        return Model(label or _name(folder), student, None)
    if step is None and (folder / "config.json").is_file() and not (folder / "metadata.json").exists():
        return Model(label or _name(folder.parent if folder.name == STUDENT else folder), folder, None)
    checkpoint = find_checkpoint(folder, step)
    return Model(label or _name(folder, "" if step is None else f"@{step}"), folder, checkpoint)


def _name(folder: Path, step: str = "") -> str:
    """Of the folder, with what would make a poor name of a folder left out."""
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name, flags=re.ASCII).strip("-.") + step or "model"


def _fingerprint(checkpoint: Path) -> str:
    """Of what lies there: a run that is repeated has other checkpoints under the same names."""
    listed = next((path for name in (MANIFEST, "metadata.json") if (path := checkpoint / name).is_file()), None)
    return f"{zlib.crc32(listed.read_bytes()) if listed else 0:08x}"
