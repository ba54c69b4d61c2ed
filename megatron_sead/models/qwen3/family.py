"""Qwen3, dense: norms before attention and feed-forward, and of each head's query and key. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sead.models.family import Implementation, ModelFamily, config_fields
from megatron_sead.models.hf_config import describe_dense, portable_rope
from megatron_sead.models.qwen3.hf_config import ARCHITECTURES, qwen3_fields
from megatron_sead.models.weight_tables import Weight, attention_weights, gated_mlp_weights, pre_norm_weights


def layer_weights(config: Any) -> list[Weight]:
    """Of one layer."""
    head_norms = [
        Weight(f"self_attention.{name}_layernorm.weight", (f"self_attn.{name}_norm.weight",), ((config.kv_channels,),))
        for name in ("q", "k")
    ]
    return [*attention_weights(config), *head_norms, *gated_mlp_weights(config), *pre_norm_weights(config)]


def portable_config(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """config.json with its rotary embedding in the forms that transformers 4.57 and 5.x read, both of them."""
    return portable_rope(hf, config_fields(hf, source)["theta"], None)


def _implementation() -> Implementation:
    from megatron_sead.models.qwen3.config import Qwen3Config
    from megatron_sead.models.qwen3.layers import block_spec, rotary

    return Implementation(Qwen3Config, block_spec, rotary)


FAMILY = ModelFamily(
    architectures=ARCHITECTURES,
    read=qwen3_fields,
    layer_weights=layer_weights,
    portable_config=portable_config,
    describe=describe_dense,
    implementation=_implementation,
)
