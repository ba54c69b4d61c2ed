"""The methods: functions from token statistics to two weights a token, (w_forward, w_reverse), with a record each.

Settings read the names here, so nothing imports torch before a policy is called.
"""

from __future__ import annotations

import math
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megatron_sead.distillation.policy_interface import (
    LossInput,
    Policy,
    PolicyInput,
    PolicyOptions,
    TokenLoss,
    TokenWeights,
    Weigh,
    WrongWeightsError,
)
from megatron_sead.distillation.zone_shares import ZONE_B, ZONE_C

if TYPE_CHECKING:
    import torch


def make_policy(name: str, **options: Any) -> Weigh:
    """The function of the policy `name`, with options that are fields of `PolicyOptions`.

    Raises:
        ValueError: what `find_policy` raises, or a value out of range. The policy raises it too, for alpha or
            statistics of a valid token that are NaN, and WrongWeightsError for what a function of one's own returns.
    """
    weigh, chosen = find_policy(name).weigh, PolicyOptions(**options)
    return lambda step: _checked(weigh(replace(_require_numbers(step), options=chosen)), step)


def with_options(loss: TokenLoss | None, options: PolicyOptions) -> TokenLoss | None:
    """A policy's own loss with a run's options filled in."""
    return None if loss is None else lambda given: loss(replace(given, options=options))


