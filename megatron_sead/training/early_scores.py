"""While other replicas still write: grades and the teacher's pass for what this one has written (`rollouts.overlap`).

The ranks that hold one copy of the models wait for the longest rollouts of all others before a step can go on. What
they have written themselves needs nobody else, and their engine sleeps by then, so that the teacher has its memory.
Rollouts are dealt out anew when all are known, and the teacher's hidden states travel between hosts to their rollouts.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

from megatron_sead.parallel.context import ParallelContext
from megatron_sead.prompts.packing import MicroBatch
from megatron_sead.rollouts.engine import Rollout
from megatron_sead.training.run import Run

# Shapes: n response tokens of a micro-batch, h hidden size of the teacher


class EarlyScores:
    """Of one step at a time. Every method is collective: `meanwhile` over a model-parallel group, the rest over all."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._group = _model_parallel_group(run.parallel, run.config.parallel.timeout)
        self._correct: dict[int, bool] = {}  # by the number of the request, as all that follows
        self._hidden: dict[int, torch.Tensor] = {}  # [response tokens, h] on the last stage, in host memory
        self._holder: dict[int, int] = {}  # data-parallel rank

    def meanwhile(self, written: dict[int, Rollout] | None) -> None:
        """What an engine calls on every rank that has written its share; None: it could not.

        Raises:
            EngineFailed: it cannot sleep, on every rank of the group.
        """
        self._correct, self._hidden, self._holder = {}, {}, {}
        shares: list[dict[int, Rollout] | None] = [None] * self._group.size()
        dist.all_gather_object(shares, written, group=self._group)
        together = {number: rollout for share in shares if share is not None for number, rollout in share.items()}
        if None in shares or not together:
            return  # the engine tells all ranks why
        self._run.ask(self._run.engine.sleep, self._group)
        numbers = sorted(together)
        rollouts = [together[number] for number in numbers]
        self._correct = dict(zip(numbers, self._run.grade(rollouts, self._group), strict=True))
        self._hidden = self._scored(numbers, rollouts)

    def correct(self) -> list[bool]:
        """Right or wrong, of each rollout of the step."""
        parallel = self._run.parallel
        found: list[tuple[int, dict[int, bool]]] = [(0, {})] * parallel.world_size
        dist.all_gather_object(found, (parallel.dp_rank, self._correct), group=parallel.control)
        self._holder = {number: rank for rank, verdicts in found for number in verdicts}
        verdicts = {number: verdict for _, share in found for number, verdict in share.items()}
        return [verdicts[number] for number in range(len(verdicts))]

    def teacher_hidden(self, micro_batches: list[MicroBatch]) -> list[torch.Tensor]:
        """What `train_step` would ask the teacher for, on the last stage. After `correct`."""
        parallel = self._run.parallel
        needed = [torch.unique_consecutive(batch.rollout_index).tolist() for batch in micro_batches]
        needs: list[tuple[int, list[int]]] = [(0, [])] * parallel.world_size
        mine = [number for rollouts in needed for number in rollouts]
        dist.all_gather_object(needs, (parallel.dp_rank, mine), group=parallel.control)
        if not parallel.is_last_stage:
            return []
        lengths = [batch.rollout_index.bincount(minlength=len(self._holder)).tolist() for batch in micro_batches]
        tokens = {number: lengths[i][number] for i, rollouts in enumerate(needed) for number in rollouts}
        self._exchange(dict(needs), tokens)
        nothing = self._states(0, pinned=False)  # a packed micro-batch may hold no rollout
        joined = [torch.cat([nothing, *(self._hidden.pop(number) for number in rollouts)]) for rollouts in needed]
        keep = self._run.learner.heads.rows_of_whole
        return [keep(batch, states) for batch, states in zip(micro_batches, joined, strict=True)]

    def _scored(self, numbers: list[int], rollouts: list[Rollout]) -> dict[int, torch.Tensor]:
        micro_batches = self._run.pack(rollouts, shared=False)
        learner = self._run.learner
        hidden = learner.teacher.hidden_states(micro_batches, self._run.parallel, learner.heads.whole_rows)
        scored: dict[int, torch.Tensor] = {}
        for batch, states in zip(micro_batches, hidden, strict=False):  # none before the last stage
            places, counts = torch.unique_consecutive(batch.rollout_index, return_counts=True)
            scored |= zip((numbers[i] for i in places.tolist()), states.split(counts.tolist()), strict=True)
        return scored

    def _exchange(self, needs: dict[int, list[int]], tokens: dict[int, int]) -> None:
        """Send each rollout's states to the replica that trains on it, and keep none that others train on.

        Args:
            needs: rollouts of each data-parallel rank.
            tokens: response tokens of this rank's.
        """
        parallel = self._run.parallel
        peers, here = dist.get_process_group_ranks(parallel.dp), parallel.dp_rank
        travels, received = [], {}
        for receiver, numbers in sorted(needs.items()):
            for number in numbers:
                sender = self._holder[number]
                if sender == here != receiver:
                    states = self._hidden.pop(number).contiguous()
                    travels.append(dist.isend(states, peers[receiver], parallel.control, tag=number))
                elif receiver == here != sender:
                    states = self._states(tokens[number], pinned=parallel.device.type == "cuda")
                    travels.append(dist.irecv(states, peers[sender], parallel.control, tag=number))
                    received[number] = states
        for travel in travels:
            assert travel is not None  # None is for ranks outside of the group
            travel.wait()
        self._hidden |= received

    def _states(self, tokens: int, *, pinned: bool) -> torch.Tensor:
        """Room for hidden states [tokens, h]."""
        head = self._run.learner.teacher.head
        assert head is not None  # the last stage
        return torch.empty(tokens, head.shape[1], dtype=head.dtype, device="cpu", pin_memory=pinned)


def _model_parallel_group(parallel: ParallelContext, timeout: timedelta) -> ProcessGroup:
    """The ranks that hold one copy of the models and share its micro-batches, over gloo: their grades are objects.
    Collective over all ranks."""
    replicas = [0] * parallel.world_size
    dist.all_gather_object(replicas, parallel.dp_rank, group=parallel.control)
    own: ProcessGroup | None = None
    for replica in range(parallel.dp_size):
        ranks = [rank for rank, its_replica in enumerate(replicas) if its_replica == replica]
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        own = group if parallel.rank in ranks else own
    assert own is not None
    return own
