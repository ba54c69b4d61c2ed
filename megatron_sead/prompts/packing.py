"""From rollouts to micro-batches: token ids for each model, and which positions predict response tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

import torch

from megatron_sead.models.zigzag import held
from megatron_sead.prompts.sharing import deal, share_by_tokens

# Shapes: b rollouts in a micro-batch, s padded length, n response tokens of the micro-batch; b is 1 of a packed view,
# whose s counts the tokens of all its sequences. Under context parallelism views are packed, and s counts the tokens of
# this rank alone, which predicts m of the n


@dataclass(frozen=True)
class Boundaries:
    """Where the sequences of a packed view begin and end. Padding at its end belongs to the last one."""

    starts: torch.Tensor  # [sequences + 1] int32: cumulative lengths of whole sequences, from 0
    positions: torch.Tensor  # [s] int64: each token's place in its own sequence
    lengths: tuple[int, ...]  # of whole sequences, on the host
    share: tuple[int, int] = (0, 1)  # this rank's number among those that share the sequences, and how many they are


@dataclass
class TokenView:
    """One model's view of a micro-batch. Teacher and student may see different prompts."""

    tokens: torch.Tensor  # [b, s] int64, right-padded; the causal mask keeps padding out of every response position
    # [n] int64 into the flattened [b * s]: the position whose logits predict response token i. In host memory: how many
    # are in a part of the sequence is asked without waiting for a GPU
    predictors: torch.Tensor
    boundaries: Boundaries | None = None  # of a packed view; None: every row is one sequence
    own: torch.Tensor | None = None  # [m] in host memory: which response tokens `predictors` are of; None: all n


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


# A view of prompts with their responses
ViewOf = Callable[[list[tuple[int, ...]], list[tuple[int, ...]]], TokenView]


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
    micro_batch_tokens: int | None = None,
    count_multiple: int = 1,
    share: tuple[int, int] = (0, 1),
) -> list[MicroBatch]:
    """This rank's micro-batches of the global step. All arguments are the global step's, equal on every rank.

    Args:
        responses: with the stop token, which is a response token like any other; prompt and padding are not.
        valid: one a rollout.
        length_multiple: each view's length is rounded up to this; of rows, that of its longest.
        log_probs: of each response's tokens by the engine; None where it did not say, or for all of them.
        micro_batch_tokens: views are packed, one rollout after another, with at most so many tokens for either model;
            some may be without rollouts then. None: views are rows of `micro_batch_size` rollouts.
        count_multiple: what the number of packed micro-batches must be a multiple of.
        share: number of this context-parallel rank, and how many share every sequence; each has the same micro-batches
            and of their tokens its own.

    Raises:
        ValueError: an empty prompt or response, rollouts that the ranks' micro-batches cannot share evenly, or one that
            is longer than micro_batch_tokens.
    """
    if micro_batch_tokens is None:
        _require_shares(len(responses), micro_batch_size, data_parallel_size)
    elif len(responses) < data_parallel_size:
        raise ValueError(f"{len(responses)} rollouts are fewer than {data_parallel_size} data-parallel ranks")
    if not all(prompts_student) or not all(prompts_teacher) or not all(responses):
        raise ValueError("a prompt or response holds no token: nothing would predict its first token")
    sizes = [
        (len(student) + len(response), len(teacher) + len(response))
        for student, teacher, response in zip(prompts_student, prompts_teacher, responses, strict=True)
    ]
    place = data_parallel_rank, data_parallel_size
    make_view = _rows if micro_batch_tokens is None else _packed
    view_of = partial(make_view, length_multiple=length_multiple, pad_token_id=pad_token_id, device=device, share=share)
    if micro_batch_tokens is None:
        mine = deal([sum(both) for both in sizes], *place)
        shares = [mine[start : start + micro_batch_size] for start in range(0, len(mine), micro_batch_size)]
    else:
        budget = micro_batch_tokens // length_multiple * length_multiple
        lengths = [_rounded_up(max(both), _sequence_multiple(share)) for both in sizes]
        shares = share_by_tokens(lengths, budget, *place, count_multiple)
    step = _Step(prompts_student, prompts_teacher, responses, valid, log_probs)
    return [step.micro_batch(rows, view_of, device) for rows in shares]


@dataclass(frozen=True)
class _Step:
    """A global step's rollouts, a list each of what `pack` is given."""

    prompts_student: list[tuple[int, ...]]
    prompts_teacher: list[tuple[int, ...]]
    responses: list[tuple[int, ...]]
    valid: list[bool]
    log_probs: Sequence[tuple[float, ...] | None] | None

    def micro_batch(self, rows: list[int], view_of: ViewOf, device: torch.device) -> MicroBatch:
        """Of the rollouts with these numbers."""
        written = [self.responses[i] for i in rows]
        asked, asked_teacher = [self.prompts_student[i] for i in rows], [self.prompts_teacher[i] for i in rows]
        student = view_of(asked, written)
        lengths = [len(response) for response in written]
        counts = torch.tensor(lengths, dtype=torch.int64)
        told = None if self.log_probs is None else _told([self.log_probs[i] for i in rows], lengths).to(device)
        return MicroBatch(
            student=student,
            teacher=student if asked == asked_teacher else view_of(asked_teacher, written),
            targets=torch.tensor([token for response in written for token in response], dtype=torch.int64).to(device),
            rollout_index=torch.tensor(rows, dtype=torch.int64).repeat_interleave(counts).to(device),
            position=_counts_from_0(lengths).to(device),
            valid=torch.tensor([self.valid[i] for i in rows], dtype=torch.bool).repeat_interleave(counts).to(device),
            sampled_log_prob=told,
        )


