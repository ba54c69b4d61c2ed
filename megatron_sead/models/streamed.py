"""transformers' own forward pass of a Hugging Face directory, with the weights of one layer in memory at a time.

Masks, positions and rotary angles are transformers'; a layer's weights are read when it is called and freed when it has
returned. So a model of any size is a reference on a device that is full of others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_sead.errors import UserError
from megatron_sead.models.family import read_config_fields
from megatron_sead.models.tensor_files import TensorFiles
from megatron_sead.models.weight_tables import EMBEDDING, HEAD

# Shapes: s tokens of a text, h hidden size, v vocabulary

MLP_TOKENS = 1024  # at once through a feed-forward layer, whose activations are the widest
HEAD_TOKENS = 512  # at once through the head
HEAD_ROWS = 16384  # of the head at once in fp32

Read = Callable[[str], torch.Tensor]
"""A weight by its Hugging Face name."""


@torch.no_grad()
def streamed_log_probs(
    directory: Path, tokens: Sequence[int], *, dtype: torch.dtype, device: torch.device, vocab_size: int | None
) -> torch.Tensor:
    """Log-probabilities [s - 1] fp32, on the host, of each token of a text after the first; the head's in fp32.

    Args:
        vocab_size: true size; rows of the head beyond it are padding. None: all are true.

    Raises:
        UserError: transformers cannot read the directory, or its weights are damaged.
    """
    ids = torch.tensor(list(tokens), device=device)
    tied = read_config_fields(directory)["tied_embeddings"]
    with TensorFiles(directory) as files:
        hidden = streamed_hidden_states(directory, files.read, ids, dtype=dtype)
        head = files.read(EMBEDDING if tied else HEAD)[:vocab_size].to(device, dtype)
    rows = zip(hidden[:-1].split(HEAD_TOKENS), ids[1:].split(HEAD_TOKENS), strict=True)
    return torch.cat(
        [log_probabilities(part, head).gather(1, next_ids[:, None])[:, 0] for part, next_ids in rows]
    ).cpu()


def streamed_hidden_states(
    directory: Path,
    read: Read,
    tokens: torch.Tensor,
    *,
    dtype: torch.dtype,
    after_layer: Callable[[int, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """Final hidden states [s, h] of tokens [s], on their device.

    Args:
        dtype: of weights and computation.
        after_layer: sees the number and the hidden states [1, s, h] of each layer, whose weights are gone by then.
    """
    device = tokens.device
    model = _empty_model(directory, dtype)
    model.rotary_emb = type(model.rotary_emb)(model.config).to(device)  # its frequencies are computed, not loaded

    def come(layer: int, module: torch.nn.Module, _: Any) -> None:
        weights = {name: read(f"model.layers.{layer}.{name}").to(device, dtype) for name in module.state_dict()}
        module.load_state_dict(weights, assign=True)

    def go(layer: int, module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        module.to("meta")
        if after_layer is not None:
            after_layer(layer, output)

    for number, layer in enumerate(model.layers):
        in_pieces(layer.mlp, dim=1)
        layer.register_forward_pre_hook(partial(come, number))
        layer.register_forward_hook(partial(go, number))
    model.norm.load_state_dict({"weight": read("model.norm.weight").to(device, dtype)}, assign=True)
    embedded = F.embedding(tokens.cpu(), read(EMBEDDING)).to(device, dtype)
    hidden: torch.Tensor = model(inputs_embeds=embedded[None], use_cache=False).last_hidden_state
    return hidden[0]


def _empty_model(directory: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # its checks raise what they like
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{directory / 'config.json'}: transformers cannot read it ({reason})") from None
    with torch.device("meta"):
        return AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa", trust_remote_code=False).eval()


def in_pieces(module: Any, dim: int) -> None:
    """Call a module that treats each token by itself on a few tokens at a time, along `dim`."""
    whole = module.forward

    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        pieces = [whole(piece, *args, **kwargs) for piece in hidden_states.split(MLP_TOKENS, dim)]
        if isinstance(pieces[0], tuple):  # Megatron's (output, bias); there is no bias
            return torch.cat([output for output, _ in pieces], dim), None
        return torch.cat(pieces, dim)

    module.forward = forward


def log_probabilities(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """[s, v] in fp32 from hidden states [s, h] and a head [v, h], which is converted a part at a time."""
    wide = hidden.float()
    logits = torch.cat([F.linear(wide, part.float()) for part in head.split(HEAD_ROWS)], dim=1)
    return logits.sub_(logits.logsumexp(dim=1, keepdim=True))
