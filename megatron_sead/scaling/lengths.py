"""How long synthetic responses are. No torch here."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist, fmean

from megatron_sead.errors import UserError

Z99 = NormalDist().inv_cdf(0.99)
Draw = Callable[[random.Random], int]  # tokens of a response


def drawing(told: str, mean: float | None = None) -> Draw:
    """How to draw a length.

    Args:
        told: MEAN,P99 of a log-normal distribution, or a file with a number of tokens a line.
        mean: instead of what is told; the lengths change in proportion.

    Raises:
        UserError: neither, or no log-normal distribution has these numbers.
    """
    if (numbers := re.fullmatch(r"(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", told, re.ASCII)) is not None:
        own = float(numbers[1])
        mu, sigma = log_normal(own, float(numbers[2]))
        mu += math.log((mean or own) / own)
        return lambda chance: max(1, round(chance.lognormvariate(mu, sigma)))
    lengths = read_lengths(Path(told))
    scale = 1.0 if mean is None else mean / fmean(lengths)
    return lambda chance: max(1, round(scale * chance.choice(lengths)))


def log_normal(mean: float, p99: float) -> tuple[float, float]:
    """mu and sigma of the log-normal distribution with this mean and 99th percentile; the narrower of the two.

    Raises:
        UserError: there is none.
    """
    widest = math.exp(Z99**2 / 2)
    if mean <= 0 or not mean <= p99 <= widest * mean:
        raise UserError(
            f"lengths={mean:g},{p99:g}: must be a mean and a 99th percentile of 1 to {widest:.1f} times as much, as "
            "2000,16384"
        )
    sigma = Z99 - math.sqrt(max(0.0, Z99**2 - 2 * math.log(p99 / mean)))
    return math.log(mean) - sigma**2 / 2, sigma


def read_lengths(path: Path) -> list[int]:
    """
    Raises:
        UserError: the file cannot be read, or a line is no number of tokens.
    """
    try:
        lines = path.expanduser().read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"lengths={path}: must be MEAN,P99 or a file; as a file it cannot be read: {reason}") from None
    wrong = next((line for line in lines if not (line.isascii() and line.isdigit() and int(line))), None)
    if wrong is not None or not lines:
        found = "is empty" if wrong is None else f"holds {wrong:.20}"
        raise UserError(f"lengths={path}: {found}; must have a whole number of tokens, at least 1, on each line")
    return [int(line) for line in lines]
