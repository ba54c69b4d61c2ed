"""Check 7: a 7B as a teacher that visits the card: are its weights the same after visits, and how fast do they come?"""

from __future__ import annotations

import gc
from typing import Any

import torch

from tests.gpu.check import CUDA, Report, once
from tests.gpu.models import micro_batches, random_model, start_parallel, vocabulary, write_shape

LAYERS = 32 if CUDA else 2
PROMPT, RESPONSE = (1024, 7168) if CUDA else (8, 24)


def teacher(report: Report) -> None:
    parallel = start_parallel()  # first: what is imported next imports Megatron
    from megatron_sead.training.teacher import Teacher

    folder = write_shape(LAYERS)
    model = random_model(folder, parallel)
    before = _checksums(model)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    made = []
    seconds = once(lambda: made.append(Teacher([model], offload=True)))
    frozen = made[0]
    batches = micro_batches(1, PROMPT, RESPONSE, vocabulary(folder))
    report.add(weights_gib=weights / 2**30, seconds_to_host=seconds, **_memory("at home"))
    passes = [once(lambda: frozen.hidden_states(batches, parallel)) for _ in range(2)]
    states = frozen.hidden_states(batches, parallel)[0]
    tokens = PROMPT + RESPONSE
    report.add(
        pass_seconds=passes, tokens_per_second=tokens / passes[1], states_pinned=states.is_pinned() if CUDA else None
    )
    report.expect("states", bool(states.isfinite().all()) and len(states) == RESPONSE, "finite, one a response token")
    visiting = frozen._offloaded
    arrivals = [once(visiting.__enter__) for _ in range(3)]
    report.add(arrival_seconds=arrivals, host_to_device_gb_per_second=weights / min(arrivals) / 1e9, **_memory("there"))
    report.expect("bits", _checksums(model) == before, "the weights' bits after visits are those before")
    visiting.__exit__(None, None, None)
    gc.collect()
    report.add(**_memory("at home again"))
    report.expect("arrival", weights / min(arrivals) >= 20e9 or not CUDA, "at least 20 GB/s from the host")


def _checksums(model: Any) -> list[int]:
    """Sums of every parameter's bits, weighted by place, where the parameter is."""
    sums = []
    for parameter in model.parameters():
        bits = parameter.detach().view(torch.int16).flatten().long()
        sums.append(int((bits * (torch.arange(len(bits), device=bits.device) % 8191)).sum()))
    return sums


def _memory(when: str) -> dict[str, float]:
    """GiB of the device in use, and pinned in the host."""
    if not CUDA:
        return {}
    host = torch.cuda.host_memory_stats()
    pinned = host.get("allocated_bytes.current", host.get("active_bytes.current", 0))
    return {
        f"device GiB {when}": torch.cuda.memory_allocated() / 2**30,
        f"device reserved GiB {when}": torch.cuda.memory_reserved() / 2**30,
        f"pinned GiB {when}": pinned / 2**30,
    }
