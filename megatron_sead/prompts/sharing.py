"""Who computes what: a step's rollouts over data-parallel ranks and their micro-batches, by length. No torch here."""

from __future__ import annotations

import heapq


def deal(lengths: list[int], rank: int, ranks: int) -> list[int]:
    """Which items a rank gets, longest first: as many as every other rank, and about as much length in all.

    Items sorted by length (equal ones in their order) are dealt in rounds of one item a rank, the longest of a round
    to the rank that has least so far. Micro-batches then hold rows of like length, and those that ranks run at the
    same time are alike too.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    shares: list[list[int]] = [[] for _ in range(ranks)]
    totals = [0] * ranks
    for start in range(0, len(order), ranks):
        poorest_first = sorted(range(ranks), key=lambda r: totals[r])
        for receiver, item in zip(poorest_first, order[start : start + ranks], strict=True):
            shares[receiver].append(item)
            totals[receiver] += lengths[item]
    return shares[rank]


def share_by_tokens(lengths: list[int], budget: int, rank: int, ranks: int, count_multiple: int) -> list[list[int]]:
    """Which items are in each of a rank's micro-batches: none holds more than the budget, and all are about as long.

    What is balanced is tokens: memory is in proportion to them, and so is nearly all work. Attention's part grows with
    the square of a length, but the longest items are placed first, each where least is so far, and spread out.

    Every rank has the same number of micro-batches, the least that the longest-first rule finds. Where there are
    fewer items than these micro-batches, the last ones are empty; a rank's first one is not, if items are as many as
    ranks. The result depends on the arguments alone.

    Args:
        lengths: tokens of each item.
        count_multiple: what the number of a rank's micro-batches must be a multiple of.

    Raises:
        ValueError: an item is longer than the budget.
    """
    if max(lengths) > budget:
        raise ValueError(f"a rollout has {max(lengths)} tokens: training.micro_batch_tokens holds {budget}")
    unit = ranks * count_multiple
    count = -(-sum(lengths) // (budget * unit)) * unit
    while (bins := _longest_first(lengths, count, budget)) is None:
        count += unit
    loads = [sum(lengths[item] for item in items) for items in bins]
    return [sorted(bins[i]) for i in deal(loads, rank, ranks)]


def _longest_first(lengths: list[int], count: int, budget: int) -> list[list[int]] | None:
    """Put each item, the longest first, where least is so far; None: some place would hold more than the budget."""
    places = [(0, place) for place in range(count)]
    bins: list[list[int]] = [[] for _ in range(count)]
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        load, place = places[0]
        if load + lengths[item] > budget:
            return None
        bins[place].append(item)
        heapq.heapreplace(places, (load + lengths[item], place))
    return bins
