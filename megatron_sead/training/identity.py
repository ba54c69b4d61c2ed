"""Proof that every copy of a model is the same model: Hugging Face directory, Megatron ranks, rollout engine.

A broken conversion, a wrong window or rotary scale, or stale engine weights leave losses that look plausible. So the
log-probabilities of a probe text, longer than the sliding window and than YaRN's original length, are compared with
a reference from the Hugging Face directory, at the start and after every resume.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_sead.errors import UserError
from megatron_sead.models.parallel import ParallelContext
from megatron_sead.prompts.packing import MicroBatch, TokenView
from megatron_sead.training.scoring import Heads, score_student, teacher_hidden_states

log = logging.getLogger(__name__)

# Mean absolute difference of a token's log-probability, in nats. fp32: a hundred times what summation order alone
# gives on random models (1e-6). bf16: logits carry three significant digits.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


def probe_tokens(directory: Path, texts: list[tuple[int, ...]], limit: int = 16384) -> list[int]:
    """Token ids of prompts, repeated until no window and no rotary length of the model is long enough to hide in."""
    config = AutoConfig.from_pretrained(directory)
    # One dictionary, or one a layer type; YaRN's is the one with an original length
    rope = getattr(config, "rope_parameters", None) or {}
    dictionaries = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    original = max((d.get("original_max_position_embeddings") or 0 for d in dictionaries), default=0)
    needed = max(getattr(config, "sliding_window", None) or 0, original) + 16
    length = min(needed, config.max_position_embeddings, limit)
    tokens = [token for text in texts for token in text]
    return (tokens * (length // len(tokens) + 1))[:length]


@torch.inference_mode()
def reference_log_probs(directory: Path, tokens: list[int], precision: str, device: torch.device) -> torch.Tensor:
    """What transformers makes of the directory: [len(tokens) - 1] log-probabilities of each next token, fp32."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype).to(device).eval()
    ids = torch.tensor([tokens], device=device)
    hidden = model.model(ids).last_hidden_state[0, :-1]
    rows = [
        model.lm_head(chunk).float().log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
        for chunk, targets in zip(hidden.split(512), ids[0, 1:].split(512), strict=True)
    ]
    return torch.cat(rows).cpu()


def reference_on_all_ranks(
    directory: Path, tokens: list[int], precision: str, parallel: ParallelContext
) -> torch.Tensor:
    """`reference_log_probs`, computed by the first rank, on every rank. Collective."""
    box = [reference_log_probs(directory, tokens, precision, parallel.device) if parallel.rank == 0 else None]
    dist.broadcast_object_list(box, src=0, group=parallel.control)
    assert box[0] is not None
    return box[0]


def trained_log_probs(
    student: list[torch.nn.Module],
    teacher: list[torch.nn.Module],
    heads: Heads,
    tokens: list[int],
    parallel: ParallelContext,
    length_multiple: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both Megatron models' log-probabilities [len(tokens) - 1] of the probe, on every rank. Collective."""
    padded = -(-len(tokens) // length_multiple) * length_multiple
    ids = torch.zeros(1, padded, dtype=torch.long, device=parallel.device)
    ids[0, : len(tokens)] = torch.tensor(tokens)
    count = len(tokens) - 1
    index = torch.arange(count, device=parallel.device)
    view = TokenView(ids, index)
    probe = MicroBatch(view, view, ids[0, 1 : count + 1], torch.zeros_like(index), index, torch.ones_like(index).bool())
    copies = [probe] * parallel.pp_size  # virtual pipeline stages want a multiple of the pipeline size
    scores = score_student(student, copies, teacher_hidden_states(teacher, copies), heads)
    both = torch.zeros(2, count, device=parallel.device)
    if parallel.is_last_stage:
        both = torch.stack([scores[0].student_log_prob, scores[0].teacher_log_prob])
    dist.broadcast(both, group_src=parallel.pp_size - 1, group=parallel.pp)
    return both[0].cpu(), both[1].cpu()


def require_same(what: str, found: torch.Tensor, reference: torch.Tensor, precision: str) -> None:
    """Raise unless two log-probability vectors [n] are the same model's.

    Raises:
        UserError: their mean absolute difference is over the tolerance of the precision.
    """
    difference = (found - reference).abs().mean().item()
    log.info("%s: log-probabilities differ by %.1e nats on %d tokens", what, difference, len(reference))
    if not difference <= TOLERANCE[precision]:
        raise UserError(
            f"{what} do not agree: mean log-probability difference {difference:.2e} nats over {len(reference)} tokens, "
            f"at most {TOLERANCE[precision]:.0e} in training.precision={precision}"
        )
