"""What an update lacks or has too much is told, and all of it is consumed, whatever an engine does with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from megatron_sead.rollouts.engine import EngineFailed
from megatron_sead.rollouts.new_weights import arriving

SHAPES = {"a": (2, 3), "b": (4,), "c": (1,)}


def take(weights: Iterable[tuple[str, torch.Tensor]], *, dies_after: int | None = None) -> list[str]:
    """Names that an engine sees, which makes errors of its own of all that it meets."""
    seen = []
    with arriving(weights, SHAPES) as pairs:
        try:
            for name, _ in pairs:
                seen.append(name)
                if len(seen) == dies_after:
                    raise RuntimeError("out of memory")
        except Exception as error:
            raise EngineFailed(f"engine: {error}") from error
    return seen


def weights() -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape) for name, shape in SHAPES.items()}


def test_an_engine_sees_what_fits() -> None:
    assert take(weights().items()) == ["a", "b", "c"]


def test_what_does_not_fit_or_come_is_told() -> None:
    source = iter([("a", torch.ones(2, 3)), ("d", torch.ones(1)), ("b", torch.ones(5))])
    told = r"^d: the rollout model has no such weight; b: shape \[5\], .* is \[4\]; c: no new value came$"
    with pytest.raises(ValueError, match=told):
        take(source)


def test_an_engine_that_dies_leaves_nothing_unmade() -> None:
    source = iter(weights().items())
    with pytest.raises(EngineFailed, match=r"^engine: out of memory$"):
        take(source, dies_after=1)
    assert next(source, None) is None


def test_what_goes_wrong_in_making_the_weights_is_not_the_engines_failure() -> None:
    def broken() -> Iterator[tuple[str, torch.Tensor]]:
        yield "a", torch.ones(2, 3)
        raise KeyError("a bug of the trainer")

    with pytest.raises(KeyError, match="a bug of the trainer"):
        take(broken())
