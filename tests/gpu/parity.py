"""Check 6: two layers of the 7B's widths: logits and every gradient in bf16, ours and transformers', against fp32."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.gpu.check import CUDA, DEVICE, Report, l2
from tests.gpu.models import random_model, start_parallel, vocabulary, write_shape

LENGTH = 8256 if CUDA else 61
LOGITS = "logits"


def parity(report: Report) -> None:
    folder = write_shape(layers=2)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, vocabulary(folder) - 2, (1, LENGTH), generator=generator) for _ in range(2))
    tokens, labels = tokens.to(DEVICE), labels.to(DEVICE)
    parallel = start_parallel()
    ours, weights = _ours(folder, parallel, tokens, labels)
    _let_go()
    exact = _transformers(folder, weights, torch.float32, tokens, labels)
    _let_go()
    theirs = _transformers(folder, weights, torch.bfloat16, tokens, labels)
    _let_go()
    assert exact.keys() == ours.keys() == theirs.keys()
    errors = {name: (l2(ours[name], exact[name]), l2(theirs[name], exact[name])) for name in exact}
    ratios = {name: a / b for name, (a, b) in errors.items()}
    worst = max(ratios, key=lambda name: ratios[name])
    report.add(errors={name: list(pair) for name, pair in errors.items()}, worst=worst, worst_ratio=ratios[worst])
    report.expect("logits", ratios[LOGITS] <= 1.5, "at most 1.5 times transformers' own error in bf16")
    report.expect("gradients", ratios[worst] <= 1.5, "each at most 1.5 times transformers' own error in bf16")


def _let_go() -> None:
    """The memory of a model and its activations, before the next one needs it."""
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


def _ours(
    folder: Path, parallel: Any, tokens: torch.Tensor, labels: torch.Tensor
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Logits and gradients, and the weights, by Hugging Face's names, in host memory."""
    from megatron_sead.models.huggingface import iterate_huggingface_weights, whole_tensors
    from megatron_sead.models.weights import placed_weights

    model = random_model(folder, parallel)
    weights = {name: tensor.cpu() for name, tensor in iterate_huggingface_weights([model], parallel)}
    positions = torch.arange(LENGTH, device=DEVICE)[None]
    hidden = model(input_ids=tokens, position_ids=positions, attention_mask=None)
    logits = F.linear(hidden, model.head_weight)[..., : vocabulary(folder)]
    F.cross_entropy(logits[0].float(), labels[0]).backward()
    found = {LOGITS: logits[0].detach().cpu()}
    parameters = dict(model.named_parameters())
    for placed in placed_weights(model.config, model.config.stage_layers):
        gradient = parameters[placed.parameter].grad
        parts = whole_tensors(placed, gradient, torch.bfloat16, parallel)
        found |= {name: part.cpu() for name, part in zip(placed.names, parts, strict=True)}
    return found, weights


def _transformers(
    folder: Path, weights: dict[str, torch.Tensor], dtype: torch.dtype, tokens: torch.Tensor, labels: torch.Tensor
) -> dict[str, torch.Tensor]:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").train()
    model.load_state_dict(weights)
    logits = model(tokens).logits
    F.cross_entropy(logits[0].float(), labels[0]).backward()
    found = {LOGITS: logits[0].detach().cpu()}
    return found | {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}
