"""What Megatron passes from a model's input to its attention, where several sequences follow one another in a row."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's record, which Transformer Engine reads, and what our rotary angles and torch's attention need."""

    positions: torch.Tensor | None = None  # [t] each token's place in its own sequence
    lengths: tuple[int, ...] = ()  # of the sequences, on the host: nothing waits for a GPU to tell them

    @staticmethod
    def of(starts: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...]) -> PackedSequences:
        """Of sequences that fill the row: cumulative lengths [sequences + 1] int32, places [t], lengths."""
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            positions=positions,
            lengths=lengths,
        )
