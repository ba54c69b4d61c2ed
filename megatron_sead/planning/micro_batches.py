"""How a step's rollouts become a rank's micro-batches: how many, how long, and what their tokens see. No torch here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from megatron_sead.config.micro_batches import count_multiple, length_multiple
from megatron_sead.config.run import RunConfig
from megatron_sead.planning.lengths import Lengths
from megatron_sead.prompts.sharing import share_by_tokens

EXACT = 1024  # rollouts of a step, up to which they are dealt out as a run does


@dataclass(frozen=True, eq=False)
class Batches:
    """A rank's micro-batches, on average. Context-parallel ranks have equal parts of each."""

    count: int
    tokens: float  # of a micro-batch, padding included
    responses: float  # response tokens of a micro-batch
    rows: tuple[int, ...]  # lengths of sequences, padding included
    spans: dict[int | None, float] = field(default_factory=dict)  # by window, as far as computed

    def span(self, window: int | None) -> float:
        """Keys that a token sees, on average over tokens: half of its sequence, or of what the window shows of it."""
        if window not in self.spans:
            seen = sum(_pairs(row, window) for row in self.rows)
            self.spans[window] = seen / sum(self.rows)
        return self.spans[window]


def _pairs(length: int, window: int | None) -> float:
    width = length if window is None else min(length, window)
    return width * (width + 1) / 2 + (length - width) * width


def micro_batches(config: RunConfig, replicas: int, lengths: Lengths) -> Batches:
    """Of a step whose responses have these lengths."""
    training = config.training
    return _micro_batches(
        lengths,
        training.global_batch_size,
        replicas,
        training.micro_batch_size,
        training.micro_batch_tokens,
        length_multiple(config.parallel),
        count_multiple(config.parallel),
        config.parallel.context_parallel_size,
    )


@lru_cache(maxsize=4096)
def _micro_batches(
    lengths: Lengths, total: int, replicas: int, rows: int, budget: int | None, multiple: int, unit: int, cp: int
) -> Batches:
    responses = lengths.of_step(total)
    whole = [round(lengths.prompt) + response for response in responses]
    share = sum(responses) / sum(whole)
    if budget is not None:
        count = _packed(whole, budget // multiple * multiple, replicas, unit)
        tokens = sum(whole) / replicas / count
        padded: Sequence[int] = whole
    else:  # rows of like length, padded to the longest of a micro-batch; all replicas' micro-batches are alike
        at_once = rows * replicas
        longest_first = sorted(whole, reverse=True)
        padded = [_up(longest_first[i // at_once * at_once], multiple) for i in range(total)]
        count = max(1, -(-total // at_once))
        tokens = sum(padded) / replicas / count
    spans = _spans(lengths, total) if budget is not None else {}
    return Batches(count, tokens / cp, share * sum(whole) / replicas / count / cp, tuple(padded), spans)


@lru_cache(maxsize=64)
def _spans(lengths: Lengths, total: int) -> dict[int | None, float]:
    """One for all ways to pack the same rollouts."""
    return {}


def _packed(lengths: list[int], room: int, replicas: int, count_unit: int) -> int:
    """Micro-batches of a rank; of many rollouts as many as their tokens fill."""
    if len(lengths) > EXACT:
        return -(-sum(lengths) // (room * replicas * count_unit)) * count_unit
    return len(share_by_tokens([min(room, length) for length in lengths], room, 0, replicas, count_unit))


def _up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
