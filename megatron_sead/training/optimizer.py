"""What updates the student: Megatron's DistributedDataParallel, optimizer and learning-rate schedule."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sead.config.run import TrainingSettings
from megatron_sead.parallel.context import ParallelContext


def build_optimizer(
    chunks: list[Any], settings: TrainingSettings, parallel: ParallelContext
) -> tuple[list[torch.nn.Module], Any, OptimizerParamScheduler]:
    """Wrap the model, and make its optimizer and schedule. Collective.

    No Float16Module: `build_model` makes bf16 parameters, and that wrapper would only turn the last stage's hidden
    states into fp32, twice the memory, for a loss that accumulates in fp32 anyway. fp32 main parameters are the
    optimizer's.

    Args:
        chunks: from `build_model`, in `settings.precision`; their configuration has ``calculate_per_token_loss``, so
            gradients are summed over data-parallel ranks and divided by the global count of tokens.

    Returns:
        The chunks under DDP (which the schedule runs; `zero_grad_buffer` before each step), Megatron's optimizer, and
        its scheduler: ``scheduler.step(increment=1)`` after each update. 1-D parameters (norms) have no weight decay.
        Neither looks for gradients that are not finite: the step does, and skips (`not_finite`).
    """
    config = chunks[0].config
    overlap = parallel.device.type == "cuda" and parallel.dp_size * parallel.cp_size > 1
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        # Parameters are gathered by the optimizer's step, not before the next forward pass: in between, the rollout
        # engine and checkpoints read them.
        overlap_param_gather=False,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        check_for_nan_in_grad=False,  # on: a rank raises in the midst of a collective
    )
    ddp_chunks = [
        DistributedDataParallel(
            config, ddp_config, chunk, disable_bucketing=number > 0, pg_collection=parallel.megatron
        )
        for number, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        _optimizer_config(settings),
        ddp_chunks,
        use_gloo_process_groups=False,
        pg_collection=parallel.megatron,
    )
    _connect_to_schedule(config, ddp_chunks, optimizer, overlap)
    return ddp_chunks, optimizer, _scheduler(settings, optimizer)


@torch.no_grad()
def apply_gradients(optimizer: Any) -> float:
    """Clip the gradients by their global norm, and update. After the optimizer's ``prepare_grads``. Collective.

    In place of Megatron's ``optimizer.step``, which without Transformer Engine reads every gradient's norm from the
    GPU, and copies every gradient that it scales. Here one number is read.

    Returns:
        The norm before clipping, over all ranks, of each parameter once.
    """
    parts = optimizer_parts(optimizer)
    counted = [gradient for part in parts for gradient in _counted_in_norm(part)]
    square = torch.nn.utils.get_total_norm(counted).square().to(torch.cuda.current_device())  # of none: on the CPU
    dist.all_reduce(square, group=parts[0].get_grad_stats_parallel_group())
    norm, most = square.item() ** 0.5, optimizer.config.clip_grad
    if 0 < most < norm:
        torch.nn.utils.clip_grads_with_norm_([p for part in parts for p in part.get_parameters()], most, square.sqrt())
    optimizer.step_with_ready_grads()
    return norm


def _counted_in_norm(part: Any) -> list[torch.Tensor]:
    """Gradients of the parameters of which this rank counts; the method has another name since Megatron-Core 0.19."""
    found = getattr(part, "get_main_grads_for_grad_norm", None) or part.get_grads_for_grad_norm
    return list(found())


def optimizer_parts(optimizer: Any) -> list[Any]:
    """Megatron's optimizers in one of its chains, or one that is none."""
    parts: list[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


def _optimizer_config(settings: TrainingSettings) -> OptimizerConfig:
    return OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=settings.precision == "bf16",
        params_dtype=torch.bfloat16 if settings.precision == "bf16" else torch.float32,
        use_distributed_optimizer=settings.use_distributed_optimizer,
    )


def _connect_to_schedule(config: Any, ddp_chunks: list[Any], optimizer: Any, overlap: bool) -> None:
    """Set the functions that Megatron's pipeline schedules look for on the model's configuration."""
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if overlap:  # gradients are reduced during the backward pass of the last micro-batch, not of each
        no_sync = [chunk.no_sync for chunk in ddp_chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]


def _scheduler(settings: TrainingSettings, optimizer: Any) -> OptimizerParamScheduler:
    """Warm-up to `lr`, then the decay to `min_lr`, over the run's steps.

    Update n (from 0) of w warm-up steps has lr * (n + 1) / (w + 1): the first one trains, and update w has all of
    `lr`. Megatron interpolates from `init_lr` at 0 to `lr` at w, which is that line when init_lr = lr / (w + 1). The
    decay reaches `min_lr` where the update after the last would be: the last one trains too.
    """
    warmup = settings.lr_warmup_steps
    return OptimizerParamScheduler(
        optimizer,
        init_lr=settings.lr / (warmup + 1),
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup,
        lr_decay_steps=max(settings.steps, warmup + 1),  # Megatron wants more than the warm-up
        lr_decay_style=settings.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=True,
    )
