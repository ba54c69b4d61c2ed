"""Check 9: the vLLM engine in bf16 beside a student of its model: it writes, sleeps, wakes, takes new weights in place,
and its log-probabilities are the student's before and after."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from tests.gpu.check import CUDA, DEVICE, Report, once
from tests.gpu.models import start_parallel, vocabulary, write_shape

LAYERS = 4
PROMPT, RESPONSE, REQUESTS = (512, 256, 64) if CUDA else (40, 12, 6)
STOP = 1  # a token that random weights hardly write


def vllm(report: Report) -> None:
    if importlib.util.find_spec("vllm") is None:
        report.add(vllm="not installed")
        return
    parallel = start_parallel()  # first: what is imported next imports Megatron
    from megatron_sead.models.builder import build_model

    folder = _directory()
    chunks = build_model(folder, parallel, precision="bf16")
    tokens = torch.randint(2, vocabulary(folder) - 2, (PROMPT,), generator=torch.Generator().manual_seed(2)).tolist()
    made: list[Any] = []
    report.add(start_seconds=once(lambda: made.append(_engine(folder, parallel))))
    engine = made[0]
    _agree(report, "at the start", engine, chunks, parallel, tokens)
    _writes(report, "first", engine, tokens)
    _memory(report, "awake")
    engine.sleep()
    _memory(report, "asleep")
    _move(chunks)
    engine.wake()
    seconds = once(lambda: engine.load_weights(_weights(chunks, parallel)))
    size = sum(parameter.nbytes for chunk in chunks for parameter in chunk.parameters())
    report.add(update_seconds=seconds, update_gb_per_second=size / seconds / 1e9)
    before = engine_scores(report, "at the start")
    _agree(report, "after an update", engine, chunks, parallel, tokens)
    moved = max(abs(a - b) for a, b in zip(before, engine_scores(report, "after an update"), strict=True))
    report.expect("moved", moved > 0, "the update has changed what the engine computes")
    _writes(report, "second", engine, tokens)
    engine.close()


def _directory() -> Path:
    """A Hugging Face model in bf16 with random weights, norms off one as trained ones are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = write_shape(LAYERS)
    if not CUDA:  # where vLLM has no attention for heads of 16
        config = json.loads((folder / "config.json").read_text())
        config |= {"num_attention_heads": 2, "num_key_value_heads": 2}
        (folder / "config.json").write_text(json.dumps(config))
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def _engine(folder: Path, parallel: Any) -> Any:
    from megatron_sead.config.rollouts import VllmRollouts
    from megatron_sead.rollouts.engine import EngineContext
    from megatron_sead.rollouts.registry import make_engine

    settings = VllmRollouts(
        batch_size=REQUESTS,
        max_new_tokens=RESPONSE,
        enforce_eager=not CUDA,
        gpu_memory_utilization=0.3,
        kv_cache_memory_bytes=None if CUDA else 2**26,
    )
    length = PROMPT + RESPONSE
    context = EngineContext(folder, (STOP,), 3, 5, DEVICE, torch.bfloat16, vocabulary(folder), max_length=length)
    return make_engine(settings, context)


def _agree(report: Report, when: str, engine: Any, chunks: list[Any], parallel: Any, tokens: list[int]) -> None:
    """Log-probabilities of a text, as every run compares them after every update."""
    from megatron_sead.training.parity import TOLERANCE, largest_difference

    by_engine, by_student = engine.score(tokens), _student_log_probs(chunks[0], tokens)
    difference = largest_difference(by_engine, by_student)
    report.add(**{f"{when} nats": difference, f"{when} scores": by_engine[:8].tolist()})
    report.expect(when, difference <= TOLERANCE["bf16"], f"within {TOLERANCE['bf16']} nats of the student")


def engine_scores(report: Report, when: str) -> list[float]:
    scores: list[float] = report.numbers[f"{when} scores"]
    return scores


@torch.no_grad()
def _student_log_probs(model: Any, tokens: list[int]) -> torch.Tensor:
    ids = torch.tensor([tokens], device=DEVICE)
    hidden = model(input_ids=ids, position_ids=torch.arange(len(tokens), device=DEVICE)[None], attention_mask=None)
    logits = (hidden[0, :-1].float() @ model.head_weight.float().t())[:, : model.config.vocab_size]
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1).cpu()


def _writes(report: Report, which: str, engine: Any, tokens: list[int]) -> None:
    """Responses of every request, with log-probabilities."""
    from megatron_sead.rollouts.engine import GenerationRequest

    requests = [GenerationRequest(f"p{i}", 0, tuple(tokens[: PROMPT - i])) for i in range(min(REQUESTS, PROMPT - 1))]
    written: list[Any] = []
    seconds = once(lambda: written.extend(engine.generate(requests, step=0)))
    count = sum(len(rollout.response_token_ids) for rollout in written)
    report.add(**{f"{which} tokens_per_second": count / seconds})
    complete = len(written) == len(requests) and all(
        len(r.log_probs) == len(r.response_token_ids) > 0 and max(r.log_probs) <= 0 for r in written
    )
    report.expect(f"{which} responses", complete, "one a request, each token with its log-probability")


@torch.no_grad()
def _move(chunks: list[Any]) -> None:
    """As an update of some size would: every weight by a few percent."""
    torch.manual_seed(3)
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))


def _weights(chunks: list[Any], parallel: Any) -> Any:
    from megatron_sead.models.huggingface import iterate_huggingface_weights

    return iterate_huggingface_weights(chunks, parallel)


def _memory(report: Report, when: str) -> None:
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        report.add(**{f"gib_used {when}": (total - free) / 2**30})
        if when == "asleep":
            let_go = report.numbers["gib_used awake"] - report.numbers["gib_used asleep"]
            report.expect("asleep", let_go > 10, "weights and cache are given back")
