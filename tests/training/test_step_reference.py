"""One whole step against sead-spec's formulas in fp64: transformers' models, dense softmaxes, sorted entropies.

Nothing of the code under test takes part in the reference but the recorded rollouts, which are its input. The step
runs in fp32; loss and gradient norm agree to 1e-5 relative (measured: 2e-6). A token too many or few in a zone moves
the loss by 1e-4 and more at these sizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_sead.config.run import load_config
from tests.distillation.test_policies import splitmix64
from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT, SHORT, TINY, metrics_of, train_tiny, zones_of

STEP = ["training.steps=1", "training.lr_warmup_steps=0"]
TP2 = ["parallel.tensor_model_parallel_size=2"]
SP = ["parallel.sequence_parallel=true"]
PACKED = ["training.micro_batch_size=1", "training.micro_batch_tokens=100"]


@dataclass
class Tokens:
    """The step's response tokens in the order of the record, [n] each, fp64."""

    forward_kl: torch.Tensor
    reverse_kl: torch.Tensor
    student_entropy: torch.Tensor
    teacher_entropy: torch.Tensor
    rollout: torch.Tensor
    position: torch.Tensor
    log_p: torch.Tensor  # [n, V]
    log_q: torch.Tensor
    target: torch.Tensor
    valid: torch.Tensor  # bool

    def of(self, chosen: torch.Tensor) -> Tokens:
        return Tokens(**{name: values[chosen] for name, values in vars(self).items()})


