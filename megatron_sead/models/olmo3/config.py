"""OLMo-3's configuration: Megatron's TransformerConfig with window, layer types and YaRN, from a Hugging Face file."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.transformer import TransformerConfig

from megatron_sead.errors import UserError

log = logging.getLogger(__name__)

MODEL_TYPES = ("olmo3", "olmo2")
SLIDING, FULL = "sliding_attention", "full_attention"
VOCABULARY_MULTIPLE = 128  # rows of the padded vocabulary, whatever the tensor-parallel size: 100278 -> 100352
DEFAULT_THETA = {"olmo3": 500000.0, "olmo2": 10000.0}


@dataclass(frozen=True)
class YarnScaling:
    """YaRN (Peng et al., arXiv 2309.00071), on full-attention layers alone."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0  # multiplies cos and sin, so that scores grow by its square
    truncate: bool = True  # round the correction range outwards to whole dimensions


@dataclass
class Olmo3Config(TransformerConfig):
    """What the layers need to know beyond Megatron's own fields.

    No field is named as Megatron's ``yarn_*``: it would then scale every layer's rotary embedding.
    """

    layer_types: tuple[str, ...] = ()
    sliding_window: int | None = None  # tokens that a query of a sliding layer sees, itself included
    sliding_theta: float = 500000.0  # rotary base of sliding layers, and of full ones
    full_theta: float = 500000.0
    yarn: YarnScaling | None = None
    vocab_size: int = 0  # true
    padded_vocab_size: int = 0
    spread_hidden_states: bool = False  # under sequence parallelism: hand them out as they are, not gathered
    max_position_embeddings: int = 0

    def is_sliding(self, layer_number: int) -> bool:
        """Whether layer `layer_number` (from 1, over the whole model) has a window."""
        return self.layer_types[layer_number - 1] == SLIDING

    def attention_scale(self, layer_number: int) -> float:
        """What scores are multiplied by. YaRN's magnitude goes here, not into cos and sin: it is a constant."""
        assert self.kv_channels is not None
        factor = self.yarn.attention_factor if self.yarn is not None and not self.is_sliding(layer_number) else 1.0
        return factor**2 / math.sqrt(self.kv_channels)


def olmo3_fields(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """Fields of an `Olmo3Config` that a Hugging Face ``config.json`` decides.

    Args:
        hf: the parsed file, of any transformers version.
        source: the file, for messages.

    Raises:
        UserError: a field is missing, or has a value that this family does not have.
    """
    _refuse_unknown_variants(hf, source)
    try:
        layers, hidden, heads = hf["num_hidden_layers"], hf["hidden_size"], hf["num_attention_heads"]
        ffn, vocab_size = hf["intermediate_size"], hf["vocab_size"]
    except KeyError as missing:
        raise UserError(f"{source}: {missing.args[0]} is missing") from None
    layer_types = _layer_types(hf, source)
    window = hf.get("sliding_window") if SLIDING in layer_types else None
    if SLIDING in layer_types and not window:
        raise UserError(f"{source}: sliding_window={window}: must be positive, since layer_types has sliding layers")
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": hf.get("num_key_value_heads") or heads,
        "kv_channels": hf.get("head_dim") or hidden // heads,
        "ffn_hidden_size": ffn,
        "layernorm_epsilon": hf.get("rms_norm_eps", 1e-5),
        "init_method_std": hf.get("initializer_range", 0.02),
        "layer_types": layer_types,
        "sliding_window": window,
        # Transformer Engine's form of the same: tokens to the left, and which layers have the window
        "window_size": (window - 1, 0) if window else None,
        "window_attn_skip_freq": [int(kind == SLIDING) for kind in layer_types] if window else None,
        **_rotary(hf, source),
        "vocab_size": vocab_size,
        "padded_vocab_size": -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
        "max_position_embeddings": hf.get("max_position_embeddings", 2048),
    }


def _refuse_unknown_variants(hf: dict[str, Any], source: Path) -> None:
    expected = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "tie_word_embeddings": False}
    for name, value in expected.items():
        if hf.get(name, value) != value:
            raise UserError(f"{source}: {name}={hf[name]!r}: only {value!r} is supported for {hf['model_type']}")


def _layer_types(hf: dict[str, Any], source: Path) -> tuple[str, ...]:
    layers = hf["num_hidden_layers"]
    if hf["model_type"] == "olmo2":
        return (FULL,) * layers
    given = hf.get("layer_types")
    types = tuple(given) if given else tuple(SLIDING if (i + 1) % 4 else FULL for i in range(layers))
    if len(types) != layers or not set(types) <= {SLIDING, FULL}:
        raise UserError(f"{source}: layer_types={list(types)}: must name {layers} layers, each {SLIDING} or {FULL}")
    return types


def _rotary(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """Rotary bases, and YaRN of the full layers, from any form that transformers has written.

    ``rope_theta`` with ``rope_scaling`` (4.57, and the released files); ``rope_parameters`` by layer type (5.x); flat
    ``rope_parameters``, which some 5.x versions saved. transformers 5.23 reads the flat form as no YaRN at all,
    5.2.0 as YaRN on every layer; here it means what the released files mean by the same numbers.
    """
    theta = hf.get("rope_theta") or DEFAULT_THETA[hf["model_type"]]
    full = sliding = hf.get("rope_scaling") or {}
    parameters = hf.get("rope_parameters")
    if parameters and (FULL in parameters or SLIDING in parameters):
        full, sliding = parameters.get(FULL) or {}, parameters.get(SLIDING) or {}
        if _rope_type(sliding) != "default":
            raise UserError(
                f"{source}: rope_parameters.{SLIDING} has rope_type {_rope_type(sliding)!r}: must be default"
            )
    elif parameters:
        full = sliding = parameters
        if _rope_type(full) == "yarn":
            log.warning("%s: flat rope_parameters; YaRN is applied to full-attention layers only", source)
    if _rope_type(full) not in ("default", "yarn"):
        raise UserError(f"{source}: rope_type={_rope_type(full)!r}: must be default or yarn")
    return {
        "sliding_theta": sliding.get("rope_theta") or theta,
        "full_theta": full.get("rope_theta") or theta,
        "yarn": _yarn(full, source) if _rope_type(full) == "yarn" else None,
    }


def _rope_type(parameters: dict[str, Any]) -> str:
    return parameters.get("rope_type") or parameters.get("type") or "default"


def _yarn(parameters: dict[str, Any], source: Path) -> YarnScaling:
    try:
        factor, original_length = float(parameters["factor"]), int(parameters["original_max_position_embeddings"])
    except (KeyError, TypeError):
        raise UserError(f"{source}: rope_type yarn needs factor and original_max_position_embeddings") from None
    magnitude = parameters.get("attention_factor")
    return YarnScaling(
        factor=factor,
        original_length=original_length,
        beta_fast=float(parameters.get("beta_fast") or 32),
        beta_slow=float(parameters.get("beta_slow") or 1),
        attention_factor=float(magnitude) if magnitude else 0.1 * math.log(max(factor, 1.0)) + 1.0,
        truncate=bool(parameters.get("truncate", True)),
    )
