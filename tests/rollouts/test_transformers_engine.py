"""The engine against transformers itself: its generate, its full forward pass, its softmax."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Olmo3ForCausalLM

from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.rollouts.engine import EngineFailed, GenerationRequest, Rollout, Sampling
from megatron_sead.rollouts.transformers_engine import TransformersEngine
from tests.rollouts.generation import GENERATION

pytestmark = pytest.mark.transformers_lane

STOP = (1, 3)


def make_engine(directory: Path, **changes: object) -> TransformersEngine:
    values: dict[str, object] = {
        "sampling": Sampling(temperature=1.0, top_p=1.0, max_new_tokens=20),
        "stop_token_ids": STOP,
        "pad_token_id": 0,
        "seed": 5,
    }
    return TransformersEngine(directory, **(values | changes))  # type: ignore[arg-type]


def make_requests(count: int, vocab_size: int = 60) -> list[GenerationRequest]:
    """Prompts of 2 to 14 tokens: shorter and longer than the sliding window of 6."""
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(4, vocab_size) for _ in range(draw.randrange(2, 15))) for _ in range(count)]
    return [GenerationRequest(f"p{i}", i % 3, prompt) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def engine(tiny_olmo3: Path) -> TransformersEngine:
    return make_engine(tiny_olmo3)


@pytest.fixture(scope="module")
def reference(tiny_olmo3: Path) -> Olmo3ForCausalLM:
    return Olmo3ForCausalLM.from_pretrained(tiny_olmo3, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def rollouts(engine: TransformersEngine) -> list[Rollout]:
    return engine.generate(make_requests(24), step=2)


def test_greedy_is_transformers_generate(engine: TransformersEngine, reference: Olmo3ForCausalLM) -> None:
    greedy = Sampling(temperature=0.0, top_p=1.0, max_new_tokens=20)
    for rollout in engine.generate(make_requests(12), step=0, sampling=greedy):
        prompt = torch.tensor([rollout.prompt_token_ids])
        expected = reference.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=20, eos_token_id=list(STOP)
        )
        assert rollout.response_token_ids == tuple(expected[0, prompt.shape[1] :].tolist())


def test_log_probs_are_those_of_a_full_forward_pass(rollouts: list[Rollout], reference: Olmo3ForCausalLM) -> None:
    assert max(len(r.response_token_ids) for r in rollouts) > 10
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.response_token_ids]])
        logits = reference(ids, use_cache=False).logits[0].double()
        start = len(rollout.prompt_token_ids)
        expected = logits.log_softmax(-1)[start - 1 : -1].gather(-1, ids[0, start:, None]).squeeze(1)
        # fp32 sums in another order; a window or position that is off by one shows as 1e-1
        torch.testing.assert_close(torch.tensor(rollout.log_probs, dtype=torch.float64), expected, atol=2e-5, rtol=0)


def test_log_probs_do_not_follow_the_sampling(engine: TransformersEngine) -> None:
    cold = engine.generate(make_requests(4), 0, Sampling(temperature=0.5, top_p=0.6, max_new_tokens=8))
    for rollout in cold:
        scored = engine.score([*rollout.prompt_token_ids, *rollout.response_token_ids])
        expected = scored[len(rollout.prompt_token_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(rollout.log_probs), expected, atol=2e-5, rtol=0)


def test_score_is_the_full_forward_pass(engine: TransformersEngine, reference: Olmo3ForCausalLM) -> None:
    ids = [token % 56 + 4 for token in range(70)]
    logits = reference(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(engine.score(ids), expected, atol=1e-5, rtol=0)


def test_a_rollout_does_not_depend_on_its_batch(tiny_olmo3: Path, rollouts: list[Rollout]) -> None:
    requests = make_requests(24)
    by_key = {(r.prompt_id, r.sample): r for r in rollouts}
    small = make_engine(tiny_olmo3, batch_size=5)
    for other in (small.generate(requests, 2), small.generate(requests[::-1], 2), small.generate(requests[7:8], 2)):
        for rollout in other:
            assert rollout.response_token_ids == by_key[rollout.prompt_id, rollout.sample].response_token_ids


def test_rollouts_come_in_the_order_of_the_requests(rollouts: list[Rollout]) -> None:
    assert [(r.prompt_id, r.sample, r.prompt_token_ids) for r in rollouts] == [
        (r.prompt_id, r.sample, r.prompt_token_ids) for r in make_requests(24)
    ]


@pytest.mark.parametrize("change", ["seed", "step", "prompt_id", "sample"])
def test_seed_step_prompt_and_sample_each_change_the_draw(
    tiny_olmo3: Path, rollouts: list[Rollout], change: str
) -> None:
    requests = make_requests(24)
    if change in ("prompt_id", "sample"):
        value = {"prompt_id": "other", "sample": 99}[change]
        requests = [GenerationRequest(**(vars(r) | {change: value})) for r in requests]
    engine = make_engine(tiny_olmo3, seed=6 if change == "seed" else 5)
    others = engine.generate(requests, 3 if change == "step" else 2)
    same = [a.response_token_ids == b.response_token_ids for a, b in zip(rollouts, others, strict=True)]
    assert sum(same) < len(same) / 2


def test_stop_tokens_end_a_response_and_belong_to_it(rollouts: list[Rollout]) -> None:
    assert {rollout.finished for rollout in rollouts} == {True, False}
    for rollout in rollouts:
        *before, last = rollout.response_token_ids
        assert not set(before) & set(STOP)
        assert (last in STOP) == rollout.finished
        assert rollout.finished or len(rollout.response_token_ids) == 20
        assert rollout.log_probs is not None
        assert len(rollout.log_probs) == len(rollout.response_token_ids)


def test_padded_vocabulary_is_never_sampled(tiny_olmo3: Path) -> None:
    engine = make_engine(tiny_olmo3, vocab_size=12, stop_token_ids=())
    hot = Sampling(temperature=50.0, top_p=1.0, max_new_tokens=20)
    written = engine.generate(make_requests(20, vocab_size=12), 0, hot)
    tokens = [token for rollout in written for token in rollout.response_token_ids]
    assert max(tokens) == 11  # all of the true columns come up among 400 draws, and none beyond
    assert set(tokens) == set(range(12))


def test_new_weights_are_used(tiny_olmo3: Path, reference: Olmo3ForCausalLM) -> None:
    engine = make_engine(tiny_olmo3)
    ids = list(range(4, 40))
    before = engine.score(ids)
    changed = Olmo3ForCausalLM(reference.config)
    engine.load_weights((name, weight.detach()) for name, weight in changed.state_dict().items())
    logits = changed(torch.tensor([ids]), use_cache=False).logits[0, :-1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    torch.testing.assert_close(engine.score(ids), expected, atol=1e-5, rtol=0)
    assert (engine.score(ids) - before).abs().max() > 0.1


def test_wrong_weights_are_refused_after_all_were_consumed(
    engine: TransformersEngine, reference: Olmo3ForCausalLM
) -> None:
    good = dict(reference.state_dict())
    missing = {name: weight for name, weight in good.items() if name != "model.norm.weight"}
    cases = {
        "model.norm.weight: no new value": missing,
        "rotor.weight: the rollout model has no such weight": {"rotor.weight": torch.ones(1)} | good,
        r"lm_head.weight: shape \[2, 2\]": good | {"lm_head.weight": torch.ones(2, 2)},
    }
    for message, weights in cases.items():
        iterator = iter(weights.items())
        with pytest.raises(ValueError, match=message):
            engine.load_weights(iterator)
        assert next(iterator, None) is None


def test_how_a_models_directory_would_generate_changes_nothing(tiny_olmo3: Path, tmp_path: Path) -> None:
    """What decides is the run's settings, and what it says ends a response."""
    directory = Path(shutil.copytree(tiny_olmo3, tmp_path / "model"))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    written = [make_engine(place).generate(make_requests(12), 4) for place in (directory, tiny_olmo3)]
    assert written[0] == written[1]
    tokens = {token for rollout in written[0] for token in rollout.response_token_ids}
    assert tokens & {5, 6, 7, 8, 9, 10} and tokens & {20, 21, 22}