@pytest.fixture(scope="module")
def recorded(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recorded") / "run"
    assert train_tiny(pools, 1, output, STEP) == [True]
    _cut_every_fourth(output / "rollouts" / "step-0.jsonl")
    return output


def _cut_every_fourth(file: Path) -> None:
    """As if these had reached max_new_tokens."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    for record in records[::4]:
        record["finished"] = False
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture(scope="module")
def student() -> Any:
    return AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny" / "student", dtype=torch.float64)


def teacher_prompts(overrides: list[str]) -> dict[str, tuple[int, ...]]:
    from megatron_sead.prompts.dataset import stream_prompts
    from megatron_sead.prompts.tokenizer import load_tokenizer

    config = load_config(TINY, [*SHORT, *overrides])
    tokenizers = load_tokenizer(config.student, "student"), load_tokenizer(config.teacher, "teacher")
    prompts = list(stream_prompts(config.prompts, *tokenizers, teacher_prompt_field=config.teacher.prompt_field))
    return {prompt.id: prompt.teacher_token_ids for prompt in prompts}


def reference_tokens(run: Path, student: Any, overrides: list[str]) -> Tokens:
    teacher = AutoModelForCausalLM.from_pretrained(ROOT / "examples" / "tiny" / "teacher", dtype=torch.float64)
    prompts = teacher_prompts(overrides)
    records = [json.loads(line) for line in (run / "rollouts" / "step-0.jsonl").read_text().splitlines()]
    responses = [record["response_token_ids"] for record in records]
    z = logits_at(student, [record["prompt_token_ids"] for record in records], responses)
    with torch.no_grad():
        y = logits_at(teacher, [list(prompts[record["prompt_id"]]) for record in records], responses)
    log_p, log_q = z.log_softmax(-1), y.log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    values = (q * (log_q - log_p), p * (log_p - log_q), -p * log_p, -q * log_q)
    rollout = torch.tensor([index for index, response in enumerate(responses) for _ in response])
    position = torch.tensor([place for response in responses for place in range(len(response))])
    masked = [not record["finished"] and "training.mask_truncated=true" in overrides for record in records]
    target = torch.tensor([token for response in responses for token in response])
    sums = [value.sum(-1) for value in values]
    return Tokens(*sums, rollout, position, log_p, log_q, target, ~torch.tensor(masked)[rollout])


def logits_at(model: Any, prompts: list[list[int]], responses: list[list[int]]) -> torch.Tensor:
    """[n, V] that predict the response tokens. Padding is on the right, where a causal model does not see it."""
    rows = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
    logits = model(torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)).logits
    pairs = enumerate(zip(prompts, responses, strict=True))
    return torch.cat([logits[i, len(p) - 1 : len(p) - 1 + len(r)] for i, (p, r) in pairs])


def reference_zones(tokens: Tokens, overrides: list[str]) -> torch.Tensor:
    """0 A, 1 B, 2 C, -1 not valid."""
    zones = torch.full((len(tokens.rollout),), -1)
    if "zones.scope=sequence" in overrides:
        for rollout in tokens.rollout.unique():
            own = tokens.rollout == rollout
            zones[own] = quantile_zones(tokens.of(own))
    elif "zones.thresholds=absolute" in overrides:
        zones = (tokens.student_entropy > 0.3).long()
        zones[tokens.teacher_entropy >= 0.5] = 2
    else:
        zones[tokens.valid] = quantile_zones(tokens.of(tokens.valid))
    if "zones.rescue_threshold=0.05" in overrides:
        zones[(zones == 0) & (tokens.reverse_kl > 0.05)] = 1
    return zones


def quantile_zones(tokens: Tokens) -> torch.Tensor:
    """The tenth with the highest teacher entropy is in C, 4/10 of all, those of the rest with the highest student
    entropy, in B."""
    count = len(tokens.rollout)
    zones = torch.zeros(count, dtype=torch.long)
    order = tokens.teacher_entropy.detach().argsort(descending=True)
    in_c = round(count * 0.1)
    zones[order[:in_c]] = 2
    rest = order[in_c:]
    by_student = rest[tokens.student_entropy.detach()[rest].argsort(descending=True)]
    zones[by_student[: round(count * 0.4)]] = 1
    return zones


def kept_of_each_rollout(tokens: Tokens, weight: torch.Tensor) -> torch.Tensor:
    """[n] half of each rollout's tokens, those with the greatest log weight + Gumbel noise of (seed 0, the token)."""
    places = zip(tokens.rollout.tolist(), tokens.position.tolist(), strict=True)
    noise = torch.tensor([splitmix64(0, *place) for place in places], dtype=torch.float64)
    score, kept = weight.detach().log() - (-noise.log()).log(), torch.zeros(len(noise), dtype=torch.float64)
    for rollout in tokens.rollout.unique():
        own = (tokens.rollout == rollout).nonzero().squeeze(1)
        kept[own[score[own].argsort(descending=True)[: (len(own) + 1) // 2]]] = 1
    return kept


def kept_of_the_step(tokens: Tokens) -> torch.Tensor:
    """[n] the half with the highest h + d - h*d."""
    h, d = (
        (values - values.min()) / (values.max() - values.min())
        for values in (tokens.student_entropy.detach(), tokens.reverse_kl.detach())
    )
    kept = torch.zeros_like(h)
    kept[(h + d - h * d).argsort(descending=True)[: round(len(h) / 2)]] = 1
    return kept


def weights_of(policy: str, tokens: Tokens, zones: torch.Tensor, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Section 3's table of presets."""
    one = tokens.valid.double()
    b, c = (zones == 1).double(), (zones == 2).double()
    gate = (tokens.teacher_entropy.detach() >= 0.8).double()
    entropy = tokens.student_entropy.detach()
    return {
        "sead": lambda: (alpha * c, b + (1 - alpha) * c),
        "sead eq4": lambda: (alpha * c, b),
        "opd": lambda: (0 * one, one),
        "forward_kl": lambda: (one, 0 * one),
        "annealing": lambda: (alpha * one, (1 - alpha) * one),
        "zones": lambda: (c, b),
        "eopd": lambda: (gate, one),
        "tip_entropy": lambda: (0 * one, kept_of_each_rollout(tokens, entropy)),
        "random_half": lambda: (0 * one, kept_of_each_rollout(tokens, one)),
        "tip_soft_or": lambda: (0 * one, kept_of_the_step(tokens)),
        "own function": lambda: (c, 0.5 * (1 - c)),
        "own record": lambda: (0 * one, entropy),
        "opd_sampled": lambda: (0 * one, one),
        "gkd": lambda: (0 * one, one),
        "top_k": lambda: (0 * one, one),
    }[policy]()


def baseline_terms(policy: str, tokens: Tokens) -> torch.Tensor:
    """[n] losses that are no weighted sum of the divergences, whose gradient autograd finds."""
    log_p, log_q = tokens.log_p, tokens.log_q
    if policy == "gkd":
        mixture = (0.3 * log_q.exp() + 0.7 * log_p.exp()).log()
        of_teacher = (log_q.exp() * (log_q - mixture)).sum(-1)
        return 0.3 * of_teacher + 0.7 * (log_p.exp() * (log_p - mixture)).sum(-1)
    if policy == "opd_sampled":
        sampled, of_teacher = (log.gather(-1, tokens.target[:, None]).squeeze(-1) for log in (log_p, log_q))
        return -(sampled - sampled.detach()).exp() * (of_teacher - sampled).detach()
    best = log_q.topk(20).indices
    log_p, log_q = (log.gather(-1, best).log_softmax(-1) for log in (log_p, log_q))
    return (log_p.exp() * (log_p - log_q)).sum(-1)


CASES: dict[str, tuple[str, int, list[str]]] = {
    "sead": ("sead", 1, []),
    "sead at tp2": ("sead", 2, TP2),
    "sead at dp2, micro-batches of 1": ("sead", 2, ["training.micro_batch_size=1"]),
    "sead, packed": ("sead", 1, PACKED),
    "sead, packed, tp2 sequence parallel, the teacher sees another prompt": (
        "sead",
        2,
        [*PACKED, *TP2, *SP, "teacher.prompt_field=answer"],
    ),
    "sead, the teacher sees another prompt": ("sead", 2, [*TP2, "teacher.prompt_field=answer"]),
    "sead, one sequence as much as another": ("sead", 2, ["training.normalizer=sequence"]),
    "sead, all response tokens": ("sead", 1, ["training.normalizer=valid"]),
    "sead with eq. 4 in zone C": ("sead eq4", 1, ["policy.zone_c=eq4"]),
    "opd": ("opd", 1, ["policy.name=opd"]),
    "forward_kl": ("forward_kl", 2, ["policy.name=forward_kl", *TP2]),
    "annealing": ("annealing", 1, ["policy.name=annealing"]),
    "zones": ("zones", 1, ["policy.name=zones"]),
    "eopd": ("eopd", 1, ["policy.name=eopd"]),
    "tip_entropy": ("tip_entropy", 1, ["policy.name=tip_entropy"]),
    "random_half": ("random_half", 1, ["policy.name=random_half"]),
    "tip_soft_or": ("tip_soft_or", 1, ["policy.name=tip_soft_or"]),
    "opd_sampled": ("opd_sampled", 1, ["policy.name=opd_sampled"]),
    "opd_sampled at tp2, sequence parallel": ("opd_sampled", 2, ["policy.name=opd_sampled", *TP2, *SP]),
    "gkd": ("gkd", 1, ["policy.name=gkd", "policy.beta=0.3"]),
    "gkd at tp2, a few tokens at a time": (
        "gkd",
        2,
        ["policy.name=gkd", "policy.beta=0.3", "training.scratch_bytes=1048576", *TP2],
    ),
    "top_k": ("top_k", 1, ["policy.name=top_k", "policy.top_k=20", "policy.top_k_tail=renormalize"]),
    "top_k at tp2": ("top_k", 2, ["policy.name=top_k", "policy.top_k=20", "policy.top_k_tail=renormalize", *TP2]),
    "a function of one's own": ("own function", 1, ["policy.name=tests.training.own_policy:gentle"]),
    "a record of one's own": ("own record", 1, ["policy.name=tests.training.own_policy:BY_ENTROPY"]),
    "sead by each sequence's quantiles": ("sead", 1, ["zones.scope=sequence"]),
    "sead by given nats": (
        "sead",
        1,
        ["zones.thresholds=absolute", "zones.teacher_threshold=0.5", "zones.student_threshold=0.3"],
    ),
    "sead with confident errors rescued": ("sead", 1, ["zones.rescue_threshold=0.05"]),
    "sead without truncated rollouts": ("sead", 1, ["training.mask_truncated=true"]),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_formula(case: str, pools: RankPools, recorded: Path, student: Any, tmp_path: Path) -> None:
    policy, ranks, overrides = CASES[case]
    replay = ["rollouts.engine=replay", f"rollouts.path={recorded}", "training.clip_grad=1000"]
    assert train_tiny(pools, ranks, tmp_path / "run", [*STEP, *replay, *overrides]) == [True] * ranks
    found = metrics_of(tmp_path / "run")[0]

    student.zero_grad()
    tokens = reference_tokens(recorded, student, overrides)
    zones = reference_zones(tokens, overrides)
    forward, reverse = weights_of(policy, tokens, zones, alpha=0.8)
    if policy in ("opd_sampled", "gkd", "top_k"):
        terms = baseline_terms(policy, tokens)
    else:
        terms = forward * tokens.forward_kl + reverse * tokens.reverse_kl
    active = (zones > 0) if policy in ("sead", "sead eq4", "zones") else (forward != 0) | (reverse != 0)
    if "training.normalizer=valid" in overrides:
        loss = terms.sum() / len(terms)
    elif "training.normalizer=sequence" in overrides:
        rollouts = [terms[tokens.rollout == i].sum() / active[tokens.rollout == i].sum() for i in range(32)]
        loss = torch.stack(rollouts).mean()
    else:
        loss = terms.sum() / active.sum()
    loss.backward()
    norm = torch.stack([parameter.grad.norm() for parameter in student.parameters()]).norm()

    assert "".join(zones_of(tmp_path / "run", 0)) == "".join("ABC-"[zone] for zone in zones)
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    for key in ("forward_kl", "reverse_kl", "student_entropy", "teacher_entropy"):
        assert found[key] == pytest.approx(getattr(tokens, key)[tokens.valid].mean().item(), rel=1e-5), key
    share = tokens.forward_kl[zones == 0].sum() / tokens.forward_kl[tokens.valid].sum()
    assert found["zone_a_forward_kl_share"] == pytest.approx(share.item(), abs=1e-6)
