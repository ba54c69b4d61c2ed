"""Properties that statistics have whatever the logits, and what is refused. One process; ranks are in another file."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sead.distillation import linear_token_scores, token_statistics, vocab_parallel_entropy
from megatron_sead.distillation.kernels import eager, formulas
from megatron_sead.distillation.partial_sums import matrices, pair_sums, vocabulary_shard
from tests.distillation.reference import pad, reference, relative_error

FIELDS = ("student_entropy", "teacher_entropy", "forward_kl", "reverse_kl")


def logits(seed: int, tokens: int, columns: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)) * scale


seeds = st.integers(0, 2**31)
sizes = st.integers(1, 700)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, columns=sizes, shift=st.floats(-1000, 1000), other_shift=st.floats(-1000, 1000))
def test_a_constant_added_to_logits_changes_nothing(seed: int, columns: int, shift: float, other_shift: float) -> None:
    student, teacher = logits(seed, 3, columns), logits(seed + 1, 3, columns)
    moved = student + shift, teacher + other_shift
    # compared with the moved logits in fp64: fp32 has rounded them. A divergence of nearly zero may be what is left
    # of terms of several nats, each good to 1e-7 of its size
    expected, found = vars(reference(*moved)), token_statistics(*moved)
    for name in FIELDS:
        torch.testing.assert_close(getattr(found, name).double(), expected[name], rtol=2e-6, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, order=st.permutations(range(7)))
def test_tokens_do_not_know_each_other(seed: int, order: list[int]) -> None:
    student, teacher = logits(seed, 7, 300), logits(seed + 1, 7, 300)
    found, permuted = token_statistics(student, teacher), token_statistics(student[order], teacher[order])
    for name, value in vars(found).items():
        assert torch.equal(value[order], getattr(permuted, name))


@settings(max_examples=30, deadline=None)
@given(seed=seeds, columns=sizes)
def test_equal_models_do_not_diverge(seed: int, columns: int) -> None:
    student = logits(seed, 3, columns)
    found = token_statistics(student, student.clone())
    assert not found.forward_kl.any() and not found.reverse_kl.any() and found.same_argmax.all()
    assert torch.equal(found.student_entropy, found.teacher_entropy)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, columns=sizes, scale=st.floats(0, 1e4))
def test_bounds(seed: int, columns: int, scale: float) -> None:
    found = token_statistics(logits(seed, 3, columns, scale), logits(seed + 1, 3, columns, scale))
    limit = torch.tensor(float(columns)).log() * (1 + 1e-6)
    assert (found.student_entropy <= limit).all() and (found.teacher_entropy <= limit).all()
    for name in FIELDS:
        assert getattr(found, name).isfinite().all() and (getattr(found, name) >= 0).all()


def test_models_that_nearly_agree_over_a_whole_vocabulary() -> None:
    """Divergences of 5e-9 have the rounding of numbers near 1, not of ln V: 2e-7 is twice 2^-23, 1e-6 that of ln V."""
    student = logits(0, 32, 100_352, 0.01)
    teacher = student + logits(1, 32, 100_352, 1e-4)
    expected, found = reference(student, teacher), token_statistics(student, teacher)
    for name in ("forward_kl", "reverse_kl"):
        assert (getattr(found, name) - getattr(expected, name)).abs().max() < 2e-7


@settings(max_examples=30, deadline=None)
@given(seed=seeds, columns=st.integers(2, 500), data=st.data())
def test_a_split_of_the_vocabulary_changes_nothing(seed: int, columns: int, data: st.DataObject) -> None:
    """What ranks do to each other's sums, without ranks: shards of any sizes, moved to common maxima and added."""
    student, teacher = logits(seed, 4, columns), logits(seed + 1, 4, columns)
    cut = data.draw(st.integers(1, columns - 1))
    whole = pair_sums(student, teacher, vocabulary_shard(columns, None, None))
    parts = [
        pair_sums(student[:, part], teacher[:, part], vocabulary_shard(student[:, part].shape[1], None, None))
        for part in (slice(cut), slice(cut, None))
    ]
    maxima = torch.maximum(parts[0].maxima, parts[1].maxima)
    together = sum(formulas.move_sums(part.sums, part.maxima, maxima) for part in parts)
    torch.testing.assert_close(together, whole.sums, rtol=2e-6, atol=5e-5)  # E, F: terms of hundreds may cancel


