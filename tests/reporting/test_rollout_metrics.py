"""What is said of a step's rollouts, for four of which all is different."""

from __future__ import annotations

from megatron_sead.reporting.rollout_metrics import ROLLOUT_METRICS, Written


def test_each_metric_of_four_rollouts() -> None:
    written = Written(
        correct=[True, True, False, False],
        finished=[True, False, True, False],
        repeated=[False, True, False, False],
        lengths=[1, 2, 3, 10],
    )
    assert {measured.metric.name: measured.value(written) for measured in ROLLOUT_METRICS} == {
        "pass_rate": 0.5,
        "finished_share": 0.5,
        "truncated_share": 0.5,
        "repetition_share": 0.25,
        "pass_rate_given_finish": 0.5,
        "response_length": 4.0,
    }


def test_none_that_finished_is_no_division_by_zero() -> None:
    written = Written(correct=[True], finished=[False], repeated=[False], lengths=[5])
    values = {measured.metric.name: measured.value(written) for measured in ROLLOUT_METRICS}
    assert (values["pass_rate_given_finish"], values["truncated_share"]) == (0.0, 1.0)
