"""Curves as few points as a screen shows, without losing a spike, and numbers as short as they can be read."""

from __future__ import annotations

import math
from collections.abc import Sequence

Number = float | None
MOST_POINTS = 1000


def thinned(xs: Sequence[float], ys: Sequence[Number], most: int = MOST_POINTS) -> tuple[list[float], list[Number]]:
    """A curve's `places_to_draw`."""
    order = places_to_draw(ys, most)
    return [xs[place] for place in order], [short(ys[place]) for place in order]


def places_to_draw(ys: Sequence[Number], most: int = MOST_POINTS) -> Sequence[int]:
    """All, if there are no more than `most`; else of each run of neighbouring points the lowest and the highest, in
    their order. A run without a known value keeps one gap."""
    if len(ys) <= most:
        return range(len(ys))
    buckets, kept = most // 2 - 1, {0, len(ys) - 1}
    for bucket in range(buckets):
        places = range(bucket * len(ys) // buckets, (bucket + 1) * len(ys) // buckets)
        known = [(y, place) for place in places if (y := ys[place]) is not None]
        kept |= {min(known)[1], max(known)[1]} if known else {places[0]}
    return sorted(kept)


def short(value: Number, digits: int = 5) -> Number:
    """With so many significant digits, a whole number without a point; None: no finite number."""
    if value is None or not math.isfinite(value):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def smoothed(values: Sequence[Number], window: int) -> list[Number]:
    """The mean of up to `window` values around each; None where none is known."""
    half, result = window // 2, list[Number]()
    for place in range(len(values)):
        known = [v for v in values[max(0, place - half) : place + half + 1] if v is not None]
        result.append(sum(known) / len(known) if known else None)
    return result
