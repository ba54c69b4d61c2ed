"""The weights of an update, as they come: what an engine takes of them, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from megatron_sead.wording import first_of


@contextmanager
def arriving(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, Sequence[int]]
) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
    """The pairs that fit the engine's model, for the body to take.

    All of `weights` are consumed, whatever the body does: other ranks take part in making them.

    Args:
        shapes: of all tensors of the model, by their Hugging Face names.

    Raises:
        ValueError: a name that the model does not have, another shape, or a weight that did not come.
        Exception: what making the weights raised, whatever the body makes of it: it is not the engine's failure.
    """
    missing, problems, broken = set(shapes), list[str](), list[Exception]()

    def fitting() -> Iterator[tuple[str, torch.Tensor]]:
        source = iter(weights)
        while True:
            try:
                pair = next(source, None)
            except Exception as error:
                broken.append(error)
                raise
            if pair is None:
                return
            problem = _problem(*pair, shapes)
            missing.discard(pair[0])
            if problem is None:
                yield pair
            else:
                problems.append(problem)

    pairs = fitting()
    try:
        yield pairs
    except Exception:
        if broken:
            raise broken[0] from None
        raise
    finally:
        for _ in pairs:
            pass
    problems += [f"{name}: no new value came" for name in sorted(missing)]
    if problems:
        raise ValueError(first_of(problems, 5, "; "))


def _problem(name: str, tensor: torch.Tensor, shapes: Mapping[str, Sequence[int]]) -> str | None:
    if name not in shapes:
        return f"{name}: the rollout model has no such weight"
    if tuple(tensor.shape) != tuple(shapes[name]):
        return f"{name}: shape {list(tensor.shape)}, the rollout model's is {list(shapes[name])}"
    return None
