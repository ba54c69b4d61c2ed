"""Names of zones, and what their shares must be. No torch, since settings read it."""

from __future__ import annotations

from collections.abc import Sequence

NOT_VALID, ZONE_A, ZONE_B, ZONE_C = -1, 0, 1, 2
LETTERS = {ZONE_A: "A", ZONE_B: "B", ZONE_C: "C", NOT_VALID: "-"}  # as records and metrics write them

Shares = tuple[float, float, float]  # percent of the tokens in A, B, C

DEFAULT_SHARES: Shares = (50, 40, 10)


def shares_problem(shares: Sequence[float]) -> str | None:
    """What is wrong with shares; None: nothing."""
    if len(shares) != 3:
        return "must be three percentages, of zones A, B and C"
    if not min(shares) >= 0:
        return "must not be negative"
    if not abs(sum(shares) - 100) <= 1e-6:
        return f"must sum to 100 percent, not {sum(shares):g}"
    return None
