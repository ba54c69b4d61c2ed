from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_olmo3
from tests.distributed.ranks import RankPool, RankPools


@pytest.fixture(scope="session")
def ranks(pools: RankPools) -> RankPool:
    return pools.of(2)


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, for two stages of two chunks; two KV heads, for TP 2."""
    return make_olmo3(
        tmp_path_factory.mktemp("checkpoints") / "student",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_key_value_heads=2,
    )
