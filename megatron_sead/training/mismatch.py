"""Sampler against trainer: the engine that wrote a token and the student that learns from it compute it differently.

Their log-probabilities of the same token differ by rounding, or by a fault. With importance weights a token counts by
how likely the student, rather than the engine, was to write it, at most `cap` times: truncated importance sampling.
Both probabilities are at temperature 1 and over the whole vocabulary, whatever `rollouts.temperature` and `.top_p` say:
models are compared, not ways of drawing.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.distillation import TokenScores
from megatron_sead.distillation.selection import greatest, token_key
from megatron_sead.prompts.packing import MicroBatch

# Shapes: n response tokens of a micro-batch

STATISTICS = (
    "sampling_log_prob_difference",
    "sampling_log_prob_difference_p99",
    "sampling_log_prob_difference_max",
)


def importance_weights(student_log_prob: torch.Tensor, sampled_log_prob: torch.Tensor, cap: float) -> torch.Tensor:
    """[n] min(cap, student's probability / engine's); 1 where the engine did not say. All arguments [n], in nats."""
    return torch.nan_to_num((student_log_prob - sampled_log_prob).exp(), nan=1.0, posinf=cap).clamp(max=cap)


def measure_mismatch(
    scores: list[TokenScores], micro_batches: list[MicroBatch], group: ProcessGroup | None
) -> dict[str, float]:
    """Mean, 99th percentile and maximum of the absolute difference over the valid tokens of the step, in nats.

    Nothing where no engine has said a log-probability. Collective over `group`, the data-parallel ranks.
    """
    device = micro_batches[0].targets.device
    found, keys = [torch.empty(0, device=device)], [torch.empty(0, dtype=torch.int64, device=device)]
    for score, batch in zip(scores, micro_batches, strict=True):
        if batch.sampled_log_prob is not None:
            difference = (score.student_log_prob.float() - batch.sampled_log_prob).abs()
            found.append(difference.masked_fill(~batch.valid, torch.nan))
            keys.append(token_key(batch.rollout_index, batch.position))
    here, groups = torch.cat(found), () if group is None else (group,)
    known = ~here.isnan()  # of the others nothing is known
    sums = torch.stack([known.sum().double(), here.double().nansum()])
    for each in groups:
        dist.all_reduce(sums, group=each)
    tokens = sums[0].long()
    from_the_top = (tokens - (0.99 * (tokens - 1).double()).long()).minimum(tokens)
    upper = greatest(here, known, from_the_top, torch.cat(keys), groups)
    limits = torch.stack([torch.where(upper, -here, -torch.inf), torch.where(known, here, -torch.inf)])
    limits = torch.cat([limits, limits.new_full((2, 1), -torch.inf)], dim=1).amax(1)
    for each in groups:
        dist.all_reduce(limits, dist.ReduceOp.MAX, group=each)
    count, total, negated, largest = torch.cat([sums, limits.double()]).tolist()
    return dict(zip(STATISTICS, (total / count, -negated, largest), strict=True)) if count else {}
