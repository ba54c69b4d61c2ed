"""Four ranks and one small model for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_olmo3
from tests.distributed.ranks import RankPool, RankPools


@pytest.fixture(scope="session")
def ranks(pools: RankPools) -> RankPool:
    return pools.of(4)


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, kinds mixed; four KV heads for TP 4; norms that are not all ones; a vocabulary to be padded."""
    directory = make_olmo3(
        tmp_path_factory.mktemp("olmo3"),
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_attention_heads=8,
        num_key_value_heads=4,
        rms_norm_eps=1e-6,
        pad_token_id=None,  # transformers keeps the padding row's gradient at zero, Megatron does not
        initializer_range=0.2,
    )
    vary_norms(directory / "model.safetensors")
    return directory


def vary_norms(file: Path) -> None:
    """Norm weights from 0.5 to 1.5: ones would hide a weight that is not applied, or that another rank applies."""
    tensors = load_file(file)
    generator = torch.Generator().manual_seed(2)
    for name in sorted(tensors):
        if "norm" in name:
            tensors[name] = torch.rand(tensors[name].shape, generator=generator) + 0.5
    save_file(tensors, file, metadata={"format": "pt"})