def _require_shares(rollouts: int, micro_batch_size: int, ranks: int) -> None:
    unit = micro_batch_size * ranks
    if not rollouts or rollouts % unit:
        raise ValueError(
            f"{rollouts} rollouts cannot be shared by {ranks} data-parallel ranks in micro-batches "
            f"of {micro_batch_size}: must be a multiple of {unit}"
        )


def _told(log_probs: list[tuple[float, ...] | None], lengths: list[int]) -> torch.Tensor:
    parts = [torch.empty(0)]
    for values, count in zip(log_probs, lengths, strict=True):
        parts.append(torch.full((count,), math.nan) if values is None else torch.tensor(values, dtype=torch.float32))
    return torch.cat(parts)


def _rows(
    prompts: list[tuple[int, ...]],
    responses: list[tuple[int, ...]],
    *,
    length_multiple: int,
    pad_token_id: int,
    device: torch.device,
    share: tuple[int, int],
) -> TokenView:
    """[b, s]: a row each, padded to the longest."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
    padded = _rounded_up(max(len(row) for row in rows), length_multiple)
    tokens = torch.tensor([[*row, *[pad_token_id] * (padded - len(row))] for row in rows])
    return row_view(tokens, _predictors(prompts, responses, range(0, len(rows) * padded, padded)), share, device)


def row_view(tokens: torch.Tensor, predictors: torch.Tensor, share: tuple[int, int], device: torch.device) -> TokenView:
    """Of rows [b, s] on the host; under context parallelism what this rank holds of them."""
    if share[1] > 1:
        return _held(tokens, predictors, (tokens.shape[1],) * tokens.shape[0], share, device)
    return TokenView(tokens.to(device), predictors)


def _packed(
    prompts: list[tuple[int, ...]],
    responses: list[tuple[int, ...]],
    *,
    length_multiple: int,
    pad_token_id: int,
    device: torch.device,
    share: tuple[int, int],
) -> TokenView:
    """[1, s]: one after another, padded at the end alone; under context parallelism each for itself, and at the end.
    Without rollouts, padding alone: a pass needs some token."""
    rows = [prompt + response for prompt, response in zip(prompts, responses, strict=True)] or [(pad_token_id,)]
    lengths = [_rounded_up(len(row), _sequence_multiple(share)) for row in rows]
    lengths[-1] += _rounded_up(sum(lengths), length_multiple) - sum(lengths)
    starts = [0, *accumulate(lengths)]
    padded = ([*row, *[pad_token_id] * (length - len(row))] for row, length in zip(rows, lengths, strict=True))
    tokens = torch.tensor([[token for row in padded for token in row]])
    predictors = _predictors(prompts, responses, starts)
    if share[1] > 1:
        return _held(tokens, predictors, tuple(lengths), share, device)
    return TokenView(
        tokens.to(device),
        predictors,
        Boundaries(
            torch.tensor(starts, dtype=torch.int32, device=device), _counts_from_0(lengths).to(device), tuple(lengths)
        ),
    )


def _held(
    tokens: torch.Tensor,
    predictors: torch.Tensor,
    lengths: tuple[int, ...],
    share: tuple[int, int],
    device: torch.device,
) -> TokenView:
    """What a context-parallel rank holds of sequences [b, s] of these lengths, on the host, one after another."""
    place = held(lengths, *share)
    here = torch.full((tokens.numel(),), -1)
    here[place] = torch.arange(len(place))
    own = (here[predictors] >= 0).nonzero().squeeze(1)
    starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    positions = _counts_from_0(lengths)[place]
    return TokenView(
        tokens.flatten()[None, place].to(device),
        here[predictors[own]],
        Boundaries(starts.to(device), positions.to(device), lengths, share),
        own,
    )


def _sequence_multiple(share: tuple[int, int]) -> int:
    """What the length of each packed sequence is a multiple of: context-parallel ranks hold two pieces each."""
    return 1 if share[1] == 1 else 2 * share[1]


def _predictors(
    prompts: list[tuple[int, ...]], responses: list[tuple[int, ...]], starts: Sequence[int]
) -> torch.Tensor:
    """[n] The logits at a position predict the token after it: the last prompt position predicts response token 0."""
    parts = [torch.empty(0, dtype=torch.int64)]
    for prompt, response, start in zip(prompts, responses, starts, strict=False):  # starts may end with the end
        parts.append(torch.arange(len(response)) + (start + len(prompt) - 1))
    return torch.cat(parts)


def _counts_from_0(lengths: Sequence[int]) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=torch.int64), *(torch.arange(length) for length in lengths)])


def _rounded_up(length: int, multiple: int) -> int:
    return -(-length // multiple) * multiple
