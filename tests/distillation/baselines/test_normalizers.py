"""Tokens are walked in blocks, so that scratch does not grow with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_sead.distillation.baselines import normalizers
from megatron_sead.distillation.baselines.normalizers import token_blocks
from tests.distillation.baselines import test_generalized_jsd, test_sampled_token, test_top_k
from tests.distillation.baselines.cases import Case, make_case


@pytest.mark.parametrize(
    ("loss_of", "options"),
    [
        (test_sampled_token.loss_of, {}),
        (test_generalized_jsd.loss_of, {"beta": 0.3}),
        (test_top_k.loss_of, {"k": 7, "tail": "bucket"}),
        (test_top_k.loss_of, {"k": 7, "tail": "renormalize"}),
    ],
)
def test_the_size_of_a_block_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, loss_of: Callable[..., torch.Tensor], options: dict[str, Any]
) -> None:
    def loss_and_gradient(case: Case) -> tuple[torch.Tensor, torch.Tensor]:
        logits = case.student.clone().requires_grad_()
        loss = loss_of(case, logits, case.teacher, **options)
        loss.backward(case.upstream)
        return loss.detach(), logits.grad

    whole = loss_and_gradient(make_case(40))
    for rows in (0, 1, 4):  # of 15: a row does not fit; one fits; a last block that is not full
        monkeypatch.setattr(normalizers, "BLOCK_ELEMENTS", rows * 40)
        for value, expected in zip(loss_and_gradient(make_case(40)), whole, strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-7)


def test_blocks_are_small() -> None:
    tokens, columns = 1000, 100_352
    blocks = list(token_blocks(torch.empty(tokens, 1), columns))
    assert [block.start for block in blocks[1:]] == [block.stop for block in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, tokens)
    assert max(block.stop - block.start for block in blocks) * columns <= normalizers.BLOCK_ELEMENTS
    assert list(token_blocks(torch.empty(2, 1), 2**30)) == [slice(0, 1), slice(1, 2)]
