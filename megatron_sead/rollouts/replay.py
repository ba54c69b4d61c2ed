"""Rollouts read from an earlier run: the same tokens whatever the layout, which makes layouts comparable."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from megatron_sead.config.rollouts import ReplayRollouts
from megatron_sead.errors import UserError
from megatron_sead.rollouts.engine import EngineContext, GenerationRequest, Meanwhile, Rollout, Sampling
from megatron_sead.rollouts.records import FOLDER, read_records

log = logging.getLogger(__name__)


class ReplayEngine:
    """Returns all rollouts that were recorded for a step, in file order; the requests are not compared with them.

    Args:
        path: a run directory, or its rollouts folder.
        vocab_size: tokens from there on are refused; None: not checked.

    Raises:
        UserError: there is no such folder, later a step's file is missing or damaged.
    """

    has_weights = False

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        self._vocab_size = vocab_size
        self._folder = path / FOLDER if (path / FOLDER).is_dir() else path
        if not self._folder.is_dir():
            raise UserError(f"rollouts.path={path}: must be a run directory or its {FOLDER} folder")
        self._warned = False

    def generate(
        self,
        requests: list[GenerationRequest],
        step: int,
        sampling: Sampling | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> list[Rollout]:
        """Every rank reads the same file. ValueError when `sampling` asks for something that was not recorded."""
        if sampling is not None:
            raise ValueError("recorded rollouts cannot be sampled anew")
        rollouts = read_records(self._folder / f"step-{step}.jsonl")
        self._require_known_tokens(rollouts, step)
        asked = sorted((request.prompt_id, request.sample) for request in requests)
        if not self._warned and asked != sorted((rollout.prompt_id, rollout.sample) for rollout in rollouts):
            log.warning(
                "step %d: the recorded rollouts are of other prompts than this run would ask; the record is used", step
            )
            self._warned = True
        return rollouts

    def _require_known_tokens(self, rollouts: list[Rollout], step: int) -> None:
        for number, rollout in enumerate(rollouts, 1):
            tokens = (*rollout.prompt_token_ids, *rollout.response_token_ids)
            if min(tokens) < 0 or (self._vocab_size is not None and max(tokens) >= self._vocab_size):
                raise UserError(
                    f"{self._folder / f'step-{step}.jsonl'}, line {number}: holds a token outside of the student's "
                    f"vocabulary of {self._vocab_size}; it was recorded with another tokenizer, or edited"
                )

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Consumes and drops them: making them is collective, and other ranks wait for this one."""
        deque(weights, maxlen=0)

    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """ValueError: there are no weights here."""
        raise ValueError("recorded rollouts come without the weights that wrote them")

    def sleep(self) -> None:
        """It holds no memory of a device."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing was started."""


def make(settings: ReplayRollouts, context: EngineContext) -> ReplayEngine:
    """As the registry asks for it."""
    return ReplayEngine(settings.path, context.vocab_size)
