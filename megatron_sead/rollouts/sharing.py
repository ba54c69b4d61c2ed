"""Rollouts that several ranks write together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.errors import UserError
from megatron_sead.rollouts.engine import GenerationRequest, Meanwhile, Rollout


def share_of(requests: list[GenerationRequest], writer: int, writers: int) -> list[int]:
    """Numbers of the requests that one of several writers answers, short prompts first.

    Dealing them out in turns by length gives every writer like work.
    """
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_token_ids))
    return order[writer::writers]


def gather_written(
    mine: dict[int, Rollout],
    problem: UserError | None,
    count: int,
    group: ProcessGroup | None,
    meanwhile: Meanwhile | None,
) -> list[Rollout]:
    """All rollouts of a call, in the order of its requests, on every rank. Collective over the group.

    Args:
        mine: what this rank has written, by the number of its request.
        problem: with which it stopped; the other ranks were still writing then, and must not wait for it.
        count: of requests.
        group: gloo; None: this process alone.
        meanwhile: what there is to do before the other ranks are waited for.

    Raises:
        UserError: the first rank's problem, on every rank.
    """
    if meanwhile is not None:
        try:
            meanwhile(mine if problem is None else None)
        except UserError as error:
            problem = error
    raise_together(problem, group)
    shares = [mine]
    if group is not None:
        shares *= group.size()
        dist.all_gather_object(shares, mine, group=group)
    written = {number: rollout for share in shares for number, rollout in share.items()}
    return [written[number] for number in range(count)]


def raise_together(problem: UserError | None, group: ProcessGroup | None) -> None:
    """Go on if no rank has a problem. Collective over the group.

    Args:
        group: gloo; None: this process alone.

    Raises:
        UserError: the first rank's problem, on every rank.
    """
    problems: list[Any] = [problem]
    if group is not None:
        problems *= group.size()
        dist.all_gather_object(problems, problem, group=group)
    if (first := next(filter(None, problems), None)) is not None:
        raise first
