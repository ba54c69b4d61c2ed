"""Llama, dense: norms before attention and feed-forward, no biases, tied embeddings or not. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sead.models.family import Implementation, ModelFamily, config_fields
from megatron_sead.models.hf_config import describe_dense, portable_rope
from megatron_sead.models.llama.hf_config import ARCHITECTURES, llama_fields
from megatron_sead.models.weight_tables import Weight, attention_weights, gated_mlp_weights, pre_norm_weights


def layer_weights(config: Any) -> list[Weight]:
    """Of one layer."""
    return [*attention_weights(config), *gated_mlp_weights(config), *pre_norm_weights(config)]


def portable_config(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """config.json with its rotary embedding in the forms that transformers 4.57 and 5.x read, both of them."""
    fields = config_fields(hf, source)
    scaling = fields["scaling"]
    if scaling is None:
        return portable_rope(hf, fields["theta"], None)
    named = {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_length,
    }
    return portable_rope(hf, fields["theta"], named)


def describe(fields: dict[str, Any], hf: dict[str, Any]) -> list[tuple[str, str]]:
    """Layers, rotary embedding and its scaling, head."""
    scaling = fields["scaling"]
    told = "none" if scaling is None else f"llama3: factor {scaling.factor:g} from {scaling.original_length}"
    return describe_dense(fields, hf, ("scaling", told))


def _implementation() -> Implementation:
    from megatron_sead.models.layers import dense_block_spec
    from megatron_sead.models.llama.config import LlamaConfig
    from megatron_sead.models.llama.rotary import rotary

    return Implementation(LlamaConfig, dense_block_spec, rotary)


FAMILY = ModelFamily(
    architectures=ARCHITECTURES,
    read=llama_fields,
    layer_weights=layer_weights,
    portable_config=portable_config,
    describe=describe,
    implementation=_implementation,
)
