"""Saving and resuming: the product's own, but for files: tensors go to the host, and come from it.

Megatron-Core's exchange of its plan of files between ranks, its file format and the disk are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace, merge, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factory_merges, is_main_replica
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.utils import extract_sharded_base

from megatron_sead.checkpoints.store import INPUTS_FILE, STATE_FILE, CheckpointStore
from megatron_sead.parallel.context import ParallelContext

STEP = 1


@contextmanager
def nothing_written() -> Iterator[None]:
    """Instead of what torch.save would write, which cannot be of fakes, there is an empty file."""
    with mock.patch.object(torch, "save", lambda value, path: path.touch()):
        yield


def store_of(directory: Path, parallel: ParallelContext) -> CheckpointStore:
    """A run's checkpoints in an empty directory, where a rank finds what the first rank would have written."""
    if parallel.rank != 0:
        temporary = directory / f".step-{STEP:08d}"
        temporary.mkdir(parents=True)
        for name in (STATE_FILE, INPUTS_FILE):
            (temporary / name).touch()
    return CheckpointStore(directory, 1, parallel, SimpleNamespace(save=_to_host, load=_from_host))


def _to_host(content: dict[str, Any], directory: str) -> None:
    """As Megatron-Core's writer: all that this rank writes is on the host before any of it is written."""
    sharded, _ = save_preprocess(content, False)
    mine = [v for v in nested_values(sharded) if isinstance(v, ShardedTensor) and is_main_replica(v.replica_id)]
    written = [_on_host(value.data.detach()) for value in mine]
    torch.cuda.synchronize()
    del written


def _on_host(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_cuda:
        return tensor.to("cpu", non_blocking=True)
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor  # a file has no views


def _from_host(content: dict[str, Any], directory: str) -> dict[str, Any]:
    """As Megatron-Core's reader: a piece at a time, into the tensors that are there, or new ones on the host."""
    content, local, factories = load_preprocess(content)
    sharded, loaded = extract_sharded_base(content)
    merge(loaded, local)
    merge(loaded, dict_list_map_inplace(_read, sharded))
    result: dict[str, Any] = apply_factory_merges(loaded, factories)
    return result


def _read(value: Any) -> Any:
    if not isinstance(value, ShardedTensor):
        return value.data
    if value.data is None:
        value.init_data(torch.device("cpu"))
    target = value.data.detach()
    return target.copy_(torch.empty(target.shape, dtype=target.dtype, device="cpu"))
