"""Small OLMo-3 models of the family's own pattern: three sliding layers, then a full one with YaRN."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, Olmo3Config, Olmo3ForCausalLM, PreTrainedTokenizerBase

from tiny_pair.tokenizer import stop_token_ids

HEAD_DIM = 32  # the smallest that vLLM's attention takes
# OLMo-3's own theta: transformers 5.23 gives it to the sliding layers of a published config whatever the file says.
ROPE_THETA = 500000.0
YARN_FACTOR = 8  # OLMo-3's


@dataclass(frozen=True)
class Shape:
    """What differs between the two models."""

    hidden_size: int
    key_value_heads: int
    ffn_size: int
    layers: int = 4
    context: int = 256  # an eighth of it is YaRN's original length: a problem with its solution is longer
    sliding_window: int = 24  # shorter than a problem with its solution, so that the window matters

    def problem(self) -> str | None:
        """Why these sizes make no model, or None."""
        heads = self.hidden_size // HEAD_DIM
        if self.hidden_size % HEAD_DIM or not heads:
            return f"hidden size {self.hidden_size}: must be a multiple of the head size, {HEAD_DIM}"
        if not 0 < self.key_value_heads <= heads or heads % self.key_value_heads:
            return f"{self.key_value_heads} key-value heads: must divide its {heads} heads"
        if self.ffn_size < 1 or self.layers < 1:
            return "layers and ffn size must be at least 1"
        if self.context < YARN_FACTOR or self.context % YARN_FACTOR:
            return f"context {self.context}: must be a multiple of {YARN_FACTOR}"
        return None

    def yarn(self) -> dict[str, Any]:
        """Rotary scaling of the full layers, in OLMo-3's proportions."""
        return {
            "rope_type": "yarn",
            "factor": float(YARN_FACTOR),
            "original_max_position_embeddings": self.context // YARN_FACTOR,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "attention_factor": 0.1 * math.log(YARN_FACTOR) + 1,  # how much attention is sharpened
        }


def build_model(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> Olmo3ForCausalLM:
    """A model with random fp32 weights that depend on ``seed``, its vocabulary exactly the tokenizer's."""
    rope_parameters = {
        "sliding_attention": {"rope_type": "default", "rope_theta": ROPE_THETA},
        "full_attention": {**shape.yarn(), "rope_theta": ROPE_THETA},
    }
    config = Olmo3Config(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden_size // HEAD_DIM,
        num_key_value_heads=shape.key_value_heads,
        sliding_window=shape.sliding_window,
        max_position_embeddings=shape.context,
        layer_types=_layer_types(shape.layers),
        rope_parameters=rope_parameters,
        rms_norm_eps=1e-6,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    torch.manual_seed(seed)
    model = Olmo3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=stop_token_ids(tokenizer), pad_token_id=tokenizer.pad_token_id, do_sample=True, temperature=1.0
    )
    return model


def save_model(model: Olmo3ForCausalLM, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Weights, configuration and tokenizer as one Hugging Face directory.

    Rotary settings are written as OLMo-3 was published (``rope_theta``, ``rope_scaling``): transformers 4.57 and 5
    both read that form.
    """
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    full_layers = config.pop("rope_parameters")["full_attention"]
    config |= {"rope_theta": full_layers.pop("rope_theta"), "rope_scaling": full_layers}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _layer_types(layers: int) -> list[str]:
    """Three sliding layers to one full; the last is full, however few there are."""
    return ["full_attention" if (layers - 1 - layer) % 4 == 0 else "sliding_attention" for layer in range(layers)]
