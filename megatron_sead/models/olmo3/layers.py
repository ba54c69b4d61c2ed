"""OLMo-3's layer: its norms come after the attention and after the feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from megatron_sead.models.layers import dense_block_spec
from megatron_sead.models.norms import RMSNorm
from megatron_sead.models.olmo3.attention import Olmo3Attention
from megatron_sead.models.olmo3.config import Olmo3Config


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


block_spec = partial(dense_block_spec, attention=Olmo3Attention, layer=Olmo3Layer, pre_norm=False)
