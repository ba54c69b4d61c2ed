"""How far tensors are from a reference, taken a part at a time, and memory seen on the way."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

PART = 2**24  # elements at once in fp64


@dataclass
class Distance:
    """Of a tensor, or of a rank's share of it; shares add up."""

    squares: float = 0.0  # of the difference
    expected_squares: float = 0.0
    largest: float = 0.0  # absolute difference
    expected_largest: float = 0.0

    @classmethod
    def between(cls, found: torch.Tensor, expected: torch.Tensor) -> Distance:
        assert found.shape == expected.shape
        total = cls()
        rows = max(1, PART // max(1, found[0].numel()))
        for a, b in zip(found.split(rows), expected.split(rows), strict=True):
            b = b.double()
            apart = a.double() - b
            total.squares += float(apart.square().sum())
            total.expected_squares += float(b.square().sum())
            total.largest = max(total.largest, float(apart.abs().max()))
            total.expected_largest = max(total.expected_largest, float(b.abs().max()))
        return total

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.squares + other.squares,
            self.expected_squares + other.expected_squares,
            max(self.largest, other.largest),
            max(self.expected_largest, other.expected_largest),
        )

    def relative(self) -> dict[str, float]:
        """Of the norms (l2), and of the largest entries (max)."""
        return {
            "l2": (self.squares / self.expected_squares) ** 0.5,
            "max": self.largest / self.expected_largest,
        }


@dataclass
class Seen:
    """What one process saw in a pass."""

    loss: float = 0.0
    logits: Distance = field(default_factory=Distance)
    gradients: dict[str, Distance] = field(default_factory=dict)  # by the first Hugging Face name of the weight
    peak_bytes: int = 0  # of memory of its own, sampled where gradients are made

    def sample_memory(self) -> None:
        lines = Path("/proc/self/status").read_text().splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
        self.peak_bytes = max(self.peak_bytes, kilobytes * 1024)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Seen:
        gradients = {name: Distance(**distance) for name, distance in content["gradients"].items()}
        return cls(content["loss"], Distance(**content["logits"]), gradients, content["peak_bytes"])


def merge(shares: list[Seen]) -> Seen:
    """Of all tensor-parallel ranks: shares of logits and gradients together, memory of all processes."""
    first = shares[0]
    merged = Seen(first.loss, first.logits, dict(first.gradients), sum(share.peak_bytes for share in shares))
    for share in shares[1:]:
        assert abs(share.loss - first.loss) <= 1e-6 * abs(first.loss), "ranks disagree on the loss"
        merged.logits += share.logits
        for name, distance in share.gradients.items():
            merged.gradients[name] += distance
    return merged
