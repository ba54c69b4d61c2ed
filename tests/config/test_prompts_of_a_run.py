"""A step's prompts, held-out prompts, and a run that is to go on: told by the settings that would mend them."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sead.config.checks import check_batch, check_output
from megatron_sead.config.run import dump_config
from megatron_sead.errors import UserError
from megatron_sead.files.outputs import whole_directory
from tests.config.test_run import config


def test_a_finished_run_is_continued_as_a_new_one_from_its_student(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(config(f"output={tmp_path}")))
    with whole_directory(tmp_path / "student-hf", inputs=[], overwrite=False) as folder:
        (folder / "config.json").write_text("{}")
    longer = config(f"output={tmp_path}", "training.steps=30")
    with pytest.raises(UserError, match=rf"training.steps is 10 .* 30 here: it is finished.*={tmp_path}/student-hf"):
        check_output(longer)


@pytest.mark.parametrize(
    ("overrides", "prompts", "told"),
    [
        ([], [0.5] * 8, ""),
        (
            [],
            [None] * 7,
            r"global_batch_size=8: a step asks 8 .*samples_per_prompt=1.*has 7; must be at most 7",
        ),
        (["rollouts.samples_per_prompt=2"], [0.5] * 4, ""),
        (["rollouts.samples_per_prompt=2"], [0.5] * 3, "a step asks 4 different prompts .* has 3; must be at most 6"),
        (["curriculum.drop_unsolved=true"], [0.5] * 6 + [1.0] * 4, r"has 6, 4 more never solved \(curriculum.drop"),
    ],
)
def test_a_step_needs_as_many_prompts_as_it_asks(overrides: list[str], prompts: list[float | None], told: str) -> None:
    if not told:
        check_batch(config(*overrides), prompts)
        return
    with pytest.raises(UserError, match=told):
        check_batch(config(*overrides), prompts)


def test_held_out_prompts_have_the_fields_of_prompts_unless_they_have_their_own() -> None:
    assert config().evaluation.prompts(config().prompts) is None
    named = config("evaluation.path=held.jsonl", "evaluation.answer_field=solution", "prompts.prompt_field=question")
    heldout = named.evaluation.prompts(named.prompts)
    assert heldout is not None
    assert (heldout.path, heldout.prompt_field, heldout.answer_field) == ("held.jsonl", "question", "solution")
    assert named.prompts.answer_field == "answer"


def test_held_out_prompts_have_a_subset_and_an_instruction_of_their_own() -> None:
    """A subset is that of one data set; an instruction holds for both until another is named."""
    given = ["prompts.path=org/train", "prompts.subset=en", "prompts.instruction=Go."]
    other = config(*given, "evaluation.path=org/test").evaluation.prompts(config(*given).prompts)
    assert other is not None and (other.subset, other.instruction) == (None, "Go.")
    same = config(*given, "evaluation.path=org/train", "evaluation.split=test")
    asked = same.evaluation.prompts(same.prompts)
    assert asked is not None and (asked.subset, asked.split) == ("en", "test")
    own = config(*given, "evaluation.path=org/test", "evaluation.subset=main", "evaluation.instruction=Stop.")
    asked = own.evaluation.prompts(own.prompts)
    assert asked is not None and (asked.subset, asked.instruction) == ("main", "Stop.")
