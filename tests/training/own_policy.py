"""A policy as a user would write it, outside of the package."""

from __future__ import annotations

from megatron_sead.distillation import Policy, PolicyInput, TokenWeights


def gentle(tokens: PolicyInput) -> TokenWeights:
    """Forward KL in zone C, half of the reverse KL elsewhere."""
    in_c = tokens.zones == 2
    return TokenWeights(forward=in_c.float(), reverse=0.5 * (~in_c).float())


def by_entropy(tokens: PolicyInput) -> TokenWeights:
    """Reverse KL in proportion to the student's entropy."""
    entropy = tokens.statistics.student_entropy
    return TokenWeights(forward=entropy * 0, reverse=entropy)


BY_ENTROPY = Policy("by_entropy", by_entropy, "reverse KL in proportion to the student's entropy")


def crooked(tokens: PolicyInput) -> TokenWeights:
    """One weight too few."""
    return TokenWeights(tokens.statistics.forward_kl[1:], tokens.statistics.forward_kl)


def of_some(tokens: PolicyInput) -> TokenWeights:
    """Reverse KL alike for all, in a way that does not go without tokens."""
    entropy = tokens.statistics.student_entropy
    return TokenWeights(forward=entropy * 0, reverse=(entropy <= entropy.max()).float())
