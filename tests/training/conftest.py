"""Ranks that several modules train on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.training.launching import Pools


@pytest.fixture(scope="session")
def pools() -> Iterator[Pools]:
    pools = Pools()
    yield pools
    pools.stop()
