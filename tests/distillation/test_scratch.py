"""Memory that calls on a CPU hand on to each other, and large pages."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_sead.distillation import linear_weighted_divergence
from megatron_sead.distillation.scratch import LARGE, large_empty_like, release, scratch

CPU = torch.device("cpu")
STATUS = Path("/proc/self/status")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_tensors_are_as_torch_makes_them(dtype: torch.dtype) -> None:
    """Also where large pages are not asked for: of a few numbers, or of rows in another order in memory."""
    for tensor in (torch.empty(LARGE, 2), torch.empty(LARGE, 2).t(), torch.empty(2, 3), torch.empty(0, LARGE)):
        found, expected = large_empty_like(tensor, dtype), torch.empty_like(tensor, dtype=dtype)
        assert (found.shape, found.dtype, found.stride()) == (expected.shape, dtype, expected.stride())
        found.fill_(3.0)
        assert not found.numel() or float(found[-1, -1]) == 3.0


@pytest.mark.skipif(not STATUS.exists(), reason="needs /proc")
def test_large_tensors_give_their_memory_back() -> None:
    def resident() -> int:
        return int(STATUS.read_text().split("VmRSS:")[1].split()[0]) * 1024

    before = resident()
    tensor = large_empty_like(torch.empty(16, LARGE), torch.float32).fill_(1.0)
    kept, size = tensor[1:2], tensor.nbytes
    del tensor
    assert resident() > before + 0.9 * size  # a view holds it
    del kept
    assert resident() < before + 0.1 * size
