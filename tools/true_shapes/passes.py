"""One forward and backward pass, by transformers or by our model. A gradient is compared, or written, and let go as
soon as it is there: beside the weights, memory holds one of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from true_shapes.errors import Distance, Seen
from true_shapes.model import Shape, text

LOGITS = "logits"  # beside the gradients, in the reference's files


def transformers_pass(directory: Path, shape: Shape, dtype: torch.dtype, reference: Path, *, write: bool) -> Seen:
    """transformers' model, eager attention, compared with `reference`.

    Args:
        write: make `reference`, a directory with all gradients and the logits.
    """
    from transformers import AutoModelForCausalLM

    from megatron_sead.checkpoints.huggingface import huggingface_shapes
    from megatron_sead.checkpoints.shard_writer import SHARD_BYTES, ShardWriter
    from megatron_sead.models.tensor_files import TensorFiles

    tokens, labels = text(shape)
    seen = Seen()
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", trust_remote_code=False
    ).train()
    if write:
        reference.mkdir()
        shapes = huggingface_shapes(directory) | {LOGITS: (tokens.shape[1], shape.vocab)}
        writer = ShardWriter(reference, shapes, torch.float32, SHARD_BYTES)
        keep = writer.add
    else:
        files = TensorFiles(reference)
        files.__enter__()

        def keep(name: str, tensor: torch.Tensor) -> None:
            seen.gradients[name] = Distance.between(tensor, files.read(name))

    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(_release(seen, lambda grad, name=name: keep(name, grad)))
    logits = model(tokens).logits
    keep(LOGITS, logits[0].detach())
    loss = F.cross_entropy(logits[0].float(), labels[0])
    loss.backward()
    seen.loss = loss.item()
    if write:
        writer.finish()
    else:
        seen.logits = seen.gradients.pop(LOGITS)
        files.__exit__()
    return seen


def megatron_pass(
    directory: Path,
    shape: Shape,
    precision: Any,
    reference: Path,
    parallel: Any,
    fault: Callable[[Any], None] | None = None,
) -> Seen:
    """Our model on this rank, its share of everything compared with the reference's.

    Args:
        fault: changes the model first: what a mistake would look like.
    """
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy

    from megatron_sead.models.builder import build_model
    from megatron_sead.models.huggingface import read_share
    from megatron_sead.models.tensor_files import TensorFiles
    from megatron_sead.models.weights import placed_weights

    tokens, labels = text(shape)
    seen = Seen()
    (model,) = build_model(directory, parallel, precision=precision)
    if fault:
        fault(model)
    parameters = dict(model.named_parameters())
    with TensorFiles(reference) as files:

        def compare(placed: Any, grad: torch.Tensor) -> None:
            parts = [read_share(files, name, placed.weight, parallel) for name in placed.names]
            seen.gradients[placed.names[0]] = Distance.between(grad, placed.weight.join(parts))

        for placed in placed_weights(model.config, model.config.stage_layers):
            hook = _release(seen, lambda grad, placed=placed: compare(placed, grad))
            parameters.pop(placed.parameter).register_post_accumulate_grad_hook(hook)
        assert not parameters
        hidden = model(input_ids=tokens, position_ids=torch.arange(tokens.shape[1])[None], attention_mask=None)
        logits = F.linear(copy_to_tensor_model_parallel_region(hidden, group=parallel.tp), model.head_weight)
        first = parallel.tp_rank * logits.shape[-1]
        true = min(logits.shape[-1], shape.vocab - first)  # the rest of the columns is padding
        seen.logits = Distance.between(logits[0, :, :true].detach(), files.slice(LOGITS)[:, first : first + true])
        masked = logits.float().masked_fill(torch.arange(logits.shape[-1]) >= true, float("-inf"))
        loss = vocab_parallel_cross_entropy(masked, labels).mean()
        loss.backward()
        seen.loss = loss.item()
    return seen


def _release(seen: Seen, use: Callable[[torch.Tensor], None]) -> Callable[[torch.Tensor], None]:
    def hook(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        use(parameter.grad)
        seen.sample_memory()
        parameter.grad = None

    return hook
