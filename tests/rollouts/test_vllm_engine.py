"""vLLM in this process, against transformers: greedy tokens, distributions and log-probabilities are the same.

vLLM changes transformers' classes when it loads a model. What transformers says is therefore gathered first.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import multiprocessing
import os
import random
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sead.config.rollouts import VllmRollouts
from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.rollouts.engine import EngineContext, EngineFailed, GenerationRequest, Rollout, Sampling
from megatron_sead.rollouts.registry import make_engine
from megatron_sead.rollouts.sampling import request_seed
from megatron_sead.rollouts.vllm_engine import VllmEngine
from megatron_sead.training.engines import UPDATE_PROBE
from megatron_sead.training.parity import TOLERANCE, largest_difference
from tests.rollouts.generation import GENERATION

pytestmark = [
    pytest.mark.vllm_lane,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]
TINY = Path(__file__).parents[2] / "examples" / "tiny" / "student"
STOP = (0, 2, 7, 30)
GREEDY, WARM = Sampling(0.0, 1.0, 24), Sampling(0.7, 0.9, 24)
CLOSE = {"atol": 5e-5, "rtol": 0.0}  # nats in fp32: sums in another order
SETTINGS = VllmRollouts(enforce_eager=True, kv_cache_memory_bytes=2**26, batch_size=32, max_new_tokens=24)


def context(directory: Path) -> EngineContext:
    return EngineContext(directory, STOP, 3, 5, torch.device("cpu"), torch.float32, vocab_size=307, max_length=128)


def requests(count: int) -> list[GenerationRequest]:
    """Prompts shorter and longer than the sliding window of 24."""
    draw = random.Random(0)
    prompts = [tuple(draw.randrange(8, 307) for _ in range(draw.randrange(2, 40))) for _ in range(count)]
    return [GenerationRequest(f"p{i}", i % 3, prompt) for i, prompt in enumerate(prompts)]


@dataclass
class Expected:
    """What transformers makes of a model."""

    greedy: list[Rollout]
    scored: torch.Tensor
    first_token: torch.Tensor  # [V] probabilities after the first prompt, as WARM draws


@pytest.fixture(scope="module")
def text() -> list[int]:
    draw = random.Random(1)
    return [draw.randrange(8, 307) for _ in range(100)]


@pytest.fixture(scope="module")
def moved() -> dict[str, torch.Tensor]:
    """The student after an update that moves every weight."""
    generator = torch.Generator().manual_seed(0)
    weights = load_file(TINY / "model.safetensors")
    return {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in weights.items()}


@pytest.fixture(scope="module")
def expected(text: list[int], moved: dict[str, torch.Tensor]) -> tuple[Expected, Expected]:
    """Before and after the update. In a process of its own: vLLM may have changed transformers' classes in this one."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(by_transformers, text, moved).result()


