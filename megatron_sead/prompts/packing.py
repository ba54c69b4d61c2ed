"""From rollouts to micro-batches: token ids for each model, and which positions predict response tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

# Shapes: b rollouts in a micro-batch, s padded length, n response tokens of the micro-batch


@dataclass
class TokenView:
    """One model's view of a micro-batch. Teacher and student may see different prompts."""

    tokens: torch.Tensor  # [b, s] int64, right-padded; the causal mask keeps padding out of every response position
    predictors: torch.Tensor  # [n] int64 into the flattened [b * s]: the position whose logits predict response token i


@dataclass
class MicroBatch:
    """Rollouts that go through the models together. The n response tokens are in the same order everywhere."""

    student: TokenView
    teacher: TokenView
    targets: torch.Tensor  # [n] int64: the response tokens themselves
    rollout_index: torch.Tensor  # [n] int64: which rollout of the global step, whatever the layout
    position: torch.Tensor  # [n] int64: place of the token in its response, from 0
    valid: torch.Tensor  # [n] bool: False where the token must not teach (masked truncated rollouts)
    sampled_log_prob: torch.Tensor | None = None  # [n] fp32: by the engine that wrote the token; NaN: it did not say


def pack(
    prompts_student: list[tuple[int, ...]],
    prompts_teacher: list[tuple[int, ...]],
    responses: list[tuple[int, ...]],
    valid: list[bool],
    *,
    micro_batch_size: int,
    data_parallel_rank: int,
    data_parallel_size: int,
    length_multiple: int,
    pad_token_id: int,
    device: torch.device,
    log_probs: Sequence[tuple[float, ...] | None] | None = None,
) -> list[MicroBatch]:
    """This rank's micro-batches of the global step. All arguments are the global step's, equal on every rank.

    Args:
        responses: with the stop token, which is a response token like any other; prompt and padding are not.
        valid: one a rollout.
        length_multiple: each view is padded to its own longest row, rounded up to this.
        log_probs: of each response's tokens by the engine; None where it did not say, or for all of them.

    Raises:
        ValueError: an empty prompt or response, or rollouts that the ranks' micro-batches cannot share evenly.
    """
    unit = micro_batch_size * data_parallel_size
    if not responses or len(responses) % unit:
        raise ValueError(
            f"{len(responses)} rollouts cannot be shared by {data_parallel_size} data-parallel ranks in micro-batches "
            f"of {micro_batch_size}: must be a multiple of {unit}"
        )
    if not all(prompts_student) or not all(prompts_teacher) or not all(responses):
        raise ValueError("a prompt or response holds no token: nothing would predict its first token")
    lengths = [
        len(student) + len(teacher) + 2 * len(response)
        for student, teacher, response in zip(prompts_student, prompts_teacher, responses, strict=True)
    ]
    mine = deal(lengths, data_parallel_rank, data_parallel_size)
    micro_batches = []
    for start in range(0, len(mine), micro_batch_size):
        rows = mine[start : start + micro_batch_size]
        written = [responses[i] for i in rows]
        asked, asked_teacher = [prompts_student[i] for i in rows], [prompts_teacher[i] for i in rows]
        student = _view(asked, written, length_multiple, pad_token_id, device)
        same = asked == asked_teacher
        teacher = student if same else _view(asked_teacher, written, length_multiple, pad_token_id, device)
        counts = torch.tensor([len(response) for response in written])
        micro_batches.append(
            MicroBatch(
                student=student,
                teacher=teacher,
                targets=torch.tensor([token for response in written for token in response], device=device),
                rollout_index=torch.tensor(rows).repeat_interleave(counts).to(device),
                position=torch.cat([torch.arange(len(response)) for response in written]).to(device),
                valid=torch.tensor([valid[i] for i in rows]).repeat_interleave(counts).to(device),
                sampled_log_prob=None if log_probs is None else _told([log_probs[i] for i in rows], counts).to(device),
            )
        )
    return micro_batches


def _told(log_probs: list[tuple[float, ...] | None], counts: torch.Tensor) -> torch.Tensor:
    return torch.cat(
        [
            torch.full((int(count),), math.nan) if values is None else torch.tensor(values, dtype=torch.float32)
            for values, count in zip(log_probs, counts, strict=True)
        ]
    )


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


def _view(
    prompts: list[tuple[int, ...]],
    responses: list[tuple[int, ...]],
    length_multiple: int,
    pad_token_id: int,
    device: torch.device,
) -> TokenView:
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    longest = max(len(row) for row in rows)
    padded = -(-longest // length_multiple) * length_multiple
    tokens = torch.tensor([[*row, *[pad_token_id] * (padded - len(row))] for row in rows], device=device)
    # The logits at a position predict the token after it: the last prompt position predicts response token 0.
    predictors = [
        torch.arange(len(response)) + (b * padded + len(prompt) - 1)
        for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
    ]
    return TokenView(tokens, torch.cat(predictors).to(device))
