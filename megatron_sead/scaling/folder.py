"""A study's folder: whose it is, and the study in it. Files that nobody has changed since are written anew."""

from __future__ import annotations

from pathlib import Path

from megatron_sead.config.settings_file import dump_settings, flatten, load_settings
from megatron_sead.errors import UserError
from megatron_sead.files.replaceable import replace_files, require_replaceable
from megatron_sead.scaling.records import read_records
from megatron_sead.scaling.study import Experiments, Study

STUDY = "study.yaml"
TABLES = ("scaling.json", "scaling.md")
PICTURES = tuple(f"{name}.svg" for name in (*Experiments.TITLES, "memory", "parity"))


def require_place(study: Study, output: Path) -> None:
    """A new or empty directory, or that of the same study; runs may have come or gone. One in which nothing was
    measured takes any study: what was wrong with its own is corrected under the same name.

    Raises:
        UserError: it holds another study, something else, or files of these names that are not ours.
    """
    require_replaceable(output, (STUDY, *TABLES, *PICTURES))
    recorded = output / STUDY
    if not recorded.exists():
        if output.exists() and (not output.is_dir() or any(output.iterdir())):
            raise UserError(f"{output}: is there already and holds no study ({STUDY}); choose another output")
        return
    old = load_settings(Study, recorded, [])
    there, here = (flatten(s.model_dump(mode="json")) for s in (old, study))
    changed = [k for k in here | there if there.get(k) != here.get(k) and not k.startswith(Study.MAY_CHANGE)]
    if changed and any(record.get("reason") is None for record in read_records(output).values()):
        told = ", ".join(f"{key} is {there.get(key)!r} there and {here.get(key)!r} here" for key in changed)
        raise UserError(f"{output}: holds another study: {told}; choose another output")


def write_study(study: Study, output: Path) -> None:
    """Make the folder, if need be, and put the study there."""
    output.mkdir(parents=True, exist_ok=True)
    replace_files(output, {STUDY: dump_settings(study).encode()})
