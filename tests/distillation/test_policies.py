"""Every preset's two weights; draws that no layout changes."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from megatron_sead.distillation import POLICIES, PolicyInput, TokenStatistics, TokenWeights, find_policy, make_policy
from megatron_sead.distillation.policies import LossInput, PolicyOptions, with_options
from megatron_sead.distillation.token_selection import uniform_noise
from tests.distillation.ranks import Groups, Ranks


def step(count: int = 400, *, rollouts: int = 8, alpha: float = 0.3, seed: int = 5) -> PolicyInput:
    """Random statistics; rollouts of 7, 14, ... tokens."""
    generator = torch.Generator().manual_seed(0)
    entropy, other, forward, reverse = torch.rand(4, count, generator=generator) * 2
    rollout = torch.arange(count) * rollouts // count
    return PolicyInput(
        TokenStatistics(entropy, other, forward, reverse, torch.ones(count, dtype=torch.bool)),
        zones=torch.randint(-1, 3, (count,), generator=generator).to(torch.int8),
        rollout_index=rollout,
        position=torch.arange(count) - (rollout * count).div(rollouts, rounding_mode="floor"),
        alpha=alpha,
        seed=seed,
    )


def take(whole: PolicyInput, chosen: torch.Tensor) -> PolicyInput:
    """Some tokens of a step, in any order."""
    statistics = TokenStatistics(**{name: value[chosen] for name, value in vars(whole.statistics).items()})
    return PolicyInput(
        statistics,
        whole.zones[chosen],
        whole.rollout_index[chosen],
        whole.position[chosen],
        whole.alpha,
        whole.seed,
    )


# weights in zones A, B, C at alpha = 0.3; teacher entropy 1 nat
TABLE = {
    "sead": [(0, 0), (0, 1), (0.3, 0.7)],
    "opd": [(0, 1)] * 3,
    "forward_kl": [(1, 0)] * 3,
    "annealing": [(0.3, 0.7)] * 3,
    "zones": [(0, 0), (0, 1), (1, 0)],
    "eopd": [(1, 1)] * 3,
}


def weights_by_zone(weights: TokenWeights) -> list[tuple[float, float]]:
    return [(round(f, 6), round(r, 6)) for f, r in zip(weights.forward.tolist(), weights.reverse.tolist(), strict=True)]


def one_of_each_zone() -> PolicyInput:
    four = take(step(), torch.arange(4))
    four.zones = torch.tensor([0, 1, 2, -1], dtype=torch.int8)
    four.statistics.teacher_entropy = torch.ones(4)
    return four


@pytest.mark.parametrize("name", TABLE)
def test_presets(name: str) -> None:
    weights = make_policy(name)(one_of_each_zone())
    assert weights_by_zone(weights) == [*TABLE[name], (0, 0)]
    assert weights.forward.dtype == weights.reverse.dtype == torch.float32


def test_options_of_zone_c() -> None:
    tokens = one_of_each_zone()
    eq4 = make_policy("sead", zone_c="eq4", zone_c_scale=2.0)(tokens)
    assert weights_by_zone(eq4) == [(0, 0), (0, 1), (0.6, 0), (0, 0)]
    mix = make_policy("sead", zone_c_scale=2.0)(tokens)
    assert weights_by_zone(mix)[2] == (0.6, 0.7)
    assert weights_by_zone(make_policy("zones", zone_c_scale=2.0)(tokens))[2] == (2, 0)


def test_eopd_gate_is_closed_under_its_threshold() -> None:
    tokens = one_of_each_zone()
    tokens.statistics.teacher_entropy = torch.tensor([0.49, 0.5, 0.51, 2.0])
    weights = make_policy("eopd", entropy_gate=0.5)(tokens)
    assert weights_by_zone(weights) == [(0, 1), (1, 1), (1, 1), (0, 0)]


@pytest.mark.parametrize("share", [0.5, 0.2, 1.0])
@pytest.mark.parametrize("name", ["tip_entropy", "random_half"])
def test_sampled_share_is_exact_in_each_rollout(name: str, share: float) -> None:
    tokens = step()
    weights = make_policy(name, keep_share=share)(tokens)
    assert not weights.forward.any() and set(weights.reverse.tolist()) <= {0.0, 1.0}
    assert not weights.reverse[tokens.zones < 0].any()
    for rollout in range(8):
        own = tokens.rollout_index == rollout
        valid = int((tokens.zones[own] >= 0).sum())
        assert weights.reverse[own].sum() == math.floor(share * valid + 0.5)


@pytest.mark.parametrize("name", POLICIES)
def test_no_layout_changes_a_weight(name: str) -> None:
    """Micro-batches of whole rollouts in another order give what the whole step gives; and so does a second call."""
    whole, policy = step(), make_policy(name)
    expected = policy(whole)
    if POLICIES[name].needs_whole_step:  # its ranks are tested below
        parts = [torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    else:
        parts = [torch.isin(whole.rollout_index, torch.tensor(r)).nonzero().squeeze(1) for r in ([7, 2], [1], [0, 3])]
        parts[1] = parts[1].flip(0)
    for part in parts:
        found = policy(take(whole, part))
        assert torch.equal(found.forward, expected.forward[part]) and torch.equal(found.reverse, expected.reverse[part])


@pytest.mark.parametrize("name", ["tip_entropy", "random_half"])
def test_another_seed_is_another_draw(name: str) -> None:
    policy = make_policy(name)
    assert not torch.equal(policy(step(seed=1)).reverse, policy(step(seed=2)).reverse)


def test_tip_entropy_draws_in_proportion() -> None:
    """One of two tokens with weights 1 and 3: the second is drawn in 3/4 of 4000 rollouts, give or take 5 sigma."""
    count = 8000
    tokens = step(count, rollouts=count // 2)
    tokens.zones = torch.zeros(count, dtype=torch.int8)
    tokens.statistics.student_entropy = torch.tensor([0.2, 0.6]).repeat(count // 2)
    kept = make_policy("tip_entropy")(tokens).reverse.view(-1, 2)
    assert (kept.sum(1) == 1).all()
    assert abs(kept[:, 1].mean() - 0.75) < 5 * (0.75 * 0.25 / 4000) ** 0.5


def test_tip_entropy_takes_certain_tokens_last() -> None:
    tokens = step()
    tokens.statistics.student_entropy[::2] = 0
    kept = make_policy("tip_entropy", keep_share=0.4)(tokens).reverse > 0
    for rollout in range(8):
        own = (tokens.rollout_index == rollout) & (tokens.zones >= 0)
        unsure = own & (tokens.statistics.student_entropy > 0)
        assert not (kept & own & ~unsure).any() or kept[unsure].all()


def soft_or_reference(tokens: PolicyInput, share: float) -> list[int]:
    """By the formula, in plain Python."""
    valid = (tokens.zones >= 0).nonzero().squeeze(1).tolist()
    scaled = []
    for values in (tokens.statistics.student_entropy, tokens.statistics.reverse_kl):
        chosen = values[valid].tolist()
        scaled.append([(value - min(chosen)) / (max(chosen) - min(chosen)) for value in chosen])
    scores = {token: h + d - h * d for token, h, d in zip(valid, *scaled, strict=True)}
    return sorted(sorted(valid, key=scores.__getitem__, reverse=True)[: round(share * len(valid))])


@pytest.mark.parametrize("share", [0.5, 0.1])
def test_tip_soft_or(share: float) -> None:
    tokens = step()
    kept = make_policy("tip_soft_or", keep_share=share)(tokens).reverse.nonzero().squeeze(1).tolist()
    assert kept == soft_or_reference(tokens, share)


def test_tip_soft_or_breaks_ties_by_place() -> None:
    tokens = take(step(), torch.arange(12).flip(0))
    tokens.zones[:] = 0
    tokens.statistics.student_entropy[:] = tokens.statistics.reverse_kl[:] = 1.0
    assert make_policy("tip_soft_or")(tokens).reverse.tolist() == [0] * 6 + [1] * 6


def soft_or_on_rank(groups: Groups, names: list[str], split: list[int]) -> list[float]:
    chosen = torch.arange(400).split(split)[torch.distributed.get_rank()]
    policy = make_policy("tip_soft_or", groups=[groups[name] for name in names])
    return policy(take(step(), chosen)).reverse.tolist()


@pytest.mark.parametrize("names", [["4"], ["2", "columns"]])
def test_tip_soft_or_over_ranks(ranks: Ranks, names: list[str]) -> None:
    expected = make_policy("tip_soft_or")(step()).reverse.tolist()
    for split in ([100, 100, 100, 100], [0, 390, 0, 10]):
        assert [weight for rank in ranks.run(soft_or_on_rank, names, split) for weight in rank] == expected


def splitmix64(seed: int, *values: int) -> float:
    """The hash in Python's own integers."""
    mask, state = 2**64 - 1, seed

    def mix(state: int) -> int:
        state = (state + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        return state ^ (state >> 31)

    for value in values:
        state = mix(state) ^ value
    return ((mix(state) >> 11) + 0.5) * 2.0**-53


def test_noise_is_splitmix64() -> None:
    assert splitmix64(0) == ((0xE220A8397B1DCDAF >> 11) + 0.5) * 2.0**-53  # the generator's published first output
    rollout, position = torch.tensor([0, 0, 1, 2**40]), torch.tensor([0, 1, 0, 16384])
    for seed in (0, 7, 2**62 + 1):
        expected = [splitmix64(seed, r, p) for r, p in zip(rollout.tolist(), position.tolist(), strict=True)]
        assert uniform_noise(seed, rollout, position).tolist() == expected


def test_noise_is_uniform() -> None:
    noise = uniform_noise(3, torch.arange(100).repeat_interleave(1000), torch.arange(1000).repeat(100))
    assert noise.min() > 0 and noise.max() < 1 and len(noise.unique()) == 100_000
    counts = torch.histc(noise.float(), bins=20, min=0, max=1)
    assert ((counts - 5000) ** 2 / 5000).sum() < 50  # chi-square, 19 degrees of freedom: 1 in 10,000


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_without_tokens(name: str) -> None:
    weights = make_policy(name)(take(step(), torch.arange(0)))
    assert weights.forward.shape == weights.reverse.shape == (0,)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "seed"}, "policy 'seed': must be one of 'sead', 'opd'"),
        ({"name": "sead", "zone_c": "eq5"}, "zone_c='eq5': must be one of mix, eq4"),
        ({"name": "tip_entropy", "keep_share": 0}, "keep_share=0"),
    ],
)
def test_bad_values_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(**values)  # type: ignore[arg-type]


