"""Real ranks over gloo: sharing the work changes no rollout, and every rank grades alike."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_sead.grading.grader import Grader
from megatron_sead.rollouts.engine import GenerationRequest, Sampling
from megatron_sead.rollouts.records import read_records, write_records
from megatron_sead.rollouts.transformers_engine import TransformersEngine

REQUESTS = [GenerationRequest(str(i), i % 2, tuple(range(4, 7 + i % 5))) for i in range(11)]
RANKS = 2


def make_engine(directory: Path, group: dist.ProcessGroup | None) -> TransformersEngine:
    sampling = Sampling(1.0, 0.9, 12)
    return TransformersEngine(
        directory, sampling=sampling, stop_token_ids=(1, 3), pad_token_id=0, seed=3, batch_size=4, group=group
    )


def work(rank: int, directory: Path, results: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{results / 'meet'}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    group = dist.group.WORLD
    write_records(results / f"rank-{rank}.jsonl", make_engine(directory, group).generate(REQUESTS, step=1))
    with Grader() as grader:
        verdicts = grader.grade_all([r"\boxed{\frac12}", "2", "3"], [["0.5"], ["2"], ["4"]], group)
    (results / f"verdicts-{rank}").write_text(str(verdicts))
    dist.destroy_process_group()


def test_the_number_of_ranks_changes_nothing(tiny_olmo3: Path, tmp_path: Path) -> None:
    mp.spawn(work, (tiny_olmo3, tmp_path), nprocs=RANKS)
    alone = make_engine(tiny_olmo3, None).generate(REQUESTS, step=1)
    for rank in range(RANKS):
        together = read_records(tmp_path / f"rank-{rank}.jsonl")
        assert [(r.prompt_id, r.sample, r.response_token_ids, r.finished) for r in together] == [
            (r.prompt_id, r.sample, r.response_token_ids, r.finished) for r in alone
        ]
        assert (tmp_path / f"verdicts-{rank}").read_text() == "[True, True, False]"
