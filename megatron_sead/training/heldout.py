"""Held-out accuracy of any model of a run: the student before and after, and the teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_sead.evaluation.accuracy import evaluate
from megatron_sead.prompts.tokenizer import ModelTokenizer
from megatron_sead.rollouts.factory import make_engine
from megatron_sead.training.run import Run


def evaluate_directory(run: Run, directory: Path, tokenizer: ModelTokenizer) -> dict[str, Any] | None:
    """Held-out accuracy of a model as its Hugging Face directory holds it; None without evaluation.path. Collective.

    The transformers engine answers, whatever engine the run uses: replayed rollouts cannot.
    """
    config = run.config
    if not run.heldout:
        return None
    engine = make_engine(
        config.rollouts.model_copy(update={"engine": "transformers"}),
        directory,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
        seed=config.seed,
        device=run.parallel.device,
        dtype=run.student_chunks[0].config.params_dtype,
        vocab_size=run.learner.heads.vocab_size,
        group=run.parallel.control,
    )
    result = evaluate(
        engine,
        tokenizer,
        run.heldout,
        run.grader,
        max_new_tokens=config.evaluation.max_new_tokens or config.rollouts.max_new_tokens,
        samples=config.evaluation.samples,
        temperature=config.evaluation.temperature,
        group=run.parallel.control,
    )
    return result.as_dict()
