"""The layer, and the specification from which Megatron builds a stack of them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_sead.errors import UserError
from megatron_sead.models.olmo3.attention import Olmo3Attention, TorchCoreAttention
from megatron_sead.models.olmo3.config import Olmo3Config
from megatron_sead.models.olmo3.norms import RMSNorm

AttentionBackend = Literal["torch", "transformer_engine"]


class Olmo3Layer(TransformerLayer):
    """Post-norm: ``h = x + norm(attention(x)); h = h + norm(mlp(h))``. Megatron's forward, our residual add."""

    def __init__(self, config: Olmo3Config, *args: Any, norm: type[torch.nn.Module] = RMSNorm, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.post_attention_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.post_feedforward_layernorm = norm(config, config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attn_bda = _add_normalized(self.post_attention_layernorm)
        self.mlp_bda = _add_normalized(self.post_feedforward_layernorm)
        # Megatron turns gradients on here, even inside no_grad. Its own add has no weights; ours has a norm, and a
        # forward-only pass would keep every layer's activations for a backward that never comes.
        self.bias_dropout_add_exec_handler = nullcontext


def _add_normalized(norm: torch.nn.Module) -> Callable[[bool, bool], Callable[..., torch.Tensor]]:
    """Megatron's bias-dropout-add interface; OLMo-3 has neither bias nor dropout."""

    def add(output_with_bias: tuple[torch.Tensor, None], residual: torch.Tensor, dropout: float) -> torch.Tensor:
        return residual + norm(output_with_bias[0])

    return lambda training, fused: add


def block_spec(config: Olmo3Config, backend: AttentionBackend, vp_stage: int | None) -> TransformerBlockSubmodules:
    """Layers of one model chunk, and the final norm.

    Raises:
        UserError: Transformer Engine is asked for and not installed.
    """
    parts = _torch_parts() if backend == "torch" else _transformer_engine_parts()
    attention = ModuleSpec(
        module=Olmo3Attention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=parts["column"], core_attention=parts["core_attention"], linear_proj=parts["row"]
        ),
    )
    mlp = MLPSubmodules(linear_fc1=parts["column"], linear_fc2=parts["row"])
    layer = ModuleSpec(
        module=Olmo3Layer,
        params={"norm": parts["norm"]},
        submodules=TransformerLayerSubmodules(
            self_attention=attention,
            self_attn_bda=get_bias_dropout_add,  # this and mlp_bda: Olmo3Layer puts its own in their place
            mlp=_mlp_spec(mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=parts["norm"])


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
    """Transformer Engine's modules. Q/K norms stay ours: TE's norms know nothing of shards.

    The plain column-parallel linear, not the one with a norm fused in: OLMo-3 has no norms before its projections.
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

    def core_attention(config: Olmo3Config, layer_number: int, softmax_scale: None = None, **kwargs: Any) -> Any:
        scale = config.attention_scale(layer_number)  # TE keeps the scale that it is built with
        return TEDotProductAttention(config=config, layer_number=layer_number, softmax_scale=scale, **kwargs)

    return {
        "column": TEColumnParallelLinear,
        "row": TERowParallelLinear,
        "core_attention": core_attention,
        "norm": TENorm,
    }
