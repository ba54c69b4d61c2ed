"""Both entropies and both divergences of a token, in one pass over a vocabulary shard."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.distributed import ProcessGroup

# Shapes: [...] any leading dimensions; V vocabulary padded; tp ranks of `group`; n tokens; h hidden size


@dataclass
class TokenStatistics:
    """What SEAD knows about a token, all [...] fp32 (nats), same_argmax bool."""

    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    same_argmax: torch.Tensor


@dataclass
class TokenScores:
    """Statistics of sampled tokens, with what the same pass tells about the sampled token and about stopping."""

    statistics: TokenStatistics
    student_log_prob: torch.Tensor  # [n] of the sampled token
    teacher_log_prob: torch.Tensor  # [n]
    student_stop_probability: torch.Tensor  # [n] summed over the stop tokens
    teacher_stop_probability: torch.Tensor  # [n]


def token_statistics(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    *,
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
) -> TokenStatistics:
    raise NotImplementedError


def vocab_parallel_entropy(
    logits: torch.Tensor, *, group: ProcessGroup | None = None, vocab_size: int | None = None
) -> torch.Tensor:
    raise NotImplementedError


def linear_token_scores(
    student_hidden: torch.Tensor,
    student_head: torch.Tensor,
    teacher_hidden: torch.Tensor,
    teacher_head: torch.Tensor,
    targets: torch.Tensor,
    *,
    student_stop_token_ids: tuple[int, ...],
    teacher_stop_token_ids: tuple[int, ...],
    group: ProcessGroup | None = None,
    vocab_size: int | None = None,
    scratch_bytes: int = 256 * 2**20,
) -> TokenScores:
    """No gradient; hidden [n, h] replicated over the group (the two h may differ), heads [V/tp, h], chunk by chunk."""
    raise NotImplementedError
