"""One training step of a Megatron model under a layout, as a rank sees it, and of the same model in transformers."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from megatron_sead.config.parallel import ParallelSettings

# Shapes: b sequences in a micro-batch, s their length, v true vocabulary

# Every length is a multiple of 4 (sequence parallelism splits it) and over the window; 32 and 40 exceed YaRN's 16.
LENGTHS = (40, 24, 32, 16)
MICRO_BATCH_SIZE = 2


@dataclass
class Layout:
    """What `initialize_parallel` and `build_model` are asked for."""

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    sp: bool = False
    recompute: str | None = None
    first: int | None = None  # layers on the first stage
    last: int | None = None
    cp: int = 1

    def settings(self) -> ParallelSettings:
        return ParallelSettings(
            tensor_model_parallel_size=self.tp,
            pipeline_model_parallel_size=self.pp,
            virtual_pipeline_model_parallel_size=self.vpp,
            sequence_parallel=self.sp,
            first_stage_layers=self.first,
            last_stage_layers=self.last,
            context_parallel_size=self.cp,
        )

    def __str__(self) -> str:
        parts = (
            [f"tp{self.tp}", f"pp{self.pp}"] + ([f"vpp{self.vpp}"] if self.vpp else []) + (["sp"] if self.sp else [])
        )
        parts += [f"{name}{count}" for name, count in (("first", self.first), ("last", self.last)) if count]
        parts += [f"cp{self.cp}"] if self.cp > 1 else []
        return "-".join(parts + ([self.recompute] if self.recompute else []))


@dataclass
class Batch:
    """A step of micro-batches, the same on every rank; data-parallel ranks take turns."""

    tokens: list[torch.Tensor]  # [b, s]
    labels: list[torch.Tensor]  # [b, s]
    mask: list[torch.Tensor]  # [b, s] 0 or 1: which positions count


@dataclass
class Measured:
    """Of one step: logits and loss a micro-batch, and every weight's gradient of the mean token loss."""

    logits: dict[int, torch.Tensor] = field(default_factory=dict)  # [b, s, v]
    losses: dict[int, float] = field(default_factory=dict)
    gradients: dict[str, torch.Tensor] = field(default_factory=dict)  # by Hugging Face name

    def worst(self, reference: Measured) -> dict[str, float]:
        """Largest differences, each relative to the largest entry of its own tensor."""
        assert self.logits.keys() == reference.logits.keys()
        assert self.gradients.keys() == reference.gradients.keys()
        return {
            "logits": max(relative(self.logits[i], reference.logits[i]) for i in reference.logits),
            "losses": max(abs(self.losses[i] / reference.losses[i] - 1) for i in reference.losses),
            "gradients": max(relative(self.gradients[n], reference.gradients[n]) for n in reference.gradients),
        }


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def make_batch(vocab_size: int, lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int) -> list[torch.Tensor]:
        return [torch.randint(0, high, (MICRO_BATCH_SIZE, n), generator=generator) for n in lengths]

    return Batch(draw(vocab_size), draw(vocab_size), draw(2))


def reference_step(hf_dir: Path, batch: Batch, dtype: torch.dtype = torch.float32) -> Measured:
    """transformers' model, one process, eager attention."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype, attn_implementation="eager").train()
    measured, total = Measured(), torch.zeros((), dtype=dtype)
    for i, (tokens, labels, mask) in enumerate(zip(batch.tokens, batch.labels, batch.mask, strict=True)):
        logits = model(tokens).logits
        # Flat: over a dimension in the middle torch sums one by one, which over 49,152 columns costs four digits
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        loss = (losses * mask.flatten()).sum()
        measured.logits[i], measured.losses[i] = logits.detach(), loss.item()
        total = total + loss
    (total / sum(m.sum() for m in batch.mask)).backward()
    measured.gradients = {name: p.grad for name, p in model.named_parameters()}
    return measured


def megatron_step(
    hf_dir: Path,
    layout: Layout,
    batch: Batch,
    *,
    fault: Callable[[list[Any]], AbstractContextManager[None] | None] | None = None,
    mask_padding: bool = True,
) -> Measured:
    """The same step on this rank. Gradients are whole on rank 0; logits and losses are where they arise.

    Args:
        fault: changes the built chunks, or returns a context to run the step in: what a mistake would look like.
        mask_padding: False leaves the padded columns in the softmax.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    from megatron_sead.models.builder import build_model
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel

    parallel = initialize_parallel(layout.settings(), "cpu", seed=0)
    chunks = build_model(
        hf_dir, parallel, precision="fp32", sequence_parallel=layout.sp, recompute_granularity=layout.recompute
    )
    config = chunks[0].config
    config.finalize_model_grads_func = finalize_model_grads
    ddp_config = DistributedDataParallelConfig(overlap_grad_reduce=False)
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    measured = Measured()
    context = fault(chunks) if fault else None
    with context or nullcontext():
        run_schedule(wrapped, parallel, batch, measured, mask_padding)
    measured.gradients = _whole_gradients(wrapped, parallel)
    destroy_parallel(keep_world=True)
    return measured


