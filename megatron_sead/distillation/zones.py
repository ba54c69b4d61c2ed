"""Zones of tokens by two entropies: 0 A both models confident, 1 B student unsure, 2 C teacher unsure, -1 not valid.

Quantiles are nested (SEAD's Table 3): C is the top share of the teacher's entropies, B the top share of the student's
among the rest, A what remains. They are chosen by count, so that the shares hold whatever the ties and the layout.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation.checks import places_of, require_tensors
from megatron_sead.distillation.gather import all_gather_rows
from megatron_sead.distillation.selection import greatest
from megatron_sead.distillation.zone_shares import (
    DEFAULT_SHARES,
    NOT_VALID,
    ZONE_A,
    ZONE_B,
    ZONE_C,
    Shares,
    shares_problem,
)

# Shapes: [...] any, the same for all tensors of a call; n valid tokens of this rank, N of all ranks


@dataclass(frozen=True)
class Thresholds:
    """Entropies in nats at which zones begin: C where H_t >= teacher; of the rest, B where H_s > student.

    Infinite where a zone is empty: (inf, -inf) puts every token in B.
    """

    teacher: float
    student: float


def assign_zones(
    student_entropy: torch.Tensor,
    teacher_entropy: torch.Tensor,
    valid: torch.Tensor,
    *,
    shares: Shares = DEFAULT_SHARES,
    groups: Sequence[ProcessGroup] = (),
    token_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """Zones [...] int8 by the exact quantiles of all valid tokens of all ranks.

    Of N tokens round(share of C * N) are in C, round(share of B * N) in B. What ranks send each other does not grow
    with N.

    Args:
        student_entropy: [...] nats, fp32.
        teacher_entropy: [...].
        valid: [...] bool.
        shares: percent of the tokens in A, B, C; they sum to 100.
        groups: process groups over which tokens are distributed, each token once.
        token_index: [...] int64, unique and the same whatever the layout: of equal entropies the lower index gets
            the higher zone. None: the order of ranks and positions, so that ties depend on the layout.

    Raises:
        TypeError: entropies that are no tensors.
        ValueError: shapes differ, shares are negative or do not sum to 100, or a valid token's entropy is not finite,
            on every rank, whichever holds it. What stands at other positions does not matter.
    """
    return _assigned(student_entropy, teacher_entropy, valid, shares, groups, token_index)


def zones_and_thresholds(
    student_entropy: torch.Tensor,
    teacher_entropy: torch.Tensor,
    valid: torch.Tensor,
    *,
    shares: Shares = DEFAULT_SHARES,
    groups: Sequence[ProcessGroup] = (),
    token_index: torch.Tensor | None = None,
) -> tuple[torch.Tensor, Thresholds]:
    """What `assign_zones` gives, and the thresholds that it amounts to: the least H_t of C and the greatest H_s of A.

    Arguments and errors as there.
    """
    zones = _assigned(student_entropy, teacher_entropy, valid, shares, groups, token_index)
    in_a = torch.where(zones == ZONE_A, student_entropy, -torch.inf).flatten()
    in_c = torch.where(zones == ZONE_C, -teacher_entropy, -torch.inf).flatten()
    limits = torch.stack([in_c, in_a]).float()
    limits = torch.cat([limits, limits.new_full((2, 1), -torch.inf)], dim=1).amax(1)
    for group in groups:
        dist.all_reduce(limits, dist.ReduceOp.MAX, group=group)
    negated, student = limits.tolist()
    return zones, Thresholds(-negated, student)


def assign_zones_by_threshold(
    student_entropy: torch.Tensor, teacher_entropy: torch.Tensor, valid: torch.Tensor, thresholds: Thresholds
) -> torch.Tensor:
    """Zones [...] int8 by given thresholds: absolute ones, or those of earlier steps. Local to the rank.

    Raises:
        ValueError: shapes differ, a threshold is NaN, or a valid token's entropy is not finite.
    """
    _check(student_entropy, teacher_entropy, valid)
    if math.isnan(thresholds.student) or math.isnan(thresholds.teacher):
        raise ValueError(f"{thresholds}: must not be NaN")
    _require_finite(torch.stack([student_entropy, teacher_entropy], dim=-1).view(-1, 2), valid.bool().flatten())
    zones = (student_entropy > thresholds.student).to(torch.int8)  # ZONE_A, ZONE_B
    zones.masked_fill_(teacher_entropy >= thresholds.teacher, ZONE_C)
    return zones.masked_fill_(~valid.bool(), NOT_VALID)


def assign_zones_per_sequence(
    student_entropy: torch.Tensor,
    teacher_entropy: torch.Tensor,
    valid: torch.Tensor,
    rollout_index: torch.Tensor,
    *,
    shares: Shares = DEFAULT_SHARES,
) -> torch.Tensor:
    """Zones [...] int8 by the quantiles of each rollout's own tokens, all of which are on this rank."""
    _check(student_entropy, teacher_entropy, valid, rollout_index=rollout_index)
    _check_shares(shares)
    chosen = _places(valid)
    entropies = torch.stack([student_entropy.flatten()[chosen], teacher_entropy.flatten()[chosen]], dim=-1).float()
    _require_finite(entropies)
    _, sequence, sizes = rollout_index.flatten()[chosen].unique(return_inverse=True, return_counts=True)
    return _in_place(_of_sequences(entropies, shares, sequence, sizes), chosen, valid)


