"""How long responses will be: as a run recorded them, as a file says, or by their mean and 99th percentile."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from statistics import NormalDist, fmean

from megatron_sead.errors import ArgumentError, UserError

STEPS_READ = 20  # newest records of a run
SHARE_OF_LONGEST = 8  # where nothing is said, the mean is this part of the longest
PROMPT = 256  # tokens, where nothing is known
STEP = re.compile(r"step-(\d+)\.jsonl", re.ASCII)
NORMAL = NormalDist()
WIDEST = math.exp(NORMAL.inv_cdf(0.99) ** 2 / 2)  # 99th percentile over mean: no log-normal has more


@dataclass(frozen=True, eq=False)  # one distribution is another only if it is the same object: quick to look up
class Lengths:
    """Tokens of responses, and of a prompt."""

    values: tuple[int, ...]  # ascending: a sample, or quantiles at equal steps
    prompt: float  # mean
    source: str

    @cached_property
    def mean(self) -> float:
        return fmean(self.values)

    def of_step(self, count: int) -> tuple[int, ...]:
        """Lengths of a step's responses, ascending: the middles of `count` equal parts of the distribution."""
        return _quantiles(self.values, count)


@lru_cache(maxsize=64)
def _quantiles(values: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(values[int((i + 0.5) / count * len(values))] for i in range(count))


def log_normal(mean: float, p99: float, longest: int, prompt: float) -> Lengths:
    """A log-normal distribution, cut at `longest`: what would be longer is as long as that.

    Raises:
        ArgumentError: no log-normal has these numbers.
    """
    if not 0 < mean <= p99 or p99 > WIDEST * mean:
        raise ArgumentError(
            "lengths",
            f"{mean:g},{p99:g}",
            f"must be a mean and a 99th percentile of 1 to {WIDEST:.1f} times as much, as 2000,16384",
        )
    z = NORMAL.inv_cdf(0.99)
    # mean = exp(mu + s^2 / 2) and p99 = exp(mu + z s); the smaller root is the narrower distribution
    spread = z - math.sqrt(max(0.0, z * z - 2 * math.log(p99 / mean)))
    middle = math.log(mean) - spread**2 / 2
    count = 4096
    drawn = (math.exp(middle + spread * NORMAL.inv_cdf((i + 0.5) / count)) for i in range(count))
    values = tuple(max(1, min(longest, round(value))) for value in drawn)
    return Lengths(values, prompt, f"log-normal, mean {mean:g} and 99th percentile {p99:g}, cut at {longest:,}")


def read_lengths(told: str | None, longest: int, longest_prompt: int | None) -> Lengths:
    """What the user says of lengths: ``MEAN,P99``, a run's directory, or a file with a number a line. None: a
    log-normal distribution up to the longest.

    Args:
        longest: response, rollouts.max_new_tokens.
        longest_prompt: None where it is not known.

    Raises:
        UserError: none of these, or they hold no lengths.
    """
    prompt = float(min(PROMPT, longest_prompt or PROMPT))
    if told is None:
        return log_normal(max(1.0, longest / SHARE_OF_LONGEST), max(1.0, float(longest)), longest, prompt)
    if (numbers := re.fullmatch(r"([\d.]+),([\d.]+)", told)) is not None:
        try:
            return log_normal(float(numbers[1]), float(numbers[2]), longest, prompt)
        except ValueError:
            raise ArgumentError("lengths", told, "must be two numbers, as 2000,16384") from None
    path = Path(told).expanduser()
    if path.is_dir():
        return recorded(path, longest)
    if not path.is_file():
        raise ArgumentError(
            "lengths", told, "no such file or directory; must be MEAN,P99, a run's directory, or a file of numbers"
        )
    return Lengths(_ascending(_numbers(path), longest), prompt, str(path))


def recorded(run: Path, longest: int) -> Lengths:
    """Of the rollouts that a run recorded; without them, by the mean length in its metrics.

    Raises:
        UserError: it holds neither.
    """
    files = {int(n[1]): f for f in (run / "rollouts").glob("step-*.jsonl") if (n := STEP.fullmatch(f.name))}
    responses, prompts = list[int](), list[int]()
    for _, file in sorted(files.items())[-STEPS_READ:]:
        for record in _objects(file):
            responses.append(_count(record, "response_token_ids"))
            prompts.append(_count(record, "prompt_token_ids"))
    if responses:
        return Lengths(_ascending(responses, longest), fmean(prompts), f"{len(responses):,} rollouts of {run}")
    metrics = run / "metrics.jsonl"
    told = [r.get("response_length") for r in _objects(metrics)] if metrics.is_file() else []
    means = [float(mean) for mean in told if isinstance(mean, int | float) and mean > 0]
    if not means:
        raise UserError(f"{run}: holds no rollouts/step-N.jsonl, and no response_length in metrics.jsonl")
    mean = fmean(means)
    return log_normal(mean, min(max(mean, float(longest)), WIDEST * mean), longest, PROMPT)


def _count(record: dict[str, object], name: str) -> int:
    tokens = record.get(name)
    return len(tokens) if isinstance(tokens, list) else 0


def _objects(file: Path) -> list[dict[str, object]]:
    try:  # not splitlines(): a response may hold line separators such as U+2028, which end no line of the file
        records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read: {' '.join(str(error).split())}") from None
    if not all(isinstance(record, dict) for record in records):
        raise UserError(f"{file}: must hold a JSON object a line")
    return records


def _numbers(path: Path) -> list[int]:
    try:
        numbers = [int(float(word)) for word in re.split(r"[\s,\[\]]+", path.read_text(encoding="utf-8")) if word]
    except (OSError, ValueError, OverflowError):
        raise UserError(f"{path}: must hold lengths of responses in tokens, a number a line") from None
    if not numbers or min(numbers) < 1:
        raise UserError(f"{path}: must hold lengths of responses in tokens, each at least 1")
    return numbers


def _ascending(values: Sequence[int], longest: int) -> tuple[int, ...]:
    return tuple(sorted(max(1, min(longest, value)) for value in values))