@settings(max_examples=40, deadline=None)
@given(seed=seeds, columns=sizes, levels=st.integers(1, 50))
def test_argmax_is_the_first_of_the_greatest(seed: int, columns: int, levels: int) -> None:
    rows = torch.randint(levels, (5, columns), generator=torch.Generator().manual_seed(seed)).float()
    column = formulas.columns_of(rows, rows.amax(-1, keepdim=True))
    assert column.tolist() == [row.index(max(row)) for row in rows.tolist()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sums_are_wide_whatever_the_type_of_the_logits(dtype: torch.dtype) -> None:
    student, teacher = logits(0, 5, 40_000).to(dtype), logits(1, 5, 40_000).to(dtype)
    expected, found = vars(reference(student, teacher)), token_statistics(student, teacher)
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.float32
        assert relative_error(getattr(found, name), expected[name]) < 1e-6
    assert relative_error(vocab_parallel_entropy(student), expected["student_entropy"]) < 1e-6


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_block_size_changes_nothing(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = logits(0, 23, 900), logits(1, 23, 900)
    expected = token_statistics(student, teacher)
    monkeypatch.setattr(eager, "BLOCK_ELEMENTS", rows * 900)
    for name, value in vars(token_statistics(student, teacher)).items():
        assert torch.equal(value, getattr(expected, name))


def test_rows_are_walked_in_place_whatever_the_strides() -> None:
    tensor = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    for strided in (tensor, tensor.transpose(0, 1), tensor.transpose(0, 2), tensor[:, :, ::2], tensor[..., :3]):
        seen = torch.full((strided.shape[:-1].numel(), strided.shape[-1]), -1)
        for place, (rows,) in matrices(strided):
            assert rows.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
            seen[place] = rows
        assert torch.equal(seen, strided.reshape(-1, strided.shape[-1]))


def test_transposed_logits() -> None:
    student, teacher = logits(0, 12, 50).view(3, 4, 50), logits(1, 12, 50).view(3, 4, 50)
    expected = token_statistics(student, teacher)
    found = token_statistics(student.transpose(0, 1), teacher.transpose(0, 1))
    for name, value in vars(found).items():
        assert torch.equal(value, getattr(expected, name).t())


def test_one_token_and_none() -> None:
    assert token_statistics(torch.randn(9), torch.randn(9)).forward_kl.shape == ()
    empty = token_statistics(torch.randn(2, 0, 9), torch.randn(2, 0, 9))
    assert empty.forward_kl.shape == (2, 0) and empty.same_argmax.dtype == torch.bool
    hidden, head = torch.randn(0, 4), torch.randn(9, 4)
    scores = linear_token_scores(
        hidden,
        head,
        hidden,
        head,
        torch.zeros(0, dtype=torch.int64),
        student_stop_token_ids=(1,),
        teacher_stop_token_ids=(),
    )
    assert scores.student_log_prob.shape == (0,)


def test_scores_do_not_depend_on_the_chunks() -> None:
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(11, 8), torch.randn(70, 8), torch.randint(0, 61, (11,))
    results = [
        linear_token_scores(
            hidden,
            pad(head[:61], 70, 0),
            hidden * 0.5,
            pad(head[:61], 70, 0),
            targets,
            student_stop_token_ids=(4, 60),
            teacher_stop_token_ids=(),
            vocab_size=61,
            scratch_bytes=scratch_bytes,
        )
        for scratch_bytes in (1, 3000, 2**20)
    ]
    for found in results[1:]:
        # a matrix product of other sizes sums in another order
        torch.testing.assert_close(found.student_log_prob, results[0].student_log_prob, rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(vars(found.statistics), vars(results[0].statistics), rtol=2e-6, atol=2e-6)
    assert not results[0].teacher_stop_probability.any()


def test_tokens_without_a_target_are_not_scored() -> None:
    torch.manual_seed(0)
    hidden, head, targets = torch.randn(6, 8), torch.randn(70, 8), torch.randint(0, 70, (6,))
    some = torch.where(torch.arange(6) % 2 == 0, targets, -1)
    hidden_with_junk = hidden.clone()
    hidden_with_junk[1::2] = torch.nan
    stops = {"student_stop_token_ids": (4,), "teacher_stop_token_ids": (5,)}
    expected = linear_token_scores(hidden, head, hidden * 0.5, head, targets, **stops)
    found = linear_token_scores(hidden_with_junk, head, hidden * 0.5, head, some, **stops)
    for name, value in (vars(found) | vars(found.statistics)).items():
        if name != "statistics":
            whole = vars(expected) | vars(expected.statistics)
            torch.testing.assert_close(value[::2], whole[name][::2], rtol=2e-6, atol=2e-6)
            assert name == "same_argmax" or not value[1::2].any(), name


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ([0.0, torch.nan], [0.0, 0.0], "student logits of token 4 (of 6)"),
        ([0.0, 0.0], [torch.nan, 0.0], "teacher logits of token 4 (of 6)"),
        ([torch.inf, 0.0], [torch.nan, 0.0], "student and teacher logits of token 4 (of 6)"),
        ([-torch.inf, -torch.inf], [0.0, 0.0], "token 4 (of 6): all its logits are -inf"),
    ],
)
def test_logits_without_a_distribution_are_refused(student: list[float], teacher: list[float], message: str) -> None:
    pair = [torch.zeros(2, 3, 2), torch.zeros(2, 3, 2)]
    pair[0][1, 1], pair[1][1, 1] = torch.tensor(student), torch.tensor(teacher)
    with pytest.raises(ValueError, match=re.escape(message)):
        token_statistics(*pair)
    if "student" in message or "all" in message:
        with pytest.raises(ValueError, match="token 4"):
            vocab_parallel_entropy(pair[0])


@pytest.mark.parametrize(
    ("student", "teacher", "vocab_size", "message"),
    [
        (torch.zeros(2, 5), torch.zeros(3, 5), None, "teacher_logits is [3, 5]"),
        (torch.zeros(2, 5), torch.zeros(2, 5).double(), None, "float64"),
        (torch.zeros(2, 5), torch.zeros(2, 5, device="meta"), None, "meta"),
        (torch.zeros(2, 5).long(), torch.zeros(2, 5).long(), None, "floating point"),
        (torch.tensor(1.0), torch.tensor(1.0), None, "[..., vocabulary]"),
        (torch.zeros(2, 5), torch.zeros(2, 5), 6, "vocab_size=6: must be from 1 to 5"),
        (torch.zeros(2, 5), torch.zeros(2, 5), 0, "vocab_size=0"),
    ],
)
def test_bad_logits_are_refused(
    student: torch.Tensor, teacher: torch.Tensor, vocab_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        token_statistics(student, teacher, vocab_size=vocab_size)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"targets": torch.tensor([0, 9])}, "token 9"),
        ({"targets": torch.zeros(3, dtype=torch.int64)}, "targets is [3]"),
        ({"targets": torch.zeros(2)}, "integers"),
        ({"student_stop_token_ids": (12,)}, "token 12"),
        ({"student_hidden": torch.zeros(2, 5)}, "student_hidden is [2, 5]"),
        ({"student_hidden": torch.zeros(1, 2, 4)}, "must"),
    ],
)
def test_bad_scores_are_refused(changes: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "student_hidden": torch.zeros(2, 4),
        "student_head": torch.zeros(9, 4),
        "teacher_hidden": torch.zeros(2, 4),
        "teacher_head": torch.zeros(9, 4),
        "targets": torch.tensor([0, 8]),
        "student_stop_token_ids": (),
        "teacher_stop_token_ids": (),
    }
    linear_token_scores(**arguments)
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_token_scores(**(arguments | changes))
