"""Which tensors of a trace have values."""

from __future__ import annotations

import pytest
import torch

from megatron_sead.distillation.partial_sums import MODELS, SUMS
from megatron_sead.tracing import shadows


def test_what_a_token_has_is_small_however_long_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums of a token, and the two numbers of each model that travel with them: entropies are made of these."""
    monkeypatch.setattr(shadows, "_tokens", 10**5)
    assert shadows.is_small(torch.empty(10**5, SUMS + 2 * MODELS, device="meta"))
    assert not shadows.is_small(torch.empty(10**5 + 1, SUMS + 2 * MODELS, device="meta"))
    assert not shadows.is_small(torch.empty(10**5, 100, device="meta"))