DOCUMENT = (Path(__file__).parents[2] / "docs" / "policies.md").read_text(encoding="utf-8")


def test_every_policy_is_documented() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE)) == sorted(POLICIES)
    assert all(policy.summary for policy in POLICIES.values())


def test_the_documented_examples_are_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("my_policies")
    for code in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        exec(code, module.__dict__)
    monkeypatch.setitem(sys.modules, "my_policies", module)
    tokens = one_of_each_zone()
    tokens.statistics.teacher_entropy = torch.tensor([0.5, 1.5, 0.5, 0.5])
    assert weights_by_zone(make_policy("my_policies:cautious")(tokens)) == [(0, 0), (0.5, 0), (0, 1), (0, 0)]
    assert find_policy("my_policies:cautious").reads_zones and not find_policy("my_policies:BY_ENTROPY").reads_zones
    weights = make_policy("my_policies:BY_ENTROPY")(tokens)
    assert torch.equal(weights.reverse[:3], tokens.statistics.student_entropy[:3]) and not weights.reverse[3]


@pytest.mark.parametrize("name", ["", "my policies:f", "a.b", "a:b:c", ":f", "a:", "a..b:f", "./a.py:f"])
def test_what_names_no_function_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"must be one of 'sead', .* or package.module:function for one of your own"):
        find_policy(name)


