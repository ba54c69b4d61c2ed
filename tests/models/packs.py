"""One training pass over rollouts of many lengths, as rows or packed, as a rank sees it: what tests compare."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.models.parity import Layout

# Tokens of prompt, of the teacher's prompt, and of response. One has a single response token, the third fills BUDGET
ROLLOUTS = ((3, 9, 20), (1, 1, 1), (21, 30, 10), (4, 4, 36), (9, 2, 2), (1, 1, 17), (5, 5, 5), (12, 11, 25))
EVERY = tuple(range(len(ROLLOUTS)))
BUDGET = 40
LONGEST = 64


@dataclass
class Step:
    """Of one pass over a step's rollouts, by its tokens' (rollout, position)."""

    loss: float = 0.0
    count: int = 0
    teacher: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # final hidden states [h]
    student: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)  # where no rank has a part alone
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # by Hugging Face name, on the first rank
    rollouts: list[int] = field(default_factory=list)  # in each of this rank's micro-batches
    lengths: list[int] = field(default_factory=list)  # tokens of each


def make_rollouts(
    vocab_size: int, chosen: tuple[int, ...] = EVERY, changed: int | None = None
) -> tuple[list[tuple[int, ...]], ...]:
    """Student's prompts, teacher's and responses; of the rollout `changed` all tokens are others."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int, index: int) -> tuple[int, ...]:
        tokens = torch.randint(0, vocab_size, (length,), generator=generator)
        return tuple(((tokens + (index == changed)) % vocab_size).tolist())

    rollouts = [tuple(draw(length, i) for length in ROLLOUTS[i]) for i in chosen]
    return tuple(list(column) for column in zip(*rollouts, strict=True))


def run_step(
    hf_dir: Path, layout: Layout, budget: int | None, chosen: tuple[int, ...] = EVERY, changed: int | None = None
) -> Step:
    """The teacher's pass and the student's, of the same model, with the loss over the vocabulary."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_sead.config.micro_batches import count_multiple, length_multiple
    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from megatron_sead.prompts.packing import pack
    from megatron_sead.training.pipeline import run_schedule
    from tests.models.parity import _whole_gradients

    parallel = initialize_parallel(layout.settings(), "cpu", seed=0)
    chunks = build_model(
        hf_dir,
        parallel,
        precision="fp32",
        sequence_parallel=layout.sp,
        sequence_parallel_output=True,
        recompute_granularity=layout.recompute,
    )
    teacher = build_model(hf_dir, parallel, precision="fp32", sequence_parallel=layout.sp)
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    wrapped = [DistributedDataParallel(config, DistributedDataParallelConfig(), chunk) for chunk in chunks]
    prompts, teacher_prompts, responses = make_rollouts(config.vocab_size, chosen, changed)
    micro_batches = pack(
        prompts,
        teacher_prompts,
        responses,
        [True] * len(responses),
        micro_batch_size=1,
        data_parallel_rank=parallel.dp_rank,
        data_parallel_size=parallel.dp_size,
        length_multiple=length_multiple(layout.settings()),
        pad_token_id=0,
        device=parallel.device,
        micro_batch_tokens=budget,
        count_multiple=count_multiple(layout.settings()),
        share=parallel.share,
    )
    step = Step(
        rollouts=[len(batch.rollout_index.unique()) for batch in micro_batches],
        lengths=[max(batch.student.tokens.numel(), batch.teacher.tokens.numel()) for batch in micro_batches],
    )
    seen = _by_token(micro_batches, "teacher", step.teacher)
    for model in teacher:
        model.requires_grad_(False).eval()
    modules = list[torch.nn.Module](teacher)
    hidden = run_schedule(modules, micro_batches, "teacher", seen, parallel=parallel, forward_only=True)
    loss = _loss(step, wrapped, micro_batches, hidden, parallel, layout.sp)
    run_schedule(wrapped, micro_batches, "student", loss, parallel=parallel, forward_only=False)
    step.gradients = _whole_gradients(wrapped, parallel)
    destroy_parallel(keep_world=True)
    return step


def _by_token(micro_batches: list[Any], view: str, into: dict[tuple[int, int], torch.Tensor]) -> Any:
    def keep(index: int, hidden: torch.Tensor) -> torch.Tensor:
        batch = micro_batches[index]
        own = getattr(batch, view).own
        own = slice(None) if own is None else own
        tokens = zip(batch.rollout_index[own].tolist(), batch.position[own].tolist(), hidden.detach(), strict=True)
        into.update({(rollout, position): row.clone() for rollout, position, row in tokens})
        return hidden.detach()

    return keep


def _loss(
    step: Step, wrapped: list[Any], micro_batches: list[Any], teacher_hidden: Any, parallel: Any, sharded: bool
) -> Any:
    from megatron_sead.distillation import TokenWeights
    from megatron_sead.training.scoring import Heads

    head = wrapped[-1].module.head_weight
    heads = Heads(
        student=head,
        teacher=None if head is None else head.detach() * 0.9,
        student_stop_token_ids=(1,),
        teacher_stop_token_ids=(1,),
        vocab_size=wrapped[-1].module.config.vocab_size,
        scratch_bytes=2**20,
        group=parallel.tp if parallel.tp_size > 1 else None,
        sequence_parallel=sharded,
        context=parallel.cp if parallel.cp_size > 1 else None,
    )
    weights = torch.rand(2, len(ROLLOUTS) * LONGEST, generator=torch.Generator().manual_seed(4))
    keep = _by_token(micro_batches, "student", step.student)

    def loss(index: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        batch = micro_batches[index]
        forward, reverse = weights[:, batch.rollout_index * LONGEST + batch.position]
        known = torch.zeros_like(forward)
        states = heads.own_rows(batch, teacher_hidden[index])
        summed = heads.loss(hidden, states, TokenWeights(forward, reverse), batch, None, known)
        if not sharded:
            keep(index, hidden)
        step.loss += summed.item()
        count = len(batch.targets) * (parallel.cp_rank == 0)
        step.count += count
        return summed, torch.tensor(count, dtype=torch.int), None

    return loss
