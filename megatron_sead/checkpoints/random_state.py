"""The random generators of this rank, as plain values and tensors."""

from __future__ import annotations

import random
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker


def random_state() -> dict[str, Any]:
    """States of Python's, numpy's, torch's and Megatron's generators."""
    kind, keys, *rest = numpy.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(numpy.asarray(keys, dtype="int64")), *rest),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set all generators to what `random_state` returned.

    The device's generators keep their state where the saved one is of another kind of device: a CPU's has 5,056 bytes,
    a GPU's 16, and neither can be made of the other.
    """
    kind, keys, *rest = state["numpy"]
    random.setstate(state["python"])
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if len(state["device"]) == len(torch.cuda.get_rng_state()):
        torch.cuda.set_rng_state(state["device"])
        get_cuda_rng_tracker().set_states(state["megatron"])
