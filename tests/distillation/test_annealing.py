"""alpha(u), and u from competence."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sead.distillation import CompetenceTracker, annealing_coefficient


@pytest.mark.parametrize(
    ("shape", "values"),
    [
        ("cosine", [0.8, 0.8 * (2 + 2**0.5) / 4, 0.4, 0.0]),
        ("linear", [0.8, 0.6, 0.4, 0.0]),
        ("constant", [0.8, 0.8, 0.8, 0.8]),
    ],
)
def test_shapes(shape: str, values: list[float]) -> None:
    found = [annealing_coefficient(u, shape=shape) for u in (0, 0.25, 0.5, 1)]
    assert found == pytest.approx(values, abs=1e-15)


def test_ends_are_where_they_are_put() -> None:
    assert [annealing_coefficient(u, start=0.9, end=0.3) for u in (-1, 0, 1, 7)] == pytest.approx([0.9, 0.9, 0.3, 0.3])


def test_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape='step': must be one of cosine, linear, constant"):
        annealing_coefficient(0.5, shape="step")


@given(st.lists(st.floats(0, 1), max_size=30))
def test_competence_never_falls(pass_rates: list[float]) -> None:
    tracker, last = CompetenceTracker(target=0.6, smoothing=0.5), 0.0
    for pass_rate in pass_rates:
        tracker.update(pass_rate)
        assert 0 <= tracker.u <= 1 and tracker.u >= last
        last = tracker.u


def test_competence_scales_from_start_to_target() -> None:
    tracker = CompetenceTracker(target=0.7, smoothing=0.5)
    assert tracker.value == 0 and tracker.u == 0
    seen = []
    for pass_rate in (0.3, 0.5, 0.1, 1.0, 1.0):
        tracker.update(pass_rate)
        seen.append((round(tracker.value, 6), round(tracker.u, 6)))
    assert seen == [(0.3, 0), (0.4, 0.25), (0.25, 0.25), (0.625, 0.8125), (0.8125, 1.0)]


def test_competence_resumes() -> None:
    whole, first, second = (CompetenceTracker(smoothing=0.8) for _ in range(3))
    rates = [0.2, 0.6, 0.1, 0.7, 0.5]
    for rate in rates:
        whole.update(rate)
    for rate in rates[:2]:
        first.update(rate)
    second.load_state_dict(first.state_dict())
    for rate in rates[2:]:
        second.update(rate)
    assert second.state_dict() == whole.state_dict() and second.u == whole.u


def test_a_student_that_starts_above_the_target_is_done() -> None:
    tracker = CompetenceTracker(target=0.5)
    tracker.update(0.5)
    assert tracker.u == 1


@pytest.mark.parametrize("values", [{"target": 0}, {"target": 1.1}, {"smoothing": 1.0}, {"smoothing": -0.1}])
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CompetenceTracker(**values)
