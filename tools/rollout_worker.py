"""One process of tools/benchmark_rollouts.py: ``python rollout_worker.py WHAT SETTINGS.json``. Prints one JSON object.

WHAT is ``vllm``, ``vllm-direct``, ``transformers`` or ``transformers-direct``, which write the same requests again and
again; or ``update-`` and an engine, which takes the weights of a Megatron model again and again; or ``make``, which
writes random weights for a config.json.
"""

from __future__ import annotations

import json
import random
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

WARM_UP = 2  # repetitions that are not counted: lazy initialisation, caches


def main(what: str, settings: dict[str, Any]) -> None:
    """Measure, and print what was measured."""
    warnings.filterwarnings("ignore")
    if what.startswith(("update-", "make")):
        from megatron_sead.parallel.cpu_adaptor import adapt_to_cpu

        adapt_to_cpu()
    import torch

    torch.set_num_threads(1)
    measured: dict[str, Any] = {}
    if what == "make":
        from true_shapes.model import write_weights

        write_weights(Path(settings["model"]))
    elif what.startswith("update-"):
        measured = update(what.removeprefix("update-"), settings)
    else:
        measured = write(what, settings)
    print(json.dumps(measured))


def write(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of each repetition, and the tokens of one: no token ends a response, so all write as many."""
    from megatron_sead.rollouts.engine import GenerationRequest

    draw = random.Random(0)
    requests = [
        GenerationRequest(str(i), 0, tuple(draw.randrange(8, 300) for _ in range(draw.randrange(8, 40))))
        for i in range(settings["requests"])
    ]
    call = {
        "vllm": our_engine,
        "transformers": our_engine,
        "vllm-direct": vllm_direct,
        "transformers-direct": transformers_direct,
    }[what](what, requests, settings)
    tokens, seconds = 0, []
    for _ in range(WARM_UP + settings["repetitions"]):
        began = time.perf_counter()
        tokens = call()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds[WARM_UP:], "tokens": tokens}


def engine_parts(what: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """Settings and context of an engine."""
    import torch

    from megatron_sead.config.rollouts import TransformersRollouts, VllmRollouts
    from megatron_sead.rollouts.engine import EngineContext

    common = {"temperature": 1.0, "max_new_tokens": settings["new_tokens"], "batch_size": settings["requests"]}
    if what.startswith("vllm"):
        chosen: Any = VllmRollouts(**common, enforce_eager=True, kv_cache_memory_bytes=2**28)
    else:
        chosen = TransformersRollouts(**common)
    dtype = torch.float32
    context = EngineContext(Path(settings["model"]), (), 3, 0, torch.device("cpu"), dtype, max_length=128)
    return chosen, context


def our_engine(what: str, requests: list[Any], settings: dict[str, Any]) -> Callable[[], int]:
    from megatron_sead.rollouts.registry import make_engine

    engine = make_engine(*engine_parts(what, settings))
    return lambda: sum(len(rollout.response_token_ids) for rollout in engine.generate(requests, 0))


def vllm_direct(what: str, requests: list[Any], settings: dict[str, Any]) -> Callable[[], int]:
    """vLLM with the same settings, asked for the same: seeds, and each token's log-probability."""
    import os

    from megatron_sead.rollouts.sampling import request_seed
    from megatron_sead.rollouts.vllm_engine import ENVIRONMENT, llm_arguments

    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    chosen, context = engine_parts(what, settings)
    llm = LLM(settings["model"], **llm_arguments(chosen, context, sleeps=False))
    common = {"temperature": 1.0, "max_tokens": settings["new_tokens"], "logprobs": 0}
    common |= {"ignore_eos": True, "detokenize": False}
    parameters = [SamplingParams(seed=request_seed(0, 0, request), **common) for request in requests]
    prompts: list[Any] = [{"prompt_token_ids": list(request.prompt_token_ids)} for request in requests]
    return lambda: sum(len(o.outputs[0].token_ids) for o in llm.generate(prompts, parameters, use_tqdm=False))


def transformers_direct(what: str, requests: list[Any], settings: dict[str, Any]) -> Callable[[], int]:
    """``model.generate`` of one batch, padded on the left."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.float32, trust_remote_code=False
    ).eval()
    longest = max(len(request.prompt_token_ids) for request in requests)
    padding = [longest - len(request.prompt_token_ids) for request in requests]
    ids = torch.tensor([[3] * n + list(r.prompt_token_ids) for n, r in zip(padding, requests, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
    new = settings["new_tokens"]
    sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": new}

    def call() -> int:
        written = model.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=3, **sampling)
        return int(written[:, longest:].numel())

    return call


def update(what: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Seconds of updates from the trainer's iterator, and of copies of the same bytes, in turns.

    ``vllm-unpacked`` keeps the matrices as they are loaded, as vLLM does on a GPU.
    """
    import torch

    from megatron_sead.config.parallel import ParallelSettings
    from megatron_sead.models.builder import build_model
    from megatron_sead.models.huggingface import iterate_huggingface_weights
    from megatron_sead.parallel.groups import initialize_parallel
    from megatron_sead.rollouts.registry import make_engine

    parallel = initialize_parallel(ParallelSettings(tensor_model_parallel_size=1), "cpu", seed=0)
    student = build_model(Path(settings["model"]), parallel, precision="fp32")
    unpacked: Any = nullcontext()
    if what == "vllm-unpacked":
        from vllm import _custom_ops

        unpacked = patch.object(_custom_ops, "_supports_onednn", False)
    with unpacked:
        engine = make_engine(*engine_parts(what, settings))
    weights = [tensor.clone() for _, tensor in iterate_huggingface_weights(student, parallel)]
    copies = [torch.empty_like(weight) for weight in weights]

    def copy() -> None:
        for target, weight in zip(copies, weights, strict=True):
            target.copy_(weight)

    calls = {"copy": copy, "update": lambda: engine.load_weights(iterate_huggingface_weights(student, parallel))}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + settings["repetitions"]):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    return {name: values[WARM_UP:] for name, values in seconds.items()} | {"bytes": sum(w.nbytes for w in weights)}


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
