"""Who holds what of a sequence under context parallelism, and which keys a rank's queries see. Knows torch alone.

A sequence of L tokens, padded to a multiple of 2 * ranks, is cut into 2 * ranks pieces of equal length. Rank r holds
piece r and piece 2 * ranks - 1 - r, in this order: the queries of an early piece see few keys, those of a late one
many, and the two of every rank as many in all. Of several sequences, packed or in rows, each is cut so, and a rank
holds its two pieces of the first, then of the second, and so on. Transformer Engine has the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

# Shapes: T tokens of all sequences, t of them on a rank, T / ranks; S sequences, of which a rank holds 2 S pieces


def pieces(rank: int, ranks: int) -> tuple[int, int]:
    """Numbers of the pieces that a rank holds of every sequence."""
    return rank, 2 * ranks - 1 - rank


def held(lengths: Sequence[int], rank: int, ranks: int) -> torch.Tensor:
    """[t] places, among all T, of the tokens that a rank holds, in its order. Lengths are multiples of 2 * ranks."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        size = length // (2 * ranks)
        parts += [torch.arange(start + piece * size, start + (piece + 1) * size) for piece in pieces(rank, ranks)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Keys:
    """The keys that a rank's queries see, piece by piece, and who has them.

    The queries of a piece are the last of its keys: causal masks and windows are aligned to the lower right.
    """

    query_lengths: list[int]  # [2 S]
    key_lengths: list[int]  # [2 S]
    query_starts: torch.Tensor  # [2 S + 1] int32, cumulative
    key_starts: torch.Tensor  # [2 S + 1] int32
    index: torch.Tensor  # [sum of key_lengths] into what the rank fetches
    sent: torch.Tensor | None  # into the rank's own t: those that it sends, receiver by receiver; None: all to all
    sent_counts: list[int]  # to each rank
    received_counts: list[int]  # from each rank, in whose order they arrive

    @staticmethod
    def of(lengths: Sequence[int], rank: int, ranks: int, window: int | None) -> Keys:
        """Of sequences of these lengths.

        Args:
            window: how many tokens a query sees, itself included; None: all before it, and ranks send all they hold.
        """
        place = torch.cat([held(lengths, one, ranks) for one in range(ranks)])
        row = torch.empty_like(place)
        row[place] = torch.arange(len(place))  # of each place, where it is in what all ranks hold, rank by rank
        seen = seen_by(lengths, rank, ranks, window)
        rows, t = row[torch.cat(seen)], len(place) // ranks
        sent: torch.Tensor | None = None
        sent_counts, received_counts = [t] * ranks, [t] * ranks
        index = rows
        if window is not None:
            wanted = [row[torch.cat(seen_by(lengths, one, ranks, window))].unique() for one in range(ranks)]
            mine = [rows[rows // t == rank] - rank * t for rows in wanted]
            sent, sent_counts = torch.cat(mine), [len(rows) for rows in mine]
            received_counts = (wanted[rank] // t).bincount(minlength=ranks).tolist()
            index = torch.searchsorted(wanted[rank], rows)
        query_lengths = [length // (2 * ranks) for length in lengths for _ in range(2)]
        key_lengths = [len(places) for places in seen]
        starts = _starts(query_lengths), _starts(key_lengths)
        return Keys(query_lengths, key_lengths, *starts, index, sent, sent_counts, received_counts)

    def to(self, device: torch.device) -> Keys:
        """With its tensors there. The host does not wait for a GPU."""

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)

        return replace(
            self,
            query_starts=moved(self.query_starts),
            key_starts=moved(self.key_starts),
            index=moved(self.index),
            sent=None if self.sent is None else moved(self.sent),
        )


def _starts(lengths: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def seen_by(lengths: Sequence[int], rank: int, ranks: int, window: int | None) -> list[torch.Tensor]:
    """Places among all T of the keys that each piece of a rank sees."""
    seen = []
    for start, length in zip(accumulate(lengths, initial=0), lengths, strict=False):
        size = length // (2 * ranks)
        for piece in pieces(rank, ranks):
            first = 0 if window is None else max(0, piece * size - window + 1)
            seen.append(torch.arange(start + first, start + (piece + 1) * size))
    return seen
