"""Random models of another vocabulary or depth, for what a step costs against these."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_sead.errors import UserError
from megatron_sead.files.outputs import whole_directory

RECIPE = "recipe.json"  # beside a model: what it was made from


def require_made_from(source: Path, directory: Path, seed: int) -> None:
    """The model that is there, if any, was made from that one, with that seed.

    Raises:
        UserError: it was made from another.
    """
    if not (directory / "config.json").is_file():
        return
    try:
        there = json.loads((directory / RECIPE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        there = "what it does not tell"
    here = _recipe(source, seed)
    if there != here:
        raise UserError(f"{directory}: was made from {there}, not from {here}; choose another output, or move it away")


def _recipe(source: Path, seed: int) -> dict[str, Any]:
    return {"source": str(source), "seed": seed}


def write_random_model(source: Path, directory: Path, sizes: dict[str, int], seed: int) -> None:
    """A model as `source`, with random weights, of other sizes. One that is there already stays.

    Args:
        sizes: vocabulary, layers, or both.

    Raises:
        UserError: the directory holds something else, or cannot be written.
    """
    require_made_from(source, directory, seed)
    if (directory / "config.json").is_file():
        return
    with whole_directory(directory, inputs=[source], overwrite=False) as made:
        for file in sorted(source.iterdir()):
            if file.is_file() and file.name != "config.json" and not _holds_weights(file):
                shutil.copyfile(file, made / file.name)
        fields = resized(json.loads((source / "config.json").read_text(encoding="utf-8")), sizes)
        (made / "config.json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
        (made / RECIPE).write_text(json.dumps(_recipe(source, seed)) + "\n", encoding="utf-8")
        _write_weights(made, seed)


def resized(fields: dict[str, Any], sizes: dict[str, int]) -> dict[str, Any]:
    """A config.json of other sizes; kinds of layers repeat as they did."""
    fields = dict(fields)
    if "vocabulary" in sizes:
        fields["vocab_size"] = sizes["vocabulary"]
    if "layers" in sizes:
        before, count = fields["num_hidden_layers"], sizes["layers"]
        fields["num_hidden_layers"] = count
        for name, value in fields.items():
            if isinstance(value, list) and len(value) == before > 1:
                fields[name] = [value[place % before] for place in range(count)]
    return fields


def _holds_weights(file: Path) -> bool:
    return file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf") or file.name.endswith(".index.json")


def _write_weights(directory: Path, seed: int) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    kept = (directory / "config.json").read_bytes()
    model.save_pretrained(directory)
    (directory / "config.json").write_bytes(kept)
