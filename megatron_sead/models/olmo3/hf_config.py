"""What a config.json of OLMo-3 or OLMo-2 says. No torch here."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from megatron_sead.errors import UserError
from megatron_sead.models.hf_config import (
    FULL,
    NULLABLE,
    SLIDING,
    Section,
    check_rope_theta,
    dense_fields,
    read_rope_type,
    refuse_unknown,
    refuse_unknown_rope,
)

log = logging.getLogger(__name__)

ARCHITECTURES = {"olmo3": "Olmo3ForCausalLM", "olmo2": "Olmo2ForCausalLM"}
DEFAULT_THETA = {"olmo3": 500000.0, "olmo2": 10000.0}
KINDS = ("default", "yarn")  # of rotary embeddings
READ_OF_OLMO3 = {"layer_types", "sliding_window"}  # vLLM reads them of olmo2 too


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071), on full-attention layers alone."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin, so that scores grow by its square
    truncate: bool = True  # round the correction range outwards to whole dimensions


def olmo3_fields(config: Section) -> dict[str, Any]:
    """Fields of an `Olmo3Config`.

    Raises:
        UserError: a field is missing, has a value that this family does not have, or is unknown and may change what
            the model computes.
    """
    config = config.without_null(*NULLABLE)
    family = config.values["model_type"]
    read = READ_OF_OLMO3 if family == "olmo3" or _all_full(config.values.get("layer_types")) else ()
    refuse_unknown(config, ARCHITECTURES[family], read=read, expected={"tie_word_embeddings": False})
    fields = dense_fields(config, eps=1e-5)
    layer_types = _layer_types(config, fields["num_layers"])
    window = _window(config, layer_types)
    return fields | {
        "layer_types": layer_types,
        "sliding_window": window,
        # Transformer Engine's form of the same: tokens to the left, and which layers have the window
        "window_size": (window - 1, 0) if window else None,
        "window_attn_skip_freq": [int(kind == SLIDING) for kind in layer_types] if window else None,
        **_rotary(config),
        # True would sum the gradients of the sharded Q/K norms over ranks, by their names
        "qk_layernorm": False,
    }


def _all_full(layer_types: object) -> bool:
    return isinstance(layer_types, list) and all(kind == FULL for kind in layer_types)


def _layer_types(config: Section, layers: int) -> tuple[str, ...]:
    given = config.values.get("layer_types")
    if config.values["model_type"] == "olmo2":
        return (FULL,) * layers
    if given is None:
        return tuple(SLIDING if (i + 1) % 4 else FULL for i in range(layers))
    if not isinstance(given, list) or len(given) != layers or not all(kind in (SLIDING, FULL) for kind in given):
        raise config.refusal("layer_types", f"must name {layers} layers, each {SLIDING} or {FULL}")
    return tuple(given)


def _window(config: Section, layer_types: tuple[str, ...]) -> int | None:
    if config.values["model_type"] == "olmo2":
        return None
    if config.values.get("sliding_window") is None:
        if SLIDING not in layer_types:
            return None
        raise config.refusal("sliding_window", "must be positive, since layer_types has sliding layers")
    window = config.whole("sliding_window")
    return window if SLIDING in layer_types else None


def _rotary(config: Section) -> dict[str, Any]:
    """Rotary bases, and YaRN of the full layers, from any form that transformers has written.

    ``rope_theta`` with ``rope_scaling`` (4.57, and the released files); ``rope_parameters`` by layer type (5.x); flat
    ``rope_parameters``, which some 5.x versions saved. transformers 5.23 reads the flat form as no YaRN at all,
    5.2.0 as YaRN on every layer; here it means what the released files mean by the same numbers. Two forms in one
    file must say the same, for each version reads another one.
    """
    scaling, parameters = config.section("rope_scaling"), config.section("rope_parameters")
    full = sliding = parameters if parameters.values else scaling
    if config.values["model_type"] == "olmo3" and {FULL, SLIDING} & parameters.values.keys():
        if unknown := parameters.values.keys() - {FULL, SLIDING}:
            raise parameters.refusal(min(unknown), f"must stand in {FULL} or {SLIDING}, which are given too")
        full, sliding = parameters.section(FULL), parameters.section(SLIDING)
        if read_rope_type(sliding, KINDS) != "default":
            raise sliding.refusal("rope_type", "must be default")
    elif parameters.values and read_rope_type(full, KINDS) == "yarn" and config.values["model_type"] == "olmo3":
        log.warning("%s: flat rope_parameters; YaRN is applied to full-attention layers only", config.source)
    theta = config.number("rope_theta", _default_theta(config, full, sliding))
    for section in (scaling, full, sliding):
        refuse_unknown_rope(section, KINDS)
        check_rope_theta(config, section, theta)
    yarn = _yarn(full)
    if scaling.values and _yarn(scaling) != yarn:
        raise UserError(f"{config.source}: rope_scaling and rope_parameters differ; must say the same, or one alone")
    return {
        "sliding_theta": sliding.number("rope_theta", theta),
        "full_theta": full.number("rope_theta", theta),
        "yarn": yarn,
    }


def _default_theta(config: Section, full: Section, sliding: Section) -> float:
    """What transformers takes where a file names none, if its versions agree."""
    family = config.values["model_type"]
    named = all("rope_theta" in values for values in (full.values, sliding.values)) or "rope_theta" in config.values
    if family == "olmo3" and not named and not config.values.get("rope_parameters"):  # which only 5.x writes
        raise UserError(f"{config.source}: rope_theta is missing: transformers 4.57 takes 10000 for it, 5.x 500000")
    return DEFAULT_THETA[family]


def _yarn(section: Section) -> YarnScaling | None:
    if read_rope_type(section, KINDS) != "yarn":
        return None
    section = section.without_null("beta_fast", "beta_slow", "attention_factor", "rope_theta")
    if section.values.get("factor") is None or section.values.get("original_max_position_embeddings") is None:
        raise UserError(
            f"{section.source}: {section.prefix}rope_type yarn needs factor and original_max_position_embeddings"
        )
    factor, truncate = section.number("factor", least=1), section.values.get("truncate", True)
    if not isinstance(truncate, bool):
        raise section.refusal("truncate", "must be true or false")
    return YarnScaling(
        factor=factor,
        original_length=section.whole("original_max_position_embeddings"),
        beta_fast=section.number("beta_fast", 32),
        beta_slow=section.number("beta_slow", 1),
        attention_factor=section.number("attention_factor", 0.1 * math.log(factor) + 1.0),
        truncate=truncate,
    )
