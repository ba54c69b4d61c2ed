"""Models of two layers at the widths of the released ones, with random weights, written as a stream."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

WINDOW, ORIGINAL_LENGTH, TOKENS = 64, 128, 192  # the text is longer than both, and short enough for whole logits


@dataclass(frozen=True)
class Shape:
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int = 100278

    @property
    def parameters(self) -> int:
        return 2 * self.largest + self.hidden + 2 * self._layer

    @property
    def largest(self) -> int:
        """Elements of the largest tensors, embedding and head."""
        return self.vocab * self.hidden

    @property
    def _layer(self) -> int:
        kv = self.kv_heads * self.hidden // self.heads
        return 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.ffn + 3 * self.hidden + kv


SHAPES = {"7b": Shape(4096, 32, 32, 11008), "32b": Shape(5120, 40, 8, 27648)}


def write_model(directory: Path, shape: Shape) -> None:
    """config.json and bf16 weights: a sliding layer, then a full one with YaRN."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2))
    write_weights(directory)


def write_weights(directory: Path) -> None:
    """Random bf16 weights for the config.json that is there, a tensor in memory at a time."""
    from megatron_sead.checkpoints.huggingface import huggingface_shapes
    from megatron_sead.checkpoints.shard_writer import SHARD_BYTES, ShardWriter

    shapes = huggingface_shapes(directory)
    writer = ShardWriter(directory, shapes, torch.bfloat16, SHARD_BYTES)
    generator = torch.Generator().manual_seed(0)
    for name, size in shapes.items():
        tensor = torch.empty(size, dtype=torch.bfloat16)
        if "norm" in name:  # not ones: a weight that is not applied, or that another rank applies, shows
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 0.02, generator=generator)
        writer.add(name, tensor)
    writer.finish()


def _config(shape: Shape) -> dict[str, Any]:
    """As the released models', but for depth, window and YaRN's original length."""
    yarn = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 8.0, "beta_fast": 32.0, "beta_slow": 1.0}
    yarn |= {"original_max_position_embeddings": ORIGINAL_LENGTH, "attention_factor": 1.2079441541679836}
    return {
        "architectures": ["Olmo3ForCausalLM"],
        "model_type": "olmo3",
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_hidden_layers": 2,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": WINDOW,
        "max_position_embeddings": 8 * ORIGINAL_LENGTH,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "full_attention": yarn,
        },
        "vocab_size": shape.vocab,
        "pad_token_id": shape.vocab - 1,
        "eos_token_id": shape.vocab - 1,
        "bos_token_id": None,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }


def text(shape: Shape) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and labels [1, TOKENS]. Never the padding token, whose gradient transformers keeps at zero."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randint(0, shape.vocab - 1, (1, TOKENS), generator=generator) for _ in range(2))  # type: ignore[return-value]
