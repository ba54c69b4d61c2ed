"""``python -m megatron_sead.train`` with a vLLM engine that fails from the second step on: FAULT says how. Where ranks
share a model, the other does not learn of it: it waits within vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch

from megatron_sead.commands.train import app
from megatron_sead.rollouts import vllm_engine
from megatron_sead.rollouts.vllm_engine import VllmEngine

KEPT = "model.layers.1.mlp.down_proj.weight"
load, generate = VllmEngine.load_weights, VllmEngine._write
loads = 0
before: dict[str, torch.Tensor] = {}


def load_badly(engine: VllmEngine, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    """One weight is left out; or it comes as it was."""
    global loads
    loads += 1
    if os.environ["FAULT"] == "dies":
        load(engine, weights)
    elif loads == 1:
        load(engine, ((name, before.setdefault(name, tensor.clone())) for name, tensor in weights))
    elif os.environ["FAULT"] == "left out":
        load(engine, (pair for pair in weights if pair[0] != KEPT))
    else:
        load(engine, ((name, before[name] if name == KEPT else tensor) for name, tensor in weights))


def write_badly(engine: VllmEngine, requests: Any, step: int, sampling: Any) -> Any:
    """The second rank's replica dies as it writes step 1."""
    if os.environ["FAULT"] == "dies" and step == 1 and os.environ["RANK"] == "1":
        engine._llm.generate = lambda *arguments, **keywords: (_ for _ in ()).throw(RuntimeError("out of memory"))
    return generate(engine, requests, step, sampling)


if __name__ == "__main__":
    VllmEngine.load_weights = load_badly  # type: ignore[method-assign]
    VllmEngine._write = write_badly  # type: ignore[method-assign]
    vllm_engine.PATIENCE = timedelta(seconds=1)
    app()
