"""The sentence at the end: which layout is fastest, and what holds larger ones back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from megatron_sead.scaling.records import Numbers, best_by_ranks, efficiency
from megatron_sead.wording import counted

ENOUGH = 0.75  # of a doubling's gain; below, something binds
DIMENSIONS = ("tp", "pp", "dp", "cp")


def conclusion(runs: Sequence[Numbers], cores: int | None) -> str:
    """ "TP 4 x DP 2 is fastest; beyond TP 4 the link binds."

    Args:
        runs: of strong scaling.
        cores: that ranks on a CPU share; None: every rank has a device of its own.
    """
    whole = [run for run in runs if run.reason is None]
    if not whole:
        return "No layout of strong scaling was measured."
    best = max(whole, key=lambda run: run.tokens_per_second)
    verb = "is predicted to be fastest" if best.kind == "predicted" else "is fastest"
    said = f"{best.shape} {verb} of {counted(len(whole), 'layout')}: {best.tokens_per_second:,.0f} tokens a second"
    fewest = best_by_ranks(whole)[0]
    if best.ranks > fewest.ranks:
        ratio = best.tokens_per_second / fewest.tokens_per_second
        said += f", {ratio:.2f} times that of {fewest.shape} on {best.ranks / fewest.ranks:g} times the ranks"
        said += f" (efficiency {efficiency(whole)[best.name]:.0%})"
    if best.kind == "predicted":
        limits = [_limit_of_ranks(whole)]
    else:
        limits = [_limit(name, whole, cores) for name in DIMENSIONS]
    return "; ".join([said, *filter(None, limits)]) + "."


def _limit(name: str, runs: Sequence[Numbers], cores: int | None) -> str | None:
    """Where more ranks in one dimension stop paying, and why; None where they pay as far as they were tried."""
    for small, large in pairs(name, runs):
        factor = large.layout[name] / small.layout[name]
        gain = large.tokens_per_second / small.tokens_per_second
        if gain < 1 + ENOUGH * (factor - 1):
            size = f"beyond {name.upper()} {small.layout[name]}"
            return f"{size} {what_binds(name, small, large, cores)} (x{gain:.2f} for {factor:g} times the ranks)"
    return None


def _limit_of_ranks(runs: Sequence[Numbers]) -> str | None:
    """From how many ranks on more of them stop paying, whatever the layout."""
    for small, large in pairwise(best_by_ranks(runs)):
        gain, factor = large.tokens_per_second / small.tokens_per_second, large.ranks / small.ranks
        if gain < 1 + ENOUGH * (factor - 1):
            return (
                f"beyond {small.ranks:,} ranks {grown(small, large)} binds (x{gain:.2f} for {factor:g} times the ranks)"
            )
    return None


def grown(small: Numbers, large: Numbers) -> str:
    """What of a predicted step falls furthest short of shrinking as the ranks grow."""
    ideal = small.seconds * small.ranks / large.ranks
    excess = {name: large.seconds * share - ideal * small.shares.get(name, 0.0) for name, share in large.shares.items()}
    return max(excess, key=lambda name: excess[name])


def pairs(name: str, runs: Sequence[Numbers]) -> list[tuple[Numbers, Numbers]]:
    """Runs and those that differ from them in a larger size of one dimension alone, smallest first."""

    def rest(run: Numbers) -> dict[str, Any]:
        return {key: value for key, value in run.layout.items() if key not in (name, "sp", "vpp")}

    found = []
    ordered = sorted(runs, key=lambda run: (run.layout[name], -run.tokens_per_second))
    for small in ordered:
        larger = [r for r in ordered if r.layout[name] > small.layout[name] and rest(r) == rest(small)]
        if larger:
            found.append((small, larger[0]))
    return found


def what_binds(name: str, small: Numbers, large: Numbers, cores: int | None) -> str:
    """Of going from `small` to `large`, by what the records show."""
    if large.shares:
        return f"{grown(small, large)} binds"
    if cores is not None and large.ranks > cores:
        return f"the {cores} cores bind, which {large.ranks} ranks share"
    if name == "pp" and large.bubble > 0.1:
        return f"the bubble binds, {large.bubble:.0%} of a training pass"
    calls, size = large.groups.get(name, (0.0, 0.0))
    if calls:
        return f"the link binds, or waiting at it: {calls:,.0f} collectives of {size / 1e6:,.3g} MB a step and rank"
    return "what does not shrink with the ranks binds"
