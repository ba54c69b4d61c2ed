"""A model, its Megatron checkpoint, and what is wrong with the checkpoint: each fault a function that makes one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_olmo3

Tensors = dict[str, torch.Tensor]
VICTIM = "model.layers.1.self_attn.q_proj.weight"


def convert(hf_dir: Path, checkpoint: Path) -> Path:
    from megatron_sead.checkpoints.conversion import huggingface_to_megatron  # imports Megatron: not to be collected

    huggingface_to_megatron(hf_dir, checkpoint)
    return checkpoint


def make_bf16_model(directory: Path, *, heads: int, kv_heads: int) -> Path:
    """Four layers: sliding, full, sliding, full."""
    shape = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return to_bf16(make_olmo3(directory, **shape, num_attention_heads=heads, num_key_value_heads=kv_heads))


def to_bf16(hf_dir: Path) -> Path:
    """The same directory, its weights rounded, norms varied (all ones would hide one that is not applied)."""
    generator = torch.Generator().manual_seed(3)

    def vary(tensors: Tensors) -> None:
        for name in sorted(tensors):
            if "norm" in name:
                tensors[name] = torch.rand(tensors[name].shape, generator=generator) + 0.5
            tensors[name] = tensors[name].bfloat16()

    edit_weights(hf_dir, vary)
    config = json.loads((hf_dir / "config.json").read_text())
    (hf_dir / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    return hf_dir


def converted_with_other_weights(hf_dir: Path, folder: Path, change: Callable[[Tensors], None]) -> Path:
    """A checkpoint of `hf_dir` after `change`."""
    shutil.copytree(hf_dir, folder / "changed")
    edit_weights(folder / "changed", change)
    return convert(folder / "changed", folder / "megatron")


def converted_with_other_config(hf_dir: Path, folder: Path, **changes: object) -> Path:
    """A checkpoint of `hf_dir` that reads its config.json differently: what a mistake in reading it comes to."""
    checkpoint = convert(hf_dir, folder / "megatron")
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | changes))
    return checkpoint


def edit_weights(hf_dir: Path, change: Callable[[Tensors], None]) -> None:
    tensors = load_file(hf_dir / "model.safetensors")
    change(tensors)
    save_file(tensors, hf_dir / "model.safetensors", metadata={"format": "pt"})


def window_off_by_one(hf_dir: Path, folder: Path) -> Path:
    window = json.loads((hf_dir / "config.json").read_text())["sliding_window"]
    return converted_with_other_config(hf_dir, folder, sliding_window=window + 1)


def no_yarn(hf_dir: Path, folder: Path) -> Path:
    rope = json.loads((hf_dir / "config.json").read_text())["rope_parameters"]
    plain = {"rope_type": "default", "rope_theta": rope["full_attention"]["rope_theta"]}
    return converted_with_other_config(hf_dir, folder, rope_parameters=rope | {"full_attention": plain})


def query_and_key_swapped(hf_dir: Path, folder: Path) -> Path:
    def swap(tensors: Tensors) -> None:
        key = VICTIM.replace("q_proj", "k_proj")
        tensors[VICTIM], tensors[key] = tensors[key], tensors[VICTIM]

    return converted_with_other_weights(hf_dir, folder, swap)


def gate_and_up_swapped(hf_dir: Path, folder: Path) -> Path:
    def swap(tensors: Tensors) -> None:
        gate, up = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
        tensors[gate], tensors[up] = tensors[up], tensors[gate]

    return converted_with_other_weights(hf_dir, folder, swap)


def lowest_bit_flipped(hf_dir: Path, folder: Path) -> Path:
    return converted_with_other_weights(hf_dir, folder, lambda tensors: flip(tensors[VICTIM], 0))


def highest_exponent_bit_flipped(hf_dir: Path, folder: Path) -> Path:
    return converted_with_other_weights(hf_dir, folder, lambda tensors: flip(tensors[VICTIM], 14))


def flip(tensor: torch.Tensor, bit: int) -> None:
    """Of the element [1, 2], bf16: bit 15 is the sign, 14 to 7 the exponent."""
    tensor.view(torch.int16)[1, 2] ^= 1 << bit