def loss_input(**options: object) -> LossInput:
    """Eight tokens of 30; the student is now e^0.5 as sure of the sampled ones as when it sampled."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 8, 30, generator=generator)
    targets = torch.arange(8)
    old = student.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1) - 0.5
    half = torch.full((8,), 0.5)
    return LossInput(student, teacher, half, half, targets, old, None, 30, PolicyOptions(**options))  # type: ignore[arg-type]


LOSSES: dict[str, list[dict[str, object]]] = {
    "gkd": [{"beta": 0.2}, {"beta": 0.7}],
    "opd_sampled": [{"clip": 0.1}, {"clip": 0.9}],
    "top_k": [{"top_k": 3}, {"top_k": 5}, {"top_k": 3, "top_k_tail": "renormalize"}],
}


def test_every_loss_of_its_own_is_tested_here() -> None:
    assert LOSSES.keys() == {name for name, policy in POLICIES.items() if policy.loss is not None}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_of_its_own_is_weighted_and_has_its_options(name: str) -> None:
    policy, values = POLICIES[name], []
    for options in LOSSES[name]:
        given, chosen = loss_input(), PolicyOptions(**options)  # type: ignore[arg-type]
        loss = with_options(policy.loss, chosen)
        assert loss is not None
        values.append(loss(given))
        nothing = loss(replace(given, forward_weight=torch.zeros(8), reverse_weight=torch.zeros(8)))
        assert values[-1].any() and not nothing.any()
        twice = loss(replace(given, forward_weight=2 * given.forward_weight, reverse_weight=2 * given.reverse_weight))
        torch.testing.assert_close(twice, 2 * values[-1])
    for i, value in enumerate(values):
        assert not any(torch.allclose(value, other) for other in values[i + 1 :])
