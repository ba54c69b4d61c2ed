"""Micro-batches through a model under any layout: Megatron's schedule, and what to do with final hidden states.

One function serves the teacher's pass, the student's scoring pass and the training pass; they differ in which
view of a micro-batch they read and in what they make of the hidden states that predict response tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_sead.models.packed import PackedSequences
from megatron_sead.parallel.communicator import schedule_arguments
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.prompts.packing import MicroBatch, TokenView

# Shapes: b rollouts in a micro-batch, 1 where they are packed; s padded length; n response tokens of the micro-batch;
# h hidden size

OnHidden = Callable[[int, torch.Tensor], Any]


def run_schedule(
    chunks: list[torch.nn.Module],
    micro_batches: list[MicroBatch],
    view: Literal["student", "teacher"],
    on_hidden: OnHidden,
    *,
    parallel: ParallelContext,
    forward_only: bool,
) -> list[Any]:
    """Send every micro-batch through the pipeline.

    Args:
        chunks: this rank's model chunks (several under virtual pipeline stages).
        micro_batches: this data-parallel rank's share of the step.
        view: whose tokens the model reads.
        on_hidden: called on the last stage as ``on_hidden(index, hidden)`` with hidden [n, h], one row a response
            token, under context parallelism [m, h] of those that this rank predicts; of a model with sequence-parallel
            output, this rank's shard of all positions [s/tp * b, h].
            Forward only: returns anything. Training: returns (summed loss, token count, anything), Megatron's
            per-token protocol: gradients are divided by the global count.
        forward_only: no gradients.

    Returns:
        What on_hidden returned (in training its last item), one entry a micro-batch; empty before the last stage.
    """
    tokens = [getattr(micro_batch, view).tokens for micro_batch in micro_batches]
    schedule = get_forward_backward_func(parallel.pp_size, parallel.vpp_size)
    iterators = [iter(enumerate(micro_batches)) for _ in chunks]
    forward_step = partial(_forward_step, view=view, on_hidden=on_hidden)
    with torch.set_grad_enabled(not forward_only):
        return schedule(
            forward_step_func=forward_step,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=len(micro_batches),
            seq_length=max(t.shape[1] for t in tokens),
            micro_batch_size=tokens[0].shape[0],
            forward_only=forward_only,
            collect_non_loss_data=forward_only,
            **schedule_arguments(chunks[0], parallel, [(t.shape[0], t.shape[1]) for t in tokens]),
        )


def _forward_step(
    iterator: Iterator[tuple[int, MicroBatch]], model: torch.nn.Module, view: str, on_hidden: OnHidden
) -> tuple[torch.Tensor, Callable[..., Any]]:
    index, micro_batch = next(iterator)
    seen: TokenView = getattr(micro_batch, view)
    tokens, predictors, bounds = seen.tokens, seen.predictors, seen.boundaries
    if bounds is None:
        positions, packed = torch.arange(tokens.shape[1], device=tokens.device), None
    else:
        positions = bounds.positions
        packed = PackedSequences.of(bounds.starts, positions, bounds.lengths, bounds.share)
    config: Any = model.config  # Megatron's wrappers have it too
    output = model(
        input_ids=tokens, position_ids=positions.expand_as(tokens), attention_mask=None, packed_seq_params=packed
    )

    def on_last_stage(hidden: torch.Tensor, non_loss_data: bool = False) -> Any:
        rows = hidden.flatten(0, 1)
        if not config.sequence_parallel_output:
            rows = rows.index_select(0, predictors.to(rows.device, non_blocking=True))
        return on_hidden(index, rows)

    return output, on_last_stage
