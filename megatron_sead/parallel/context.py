"""A rank's sizes, ranks and process groups, as a value that is handed to whoever needs it. `groups` makes it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import ProcessGroup

from megatron_sead.config.stages import PipelineSplit


@dataclass(frozen=True)
class ParallelContext:
    """The layout, as this rank sees it. Student and teacher share it but for the split of their layers."""

    device: torch.device
    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    tp: ProcessGroup
    pp: ProcessGroup
    cp: ProcessGroup
    dp: ProcessGroup
    dp_with_cp: ProcessGroup
    control: ProcessGroup  # all ranks, gloo whatever the device: for objects, flags, and what lives in host memory
    megatron: ProcessGroupCollection  # the same groups and the rest, as Megatron's own classes take them
    split: PipelineSplit  # of the model's layers: the student's
    teacher_split: PipelineSplit

    def for_teacher(self) -> ParallelContext:
        """The layout as the teacher's layers follow it."""
        return replace(self, split=self.teacher_split)

    @property
    def vpp_size(self) -> int | None:
        """Model chunks on each rank; None: pipeline stages are not interleaved."""
        return self.split.virtual

    @property
    def chunks(self) -> int:
        """Model chunks on this rank."""
        return self.split.chunks

    @property
    def share(self) -> tuple[int, int]:
        """This rank's number among those that share every sequence, and how many they are."""
        return self.cp_rank, self.cp_size

    @property
    def is_first_stage(self) -> bool:
        """Does this rank hold the embedding?"""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Does this rank hold the head, and see final hidden states?"""
        return self.pp_rank == self.pp_size - 1
