"""What a config.json of Qwen3 says. No torch here."""

from __future__ import annotations

from typing import Any

from megatron_sead.models.hf_config import FULL, NULLABLE, Section, dense_fields, read_rope, refuse_unknown

ARCHITECTURES = {"qwen3": "Qwen3ForCausalLM"}
DEFAULT_THETA = 10000.0
# What transformers takes where a file names none
HEAD_DIM, KEY_VALUE_HEADS, CONTEXT = 128, 32, 32768
READ = {"layer_types", "sliding_window", "max_window_layers"}  # they say nothing without use_sliding_window


def qwen3_fields(config: Section) -> dict[str, Any]:
    """Fields of a `Qwen3Config`.

    Raises:
        UserError: a field is missing, has a value that this family does not have, or is unknown and may change what
            the model computes.
    """
    config = config.without_null(*NULLABLE)
    refuse_unknown(config, ARCHITECTURES["qwen3"], read=READ, expected={"use_sliding_window": False})
    fields = dense_fields(config, eps=1e-6, head_dim=HEAD_DIM, key_value_heads=KEY_VALUE_HEADS, context=CONTEXT)
    layer_types = config.values.get("layer_types", [FULL] * fields["num_layers"])
    if layer_types != [FULL] * fields["num_layers"]:
        raise config.refusal("layer_types", f"must name {fields['num_layers']} layers, each {FULL}")
    theta, _ = read_rope(config, DEFAULT_THETA)
    # Each tensor-parallel rank sees its own heads: Megatron sums the gradients of norms with these names over them
    return fields | {"theta": theta, "qk_layernorm": True}