def by_transformers(text: list[int], moved: dict[str, torch.Tensor]) -> tuple[Expected, Expected]:
    from megatron_sead.rollouts.sampling import _truncate
    from megatron_sead.rollouts.transformers_engine import TransformersEngine

    where = {"stop_token_ids": STOP, "pad_token_id": 3, "seed": 5, "vocab_size": 307}
    engine = TransformersEngine(TINY, sampling=GREEDY, **where)  # type: ignore[arg-type]
    both = []
    for weights in (load_file(TINY / "model.safetensors"), moved):
        engine.load_weights(weights.items())
        prompt = torch.tensor([requests(1)[0].prompt_token_ids])
        with torch.no_grad():
            logits = engine.model(input_ids=prompt).logits[0, -1:].double()
        kept = _truncate(torch.softmax(logits / WARM.temperature, -1), WARM.top_p)[0]
        both.append(Expected(engine.generate(requests(24), 0), engine.score(text), kept / kept.sum()))
    return both[0], both[1]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose head is its embedding, and its scores by transformers before and after an update."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from megatron_sead.rollouts.transformers_engine import TransformersEngine

    directory = tmp_path_factory.mktemp("tied")
    sizes = {"vocab_size": 307, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, tie_word_embeddings=True)).save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    moved = {name: weight + 0.02 * torch.randn(weight.shape) for name, weight in weights.items()}
    again = {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    save_file(weights | again, directory / "model.safetensors", metadata={"format": "pt"})
    engine = TransformersEngine(directory, sampling=GREEDY, stop_token_ids=STOP, pad_token_id=3, seed=5)
    text = list(range(3, 63))
    before = engine.score(text)
    engine.load_weights(moved.items())
    torch.save({"moved": moved, "before": before, "after": engine.score(text)}, directory / "scores.pt")
    return directory


@pytest.fixture(scope="module")
def engine(expected: object, tied: Path, tmp_path_factory: pytest.TempPathFactory) -> VllmEngine:
    """Of a directory, and in an environment, that ask for other things than the run does."""
    directory = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("engine") / "model"))
    (directory / "generation_config.json").write_text(json.dumps(GENERATION))
    before = random_numbers()
    with patch.dict(os.environ, {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_USE_V1": "0", "RANK": "7"}):
        made = make_engine(SETTINGS, context(directory))
        assert os.environ["RANK"] == "7"
    assert isinstance(made, VllmEngine)
    assert all(map(torch.equal, random_numbers(), before))  # vLLM seeds the process when it starts
    return made


def random_numbers() -> list[torch.Tensor]:
    """Where the process's generators stand."""
    return [
        torch.get_rng_state(),
        torch.tensor(random.getstate()[1]),
        torch.tensor(numpy.random.get_state()[1].astype(int)),
    ]


@pytest.fixture(params=[0, 1], ids=["first weights", "new weights"])
def state(
    request: pytest.FixtureRequest,
    engine: VllmEngine,
    expected: tuple[Expected, Expected],
    moved: dict[str, torch.Tensor],
) -> Expected:
    engine.sleep()
    engine.wake()
    engine.load_weights((load_file(TINY / "model.safetensors") if request.param == 0 else moved).items())
    return expected[request.param]


def test_greedy_tokens_ends_and_log_probs_are_those_of_transformers(engine: VllmEngine, state: Expected) -> None:
    written = engine.generate(requests(24), 3, GREEDY)
    assert {r.finished for r in written} == {True, False}  # some stop, some are cut
    for ours, theirs in zip(written, state.greedy, strict=True):
        assert (ours.prompt_id, ours.sample, ours.prompt_token_ids) == (
            theirs.prompt_id,
            theirs.sample,
            theirs.prompt_token_ids,
        )
        assert (ours.response_token_ids, ours.finished) == (theirs.response_token_ids, theirs.finished)
        assert ours.log_probs is not None and theirs.log_probs is not None
        torch.testing.assert_close(torch.tensor(ours.log_probs), torch.tensor(theirs.log_probs), **CLOSE)


def test_scores_are_those_of_transformers(engine: VllmEngine, state: Expected, text: list[int]) -> None:
    torch.testing.assert_close(engine.score(text), state.scored, **CLOSE)


def test_tokens_are_drawn_with_the_probabilities_of_temperature_and_top_p(engine: VllmEngine, state: Expected) -> None:
    """Chi-square of the first token of 3,000 samples; tokens that are expected fewer than five times count as one."""
    count, prompt = 3000, requests(1)[0]
    samples = [GenerationRequest("chi", sample, prompt.prompt_token_ids) for sample in range(count)]
    drawn = [r.response_token_ids[0] for r in engine.generate(samples, 0, Sampling(WARM.temperature, WARM.top_p, 1))]
    observed = torch.bincount(torch.tensor(drawn), minlength=307).double()
    wanted = state.first_token * count
    assert observed[wanted == 0].sum() == 0  # nothing outside of the nucleus
    often = wanted >= 5
    observed = torch.cat([observed[often], observed[~often].sum()[None]])
    wanted = torch.cat([wanted[often], wanted[~often].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted.clamp(min=1e-9)).sum().item()
    freedom = max(1, len(wanted) - 1)
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5 + 5, (statistic, freedom)


def test_a_response_that_repeats_itself_is_cut_if_that_is_asked_for(
    engine: VllmEngine, state: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_repetition", (4, 3))
    written = engine.generate(requests(24), 3, GREEDY)
    cut = [(ours, whole) for ours, whole in zip(written, state.greedy, strict=True) if ours.repeated]
    assert cut and not any(ours.finished for ours, _ in cut)
    for ours, whole in cut:
        tokens = ours.response_token_ids
        assert whole.response_token_ids[: len(tokens)] == tokens
        assert any(len(tokens) >= 3 * n and tokens[-3 * n :] == tokens[-n:] * 3 for n in range(1, 5))
    for ours, whole in zip(written, state.greedy, strict=True):
        if not ours.repeated:
            assert (ours.response_token_ids, ours.finished) == (whole.response_token_ids, whole.finished)


def test_log_probs_are_at_temperature_one(engine: VllmEngine) -> None:
    for rollout in engine.generate(requests(4), 0, Sampling(0.5, 0.6, 8)):
        scored = engine.score([*rollout.prompt_token_ids, *rollout.response_token_ids])
        assert rollout.log_probs is not None
        after_prompt = scored[len(rollout.prompt_token_ids) - 1 :]
        torch.testing.assert_close(torch.tensor(rollout.log_probs), after_prompt, **CLOSE)


def test_a_rollout_depends_on_seed_step_prompt_and_sample_alone(engine: VllmEngine) -> None:
    asked = requests(20)
    whole = engine.generate(asked, 7, WARM)
    assert engine.generate(asked[::-1], 7, WARM) == whole[::-1]
    assert engine.generate(asked[3:4], 7, WARM) == whole[3:4]
    assert engine.generate(asked, 8, WARM) != whole
    seeds = {
        request_seed(s, t, GenerationRequest(p, n, ())) for s in (0, 1) for t in (0, 1) for p in "ab" for n in (0, 1)
    }
    assert len(seeds) == 16 and all(0 <= seed < 2**63 for seed in seeds)


def test_prompts_that_do_not_fit_into_one_forward_pass_are_written_alike(engine: VllmEngine) -> None:
    """The prompts of 32 rollouts that are written at once have more tokens than a pass takes."""
    asked = [GenerationRequest(str(i), 0, (5 + i % 200,) * 100) for i in range(64)]
    assert sum(len(request.prompt_token_ids) for request in asked[:32]) > SETTINGS.max_num_batched_tokens
    together = engine.generate(asked, 2, WARM)[15:25]
    alone = [engine.generate([request], 2, WARM)[0] for request in asked[15:25]]
    for one, other in zip(alone, together, strict=True):
        assert one.log_probs == pytest.approx(other.log_probs, abs=1e-5)  # by pieces, sums are rounded otherwise
        assert replace(one, log_probs=None) == replace(other, log_probs=None)


def test_completion_order_changes_nothing(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place instead of many: every request then ends before the next begins."""
    asked = requests(6)
    together = engine.generate(asked, 1, WARM)
    one_by_one = [engine.generate([request], 1, WARM)[0] for request in reversed(asked)]
    assert one_by_one[::-1] == together


def test_a_weight_left_out_or_unknown_is_told_and_all_are_consumed(
    engine: VllmEngine, moved: dict[str, torch.Tensor]
) -> None:
    left = list(moved.items())[1:]
    source = iter([*left, ("model.layers.9.mlp.up_proj.weight", torch.ones(2, 2))])
    missing, unknown = next(iter(moved)), "model.layers.9.mlp.up_proj.weight: the rollout model has no such weight"
    with pytest.raises(ValueError, match=f"^{unknown}; {missing}: no new value came$"):
        engine.load_weights(source)
    assert next(source, None) is None
    engine.load_weights(moved.items())


def test_any_weight_that_stays_as_it_was_shows_in_the_scores(
    engine: VllmEngine, moved: dict[str, torch.Tensor], text: list[int]
) -> None:
    """By more than the check after an update allows."""
    old, probe = load_file(TINY / "model.safetensors"), text[:UPDATE_PROBE]
    engine.load_weights(moved.items())
    right = engine.score(probe)
    for name in moved:
        engine.load_weights((moved | {name: old[name]}).items())
        assert largest_difference(engine.score(probe), right) > TOLERANCE["fp32"], name
    engine.load_weights(moved.items())


def test_tokens_of_a_student_that_is_sure_have_log_probs(engine: VllmEngine, moved: dict[str, torch.Tensor]) -> None:
    """As after a collapse of entropy: no NaN, nothing above 0."""
    engine.load_weights((moved | {"lm_head.weight": 1e4 * moved["lm_head.weight"]}).items())
    values = [value for r in engine.generate(requests(8), 0, WARM) for value in r.log_probs or ()]
    assert all(-1e5 < value <= 0 for value in values) and min(map(abs, values)) == 0
    engine.load_weights(moved.items())


def test_edges_of_a_response(engine: VllmEngine, moved: dict[str, torch.Tensor]) -> None:
    """The context filled to its last position, stop tokens in the prompt, one token, many samples of a prompt."""
    engine.load_weights(moved.items())
    asked = [GenerationRequest("long", n, (5, *STOP, *range(8, 96), 9)) for n in range(32)]
    whole, hot = 128 - len(asked[0].prompt_token_ids), 2.0
    written = engine.generate(asked, 0, Sampling(hot, 1.0, whole))
    assert len({r.response_token_ids for r in written}) > 28
    assert engine.generate(asked, 0, Sampling(hot, 1.0, whole)) == written
    assert all(r.finished == (r.response_token_ids[-1] in STOP) for r in written)
    cut = [r for r in written if not r.finished]
    assert cut and all(len(r.response_token_ids) == whole for r in cut)
    short = engine.generate(asked, 0, Sampling(hot, 1.0, 1))
    assert [r.response_token_ids for r in short] == [r.response_token_ids[:1] for r in written]
    assert [r.finished for r in short] == [r.response_token_ids[0] in STOP for r in short]
    assert engine.generate([], 0) == []


def test_weights_that_are_not_finite_end_the_writing(engine: VllmEngine, moved: dict[str, torch.Tensor]) -> None:
    engine.load_weights((name, tensor * float("nan")) for name, tensor in moved.items())
    with pytest.raises(NotFiniteNumbers, match=r"^rollout of prompt 'p\d+': the model's logits of token 0 are not"):
        engine.generate(requests(3), 0, GREEDY)
    assert not engine.score([5, 6, 7]).isfinite().all()
    engine.load_weights(moved.items())


def test_an_engine_that_dies_is_one_line(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access\nwas encountered")

    monkeypatch.setattr(engine._llm, "generate", die)
    with pytest.raises(
        EngineFailed, match=r"^rollouts\.engine='vllm': RuntimeError: CUDA error: an illegal memory access$"
    ):
        engine.generate(requests(2), 0)


def test_a_model_that_vllm_does_not_load_is_one_line(tmp_path: Path, expected: object) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    config = (tmp_path / "model" / "config.json").read_text()
    (tmp_path / "model" / "config.json").write_text(
        config.replace('"num_attention_heads": 2', '"num_attention_heads": 3')
    )
    with pytest.raises(UserError, match=r"^rollouts.engine='vllm': ") as caught:
        make_engine(SETTINGS, context(tmp_path / "model"))
    assert "\n" not in str(caught.value)


def test_what_vllm_refuses_is_told_in_its_words(expected: object) -> None:
    """Not by the first line of pydantic's account, which says that there is something."""
    with pytest.raises(EngineFailed, match=r"max_model_len \(300\) is greater than .*max_position_embeddings=256"):
        make_engine(SETTINGS, replace(context(TINY), max_length=300))


@pytest.mark.parametrize("packed", [True, False], ids=["packed, as on a CPU", "as loaded, as on a GPU"])
def test_a_head_that_is_the_embedding_follows_it(packed: bool, tied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes once, though the file holds it twice; and where vLLM has packed its matrices, it has a copy of it."""
    from vllm import _custom_ops

    if not packed:
        monkeypatch.setattr(_custom_ops, "_supports_onednn", False)
    told, text = torch.load(tied / "scores.pt"), list(range(3, 63))
    made = make_engine(SETTINGS, context(tied))
    assert isinstance(made, VllmEngine)
    assert made._packed is packed
    torch.testing.assert_close(made.score(text), told["before"], **CLOSE)
    made.load_weights(told["moved"].items())
    torch.testing.assert_close(made.score(text), told["after"], **CLOSE)


def test_every_name_that_is_used_of_vllm_is_there() -> None:
    """What an upgrade would break; then VERSIONS of the settings must change as well."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import parallel_state
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    engine_settings = {*inspect.signature(LLM.__init__).parameters, *inspect.signature(EngineArgs).parameters}
    used = "dtype seed skip_tokenizer_init tensor_parallel_size distributed_executor_backend enable_sleep_mode"
    used += " enable_prefix_caching enforce_eager gpu_memory_utilization kv_cache_memory_bytes max_num_batched_tokens"
    used += " max_num_seqs max_model_len generation_config use_tqdm_on_load logprobs_mode"
    assert set(used.split()) <= engine_settings
    used = "temperature top_p max_tokens seed logprobs prompt_logprobs ignore_eos stop_token_ids"
    used += " detokenize repetition_detection"
    assert set(used.split()) <= set(inspect.signature(SamplingParams).parameters)
    assert "tags" in inspect.signature(LLM.wake_up).parameters and "level" in inspect.signature(LLM.sleep).parameters
    assert "weights_iterator" in inspect.signature(GPUModelRunner.reload_weights).parameters
    assert callable(LLM.apply_model)
    assert callable(parallel_state.destroy_distributed_environment)
