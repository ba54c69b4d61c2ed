"""What a rollout engine is. The loop, the checks and the evaluation know nothing else about one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch.distributed import ProcessGroup

from megatron_sead.errors import UserError


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
    finished: bool  # False: cut at max_new_tokens, or because it repeated itself
    log_probs: tuple[float, ...] | None  # the engine's own, of each response token, at temperature 1
    repeated: bool = False  # cut because it repeated itself


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Temperature 0 is greedy; top_p keeps the smallest set of tokens with that probability."""

    temperature: float
    top_p: float
    max_new_tokens: int


@dataclass(frozen=True)
class EngineContext:
    """What an engine is told of the model and the run, beside its own settings."""

    directory: Path  # Hugging Face directory with the first weights and the tokenizer
    stop_token_ids: Sequence[int]  # tokens that end a response
    pad_token_id: int  # any valid id
    seed: int
    device: torch.device
    dtype: torch.dtype  # of weights and computation
    vocab_size: int | None = None  # true size: logits beyond it are never sampled; None: the model's config says it
    group: ProcessGroup | None = None  # gloo, the ranks that share the work; None: this process alone
    max_length: int | None = None  # tokens of the longest prompt with its response; None: as many as the model reads


Meanwhile = Callable[[dict[int, Rollout] | None], None]
"""What a rank does when it has written its share, before it waits for the others: gets the rollouts by the number of
their request, or None where it failed."""


class EngineFailed(UserError):
    """An engine cannot go on. The student is as it was, and can be saved."""


class RanksUnreachable(UserError):
    """Other ranks wait for this one within the engine, for ever: it must end, and with it all. Nothing collective may
    follow, and so the student is not saved."""


class RolloutEngine(Protocol):
    """Writes a step's responses with the weights it was last given, on the devices that also train.

    Every method but `close` is collective over all ranks, so that an engine may spread its model over them.
    """

    has_weights: bool
    """False: it writes nothing by itself, and no check can tell whether its responses are the student's."""

    def generate(
        self,
        requests: list[GenerationRequest],
        step: int,
        sampling: Sampling | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> list[Rollout]:
        """Each rank passes the same requests and receives all rollouts, in request order.

        Args:
            sampling: how to choose tokens this time, for evaluation; None: as the run's settings say.
            meanwhile: called on every rank, once; given with `rollouts.overlap` alone. It may put the engine to sleep.
        """
        ...

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Take new weights: (Hugging Face name, whole tensor) pairs, one tensor in memory at a time.

        They may be the student's own parameters: what is kept must be a copy.
        Must be consumed to the end on every rank, whatever is wrong with a name: making them is collective.
        """
        ...

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [len(token_ids) - 1] fp32 of each token after the first, given those before it.

        At temperature 1, by the same weights and code that `generate` uses: after every update they are compared with
        the student's. ValueError where `has_weights` is False.
        """
        ...

    def sleep(self) -> None:
        """Give device memory back while the student trains. Weights may be lost."""
        ...

    def wake(self) -> None:
        """Take it again. `load_weights` comes before anything else is asked."""
        ...

    def close(self) -> None:
        """End what the engine has started. It is asked for nothing again; closing it again does nothing."""
        ...