def rescue_confident_errors(zones: torch.Tensor, reverse_kl: torch.Tensor, threshold: float) -> torch.Tensor:
    """Zones with tokens of A moved to B where the reverse KL is above `threshold` nats: confident, and wrong.

    Raises:
        ValueError: the threshold, or the reverse KL of a token of A, is NaN.
    """
    if math.isnan(threshold) or bool((reverse_kl.isnan() & (zones == ZONE_A)).any()):
        raise ValueError(f"threshold={threshold}, reverse_kl: must not be NaN in zone A")
    return torch.where((zones == ZONE_A) & (reverse_kl > threshold), ZONE_B, zones).to(torch.int8)


class RunningThresholds:
    """Exponential moving average of the steps' thresholds, which spares the pass that exact ones need."""

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay}: must be at least 0 and under 1")
        self._decay = decay
        self.value: Thresholds | None = None  # None before the first step

    def update(self, thresholds: Thresholds) -> None:
        """Follow a step's thresholds. Those of a step without a zone A or C are infinite and tell nothing.

        Raises:
            ValueError: NaN.
        """
        new = torch.tensor([thresholds.teacher, thresholds.student], dtype=torch.float64)
        if bool(new.isnan().any()):
            raise ValueError(f"{thresholds}: must not be NaN")
        if not bool(new.isfinite().all()):
            return
        if self.value is not None:
            old = torch.tensor([self.value.teacher, self.value.student], dtype=torch.float64)
            new = self._decay * old + (1 - self._decay) * new
        self.value = Thresholds(*new.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The average so far."""
        return {"value": None if self.value is None else asdict(self.value)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue an average."""
        self.value = None if state["value"] is None else Thresholds(**state["value"])


def _assigned(
    student_entropy: torch.Tensor,
    teacher_entropy: torch.Tensor,
    valid: torch.Tensor,
    shares: Shares,
    groups: Sequence[ProcessGroup],
    token_index: torch.Tensor | None,
) -> torch.Tensor:
    """Zones [...] of this rank's tokens."""
    _check(student_entropy, teacher_entropy, valid, token_index=token_index)
    _check_shares(shares)
    student, teacher = student_entropy.flatten().float(), teacher_entropy.flatten().float()
    chosen = valid.bool().flatten()
    before, count = _count_finite(torch.stack([student, teacher], dim=-1), chosen, groups)
    key = before + chosen.cumsum(0) if token_index is None else token_index.flatten().long()
    in_c = round(shares[2] / 100 * count)
    # where A has no share, rounding must not leave it a token
    in_b = min(round(shares[1] / 100 * count), count - in_c) if shares[0] > 0 else count - in_c
    is_c = greatest(teacher, chosen, in_c, key, groups)
    is_b = greatest(student, chosen & ~is_c, in_b, key, groups)
    zones = torch.full((len(student),), ZONE_A, dtype=torch.int8, device=student.device)
    zones = zones.masked_fill_(is_b, ZONE_B).masked_fill_(is_c, ZONE_C).masked_fill_(~chosen, NOT_VALID)
    return zones.view(valid.shape)


def _count_finite(entropies: torch.Tensor, valid: torch.Tensor, groups: Sequence[ProcessGroup]) -> tuple[int, int]:
    """How many valid tokens the ranks before this one have, and how many all have. Collective over the groups.

    Args:
        entropies: [n, 2] (student, teacher).
        valid: [n] bool.

    Raises:
        ValueError: some rank's are not finite; on every rank.
    """
    bad = (~entropies.isfinite() & valid[:, None]).long()
    nothing = bad.new_zeros(1)
    first = torch.cat([bad.flatten(), nothing + 1]).argmax()  # 2 n where all are finite
    place = torch.cat([valid.cumsum(0), nothing])[first // 2] - 1  # of the first one's token, among the valid
    told = torch.stack([valid.sum(), *bad.sum(0), place, first % 2])
    everyone, own = all_gather_rows(told[None], groups)
    lines = everyone.tolist()
    counts = [line[0] for line in lines]
    for number, (_, *wrong, where, model) in enumerate(lines):
        if any(wrong):
            name = ("student_entropy", "teacher_entropy")[model]
            raise ValueError(
                f"{name} of {sum(line[1 + model] for line in lines)} valid tokens is not finite, the first is token "
                f"{sum(counts[:number]) + where} of {sum(counts)}"
            )
    return sum(counts[: own.start]), sum(counts)


def _places(valid: torch.Tensor) -> torch.Tensor:
    """[n] of the valid tokens among all [...], flattened."""
    chosen = valid.bool().flatten()
    return places_of(chosen, int(chosen.sum()))


def _in_place(zones: torch.Tensor, chosen: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """[...] zones of all tokens, from those [n] of the valid ones."""
    result = torch.full((valid.numel(),), NOT_VALID, dtype=torch.int8, device=zones.device)
    return result.index_copy_(0, chosen, zones).view(valid.shape)


def _of_sequences(entropies: torch.Tensor, shares: Shares, sequence: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """[N] int8 from entropies [N, 2] (student, teacher); of equal entropies the earlier gets the higher zone.

    Args:
        sequence: [N] which of the sequences, from 0, each has its shares of; with their sizes.
    """
    student, teacher = entropies.unbind(-1)
    in_c = (shares[2] / 100 * sizes.double()).round()
    # where A has no share, rounding must not leave it a token
    in_b = (shares[1] / 100 * sizes.double()).round().minimum(sizes - in_c) if shares[0] > 0 else sizes - in_c
    is_c = _highest(teacher, in_c, sequence, sizes)
    is_b = _highest(student.masked_fill(is_c, -torch.inf), in_b, sequence, sizes)  # entropies are finite: C comes last
    zones = torch.full((len(student),), ZONE_A, dtype=torch.int8, device=student.device)
    return zones.masked_fill_(is_b, ZONE_B).masked_fill_(is_c, ZONE_C)


def _highest(values: torch.Tensor, counts: torch.Tensor, sequence: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """[N] bool: of each sequence as many of the highest values [N] as `counts` says; of equals the earlier."""
    order = values.argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]
    first = (sizes.cumsum(0) - sizes)[sequence[order]]
    rank = torch.arange(len(values), device=values.device) - first
    return torch.zeros_like(sequence, dtype=torch.bool).index_copy_(0, order, rank < counts[sequence[order]])


def _require_finite(entropies: torch.Tensor, counted: torch.Tensor | None = None) -> None:
    """[N, 2] (student, teacher) of valid tokens; or of those that `counted` [N] is true of."""
    bad = ~entropies.isfinite()
    if not bool((bad if counted is None else bad & counted[:, None]).any()):
        return
    bad = bad if counted is None else bad[counted]
    token, model = bad.nonzero()[0].tolist()
    name = ("student_entropy", "teacher_entropy")[model]
    raise ValueError(
        f"{name} of {int(bad[:, model].sum())} valid tokens is not finite, the first is token {token} of {len(bad)}"
    )


def _check_shares(shares: Shares) -> None:
    if problem := shares_problem(shares):
        raise ValueError(f"shares={list(shares)}: {problem}")


def _check(student_entropy: torch.Tensor, teacher_entropy: torch.Tensor, valid: torch.Tensor, **more: Any) -> None:
    require_tensors(student_entropy=student_entropy, teacher_entropy=teacher_entropy, valid=valid)
    require_tensors(**{name: value for name, value in more.items() if value is not None})
    for name, value in {"teacher_entropy": teacher_entropy, "valid": valid, **more}.items():
        if value is not None and value.shape != student_entropy.shape:
            raise ValueError(
                f"{name} has shape {list(value.shape)}, student_entropy {list(student_entropy.shape)}: must be equal"
            )
