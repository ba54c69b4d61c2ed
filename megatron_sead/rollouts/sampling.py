"""Choosing tokens from logits: each rollout has its own random numbers, which are looked up in the cumulative
distribution."""

from __future__ import annotations

from hashlib import blake2b

import numpy as np
import torch

from megatron_sead.rollouts.engine import GenerationRequest, Sampling

# Shapes: b rollouts, V true vocabulary size, t new tokens


def uniforms(seed: int, step: int, request: GenerationRequest, count: int) -> np.ndarray:
    """[count] fp64 numbers in [0, 1), a function of (seed, step, prompt_id, sample) alone.

    A counter-based generator keyed by a hash of the four: neither the batch that a rollout is in, nor the rank that
    writes it, nor how many were written before changes them; and a longer limit only adds numbers at the end.
    """
    return np.random.Generator(np.random.Philox(key=_key(seed, step, request, 16))).random(count)


def request_seed(seed: int, step: int, request: GenerationRequest) -> int:
    """63 bits for engines that draw by themselves, a function of the same four alone."""
    return _key(seed, step, request, 8) >> 1


def _key(seed: int, step: int, request: GenerationRequest, size: int) -> int:
    """A hash of `size` bytes."""
    name = f"{seed}\0{step}\0{request.sample}\0{request.prompt_id}".encode()
    return int.from_bytes(blake2b(name, digest_size=size).digest(), "little")


def choose_tokens(logits: torch.Tensor, uniform: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """One token a row.

    Args:
        logits: [b, V] fp32.
        uniform: [b] fp64 in [0, 1), not used when greedy.

    Returns:
        [b] int64. The CDF runs in vocabulary order and in fp64, so that two computations of the same logits which
        differ in the last bit choose the same token unless the number falls within that bit of a boundary. Of a row
        that is not finite some token, whose log-probability is NaN.
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probabilities = torch.softmax(logits.double() / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        probabilities = _truncate(probabilities, sampling.top_p)
    cdf = probabilities.cumsum(-1)
    # u * total < total, so the first entry above it exists and has a probability above zero; in a row of NaN none does
    chosen = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:], right=True).squeeze(1)
    return chosen.clamp(max=logits.shape[-1] - 1)


def _truncate(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero outside of the nucleus: the fewest most probable tokens whose sum reaches top_p (not renormalised)."""
    ordered, index = probabilities.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(-1) - ordered
    return torch.zeros_like(probabilities).scatter_(-1, index, ordered.masked_fill(before >= top_p, 0.0))
