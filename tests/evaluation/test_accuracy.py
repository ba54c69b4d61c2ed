"""Accuracies, errors and levels counted by hand on responses that are known, then the real engine end to end."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from megatron_sead.config.rollouts import TransformersRollouts
from megatron_sead.config.run import ModelSettings
from megatron_sead.evaluation.accuracy import evaluate
from megatron_sead.grading.grader import Grader
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.prompts.tokenizer import ModelTokenizer, load_tokenizer
from megatron_sead.rollouts.engine import EngineContext, GenerationRequest, Rollout, Sampling
from megatron_sead.rollouts.registry import make_engine

pytestmark = pytest.mark.transformers_lane


class WrittenEngine:
    """Answers from a table: (prompt, sample, greedy?) -> text. What it does not know is cut short."""

    def __init__(self, tokenizer: ModelTokenizer, table: dict[tuple[str, int, bool], str]) -> None:
        self.tokenizer, self.table = tokenizer, table
        self.seen: list[GenerationRequest] = []

    def generate(self, requests: list[GenerationRequest], step: int, sampling: Sampling | None = None) -> list[Rollout]:
        assert sampling is not None
        assert step < 0
        self.seen += requests
        rollouts = []
        for request in requests:
            text = self.table.get((request.prompt_id, request.sample, sampling.temperature == 0))
            tokens = (*self.tokenizer.encode("cut" if text is None else text), 1)
            rollouts.append(
                Rollout(request.prompt_id, request.sample, request.prompt_token_ids, tokens, text is not None, None)
            )
        return rollouts

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None: ...


@pytest.fixture(scope="module")
def tokenizer(tiny_olmo3: Path) -> ModelTokenizer:
    return load_tokenizer(ModelSettings(path=tiny_olmo3), "student")


PROMPTS = [
    Prompt(name, name, (answer,), None, level, (4, 5), (6,))
    for name, answer, level in [("a", "1", "10"), ("b", "2", "2"), ("c", "3", "2"), ("d", "4", None)]
]
TABLE = {
    ("a", 0, True): "1",
    ("b", 0, True): "2",
    ("c", 0, True): "0",
    # d is cut: wrong
    ("a", 0, False): "1",
    ("a", 1, False): "1",
    ("b", 0, False): "2",
    ("b", 1, False): "7",
    ("c", 0, False): "7",
}


def test_counts(tokenizer: ModelTokenizer) -> None:
    engine = WrittenEngine(tokenizer, TABLE)
    with Grader() as grader:
        result = evaluate(engine, tokenizer, PROMPTS, grader, max_new_tokens=5, samples=2)
    assert (result.greedy.mean, result.greedy.truncated, result.greedy.prompts) == (0.5, 0.25, 4)
    assert result.greedy.standard_error == pytest.approx(math.sqrt(4 * 0.25 / 3 / 4))
    assert result.sampled is not None
    rates = [1.0, 0.5, 0.0, 0.0]
    assert result.sampled.mean == pytest.approx(3 / 8)
    assert result.sampled.truncated == pytest.approx(3 / 8)
    variance = sum((rate - 3 / 8) ** 2 for rate in rates) / 3
    assert result.sampled.standard_error == pytest.approx(math.sqrt(variance / 4))
    assert {level: a.mean for level, a in result.greedy_by_level.items()} == {"2": 0.5, "10": 1.0}
    assert list(result.sampled_by_level) == ["2", "10"]
    assert result.sampled_by_level["2"].mean == 0.25
    assert result.as_dict()["sampled_by_level"]["10"]["mean"] == 1.0
    assert {request.prompt_token_ids for request in engine.seen} == {(4, 5)}


def test_teacher_sees_its_own_prompt_and_no_samples_are_needed(tiny_olmo3: Path) -> None:
    teacher = load_tokenizer(ModelSettings(path=tiny_olmo3), "teacher")
    engine = WrittenEngine(teacher, TABLE)
    with Grader() as grader:
        result = evaluate(engine, teacher, PROMPTS, grader, max_new_tokens=5)
    assert {request.prompt_token_ids for request in engine.seen} == {(6,)}
    assert (result.sampled, result.sampled_by_level) == (None, {})


def test_real_engine(tiny_olmo3: Path, tokenizer: ModelTokenizer) -> None:
    speech = {"stop_token_ids": tokenizer.stop_token_ids, "pad_token_id": tokenizer.pad_token_id}
    context = EngineContext(tiny_olmo3, **speech, seed=0, device=torch.device("cpu"), dtype=torch.float32)
    engine = make_engine(TransformersRollouts(), context)
    # The model's own greedy answer is the reference: it must be right greedily, and rarely at temperature 5.
    requests = [GenerationRequest(str(i), 0, (20 + i, 30, 31)) for i in range(12)]
    greedy = engine.generate(requests, 0, Sampling(0.0, 1.0, 6))
    prompts = [
        Prompt(r.prompt_id, "", (tokenizer.decode(r.response_token_ids),), None, None, r.prompt_token_ids, ())
        for r in greedy
        if tokenizer.decode(r.response_token_ids).strip()
    ]
    with Grader() as grader:
        result = evaluate(engine, tokenizer, prompts, grader, max_new_tokens=6, samples=2, temperature=5.0)
    assert result.greedy.mean > 0.9
    assert result.sampled is not None
    assert result.sampled.mean < 0.3


def test_no_prompts_are_refused(tokenizer: ModelTokenizer) -> None:
    with Grader() as grader, pytest.raises(ValueError, match="no prompts"):
        evaluate(WrittenEngine(tokenizer, {}), tokenizer, [], grader, max_new_tokens=1)
