"""Held-out accuracy of any model of a run: the student before and after, and the teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sead.evaluation.accuracy import evaluate
from megatron_sead.prompts.tokenizer import ModelTokenizer
from megatron_sead.rollouts.engine import RolloutEngine
from megatron_sead.rollouts.registry import make_engine
from megatron_sead.training.run import Run


def evaluate_student(run: Run, directory: Path) -> dict[str, Any] | None:
    """Held-out accuracy of the student as it is; None without evaluation.path. Collective.

    The run's engine answers, which has the student's weights. Recorded rollouts answer nothing new, so a run that
    replays them makes an engine for `directory`, which holds the same weights.
    """
    if run.config.rollouts.recorded is not None:
        return evaluate_directory(run, directory, run.tokenizer)
    return _evaluate(run, run.engine, run.tokenizer)


def evaluate_directory(run: Run, directory: Path, tokenizer: ModelTokenizer) -> dict[str, Any] | None:
    """Held-out accuracy of a model as its Hugging Face directory holds it; None without evaluation.path. Collective.

    By an engine of its own. The run's must not hold memory: it is not made yet, it is closed, or only reads.
    """
    if not run.heldout:
        return None
    context = replace(
        run.engine_context,
        directory=directory,
        stop_token_ids=tokenizer.stop_token_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    engine = make_engine(run.config.rollouts.writing, context)
    try:
        return _evaluate(run, engine, tokenizer)
    finally:
        engine.close()


def _evaluate(run: Run, engine: RolloutEngine, tokenizer: ModelTokenizer) -> dict[str, Any] | None:
    config = run.config
    if not run.heldout:
        return None
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
