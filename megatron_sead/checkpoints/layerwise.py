"""Layer-by-layer parity of two directories: transformers' model and ours read the same long text, one layer in memory.

transformers' own forward runs as `streamed` has it. After each of its layers ours, filled from the Megatron checkpoint,
runs on its own states.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from megatron.core.transformer.spec_utils import build_module

from megatron_sead.checkpoints.conversion import Advance
from megatron_sead.checkpoints.model_files import HuggingFaceModel, MegatronModel, megatron_key
from megatron_sead.errors import ArgumentError, UserError
from megatron_sead.models.builder import model_config
from megatron_sead.models.config import ModelConfig
from megatron_sead.models.norms import RMSNorm
from megatron_sead.models.streamed import HEAD_TOKENS, in_pieces, log_probabilities, streamed_hidden_states
from megatron_sead.models.weight_tables import EMBEDDING, HEAD
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.wording import counted

# Shapes: s tokens of the text, h hidden size, v true vocabulary

BEYOND = 256  # tokens past the last length at which the model changes its ways
STATE_TOLERANCE = 1e-4  # of hidden states, relative to the largest of its layer
LOGPROB_TOLERANCE = 1e-3  # nats


@dataclass(frozen=True)
class Stage:
    """A place in the model where both sides' hidden states are compared."""

    name: str
    difference: float  # largest, relative to the largest entry


@dataclass
class Agreement:
    """How far two models agree on a text."""

    tokens: int
    stages: list[Stage] = field(default_factory=list)
    largest: float = 0.0  # difference of log-probabilities, over all tokens and the whole vocabulary, nats
    mean: float = 0.0
    text: tuple[float, float] = (0.0, 0.0)  # mean log-probability of the text's next tokens: transformers, Megatron

    @property
    def first_wrong(self) -> str | None:
        """The first stage whose states are further apart than arithmetic explains. NaN counts."""
        return next((stage.name for stage in self.stages if not stage.difference <= STATE_TOLERANCE), None)

    @property
    def same(self) -> bool:
        return self.first_wrong is None and self.largest <= LOGPROB_TOLERANCE


def least_tokens(config: ModelConfig) -> int:
    """Tokens that a text must exceed: at this length a wrong window, or a wrong YaRN, need not show yet."""
    return max(config.lengths_of_change.values(), default=1)


def read_tokens(model: HuggingFaceModel, tokens: int | None, text: Path | None) -> torch.Tensor:
    """The beginning of a real text, [s], never repeated, by the model's own tokenizer.

    Args:
        tokens: s; None: `least_tokens` and some.
        text: file, UTF-8; None: Python's own documentation, which comes with Python.

    Raises:
        UserError: too few tokens to show a wrong window or YaRN, a text that is too short, no tokenizer.
    """
    least = least_tokens(model.config)
    if tokens is not None and tokens <= least:
        raise ArgumentError("tokens", tokens, f"must be more than {least}{_reasons(model.config)}")
    wanted = least + BEYOND if tokens is None else tokens
    ids = _encode(model.source, _python_documentation() if text is None else _read_text(text, wanted))
    if len(ids) < wanted:
        raise ArgumentError(
            "text",
            text or "(the documentation of Python)",
            f"has {counted(len(ids), 'token')} of the {wanted:,} wanted; "
            "give a longer file (join several: cat *.txt > long.txt)",
        )
    if max(ids) >= model.config.vocab_size:
        raise UserError(
            f"{model.source}: its tokenizer gives token {max(ids)}, and the vocabulary has {model.config.vocab_size}"
        )
    return torch.tensor(ids[:wanted])


def _reasons(config: ModelConfig) -> str:
    lengths = ", ".join(f"{what} {length or None}" for what, length in config.lengths_of_change.items())
    return f" ({lengths}): no shorter text shows a wrong one" if lengths else ""


def _encode(directory: Path, text: str) -> list[int]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever it raises on a folder without one, it means that there is none
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{directory}: holds no tokenizer that transformers loads ({reason})") from None
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    return ids


def _python_documentation() -> str:
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def _read_text(path: Path, tokens: int) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read(64 * tokens)  # characters: no text has that many in a token
    except FileNotFoundError:
        raise ArgumentError("text", path, "no such file") from None
    except (OSError, ValueError) as error:
        raise ArgumentError("text", path, f"not a UTF-8 text ({error})") from None


