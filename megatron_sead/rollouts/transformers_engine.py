"""Rollouts by a Hugging Face model in this process: batched decoding with a KV cache, on any device."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed import ProcessGroup
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.utils.logging import disable_progress_bar

from megatron_sead.config.rollouts import TransformersRollouts
from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.models.family import read_config_fields
from megatron_sead.models.weight_files import locate_tensors
from megatron_sead.rollouts.engine import EngineContext, EngineFailed, GenerationRequest, Meanwhile, Rollout, Sampling
from megatron_sead.rollouts.new_weights import arriving
from megatron_sead.rollouts.sampling import choose_tokens, uniforms
from megatron_sead.rollouts.sharing import gather_written, share_of

# Shapes: b rollouts being written together, s padded prompt length, t new tokens so far, V true vocabulary size

SCORE_CHUNK = 512  # positions whose logits are in memory at once


class TransformersEngine:
    """Every rank holds the whole model and writes its share of the rollouts.

    Args:
        directory: Hugging Face directory with the first weights.
        sampling: how tokens are chosen unless a call says otherwise.
        stop_token_ids: tokens that end a response.
        pad_token_id: any valid id; padded positions are masked.
        vocab_size: true size: logits beyond it are padding and never sampled; None: all of the model's are real.
        batch_size: rollouts written at once on one rank.
        group: gloo (CPU) group whose ranks share the work; None: this process alone.
    """

    has_weights = True

    def __init__(
        self,
        directory: Path,
        *,
        sampling: Sampling,
        stop_token_ids: Sequence[int],
        pad_token_id: int,
        seed: int,
        batch_size: int = 64,
        vocab_size: int | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        group: ProcessGroup | None = None,
    ) -> None:
        self.device = device or torch.device("cpu")
        self.model = _load_model(directory, dtype).to(self.device).eval().requires_grad_(False)
        self._shapes = {name: parameter.shape for name, parameter in self.model.named_parameters()}
        for parameter in self.model.parameters():  # from a mapped file to where they are after a sleep, too: the last
            parameter.data = parameter.data.clone()  # bits of a product depend on how memory is aligned
        self.sampling = sampling
        self.pad_token_id = pad_token_id
        self.seed = seed
        self.batch_size = batch_size
        self.vocab_size: int = vocab_size or self.model.config.vocab_size
        self.group = group
        self._stop = torch.tensor(sorted(stop_token_ids), device=self.device)

    def generate(
        self,
        requests: list[GenerationRequest],
        step: int,
        sampling: Sampling | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> list[Rollout]:
        """Collective over the group: each rank passes the same requests and receives all rollouts, in their order.

        Raises:
            NotFiniteNumbers: on every rank: the model's logits are not finite for one of the prompts.
            EngineFailed: on every rank: one has not the memory.
        """
        rank, size = (0, 1) if self.group is None else (self.group.rank(), self.group.size())
        mine = share_of(requests, rank, size)  # prompts of like length share a batch
        written: dict[int, Rollout] = {}
        problem: UserError | None = None
        for start in range(0, len(mine), self.batch_size):
            batch = mine[start : start + self.batch_size]
            try:
                with _memory_told():
                    rollouts = self._write([requests[i] for i in batch], step, sampling or self.sampling)
            except UserError as error:  # the other ranks are still writing
                problem = error
                break
            written.update(zip(batch, rollouts, strict=True))
        return gather_written(written, problem, len(requests), self.group, meanwhile)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy new weights in place.

        Raises:
            ValueError: as `arriving` does.
        """
        parameters = dict(self.model.named_parameters())
        with arriving(weights, self._shapes) as pairs, torch.no_grad():
            for name, tensor in pairs:
                parameters[name].copy_(tensor)

    @torch.inference_mode()
    def score(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [len(token_ids) - 1] fp32 of each token after the first, given those before it."""
        ids = torch.tensor([list(token_ids)], device=self.device)
        hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, :-1]
        head = self.model.get_output_embeddings()
        chunks = zip(hidden.split(SCORE_CHUNK), ids[0, 1:].split(SCORE_CHUNK), strict=True)
        rows = [_log_probs(head(part)[:, : self.vocab_size].float(), targets) for part, targets in chunks]
        return torch.cat(rows).cpu()

    def sleep(self) -> None:
        """Free the weights. New ones follow, and copying them to the host would cost as much time as loading those."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.new_empty(0)

    def wake(self) -> None:
        """Allocate memory for the weights, which `load_weights` fills. An engine that is awake stays as it is."""
        with _memory_told():
            for name, parameter in self.model.named_parameters():
                if parameter.shape != self._shapes[name]:
                    parameter.data = parameter.data.new_empty(self._shapes[name])

    def close(self) -> None:
        """Let the model go."""
        self.model = None

    @torch.inference_mode()
    def _write(self, requests: list[GenerationRequest], step: int, sampling: Sampling) -> list[Rollout]:
        uniform = torch.from_numpy(
            np.stack([uniforms(self.seed, step, request, sampling.max_new_tokens) for request in requests])
        ).to(self.device)
        tokens: list[list[int]] = [[] for _ in requests]
        log_probs: list[list[float]] = [[] for _ in requests]
        finished = [False] * len(requests)
        live = torch.arange(len(requests), device=self.device)
        rows = list(range(len(requests)))  # `live` as Python sees it
        decoder = _Decoder(self.model, [request.prompt_token_ids for request in requests], self.pad_token_id)

        for t in range(sampling.max_new_tokens):
            logits = decoder.logits()[:, : self.vocab_size].float()  # [b, V]
            chosen = choose_tokens(logits, uniform[live, t], sampling)
            stopped = torch.isin(chosen, self._stop)
            probabilities = _log_probs(logits, chosen)
            for row, token, value, stop in zip(
                rows, chosen.tolist(), probabilities.tolist(), stopped.tolist(), strict=True
            ):
                if not math.isfinite(value):
                    raise NotFiniteNumbers(
                        f"rollout of prompt {requests[row].prompt_id!r}: the model's logits of token {t} are not finite"
                    )
                tokens[row].append(token)
                log_probs[row].append(value)
                finished[row] = stop
            if stopped.any():
                keep = (~stopped).nonzero().squeeze(1)
                live, chosen = live[keep], chosen[keep]
                rows = live.tolist()
                if not rows:
                    break
                decoder.keep(keep)
            decoder.append(chosen)

        return [
            Rollout(r.prompt_id, r.sample, r.prompt_token_ids, tuple(tokens[i]), finished[i], tuple(log_probs[i]))
            for i, r in enumerate(requests)
        ]


def make(settings: TransformersRollouts, context: EngineContext) -> TransformersEngine:
    """As the registry asks for it."""
    return TransformersEngine(
        context.directory,
        sampling=Sampling(settings.temperature, settings.top_p, settings.max_new_tokens),
        stop_token_ids=context.stop_token_ids,
        pad_token_id=context.pad_token_id,
        seed=context.seed,
        batch_size=settings.batch_size,
        vocab_size=context.vocab_size,
        device=context.device,
        dtype=context.dtype,
        group=context.group,
    )


class _Decoder:
    """The rows still being written: what the model must read next, and its cache of what it has read."""

    def __init__(self, model: Any, prompts: list[tuple[int, ...]], pad_token_id: int) -> None:
        longest = max(len(prompt) for prompt in prompts)
        # Left padding: all rows write their next token in the same column
        padded = [[pad_token_id] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
        self._model = model
        # transformers 5.24 calls the cache by another name than those before it
        names = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._next = torch.tensor(padded, device=model.device)  # [b, s], then [b, 1]
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        columns = torch.arange(longest, device=model.device)
        self._mask = (columns >= longest - lengths[:, None]).long()  # [b, s + t], 0 on padding
        self._positions = (self._mask.cumsum(-1) - 1).clamp(min=0)  # like _next
        self._cache = DynamicCache(config=model.config)
        self._padded = bool((lengths < longest).any())

    def logits(self) -> torch.Tensor:
        """[b, V padded] of the next token."""
        output = self._model(
            input_ids=self._next,
            # Without padding the model needs no mask, and its attention may take a faster path
            attention_mask=self._mask if self._padded else None,
            position_ids=self._positions,
            logits_to_keep=1,
            **{self._cache_name: self._cache},
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def keep(self, rows: torch.Tensor) -> None:
        """Drop all but these rows [kept]."""
        self._mask = self._mask[rows]
        self._positions = self._positions[rows]
        self._cache.batch_select_indices(rows)

    def append(self, tokens: torch.Tensor) -> None:
        """Each row's new token [b], which the model reads next."""
        self._next = tokens[:, None]
        self._positions = self._positions[:, -1:] + 1
        self._mask = torch.nn.functional.pad(self._mask, (0, 1), value=1)


def _log_probs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability [b] of one token a row of [b, V] fp32 logits, at temperature 1, nothing truncated."""
    return logits.gather(-1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def _load_model(directory: Path, dtype: torch.dtype) -> Any:
    # transformers would leave unknown keys out, and makes plain numbers of integers
    read_config_fields(directory)
    locate_tensors(directory)
    disable_progress_bar()  # of loading weights: one a rank, in the midst of the run's own
    try:
        return AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{directory}: transformers cannot load it: {_first_line(error)}") from None


@contextmanager
def _memory_told() -> Iterator[None]:
    """A GPU that is full ends the engine, not the student."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = f"rollouts.engine='transformers': {_first_line(error)}; a smaller rollouts.batch_size takes less memory"
        raise EngineFailed(told) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
