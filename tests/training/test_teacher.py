"""The teacher's weights between passes. That its hidden states are right is held by test_step_reference."""

from __future__ import annotations

import pytest
import torch

from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT


def places_of_weights(device: str) -> tuple[set[str], set[str], str, bool]:
    """Device types between passes and within one, the head's, and whether a pass left every value as it was."""
    from megatron_sead.config.parallel import ParallelSettings
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from megatron_sead.training.teacher import Teacher

    parallel = initialize_parallel(ParallelSettings(), device, 0)
    chunks = build_model(ROOT / "examples" / "tiny" / "teacher", parallel, precision="fp32")
    before = {name: value.clone() for name, value in chunks[0].named_parameters()}
    teacher = Teacher(chunks, offload=True)
    body = [p for p in chunks[0].parameters() if p is not chunks[0].head_weight]
    between = {p.device.type for p in body}
    assert teacher._offloaded is not None and teacher.head is not None
    offloaded = {id(p) for slab in teacher._offloaded._slabs for p in slab._parameters}
    assert offloaded == {id(p) for p in body}
    with teacher._offloaded:
        within = {p.device.type for p in body}
    same = all(torch.equal(value.to(device), before[name]) for name, value in chunks[0].named_parameters())
    assert not any(p.requires_grad for p in chunks[0].parameters())
    destroy_parallel(keep_world=True)
    return between, within, teacher.head.device.type, same


def test_on_a_cpu_nothing_moves_and_nothing_changes(pools: RankPools) -> None:
    assert pools.of(1).run(places_of_weights, "cpu") == [({"cpu"}, {"cpu"}, "cpu", True)]


def weights_in_slabs() -> tuple[list[int], bool]:
    """Parameters of odd sizes and two types, in slabs of 1 KiB: their sizes, and whether all stay what they were."""
    from megatron_sead.models.slabs import slabs
    from megatron_sead.training import teacher

    sizes = [(3, 5), (100,), (300,), (7,), (1, 1), (64,)]
    made = [torch.randn(size) if n % 2 else torch.randn(size).bfloat16() for n, size in enumerate(sizes)]
    parameters = [torch.nn.Parameter(tensor.clone(), requires_grad=False) for tensor in made]
    numbers = list(slabs([p.nbytes for p in parameters], 1024))
    made_slabs = [teacher._Slab([parameters[i] for i in slab]) for slab in numbers]
    same = True
    for move in (teacher._Slab.onto_device, teacher._Slab.off_device):
        for slab in made_slabs:
            move(slab)
        same &= all(
            torch.equal(p, tensor) and p.dtype == tensor.dtype for p, tensor in zip(parameters, made, strict=True)
        )
        same &= all(p.data_ptr() % 2 == 0 and p.is_contiguous() for p in parameters)
    return [len(slab._host) for slab in made_slabs], same


def test_weights_share_few_pieces_of_memory(pools: RankPools) -> None:
    """256 + 512 bytes; 600 take 768 and 256 are left for the next; 256 + 256."""
    assert pools.of(1).run(weights_in_slabs) == [([768, 1024, 512], True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: weights move between it and host memory")
def test_on_a_gpu_all_but_the_head_lives_in_host_memory() -> None:
    assert places_of_weights("cuda") == ({"cpu"}, {"cuda"}, "cuda", True)
