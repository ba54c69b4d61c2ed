"""What Megatron passes from a model's input to its attention, where several sequences follow one another in a row."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_sead.models.zigzag import Keys


@dataclass
class PackedSequences(PackedSeqParams):
    """Megatron's record, which Transformer Engine reads, and what our rotary angles and torch's attention need.

    Under context parallelism lengths are those of whole sequences, and positions those of the tokens on this rank.
    """

    positions: torch.Tensor | None = None  # [t] each token's place in its own sequence
    lengths: tuple[int, ...] = ()  # of the sequences, on the host: nothing waits for a GPU to tell them
    share: tuple[int, int] = (0, 1)  # this rank's number among those that share the sequences, and how many they are
    _keys: dict[int | None, Keys] = field(default_factory=dict)

    @staticmethod
    def of(
        starts: torch.Tensor, positions: torch.Tensor, lengths: tuple[int, ...], share: tuple[int, int] = (0, 1)
    ) -> PackedSequences:
        """Of sequences that fill the row: cumulative lengths [sequences + 1] int32, places [t], lengths."""
        return PackedSequences(
            qkv_format="thd",
            cu_seqlens_q=starts,
            cu_seqlens_kv=starts,
            max_seqlen_q=max(lengths),
            max_seqlen_kv=max(lengths),
            positions=positions,
            lengths=lengths,
            share=share,
        )

    def keys(self, window: int | None, device: torch.device) -> Keys:
        """Those that this rank's queries see in a layer with that window; found out once for all such layers."""
        if window is not None and window >= max(self.lengths):
            window = None
        if window not in self._keys:
            self._keys[window] = Keys.of(self.lengths, *self.share, window).to(device)
        return self._keys[window]