def run_schedule(
    wrapped: list[Any], parallel: Any, batch: Batch, measured: Measured, mask_padding: bool = True
) -> None:
    """Forward and backward of this data-parallel rank's micro-batches, through Megatron's DDP chunks."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from megatron_sead.parallel.communicator import schedule_arguments

    mine = list(range(len(batch.tokens)))[parallel.dp_rank :: parallel.dp_size]

    def forward_step(indices: Any, model: torch.nn.Module) -> tuple[torch.Tensor, Callable[..., Any]]:
        i = next(indices)
        tokens = batch.tokens[i]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        output = model(input_ids=tokens, position_ids=positions, attention_mask=None)

        def loss_function(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
            head = wrapped[-1].module.head_weight
            logits, loss = _token_loss(hidden, head, batch.labels[i], wrapped[-1].module.config, parallel, mask_padding)
            loss = (loss * batch.mask[i]).sum()
            measured.logits[i], measured.losses[i] = logits, loss.item()
            return loss, batch.mask[i].sum().int(), {}

        return output, loss_function

    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[iter(mine) for _ in wrapped] if len(wrapped) > 1 else iter(mine),
        model=wrapped if len(wrapped) > 1 else wrapped[0],
        num_microbatches=len(mine),
        seq_length=max(tokens.shape[1] for tokens in batch.tokens),
        micro_batch_size=len(batch.tokens[0]),
        forward_only=False,
        **schedule_arguments(wrapped[0], parallel, [(b, s) for b, s in (batch.tokens[i].shape for i in mine)]),
    )


def _token_loss(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, config: Any, parallel: Any, mask_padding: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole logits [b, s, v] and cross entropy [b, s] by Megatron's own vocabulary-parallel operators."""
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, vocab_parallel_cross_entropy

    logits = F.linear(copy_to_tensor_model_parallel_region(hidden, group=parallel.tp), head)
    column = torch.arange(logits.shape[-1]) + parallel.tp_rank * logits.shape[-1]
    if mask_padding:
        logits = logits.masked_fill(column >= config.vocab_size, float("-inf"))
    shards = [torch.empty_like(logits) for _ in range(parallel.tp_size)]
    torch.distributed.all_gather(shards, logits.detach(), group=parallel.tp)
    whole = torch.cat(shards, -1)[..., : config.vocab_size].clone()
    return whole, vocab_parallel_cross_entropy(logits.float().clone(), labels)


def _whole_gradients(wrapped: list[Any], parallel: Any) -> dict[str, torch.Tensor]:
    from megatron_sead.models.huggingface import whole_tensors
    from megatron_sead.models.weights import placed_weights

    gradients = {}
    for placed in placed_weights(wrapped[0].module.config, wrapped[0].module.config.stage_layers):
        shard = None
        if placed.pp_rank == parallel.pp_rank:
            shard = dict(wrapped[placed.chunk].module.named_parameters())[placed.parameter].main_grad
        parts = whole_tensors(placed, shard, torch.float32, parallel)
        if placed.is_copy and not all(map(torch.equal, parts, (gradients[name] for name in placed.names))):
            parts = [part.fill_(float("nan")) for part in parts]  # the two would drift apart
        gradients |= dict(zip(placed.names, parts, strict=True))
    return gradients if parallel.rank == 0 else {}


def merge(by_rank: list[Measured]) -> Measured:
    """What the ranks saw together. Ranks that saw the same thing must agree exactly."""
    merged = Measured(gradients=by_rank[0].gradients)
    for measured in by_rank:
        for i, logits in measured.logits.items():
            assert torch.equal(merged.logits.setdefault(i, logits), logits)
            assert merged.losses.setdefault(i, measured.losses[i]) == measured.losses[i]
    return merged
