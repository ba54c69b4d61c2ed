"""Memory that calls on a CPU hand on to each other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from megatron_sead.distillation import linear_weighted_divergence
from megatron_sead.distillation.scratch import release, scratch

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_kept() -> Iterator[None]:
    release()
    yield
    release()


def place(columns: int) -> int:
    with scratch(1, (2, columns), torch.float32, CPU) as (memory,):
        return memory.data_ptr()


def test_the_next_call_gets_the_same_memory() -> None:
    assert place(5_000_000) == place(5_000_000) == place(3_000_000)


def test_tensors_are_apart_even_for_who_compares_storages() -> None:
    with scratch(2, (3, 4), torch.float64, CPU) as (one, other):
        one.fill_(1.0), other.fill_(2.0)
        assert one.shape == other.shape == (3, 4) and one.dtype == torch.float64
        assert float(one.sum()) == 12 and float(other.sum()) == 24
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr()


def test_a_rank_that_holds_only_padding_needs_none() -> None:
    with scratch(2, (2, 0), torch.float32, CPU) as tensors:
        assert [tensor.shape for tensor in tensors] == [(2, 0), (2, 0)]


def test_a_larger_call_gets_as_much_as_it_needs() -> None:
    place(16)
    with scratch(2, (2, 5_000_000), torch.float32, CPU) as tensors:
        for tensor in tensors:
            tensor.fill_(1.0)
        assert [float(tensor[-1, -1]) for tensor in tensors] == [1.0, 1.0]


def test_a_call_within_another_gets_other_memory() -> None:
    place(16)
    with scratch(1, (2, 16), torch.float32, CPU) as (outer,):
        outer.fill_(1.0)
        with scratch(1, (2, 16), torch.float32, CPU) as (inner,):
            inner.fill_(2.0)
        assert bool((outer == 1.0).all())


def test_what_a_call_returned_stays_when_the_next_one_writes() -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(6, 8, requires_grad=True), torch.randn(50, 8, requires_grad=True)
    weight = torch.rand(6)

    def step() -> list[torch.Tensor]:
        loss = linear_weighted_divergence(hidden, head, hidden.detach() + 1, head.detach(), weight, weight)
        return [loss, *torch.autograd.grad(loss.sum(), (hidden, head))]

    results = step()
    before = [result.clone() for result in results]
    linear_weighted_divergence(hidden, head * 3, hidden, head, weight, weight).sum().backward()
    assert all(torch.equal(result, copy) for result, copy in zip(results, before, strict=True))
    assert all(torch.equal(result, again) for result, again in zip(results, step(), strict=True))


def test_a_call_that_fails_hands_its_memory_on() -> None:
    first = place(16)
    with pytest.raises(RuntimeError), scratch(1, (2, 16), torch.float32, CPU):
        raise RuntimeError
    assert place(16) == first