def find_policy(name: str) -> Policy:
    """The record of a preset, or what ``package.module:name`` is: a function, or a `Policy` of one's own.

    A function is given zones, which costs the student a forward pass a step; a record may say that it reads none.

    Raises:
        ValueError: there is no such preset, or nothing to call there.
    """
    if name in POLICIES:
        return POLICIES[name]
    if problem := name_problem(name):
        raise ValueError(f"policy {name!r}: {problem}")
    module, _, attribute = name.partition(":")
    try:
        found = getattr(import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise ValueError(f"policy {name!r}: {error}; its folder must be in PYTHONPATH") from None
    if isinstance(found, Policy):
        return found
    if not callable(found):
        raise ValueError(f"policy {name!r}: {module} has no function or Policy {attribute}")
    return Policy(name, found, summary=(found.__doc__ or "").partition("\n")[0], reads_zones=True)


def name_problem(name: str) -> str | None:
    """Why nothing can have this name; None for a preset's name, and for one that a function somewhere may have."""
    module, colon, attribute = name.partition(":")
    if name in POLICIES or (colon and attribute.isidentifier() and all(map(str.isidentifier, module.split(".")))):
        return None
    return f"must be one of {', '.join(map(repr, POLICIES))}, or package.module:function for one of your own"


def _require_numbers(step: PolicyInput) -> PolicyInput:
    if math.isnan(step.alpha):
        raise ValueError("alpha is NaN")
    names = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")
    every = [getattr(step.statistics, name).isnan() & step.valid for name in names]
    if not bool((every[0] | every[1] | every[2] | every[3]).any()):  # one read from a GPU, not four
        return step
    name, bad = next((name, bad) for name, bad in zip(names, every, strict=True) if bad.any())
    first = int(bad.nonzero()[0])
    raise ValueError(f"{name} of {int(bad.sum())} valid tokens is NaN, the first is token {first}")


def _checked(weights: TokenWeights, step: PolicyInput) -> TokenWeights:
    """The weights that a policy returned, zero on tokens that are not valid."""
    if not isinstance(weights, TokenWeights):
        raise WrongWeightsError(f"returns {type(weights).__name__}: must return TokenWeights")
    shape, masked = step.valid.shape, {}
    for name in ("forward", "reverse"):
        values = getattr(weights, name)
        if getattr(values, "shape", None) != shape:
            raise WrongWeightsError(f"{name} weights must be a tensor of shape {list(shape)}, one a token")
        masked[name] = values.float().masked_fill(~step.valid, 0.0)
    if not bool((masked["forward"].isfinite() & masked["reverse"].isfinite()).all()):
        name = "reverse" if masked["forward"].isfinite().all() else "forward"
        raise WrongWeightsError(f"{name} weights are not all finite")
    return replace(weights, **masked)


def _weights(step: PolicyInput, *, forward: torch.Tensor | float, reverse: torch.Tensor | float) -> TokenWeights:
    """Weights as given on valid tokens, zero on the others."""
    valid = step.valid.float()
    return TokenWeights(valid * forward, valid * reverse)


def _sead(step: PolicyInput) -> TokenWeights:
    options = step.options
    in_b, in_c = (step.zones == ZONE_B).float(), (step.zones == ZONE_C).float()
    mixed = 1 - step.alpha if options.zone_c == "mix" else 0.0
    # |B u C|, even where alpha = 0 leaves zone C of eq. 4 without weight
    return TokenWeights(step.alpha * options.zone_c_scale * in_c, in_b + mixed * in_c, active=step.zones > 0)


def _opd(step: PolicyInput) -> TokenWeights:
    return _weights(step, forward=0.0, reverse=1.0)


def _forward_kl(step: PolicyInput) -> TokenWeights:
    return _weights(step, forward=1.0, reverse=0.0)


def _annealing(step: PolicyInput) -> TokenWeights:
    return _weights(step, forward=step.alpha, reverse=1 - step.alpha)


def _zones(step: PolicyInput) -> TokenWeights:
    in_b, in_c = (step.zones == ZONE_B).float(), (step.zones == ZONE_C).float()
    return TokenWeights(step.options.zone_c_scale * in_c, in_b, active=step.zones > 0)


def _eopd(step: PolicyInput) -> TokenWeights:
    return _weights(step, forward=step.statistics.teacher_entropy >= step.options.entropy_gate, reverse=1.0)


def _tip_entropy(step: PolicyInput) -> TokenWeights:
    from megatron_sead.distillation.token_selection import sampled_share

    return _weights(
        step, forward=0.0, reverse=sampled_share(step, step.statistics.student_entropy, step.options.keep_share)
    )


def _tip_soft_or(step: PolicyInput) -> TokenWeights:
    from megatron_sead.distillation.token_selection import top_share_by_soft_or

    kept = top_share_by_soft_or(step, step.options.keep_share, step.options.groups)
    return _weights(step, forward=0.0, reverse=kept)


def _random_half(step: PolicyInput) -> TokenWeights:
    from megatron_sead.distillation.token_selection import sampled_share

    alike = step.statistics.reverse_kl.new_ones(len(step.zones))
    return _weights(step, forward=0.0, reverse=sampled_share(step, alike, step.options.keep_share))


def _gkd_loss(given: LossInput) -> torch.Tensor:
    from megatron_sead.distillation.baselines import generalized_jsd

    return given.reverse_weight * generalized_jsd(
        given.student_logits,
        given.teacher_logits,
        beta=given.options.beta,
        group=given.group,
        vocab_size=given.vocab_size,
    )


def _sampled_loss(given: LossInput) -> torch.Tensor:
    from megatron_sead.distillation.baselines import sampled_token_loss

    return given.reverse_weight * sampled_token_loss(
        given.student_logits,
        given.teacher_logits,
        given.targets,
        given.old_log_probs,
        clip=given.options.clip,
        group=given.group,
        vocab_size=given.vocab_size,
    )


def _top_k_loss(given: LossInput) -> torch.Tensor:
    from megatron_sead.distillation.baselines import top_k_divergence

    return top_k_divergence(
        given.student_logits,
        given.teacher_logits,
        given.forward_weight,
        given.reverse_weight,
        k=given.options.top_k,
        tail=given.options.top_k_tail,
        group=given.group,
        vocab_size=given.vocab_size,
    )


POLICIES = {
    policy.name: policy
    for policy in (
        Policy(
            "sead",
            _sead,
            "zone B: reverse KL; zone C: alpha x lambda x forward KL + (1 - alpha) x reverse KL; zone A: nothing",
            reads_zones=True,
        ),
        Policy("opd", _opd, "reverse KL on every token: on-policy distillation"),
        Policy("forward_kl", _forward_kl, "forward KL on every token"),
        Policy("annealing", _annealing, "alpha x forward KL + (1 - alpha) x reverse KL on every token"),
        Policy("zones", _zones, "zone B: reverse KL; zone C: lambda x forward KL; zone A: nothing", reads_zones=True),
        Policy(
            "eopd",
            _eopd,
            "reverse KL on every token, and forward KL where the teacher's entropy reaches `policy.entropy_gate`",
        ),
        Policy(
            "tip_entropy",
            _tip_entropy,
            "reverse KL on a share of each rollout's tokens, drawn in proportion to the student's entropy",
        ),
        Policy(
            "tip_soft_or",
            _tip_soft_or,
            "reverse KL on the share of the step's tokens that is highest in student entropy or reverse KL",
            needs_whole_step=True,
        ),
        Policy(
            "opd_sampled",
            _opd,
            "the log-ratio of the sampled token as advantage, its importance ratio clipped at 1 +- `policy.clip`",
            loss=_sampled_loss,
        ),
        Policy(
            "gkd",
            _opd,
            "the generalized Jensen-Shannon divergence with `policy.beta`, on every token",
            loss=_gkd_loss,
        ),
        Policy("top_k", _opd, "reverse KL over the teacher's `policy.top_k` tokens, on every token", loss=_top_k_loss),
        Policy("random_half", _random_half, "reverse KL on a random share of each rollout: the control for skipping"),
    )
}
