from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import make_olmo3
from tests.distributed.ranks import RankPool


@pytest.fixture(scope="module")
def ranks() -> Iterator[RankPool]:
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers, for two stages of two chunks; two KV heads, for TP 2."""
    return make_olmo3(
        tmp_path_factory.mktemp("checkpoints") / "student",
        num_hidden_layers=4,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_key_value_heads=2,
    )
