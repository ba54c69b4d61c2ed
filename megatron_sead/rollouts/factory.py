"""The engine that a run's settings name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch.distributed import ProcessGroup

from megatron_sead.config.run import RolloutSettings
from megatron_sead.errors import UserError
from megatron_sead.rollouts.engine import RolloutEngine, Sampling
from megatron_sead.rollouts.replay import ReplayEngine


def make_engine(
    settings: RolloutSettings,
    directory: Path,
    *,
    stop_token_ids: Sequence[int],
    pad_token_id: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    vocab_size: int | None = None,
    group: ProcessGroup | None = None,
) -> RolloutEngine:
    """The engine that the settings name, with the first weights of a Hugging Face directory.

    Args:
        vocab_size: true size of the vocabulary; None: the model's config says it.
        group: gloo group whose ranks share the work; None: this process alone.

    Raises:
        UserError: an engine that is not available, a directory that cannot be loaded.
    """
    if settings.engine == "replay":
        assert settings.path is not None  # RolloutSettings refuses replay without a path
        return ReplayEngine(settings.path, vocab_size)
    if settings.engine == "vllm":
        raise UserError("rollouts.engine='vllm': vllm is not supported by this version; use 'transformers' or 'replay'")
    from megatron_sead.rollouts.transformers_engine import TransformersEngine  # transformers takes seconds to import

    return TransformersEngine(
        directory,
        sampling=Sampling(settings.temperature, settings.top_p, settings.max_new_tokens),
        stop_token_ids=stop_token_ids,
        pad_token_id=pad_token_id,
        seed=seed,
        batch_size=settings.batch_size,
        vocab_size=vocab_size,
        device=device,
        dtype=dtype,
        group=group,
    )
