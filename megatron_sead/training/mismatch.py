"""Sampler against trainer: the engine that wrote a token and the student that learns from it compute it differently.

Their log-probabilities of the same token differ by rounding, or by a fault. With importance weights a token counts by
how likely the student, rather than the engine, was to write it, at most `cap` times: truncated importance sampling.
Both probabilities are at temperature 1 and over the whole vocabulary, whatever `rollouts.temperature` and `.top_p` say:
models are compared, not ways of drawing.
"""

from __future__ import annotations

import torch
from torch.distributed import ProcessGroup

from megatron_sead.distillation import TokenScores
from megatron_sead.distillation.gather import all_gather_rows
from megatron_sead.prompts.packing import MicroBatch

# Shapes: n response tokens of a micro-batch

DIFFERENCE = "sampling_log_prob_difference"
STATISTICS = (DIFFERENCE, f"{DIFFERENCE}_p99", f"{DIFFERENCE}_max")


def importance_weights(student_log_prob: torch.Tensor, sampled_log_prob: torch.Tensor, cap: float) -> torch.Tensor:
    """[n] min(cap, student's probability / engine's); 1 where the engine did not say. All arguments [n], in nats."""
    return torch.nan_to_num((student_log_prob - sampled_log_prob).exp(), nan=1.0, posinf=cap).clamp(max=cap)


def measure_mismatch(
    scores: list[TokenScores], micro_batches: list[MicroBatch], group: ProcessGroup | None
) -> dict[str, float]:
    """Mean, 99th percentile and maximum of the absolute difference over the valid tokens of the step, in nats.

    Nothing where no engine has said a log-probability. Collective over `group`, the data-parallel ranks.
    """
    found = [torch.empty(0, device=micro_batches[0].targets.device)]
    for score, micro_batch in zip(scores, micro_batches, strict=True):
        if micro_batch.sampled_log_prob is not None:
            difference = (score.student_log_prob.float() - micro_batch.sampled_log_prob).abs()
            found.append(difference.masked_fill(~micro_batch.valid, torch.nan))
    everywhere, _ = all_gather_rows(torch.cat(found)[:, None], () if group is None else (group,))
    if not len(everywhere):
        return {}
    ordered = everywhere[:, 0].sort().values  # NaN, of which nothing is known, comes last
    known = (~ordered.isnan()).sum()
    last = (known - 1).clamp(min=0)
    places = torch.stack([(0.99 * last.double()).long(), last])
    mean = ordered.double().nansum() / known
    count, *statistics = torch.cat([known.double()[None], mean[None], ordered[places].double()]).tolist()
    return dict(zip(STATISTICS, statistics, strict=True)) if count else {}
