"""What transformers makes of a model, here or in a process of its own, which must not import Megatron."""

from __future__ import annotations

import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

from megatron_sead.models.streamed import streamed_log_probs
from megatron_sead.rollouts.engine import EngineContext


def reference_log_probs(context: EngineContext, tokens: list[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens) - 1] fp32 by the model of the context's directory, one layer in memory.

    Args:
        context: without a group.

    Raises:
        UserError: transformers cannot load it.
    """
    if "vllm" not in sys.modules:
        return _log_probs(context, tokens)
    # vLLM has changed transformers' classes for this process
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_log_probs, context, tokens).result()


def _log_probs(context: EngineContext, tokens: list[int]) -> torch.Tensor:
    return streamed_log_probs(
        context.directory, tokens, dtype=context.dtype, device=context.device, vocab_size=context.vocab_size
    )