def test_samples_of_a_prompt_differ_and_come_again(engine: TransformersEngine, rollouts: list[Rollout]) -> None:
    asked = [GenerationRequest("same", sample, (4, 5, 6)) for sample in range(8)]
    written = engine.generate(asked, 0)
    assert len({rollout.response_token_ids for rollout in written}) == 8
    assert engine.generate(asked, 0) == written


def test_a_stop_token_in_a_prompt_stops_nothing_and_one_that_comes_first_is_a_response(
    engine: TransformersEngine, reference: Olmo3ForCausalLM
) -> None:
    prompt = (4, 1, 3, 5, 3)
    asked = [GenerationRequest("stops", sample, prompt) for sample in range(300)]
    written = engine.generate(asked, 0)
    assert max(len(rollout.response_token_ids) for rollout in written) > 1
    logits = reference(torch.tensor([prompt])).logits[0, -1]
    at_once = [r for r in written if len(r.response_token_ids) == 1]
    assert at_once and all(r.finished and r.response_token_ids[0] in STOP for r in at_once)
    for rollout in at_once:
        assert rollout.log_probs is not None
        assert rollout.log_probs[0] == pytest.approx(
            logits.log_softmax(-1)[rollout.response_token_ids[0]].item(), abs=1e-5
        )
    (one,) = engine.generate(asked[:1], 0, Sampling(1.0, 1.0, 1))
    assert one.response_token_ids == written[0].response_token_ids[:1]  # a lower limit cuts, and draws no others


