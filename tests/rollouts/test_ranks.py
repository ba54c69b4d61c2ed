"""Real ranks over gloo: sharing the work changes no rollout, and every rank grades alike."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from megatron_sead.grading.grader import Grader
from megatron_sead.rollouts.engine import GenerationRequest, Sampling
from megatron_sead.rollouts.records import read_records, write_records
from megatron_sead.rollouts.transformers_engine import TransformersEngine
from tests.distributed.ranks import RankPools

REQUESTS = [GenerationRequest(str(i), i % 2, tuple(range(4, 7 + i % 5))) for i in range(11)]
RANKS = 2


ASKED = {1: REQUESTS, 2: REQUESTS[:1]}  # by step: more than ranks, and fewer


def make_engine(directory: Path, group: dist.ProcessGroup | None) -> TransformersEngine:
    sampling = Sampling(1.0, 0.9, 12)
    return TransformersEngine(
        directory, sampling=sampling, stop_token_ids=(1, 3), pad_token_id=0, seed=3, batch_size=4, group=group
    )


def work(directory: Path, results: Path) -> list[bool | None]:
    group = dist.group.WORLD
    engine = make_engine(directory, group)
    for step, asked in ASKED.items():
        write_records(results / f"rank-{dist.get_rank()}-{step}.jsonl", engine.generate(asked, step))
    with Grader() as grader:
        return grader.grade_all([r"\boxed{\frac12}", "2", "3"], [["0.5"], ["2"], ["4"]], group)


def test_the_number_of_ranks_changes_nothing(pools: RankPools, tiny_olmo3: Path, tmp_path: Path) -> None:
    assert pools.of(RANKS).run(work, tiny_olmo3, tmp_path) == [[True, True, False]] * RANKS
    engine = make_engine(tiny_olmo3, None)
    for step, asked in ASKED.items():
        alone = engine.generate(asked, step)
        for rank in range(RANKS):
            together = read_records(tmp_path / f"rank-{rank}-{step}.jsonl")
            assert [(r.prompt_id, r.sample, r.response_token_ids, r.finished) for r in together] == [
                (r.prompt_id, r.sample, r.response_token_ids, r.finished) for r in alone
            ]
