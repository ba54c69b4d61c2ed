"""Real ranks, shared by all tests of this folder."""

from __future__ import annotations

import pytest

from tests.distillation.ranks import SIZE, Ranks
from tests.distributed.ranks import RankPools


@pytest.fixture(scope="session")
def ranks(pools: RankPools) -> Ranks:
    return Ranks(pools.of(SIZE))
