"""Scores of tokens that ranks share: what one rank finds of them, all know. Right values: test_layouts."""

from __future__ import annotations

import torch

from tests.distributed.ranks import RankPools


def score_with_nan_on(rank: int | None) -> str | list[float]:
    """On a rank: log-probabilities of six response tokens that two ranks share, or why there are none."""
    from megatron_sead.config.run import ParallelSettings
    from megatron_sead.distillation import NotFiniteError
    from megatron_sead.parallel.groups import destroy_parallel, initialize_parallel
    from megatron_sead.prompts.packing import pack
    from megatron_sead.training.scoring import Heads

    parallel = initialize_parallel(ParallelSettings(context_parallel_size=2), "cpu", seed=0)
    (batch,) = pack(
        [(1, 2)],
        [(1, 2)],
        [(3, 4, 5, 6, 7, 8)],
        [True],
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        length_multiple=4,
        pad_token_id=0,
        device=parallel.device,
        share=parallel.share,
    )
    generator = torch.Generator().manual_seed(0)
    student, teacher, states = (torch.randn(n, 4, generator=generator) for n in (10, 10, 6))
    heads = Heads(student, teacher, (0,), (0,), 10, 2**20, None, False, parallel.cp)
    hidden = states[batch.student.own]
    if parallel.rank == rank:
        hidden[0] = torch.nan
    try:
        return heads.score(hidden, states[batch.student.own], batch).student_log_prob.tolist()
    except NotFiniteError as error:
        return str(error)
    finally:
        destroy_parallel(keep_world=True)


def test_logits_that_are_not_finite_are_told_on_every_rank_that_shares_the_sequence(pools: RankPools) -> None:
    first, second = pools.of(2).run(score_with_nan_on, None)
    assert first == second and len(first) == 6 and all(value < 0 for value in first)  # type: ignore[operator]
    told = pools.of(2).run(score_with_nan_on, 1)
    assert told[0] == "logits of another context-parallel rank are not finite"
    assert "student" in told[1]
