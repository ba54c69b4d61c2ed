"""What a rollout engine is: it generates, and it takes new weights. The loop knows nothing else about it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class GenerationRequest:
    """One response to write. Its randomness is a function of (seed, step, prompt_id, sample) alone."""

    prompt_id: str
    sample: int
    prompt_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Rollout:
    """One response, as written."""

    prompt_id: str
    sample: int
    prompt_token_ids: tuple[int, ...]
    response_token_ids: tuple[int, ...]  # the stop token that ended it included
    finished: bool  # False: cut at max_new_tokens
    log_probs: tuple[float, ...] | None  # the engine's own, of each response token, at temperature 1


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability."""

    temperature: float
    top_p: float
    max_new_tokens: int


class RolloutEngine(Protocol):
    """Writes a step's responses with the weights it was last given."""

    def generate(self, requests: list[GenerationRequest], step: int, sampling: Sampling | None = None) -> list[Rollout]:
        """Collective over all ranks: each passes the same requests and receives all rollouts, in request order.

        Args:
            sampling: how to choose tokens this time, for evaluation; None: as the run's settings say.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Collective: (Hugging Face name, whole tensor) pairs; must be consumed to the end on every rank."""
        ...
