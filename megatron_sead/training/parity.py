"""Parity of every copy of a model: Hugging Face directory, Megatron ranks, rollout engine.

A broken conversion, a wrong window or rotary scale, or stale engine weights leave losses that look plausible. So the
log-probabilities of a probe text, longer than the sliding window and than YaRN's original length, are compared with
a reference from the Hugging Face directory, at the start and after every resume.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig

from megatron_sead.config.run import RunConfig
from megatron_sead.errors import NotFiniteNumbers, UserError
from megatron_sead.models.decoder import Decoder
from megatron_sead.prompts.packing import MicroBatch, row_view
from megatron_sead.rollouts.reference import reference_log_probs
from megatron_sead.training.not_finite import describe, gather_reports, weights_are_finite
from megatron_sead.training.run import Run
from megatron_sead.training.scoring import Heads, score_student

log = logging.getLogger(__name__)

# Mean absolute difference of a token's log-probability in nats, over the worst BLOCK tokens in a row: a wrong window
# shows only behind the window. fp32: a hundred times what summation order alone gives on random models (1e-6).
# bf16: logits carry three significant digits.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
BLOCK = 64


def probe_tokens(directory: Path, texts: Iterable[tuple[int, ...]], limit: int = 16384) -> list[int]:
    """Token ids of prompts, repeated until they are longer than the model's sliding window and original rotary length.

    In a shorter text a wrong window or rotary scaling changes nothing.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    # One dictionary, or one a layer type; YaRN's is the one with an original length
    rope = getattr(config, "rope_parameters", None) or {}
    dictionaries = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    original = max((d.get("original_max_position_embeddings") or 0 for d in dictionaries), default=0)
    needed = max(getattr(config, "sliding_window", None) or 0, original) + BLOCK
    length = min(needed, config.max_position_embeddings - 1, limit)  # vLLM writes a token after a text that it scores
    tokens = list(islice((token for text in texts for token in text), length))
    return (tokens * (length // len(tokens) + 1))[:length]


def check_models(run: Run, *, fresh: bool) -> None:
    """Both Megatron models against their directories; a resumed student against itself as it was saved. Collective.

    Raises:
        UserError: a model is not the one that its directory, or checkpoint, holds.
    """
    config = run.config
    _require_finite(run, "teacher", config.teacher.path, run.learner.teacher.chunks)
    if fresh:
        _require_finite(run, "student", config.student.path, run.student_chunks)
    student, teacher = both_log_probs(run)
    require_same("teacher and " + str(config.teacher.path), teacher, _reference(run, config.teacher.path), config)
    if fresh:
        require_same("student and " + str(config.student.path), student, _reference(run, config.student.path), config)
    else:
        require_same("student and its checkpoint", student, torch.tensor(run.state.probe_log_probs), config)


def _require_finite(run: Run, role: str, directory: Path, chunks: list[Decoder]) -> None:
    """Look at all weights: the probe does not reach the embeddings of other tokens, which a run may need days later."""
    if not weights_are_finite(chunks, run.parallel):
        raise UserError(f"{role}.path={directory}: holds weights that are NaN or infinite; copy or download it again")


def check_export(run: Run, directory: Path) -> None:
    """A written Hugging Face directory, as transformers reads it, against the trained student. Collective."""
    student = student_log_probs(run, run.probe)
    require_same(f"{directory} and the trained student", _reference(run, directory), student, run.config)


def _reference(run: Run, directory: Path) -> torch.Tensor:
    """What transformers makes of a directory: [len(probe) - 1] log-probabilities, by the first rank, for all."""
    box: list[torch.Tensor | None] = [None]
    if run.parallel.rank == 0:
        box[0] = reference_log_probs(replace(run.engine_context, directory=directory, group=None), run.probe)
    dist.broadcast_object_list(box, src=0, group=run.parallel.control)
    assert box[0] is not None
    return box[0]


def both_log_probs(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    """Student's and teacher's log-probabilities [len(probe) - 1] under Megatron, on every rank. Collective.

    Raises:
        NotFiniteNumbers: logits of either that are not finite, on every rank alike.
    """
    probe = _micro_batches(run, run.probe)
    teacher_hidden = run.learner.teacher.hidden_states(probe, run.parallel, run.learner.heads.own_rows)
    paths = f"student.path={run.config.student.path}, teacher.path={run.config.teacher.path}"
    return _log_probs(run, probe, teacher_hidden, run.learner.heads, paths)


def student_log_probs(run: Run, tokens: list[int]) -> torch.Tensor:
    """The student's log-probabilities [len(tokens) - 1] of a text, without a pass of the teacher. Collective.

    Raises:
        NotFiniteNumbers: its logits are not finite, on every rank alike.
    """
    probe, heads = _micro_batches(run, tokens), run.learner.heads
    # Scores are of a pair: a teacher with hidden size 1 and all logits zero takes the place of the real one
    nothing = torch.zeros(len(probe[0].student.predictors), 1, device=run.parallel.device)
    zeros = [heads.own_rows(batch, nothing) for batch in probe]
    if heads.student is not None:
        heads = replace(heads, teacher=heads.student.detach().new_zeros(len(heads.student), 1))
    return _log_probs(run, probe, zeros, heads, f"student.path={run.config.student.path}")[0]


def _micro_batches(run: Run, tokens: list[int]) -> list[MicroBatch]:
    """A text as micro-batches, of which all are the same: virtual stages want a multiple of the pipeline size."""
    parallel, count = run.parallel, len(tokens) - 1
    padded = -(-len(tokens) // run.length_multiple) * run.length_multiple
    ids, index = torch.zeros(1, padded, dtype=torch.long), torch.arange(count)
    ids[0, : len(tokens)] = torch.tensor(tokens)
    view, targets = row_view(ids, index, parallel.share, parallel.device), ids[0, 1 : count + 1].to(parallel.device)
    index = index.to(parallel.device)
    probe = MicroBatch(view, view, targets, torch.zeros_like(index), index, torch.ones_like(index).bool())
    return [probe] * parallel.pp_size


def _log_probs(
    run: Run, probe: list[MicroBatch], teacher_hidden: list[torch.Tensor], heads: Heads, paths: str
) -> tuple[torch.Tensor, torch.Tensor]:
    parallel = run.parallel
    problems: list[str] = []
    scores = score_student(run.learner.student, probe, teacher_hidden, heads, parallel, problems)
    reports = gather_reports(parallel, run.learner.student, problems[0] if problems else None)
    if reports is not None:
        raise NotFiniteNumbers(f"{paths}: {describe(reports)}; a model's weights must be finite")
    both = torch.zeros(2, len(probe[0].targets), device=parallel.device)
    if parallel.is_last_stage:
        both = torch.stack([scores[0].student_log_prob, scores[0].teacher_log_prob])
    dist.broadcast(both, group_src=parallel.pp_size - 1, group=parallel.pp)
    return both[0].cpu(), both[1].cpu()


def largest_difference(found: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean absolute difference of two vectors [n] in nats, over the worst BLOCK tokens in a row; NaN where one is."""
    blocks = (found - reference).abs().flip(0).split(BLOCK)  # from the end, where windows and rotary lengths show
    return torch.stack([block.mean() for block in blocks]).max().item()


def require_same(what: str, found: torch.Tensor, reference: torch.Tensor, config: RunConfig) -> None:
    """Raise unless two log-probability vectors [n] are the same model's.

    Raises:
        UserError: their mean absolute difference is over the tolerance of the precision.
    """
    precision = config.training.precision
    difference, bound = largest_difference(found, reference), TOLERANCE[precision]
    told = "%s: log-probabilities differ by %.1e nats over %d tokens (at most %.0e with %s)"
    log.info(told, what, difference, len(reference), bound, precision)
    if not difference <= bound:
        raise UserError(
            f"{what} do not agree: log-probabilities differ by {difference:.2e} nats a token, "
            f"at most {bound:.0e} are allowed with training.precision={precision}"
        )
