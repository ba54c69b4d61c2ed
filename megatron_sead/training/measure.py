"""The metrics of a step's tokens: sums over all ranks, then the means, shares and rates of metrics.jsonl."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation import TokenScores
from megatron_sead.distillation.zone_shares import LETTERS, NOT_VALID
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.training.supervision import StepTokens

# Shapes: n response tokens on this rank

ZONES = {zone: letter.lower() for zone, letter in LETTERS.items() if zone != NOT_VALID}
QUARTERS = 4


def measure_tokens(
    tokens: StepTokens,
    zones: torch.Tensor,
    scores: list[TokenScores],
    micro_batches: list[MicroBatch],
    group: ProcessGroup | None,
) -> dict[str, float]:
    """Means over the valid response tokens of the step; collective over `group`, the data-parallel ranks.

    Args:
        tokens: this rank's response tokens, [n] each.
        zones: [n] int8, -1 where a token is not valid.
        scores: log-probabilities and stop probabilities, a micro-batch each, in the order of `tokens`.
        micro_batches: to find the last token of each rollout.
        group: None where one rank holds all tokens.
    """
    sums = _zone_sums(tokens, zones) | _stop_sums(scores, micro_batches)
    ratios = torch.cat([s.teacher_log_prob - s.student_log_prob for s in scores])
    sums["log_prob_ratio"] = _sum_where(tokens.valid, ratios)
    names = sorted(sums)
    totals = torch.stack([sums[name].double() for name in names])
    if group is not None:
        dist.all_reduce(totals, group=group)
    return _means(dict(zip(names, totals.tolist(), strict=True)))


def _zone_sums(tokens: StepTokens, zones: torch.Tensor) -> dict[str, torch.Tensor]:
    statistics = tokens.statistics
    sums = {"response_tokens": torch.full((), len(zones), device=zones.device)}
    lengths = torch.zeros(int(tokens.rollout_index.max()) + 1, device=zones.device)
    lengths.index_add_(0, tokens.rollout_index, torch.ones_like(tokens.rollout_index, dtype=lengths.dtype))
    quarter = (QUARTERS * tokens.position / lengths[tokens.rollout_index]).long()
    for zone, name in ZONES.items():
        inside = zones == zone
        sums[f"zone_{name}_tokens"] = inside.sum()
        for field in ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl"):
            sums[f"zone_{name}_{field}"] = _sum_where(inside, getattr(statistics, field))
        sums[f"zone_{name}_mismatches"] = (~statistics.same_argmax & inside).sum()
        for q in range(QUARTERS):
            sums[f"zone_{name}_quarter_{q + 1}"] = (inside & (quarter == q)).sum()
    return sums


def _stop_sums(scores: list[TokenScores], micro_batches: list[MicroBatch]) -> dict[str, torch.Tensor]:
    """Probability of stopping where a rollout ended: at its stop token, or where it was cut."""
    index = torch.cat([micro_batch.rollout_index for micro_batch in micro_batches])
    last = torch.ones_like(index, dtype=torch.bool)
    last[:-1] = index[1:] != index[:-1]
    sums = {"rollouts": last.sum()}
    for name in ("student", "teacher"):
        probability = torch.cat([getattr(score, f"{name}_stop_probability") for score in scores])
        sums[f"{name}_stop"] = _sum_where(last, probability)
    return sums


def _sum_where(chosen: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of the values [n] where `chosen` [n] is true. An index by truth values would read their number from a GPU."""
    return torch.where(chosen, values, 0.0).sum(dtype=torch.float64)


def _means(sums: dict[str, float]) -> dict[str, float]:
    tokens = max(1.0, sum(sums[f"zone_{zone}_tokens"] for zone in ZONES.values()))
    metrics: dict[str, float] = {"response_tokens": int(sums["response_tokens"])}
    totals = {}
    for field in ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl"):
        totals[field] = sum(sums[f"zone_{zone}_{field}"] for zone in ZONES.values())
        metrics[field] = totals[field] / tokens
    for zone in ZONES.values():
        count = sums[f"zone_{zone}_tokens"]
        metrics[f"zone_{zone}_share"] = count / tokens
        for model in ("student", "teacher"):
            metrics[f"zone_{zone}_{model}_entropy"] = sums[f"zone_{zone}_{model}_entropy"] / max(1.0, count)
        for field in ("forward_kl", "reverse_kl"):
            metrics[f"zone_{zone}_{field}_share"] = sums[f"zone_{zone}_{field}"] / max(1e-12, totals[field])
    for q in range(1, QUARTERS + 1):
        here = max(1.0, sum(sums[f"zone_{zone}_quarter_{q}"] for zone in ZONES.values()))
        for zone in ZONES.values():
            metrics[f"zone_{zone}_share_quarter_{q}"] = sums[f"zone_{zone}_quarter_{q}"] / here
    # both models confident, but of different tokens: zone A skips these (failure mode 1)
    metrics["confident_mismatch_rate"] = sums["zone_a_mismatches"] / max(1.0, sums["zone_a_tokens"])
    for name in ("student", "teacher"):
        metrics[f"{name}_stop_probability"] = sums[f"{name}_stop"] / max(1.0, sums["rollouts"])
    metrics["teacher_log_prob_ratio"] = sums["log_prob_ratio"] / tokens
    return metrics
