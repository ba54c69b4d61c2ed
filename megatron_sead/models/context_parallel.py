"""Context parallelism: ranks that share every sequence. What moves between them, and where.

- A micro-batch is split when it is packed (`prompts.packing`): a rank has the token ids of its zig-zag pieces
  (`zigzag`), their places in their sequences, from which rotary angles follow, and the response tokens that they
  predict. Rows are run as packed sequences of one length. Embedding, projections, norms and feed-forward see the rank's
  tokens alone, as they do under data parallelism; tensor and sequence parallelism split these again, and pipeline
  messages hold them.
- Attention is the one place where tokens meet. Each layer gathers the keys and values of the group, of a sliding layer
  those inside the window alone, from the ranks across the pieces' edges; queries stay. In backward their gradients go
  back the same way and are summed where the keys are. What was gathered is not kept for that, but gathered again: a
  rank keeps its own keys alone, however many ranks share a sequence.
- Teacher and student are split alike where they read the same prompts. Where they do not, the teacher's final hidden
  states travel to the rank that holds the token in the student's view (`training.scoring`).
- The loss and the statistics of a token are computed on the one rank that predicts it. The statistics, forty bytes a
  token, are then shared, so that zones, policies, normalizers and metrics see whole rollouts and are the same on all
  ranks of the group, as on tensor-parallel ones: they count over data-parallel ranks, each token once. The summed loss
  and the gradients are summed over data-parallel and context-parallel ranks, the count over data-parallel ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.tensor_parallel import all_to_all, gather_from_sequence_parallel_region
from torch.distributed import ProcessGroup

from megatron_sead.models.zigzag import Keys

# Shapes: t tokens of this rank, k keys that its pieces see, piece after piece; g key/value heads, d head dimension


def fetch(key_value: torch.Tensor, keys: Keys, group: ProcessGroup) -> torch.Tensor:
    """[t, 2, g, d] of this rank -> [k, 2, g, d]. Collective; gradients are summed where the keys are."""
    if keys.sent is None:
        found = gather_from_sequence_parallel_region(key_value, group=group)
    else:
        sent = key_value.index_select(0, keys.sent)
        found = all_to_all(group, sent, keys.received_counts, keys.sent_counts)
    return found.index_select(0, keys.index)


@contextmanager
def fetched(key_value: torch.Tensor, keys: Keys, group: ProcessGroup, *, again: bool) -> Iterator[torch.Tensor]:
    """What `fetch` returns, for attention that runs in the body.

    Args:
        again: what autograd saves of it there is not kept, but fetched anew when the first of it is needed in backward,
            and kept until the last is. All ranks of the group then need it in the same order.
    """
    found = fetch(key_value, keys, group)
    if not again or not found.requires_grad:
        yield found
        return
    storage, own = found.untyped_storage()._cdata, key_value.detach()
    anew: list[torch.Tensor] = []
    uses = {"saved": 0, "needed": 0}

    def save(tensor: torch.Tensor) -> Any:
        if tensor.untyped_storage()._cdata != storage:
            return tensor
        uses["saved"] += 1
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def need(saved: Any) -> torch.Tensor:
        if isinstance(saved, torch.Tensor):
            return saved
        if not anew:
            with torch.no_grad():
                anew.append(fetch(own, keys, group))
        tensor = anew[0].as_strided(*saved)
        uses["needed"] += 1
        if uses["needed"] % uses["saved"] == 0:
            anew.clear()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, need):
        yield found
