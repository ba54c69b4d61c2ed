"""The specification from which Megatron builds a stack of layers."""

from __future__ import annotations

import functools
from typing import Any, Literal

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sead.errors import UserError
from megatron_sead.models.attention import RotaryAttention, TorchCoreAttention
from megatron_sead.models.config import ModelConfig
from megatron_sead.models.norms import RMSNorm

AttentionBackend = Literal["torch", "transformer_engine"]


def dense_block_spec(
    config: ModelConfig,
    backend: AttentionBackend,
    vp_stage: int | None,
    *,
    attention: type[RotaryAttention] = RotaryAttention,
    norm_heads: bool = False,
    layer: type[TransformerLayer] = TransformerLayer,
    pre_norm: bool = True,
) -> TransformerBlockSubmodules:
    """Layers of one model chunk, each attention and a gated feed-forward, and the final norm.

    Args:
        attention: the family's, given the backend's projections and core.
        norm_heads: it has a norm of queries and one of keys, over a head.
        layer: the family's. Without `pre_norm` it is given the backend's norm, to put where it wants it.
        pre_norm: a norm before the attention and one before the feed-forward.

    Raises:
        UserError: Transformer Engine is asked for and not installed, or cannot share the sequences of a sliding layer.
    """
    if backend != "torch" and config.context_parallel_size > 1:
        _require_full_attention(config)
    parts = _torch_parts() if backend == "torch" else _transformer_engine_parts()
    norm = parts["norm"]
    self_attention = ModuleSpec(
        module=attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts["column"],
            core_attention=parts["core_attention"],
            linear_proj=parts["row"],
            **({"q_layernorm": norm, "k_layernorm": norm} if norm_heads else {}),
        ),
    )
    spec = ModuleSpec(
        module=layer,
        params={} if pre_norm else {"norm": norm},
        submodules=TransformerLayerSubmodules(
            self_attention=self_attention,
            self_attn_bda=get_bias_dropout_add,
            mlp=_mlp_spec(MLPSubmodules(linear_fc1=parts["column"], linear_fc2=parts["row"])),
            mlp_bda=get_bias_dropout_add,
            **({"input_layernorm": norm, "pre_mlp_layernorm": norm} if pre_norm else {}),
        ),
    )
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * layers, layer_norm=norm)


def _require_full_attention(config: ModelConfig) -> None:
    """Transformer Engine's ring, the one form of it that shares packed sequences, knows no windows."""
    if any(config.window(layer) is not None for layer in range(1, config.num_layers + 1)):
        raise UserError(
            f"parallel.context_parallel_size={config.context_parallel_size}: training.attention_backend="
            "transformer_engine shares no sequences in layers with a sliding window; use torch"
        )


def _mlp_spec(submodules: MLPSubmodules) -> Any:
    """Newer Megatron-Cores take a function that builds the MLP, older ones a specification."""
    if hasattr(MLP, "as_mlp_submodule"):
        return functools.partial(MLP.as_mlp_submodule, submodules=submodules)
    return ModuleSpec(module=MLP, submodules=submodules)


def _torch_parts() -> dict[str, Any]:
    return {
        "column": ColumnParallelLinear,
        "row": RowParallelLinear,
        "core_attention": TorchCoreAttention,
        "norm": RMSNorm,
    }


def _transformer_engine_parts() -> dict[str, Any]:
    """Transformer Engine's modules. The plain column-parallel linear, not the one with a norm fused in: a weight
    has one name in every backend.
    """
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        raise UserError(
            "training.attention_backend=transformer_engine: transformer-engine is not installed; "
            "install megatron-sead[gpu], or use torch"
        ) from None
    from megatron.core.extensions.transformer_engine import (
        TEColumnParallelLinear,
        TEDotProductAttention,
        TENorm,
        TERowParallelLinear,
    )

    def core_attention(config: ModelConfig, layer_number: int, softmax_scale: None = None, **kwargs: Any) -> Any:
        scale = config.attention_scale(layer_number)  # TE keeps the scale that it is built with
        return TEDotProductAttention(config=config, layer_number=layer_number, softmax_scale=scale, **kwargs)

    return {
        "column": TEColumnParallelLinear,
        "row": TERowParallelLinear,
        "core_attention": core_attention,
        "norm": TENorm,
    }