@torch.no_grad()
def compare_on_text(
    hf: HuggingFaceModel,
    megatron: MegatronModel,
    tokens: torch.Tensor,
    parallel: ParallelContext,
    advance: Advance | None = None,
) -> Agreement:
    """Both models over the same text, in fp32, layer by layer: memory for one layer in fp32, and for its activations.

    Args:
        hf: opened.
        megatron: opened, of the same shapes; under `parallel`, one rank.
        tokens: [s], from `read_tokens`.
        advance: is told the bytes of the layers done, of how many.

    Raises:
        UserError: damaged files.
    """
    agreement = Agreement(len(tokens))
    ours = _MegatronSide(megatron, parallel, tokens)
    agreement.stages.append(Stage("embedding", _relative(ours.hidden[:, 0], _embedded(hf, tokens))))
    layers, layer_bytes = hf.config.num_layers, _layer_bytes(hf)

    def after_layer(layer: int, theirs: torch.Tensor) -> None:
        ours.run(layer)
        kind = hf.config.layer_kind(layer + 1)
        agreement.stages.append(Stage(f"layer {layer} ({kind})", _relative(ours.hidden[:, 0], theirs[0])))
        if advance:
            advance((layer + 1) * layer_bytes, layers * layer_bytes)

    theirs = streamed_hidden_states(hf.source, hf.files.read, tokens, dtype=torch.float32, after_layer=after_layer)
    ours.finish()
    agreement.stages.append(Stage("final norm", _relative(ours.hidden[:, 0], theirs)))
    name = EMBEDDING if hf.config.tied_embeddings else HEAD
    heads = hf.files.read(name), megatron.tensor(name)
    _compare_logprobs(theirs, ours.hidden[:, 0], *heads, tokens, agreement)
    return agreement


def _layer_bytes(model: HuggingFaceModel) -> int:
    shapes = [shape for named in model.weights if named.layer == 0 for shape in named.weight.shapes]
    return sum(torch.Size(shape).numel() for shape in shapes) * max(dtype.itemsize for dtype in model.dtypes())


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def _embedded(hf: HuggingFaceModel, tokens: torch.Tensor) -> torch.Tensor:
    return F.embedding(tokens, hf.files.read(EMBEDDING)).float()


class _MegatronSide:
    """Our model's hidden states [s, 1, h], moved on layer by layer."""

    def __init__(self, model: MegatronModel, parallel: ParallelContext, tokens: torch.Tensor) -> None:
        self.config, implementation = model_config(model.source, parallel, precision="fp32")
        self.config.perform_initialization = False  # weights come from the checkpoint
        self.model = model
        self.parallel = parallel
        self.specs = implementation.block_spec(self.config, "torch", None).layer_specs
        self.angles = implementation.rotary(self.config, parallel.megatron.cp)(len(tokens))
        self.hidden = F.embedding(tokens, self.model.checkpoint.read("embedding.word_embeddings.weight"))[
            :, None
        ].float()

    def run(self, layer: int) -> None:
        module = build_module(
            self.specs[layer], config=self.config, layer_number=layer + 1, pg_collection=self.parallel.megatron
        ).eval()
        parameters = dict(module.named_parameters())
        for named in self.model.weights:
            if named.layer == layer:
                saved = self.model.checkpoint.read(megatron_key(named), layer)
                parameters.pop(named.weight.megatron).data.copy_(saved)
        assert not parameters, f"no tensor for {list(parameters)}"
        in_pieces(module.mlp, dim=0)
        self.hidden, _ = module(hidden_states=self.hidden, attention_mask=None, rotary_pos_emb=self.angles)

    def finish(self) -> None:
        norm = RMSNorm(self.config, self.config.hidden_size, eps=self.config.layernorm_epsilon)
        norm.weight.data.copy_(self.model.checkpoint.read("decoder.final_layernorm.weight"))
        self.hidden = norm(self.hidden)


def _compare_logprobs(
    expected: torch.Tensor,
    found: torch.Tensor,
    expected_head: torch.Tensor,
    found_head: torch.Tensor,
    tokens: torch.Tensor,
    agreement: Agreement,
) -> None:
    """Fill in what `agreement` says of log-probabilities, from final hidden states [s, h] and heads [v, h]."""
    total, text = 0.0, torch.zeros(2, dtype=torch.float64)
    for start in range(0, len(tokens), HEAD_TOKENS):
        rows = slice(start, start + HEAD_TOKENS)
        a, b = log_probabilities(expected[rows], expected_head), log_probabilities(found[rows], found_head)
        nexts = tokens[start + 1 : start + 1 + HEAD_TOKENS, None]
        text += torch.stack([x[: len(nexts)].gather(1, nexts).double().sum() for x in (a, b)])
        apart = b.sub_(a).abs_()
        largest = float(apart.max())
        agreement.largest = largest if largest != largest else max(agreement.largest, largest)  # NaN stays
        total += float(apart.sum(dtype=torch.float64))
    agreement.mean = total / len(tokens) / len(expected_head)
    agreement.text = tuple((text / (len(tokens) - 1)).tolist())
