"""What a model family must say of itself to everything else, and where the families are found.

A family is a folder beside this file. Its ``family.py``, which brings no torch, holds a `ModelFamily` by the name of
FAMILY, which says what ``model_type`` of a config.json it serves. docs/adding-a-model.md says how to add one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_sead.errors import UserError
from megatron_sead.models.hf_config import Section, shown
from megatron_sead.models.weight_tables import Weight

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from megatron_sead.models.config import ModelConfig
    from megatron_sead.models.layers import AttentionBackend

FOLDERS = ("olmo3", "llama", "qwen3")  # of the families


class Implementation(NamedTuple):
    """The part of a family that needs torch and Megatron-Core."""

    config: type[ModelConfig]
    block_spec: Callable[[Any, AttentionBackend, int | None], Any]  # (config, backend, vp_stage): layers, final norm
    rotary: Callable[[Any, ProcessGroup], torch.nn.Module]  # (config, context-parallel group): length -> angles


@dataclass(frozen=True)
class ModelFamily:
    """One kind of model."""

    architectures: Mapping[str, str]  # model_type of config.json -> class of transformers
    # What config.json decides: fields of the family's `ModelConfig`. Raises UserError for all that it does not have
    read: Callable[[Section], dict[str, Any]]
    # A layer's weights, from an object with those fields as attributes
    layer_weights: Callable[[Any], list[Weight]]
    # config.json in forms that transformers 4.57 and 5.x read alike
    portable_config: Callable[[dict[str, Any], Path], dict[str, Any]]
    # How positions are encoded, and which layers see what, as (label, text), from the fields and config.json
    describe: Callable[[dict[str, Any], dict[str, Any]], list[tuple[str, str]]]
    implementation: Callable[[], Implementation]


@cache
def families() -> dict[str, ModelFamily]:
    """Every supported model_type and its family."""
    found: list[ModelFamily] = [import_module(f"{__package__}.{folder}.family").FAMILY for folder in FOLDERS]
    return {model_type: family for family in found for model_type in family.architectures}


def family_of(model_type: str) -> ModelFamily:
    """The family of a supported model_type."""
    return families()[model_type]


def read_hf_config(hf_dir: Path) -> dict[str, Any]:
    """``config.json``, of a supported model_type.

    Raises:
        UserError: no such file, not JSON, or another architecture.
    """
    source = hf_dir / "config.json"
    try:
        hf = json.loads(source.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{hf_dir}: holds no config.json; must be a Hugging Face model directory") from None
    except OSError as error:
        raise UserError(f"{source}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source}: not JSON ({error})") from None
    if not isinstance(hf, dict):
        raise UserError(f"{source}: must hold a JSON object")
    model_type = hf.get("model_type")
    if not isinstance(model_type, str) or model_type not in families():
        *known, last = families()
        valid = f"{', '.join(known)} or {last}"
        raise UserError(f"{source}: model_type={shown(model_type)} is not supported; must be {valid}")
    return hf


def config_fields(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """Fields of its family's `ModelConfig` that a ``config.json`` decides.

    Args:
        hf: the parsed file, of any transformers version, from `read_hf_config`.
        source: the file, for messages.

    Raises:
        UserError: a field is missing, has a value that the family does not have, or is unknown and may change what
            the model computes.
    """
    return {"model_type": hf["model_type"], **family_of(hf["model_type"]).read(Section(hf, source))}


def read_config_fields(hf_dir: Path) -> dict[str, Any]:
    """`config_fields` of a directory. Raises UserError as that and `read_hf_config` do."""
    return config_fields(read_hf_config(hf_dir), hf_dir / "config.json")
