"""What is probably not meant is told before the first step."""

from __future__ import annotations

from dataclasses import replace

from megatron_sead.config.run import load_config
from megatron_sead.prompts.dataset import Prompt
from megatron_sead.training.inputs import Inputs
from megatron_sead.training.setup import nothing_to_learn
from tests.training.launching import SHORT, TINY


def test_a_teacher_that_is_the_student_is_told_unless_it_sees_another_prompt() -> None:
    config = load_config(TINY, SHORT)
    prompt = Prompt("0", "1+1=", ("2",), None, None, (1, 2), (1, 2))
    weights = {"lm_head.weight": "crc32 00000001 float32 [2, 2]"}
    same = Inputs({"student": {"weights": weights}, "teacher": {"weights": dict(weights)}}, [], False)
    (line,) = nothing_to_learn(config, same, [prompt])
    assert f"student.path={config.student.path} and teacher.path={config.teacher.path} hold the same weights" in line
    assert nothing_to_learn(config, same, [prompt, replace(prompt, teacher_token_ids=(1, 3))]) == []
    other = Inputs({"student": {"weights": weights}, "teacher": {"weights": {}}}, [], False)
    assert nothing_to_learn(config, other, [prompt]) == []