def test_a_response_may_fill_the_context_to_its_last_position(tiny_olmo3: Path, reference: Olmo3ForCausalLM) -> None:
    engine = make_engine(tiny_olmo3, stop_token_ids=())
    context = reference.config.max_position_embeddings
    prompt = tuple(4 + i % 50 for i in range(context - 20))
    for asked in ([prompt], [prompt, (4, 5)]):  # alone, and beside one that padding must not move
        rollout = engine.generate([GenerationRequest("long", 0, p) for p in asked], 0)[0]
        assert len(rollout.response_token_ids) == 20 and not rollout.finished
        scored = engine.score([*prompt, *rollout.response_token_ids])[len(prompt) - 1 :]
        torch.testing.assert_close(torch.tensor(rollout.log_probs), scored, atol=2e-5, rtol=0)


def test_tokens_of_a_student_that_is_sure_have_log_probs(tiny_olmo3: Path) -> None:
    """As after a collapse of entropy: no NaN, nothing above 0."""
    engine = make_engine(tiny_olmo3)
    engine.model.get_output_embeddings().weight *= 1e4
    values = [value for r in engine.generate(make_requests(8), 0) for value in r.log_probs or ()]
    assert all(-1e5 < value <= 0 for value in values) and min(map(abs, values)) == 0


def test_a_directory_that_is_no_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no config\.json"):
        make_engine(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_not_finite_are_told(tiny_olmo3: Path, temperature: float, value: float) -> None:
    """Greedy or drawn: without a word they would be some token, or an index beyond the vocabulary; and beside a logit
    that is infinite, any other token's log-probability is so, too."""
    engine = make_engine(tiny_olmo3, sampling=Sampling(temperature, 1.0, 4))
    engine.model.get_output_embeddings().weight[5] = value
    with pytest.raises(NotFiniteNumbers, match=r"prompt 'p\d': the model's logits of token 0 are not finite"):
        engine.generate(make_requests(3), step=0)


@pytest.mark.parametrize("verb", ["generate", "wake"])
def test_a_full_gpu_is_one_line(tiny_olmo3: Path, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    engine = make_engine(tiny_olmo3)
    engine.sleep()
    if verb == "generate":
        monkeypatch.setattr(engine, "_write", full)
    else:
        monkeypatch.setattr(torch.Tensor, "new_empty", full)
    told = r"^rollouts\.engine='transformers': CUDA out of memory\. Tried to allocate 2 GiB\.; a smaller "
    with pytest.raises(EngineFailed, match=told):
        engine.generate(make_requests(2), 0) if verb == "generate" else engine.wake()


def test_an_engine_that_has_slept_writes_as_before_once_it_has_weights(
    tiny_olmo3: Path, reference: Olmo3ForCausalLM, rollouts: list[Rollout]
) -> None:
    engine = make_engine(tiny_olmo3)
    engine.sleep()
    assert sum(parameter.numel() for parameter in engine.model.parameters()) == 0
    for _ in range(2):  # waking twice is waking once
        engine.wake()
    for parameter in engine.model.parameters():
        parameter.fill_(torch.nan)  # as memory may hold anything
    engine.load_weights(reference.named_parameters())
    assert engine.generate(make_requests(24), step=2) == rollouts
