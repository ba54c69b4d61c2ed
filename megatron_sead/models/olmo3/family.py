"""OLMo-3 and OLMo-2, dense: norms after attention and feed-forward, Q/K norms over all heads, windows, YaRN.

OLMo-2 has the same layers, every one with full attention and plain rotary angles. No torch here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sead.models.family import Implementation, ModelFamily, config_fields
from megatron_sead.models.hf_config import FULL, LEGACY_FORM, SLIDING, rope_form
from megatron_sead.models.olmo3.hf_config import ARCHITECTURES, YarnScaling, olmo3_fields
from megatron_sead.models.weight_tables import Weight, attention_weights, gated_mlp_weights


def layer_weights(config: Any) -> list[Weight]:
    """Of one layer."""
    qkv, projection = attention_weights(config)
    widths = (config.num_attention_heads * config.kv_channels, config.num_query_groups * config.kv_channels)
    q_norm, k_norm = (
        Weight(f"self_attention.{name}_layernorm.weight", (f"self_attn.{name}_norm.weight",), ((width,),), tp_dim=0)
        for name, width in zip(("q", "k"), widths, strict=True)
    )
    post_norms = [
        Weight(f"{name}.weight", (f"{name}.weight",), ((config.hidden_size,),))
        for name in ("post_attention_layernorm", "post_feedforward_layernorm")
    ]
    return [qkv, q_norm, k_norm, projection, *gated_mlp_weights(config), *post_norms]


def portable_config(hf: dict[str, Any], source: Path) -> dict[str, Any]:
    """config.json with its rotary embeddings in the forms that transformers 4.57 and 5.x read, both of them.

    4.57 reads ``rope_theta`` with ``rope_scaling`` and ignores ``rope_parameters``. 5.x reads the first form too, but
    5.23 then gives sliding layers a base of 500000 whatever ``rope_theta`` is; ``rope_parameters`` by layer type
    comes before it (a flat one would drop YaRN). A model whose two kinds of layers have two bases, which the first
    form cannot say, gets the second alone.
    """
    rope = config_fields(hf, source)
    kept = {key: value for key, value in hf.items() if key not in ("rope_theta", "rope_scaling", "rope_parameters")}
    full = {"rope_type": "default"} if rope["yarn"] is None else _yarn_fields(rope["yarn"])
    if hf["model_type"] == "olmo2":  # one kind of layers, and a flat form in every version
        return kept | {"rope_theta": rope["full_theta"], "rope_parameters": full | {"rope_theta": rope["full_theta"]}}
    by_type = {
        SLIDING: {"rope_type": "default", "rope_theta": rope["sliding_theta"]},
        FULL: full | {"rope_theta": rope["full_theta"]},
    }
    if rope["sliding_theta"] != rope["full_theta"]:
        return kept | {"rope_parameters": by_type}
    scaling = None if rope["yarn"] is None else full
    return kept | {"rope_theta": rope["full_theta"], "rope_scaling": scaling, "rope_parameters": by_type}


def _yarn_fields(yarn: YarnScaling) -> dict[str, Any]:
    fields = {
        "rope_type": "yarn",
        "factor": yarn.factor,
        "original_max_position_embeddings": yarn.original_length,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
    }
    return fields if yarn.truncate else fields | {"truncate": False}


def describe(fields: dict[str, Any], hf: dict[str, Any]) -> list[tuple[str, str]]:
    """Layers, window, rotary embedding."""
    layers, sliding = fields["num_layers"], fields["layer_types"].count(SLIDING)
    yarn, window = fields["yarn"], fields["sliding_window"]
    scaling = "none"
    if yarn is not None:
        scaling = (
            f"full layers: factor {yarn.factor:g} from {yarn.original_length}, attention factor "
            f"{yarn.attention_factor:g}"
        )
    return [
        ("layers", f"{layers} ({sliding} sliding, {layers - sliding} full)"),
        ("sliding window", f"{window}, the current token included" if sliding else "none"),
        ("rope", f"theta {fields['full_theta']:g}; {_rope_form(hf)}"),
        ("YaRN", scaling),
    ]


def _rope_form(hf: dict[str, Any]) -> str:
    parameters = hf.get("rope_parameters") or {}
    if FULL in parameters or SLIDING in parameters:
        both = f" and {LEGACY_FORM}" if "rope_theta" in hf else ""
        return f"by layer type (rope_parameters: transformers 5){both}"
    if parameters and hf["model_type"] == "olmo3":
        yarn = "yarn" in (parameters.get("rope_type"), parameters.get("type"))
        lost = "; transformers 5.23 reads no YaRN from it" if yarn else ""
        return f"flat (rope_parameters without layer types{lost})"
    return rope_form(hf)


def _implementation() -> Implementation:
    from megatron_sead.models.olmo3.config import Olmo3Config
    from megatron_sead.models.olmo3.layers import block_spec
    from megatron_sead.models.olmo3.rotary import DualRotaryEmbedding

    return Implementation(Olmo3Config, block_spec, DualRotaryEmbedding)


FAMILY = ModelFamily(
    architectures=ARCHITECTURES,
    read=olmo3_fields,
    layer_weights=layer_weights,
    portable_config=portable_config,
    describe=describe,
    implementation=_implementation,
)
