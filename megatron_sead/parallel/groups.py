"""Process groups: from the ranks that torchrun started, or from one process alone, to a `ParallelContext`."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megatron_sead.config.checks import data_parallel_size
from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.stages import student_split, teacher_split
from megatron_sead.parallel.context import ParallelContext
from megatron_sead.parallel.cpu_adaptor import is_adapted
from megatron_sead.parallel.joining import join_world, local_gpu


def initialize_parallel(
    settings: ParallelSettings, device: str, seed: int, control_backend: str = "gloo"
) -> ParallelContext:
    """Join the process group, lay the ranks out as the settings say, and seed. Collective over all ranks.

    Started by torchrun (or any launcher that sets RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) or as one process. A
    process group that exists already is kept and laid out anew.

    Args:
        settings: sizes; data-parallel size is what is left of the ranks.
        device: "cuda" or "cpu"; "cpu" needs `adapt_to_cpu` before Megatron is imported.
        seed: every pipeline stage and tensor-parallel rank draws its initial weights from a generator of its own.
        control_backend: of the group for what lives in host memory.

    Raises:
        UserError: a layout that the ranks do not fill, or a device that is not there.
    """
    torch_device = _choose_device(device)
    if not dist.is_initialized():
        join_world(device, settings.timeout)
    data_parallel_size(settings, dist.get_world_size())
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=settings.tensor_model_parallel_size,
        pipeline_model_parallel_size=settings.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=settings.virtual_pipeline_model_parallel_size,
        context_parallel_size=settings.context_parallel_size,
        distributed_timeout_minutes=settings.timeout_minutes,
        create_gloo_process_groups=False,  # `control` is the only one that is used
    )
    context = _context(settings, torch_device, control_backend)
    _seed(seed, context)
    return context


@contextmanager
def parallel_groups(settings: ParallelSettings, device: str, seed: int) -> Iterator[ParallelContext]:
    """`initialize_parallel`, and at the end `destroy_parallel`, but not after an error.

    After an error the peers may be waiting in a collective, and NCCL would wait for them in turn. Whoever catches the
    error ends the process.
    """
    yield initialize_parallel(settings, device, seed)
    destroy_parallel()


def destroy_parallel(*, keep_world: bool = False) -> None:
    """Take the groups down, so that ranks end without a complaint or can be laid out anew.

    Args:
        keep_world: keep the default process group, for another `initialize_parallel`.
    """
    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    if not keep_world:
        dist.destroy_process_group()
        return
    # Megatron only forgets its groups, a few dozen, each with threads that wake up a hundred times a second.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _choose_device(device: str) -> torch.device:
    if device == "cpu":
        if not is_adapted():
            raise RuntimeError("device cpu: adapt_to_cpu() must run before megatron is imported")
        return torch.device("cpu")
    gpu = local_gpu()
    # It plans anew for every length, tens of milliseconds each, and its backward pass is NaN for some masked lengths
    torch.backends.cuda.enable_cudnn_sdp(False)
    return gpu


def _context(settings: ParallelSettings, device: torch.device, control_backend: str) -> ParallelContext:
    return ParallelContext(
        device=device,
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=settings.tensor_model_parallel_size,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=settings.pipeline_model_parallel_size,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=settings.context_parallel_size,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        tp=parallel_state.get_tensor_model_parallel_group(),
        pp=parallel_state.get_pipeline_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        dp=parallel_state.get_data_parallel_group(),
        dp_with_cp=parallel_state.get_data_parallel_group(with_context_parallel=True),
        control=dist.new_group(backend=control_backend, timeout=settings.timeout),
        megatron=ProcessGroupCollection.use_mpu_process_groups(),
        split=student_split(settings),
        teacher_split=teacher_split(settings),
    )


def _seed(seed: int, context: ParallelContext) -> None:
    """Same seed on every data-parallel rank, so that they start equal; another one a pipeline stage."""
    stage_seed = seed + 100 * context.pp_rank
    random.seed(stage_seed)
    numpy.random.seed(stage_seed % 2**32)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)
