"""A tiny model of each family, in one line of a table, as a Hugging Face directory with random weights.

Twelve heads and six key/value heads, a feed-forward of 192 and a vocabulary that is padded to 384: one, two and three
tensor-parallel ranks hold equal shares. Four layers: two pipeline stages of two chunks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.models.conftest import vary_norms

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 12,
    "num_key_value_heads": 6,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,  # transformers keeps the padding row's gradient at zero, Megatron does not
    "initializer_range": 0.1,
}
# Of four frequencies the fastest is kept, the next lies between, and two are scaled
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
LLAMA3 |= {"low_freq_factor": 0.1, "high_freq_factor": 2.0}

# Name -> the prefix of transformers' classes, and what differs from `SIZES`
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmo2": ("Olmo2", {}),
    "olmo3": ("Olmo3", {"sliding_window": 6}),
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}),
}
LENGTHS = (42, 24, 36, 18)  # of micro-batches: sequence parallelism splits each over two ranks, or over three


def make_model(name: str, directory: Path, *, seed: int = 0) -> Path:
    """Save a model of this table."""
    prefix, changes = FAMILIES[name]
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | changes))
    torch.manual_seed(seed)
    getattr(transformers, f"{prefix}ForCausalLM")(config).save_pretrained(directory)
    vary_norms(directory / "model.safetensors")
    return directory
