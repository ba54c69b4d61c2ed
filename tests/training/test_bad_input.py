"""A user's mistake stops a run with one line that names it; what was written before is as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sead.config.run import load_config
from megatron_sead.errors import UserError
from megatron_sead.training.setup import _telling_all_mistakes
from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT, train_tiny

TINY = ROOT / "examples" / "tiny"
FAST = ["training.steps=2", "training.lr_warmup_steps=0", "training.global_batch_size=8"]


def refusal(pools: RankPools, output: Path, *overrides: str) -> str:
    """The UserError that ends a run on one rank."""
    with pytest.raises(AssertionError) as caught:
        train_tiny(pools, 1, output, [*FAST, *overrides])
    last = str(caught.value).strip().splitlines()[-1]
    assert last.startswith(("megatron_sead.errors.UserError: ", "megatron_sead.errors.NotFiniteNumbers: ")), last
    return last.partition(": ")[2]


def student(tmp_path: Path, change: Any) -> str:
    """A copy of the student whose tensors `change` has changed."""
    directory = tmp_path / "student"
    shutil.copytree(TINY / "student", directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return f"student.path={directory}"


UP = "model.layers.1.mlp.up_proj.weight"
WEIGHTS = {
    "missing": (lambda t: t.pop(UP), f"tensors are missing: {UP}"),
    "shape": (lambda t: t.update({UP: t[UP][:-2].contiguous()}), f"{UP} has shape [126, 64]"),
    "unknown": (lambda t: t.update({"bogus": torch.zeros(1)}), "does not call for: bogus"),
    "not a number": (lambda t: t[UP].fill_(float("nan")), "holds weights that are NaN or infinite"),
    "not a number where no prompt looks": (
        lambda t: t["model.embed_tokens.weight"][300, 5:6].fill_(float("inf")),
        "holds weights that are NaN or infinite; copy or download it again",
    ),
    "out of range together": (lambda t: t["lm_head.weight"].fill_(3e38), "token 0 (of 95)"),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_wrong_weights(pools: RankPools, tmp_path: Path, case: str) -> None:
    change, told = WEIGHTS[case]
    assert told in refusal(pools, tmp_path / "run", student(tmp_path, change))
    assert not (tmp_path / "run").exists()


def test_truncated_weights(pools: RankPools, tmp_path: Path) -> None:
    setting = student(tmp_path, lambda tensors: None)
    file = tmp_path / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "not a whole safetensors file" in refusal(pools, tmp_path / "run", setting)


def prompt_lines() -> list[str]:
    return (TINY / "prompts.jsonl").read_text().splitlines()[:64]


PROMPTS = {
    "empty": ([], "holds no prompts"),
    "malformed": ([*prompt_lines(), '{"prompt": "1+'], "line 65: not valid JSON"),
    "twice": ([*prompt_lines(), prompt_lines()[0]], "line 65: id"),
    "half of a character": (
        [*prompt_lines(), json.dumps({"id": "\ud83d"})],
        "line 65: field 'id' holds \\ud83d, half of",
    ),
    "no difficulty": ([*prompt_lines(), '{"prompt": "1+1=", "answer": 2}'], "line 65: has no 'difficulty', which the"),
    "too few": (prompt_lines()[:7], "training.global_batch_size=8: a step asks 8 different prompts (rollouts.samples"),
    "too long": (
        [*prompt_lines(), json.dumps(json.loads(prompt_lines()[0]) | {"id": "x", "prompt": "1+" * 400})],
        "tokens, which leaves no room for 40 new ones (rollouts.max_new_tokens) in the student's context of",
    ),
}


@pytest.mark.parametrize("case", PROMPTS)
def test_wrong_prompts(pools: RankPools, tmp_path: Path, case: str) -> None:
    lines, told = PROMPTS[case]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    assert told in refusal(pools, tmp_path / "run", f"prompts.path={path}")


def test_all_that_is_wrong_with_files_is_told_at_once(pools: RankPools, tmp_path: Path) -> None:
    for name in ("prompts", "held"):
        (tmp_path / f"{name}.jsonl").write_text('{"prompt": "1+1="}\n' * 2)
    weights = student(tmp_path, lambda tensors: None)
    file = tmp_path / "student" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    files = [
        f"{setting}.path={tmp_path / name}.jsonl" for setting, name in (("prompts", "prompts"), ("evaluation", "held"))
    ]
    with pytest.raises(AssertionError) as caught:
        train_tiny(pools, 1, tmp_path / "run", [*FAST, weights, *files])
    told = str(caught.value)
    for mistake in (
        "prompts.jsonl, line 1: has no 'answer'",
        "held.jsonl, line 1: has no 'answer'",
        "not a whole safetensors",
    ):
        assert told.rpartition("UserError: ")[2].count(mistake) == 1


def test_a_layout_that_does_not_divide_a_model_is_told_once() -> None:
    layout = ["parallel.pipeline_model_parallel_size=2", "parallel.first_stage_layers=4"]
    models = [f"{role}.path={TINY / role}" for role in ("student", "teacher")]
    config = load_config(ROOT / "examples/configs/sead_tiny.yaml", [*layout, *models])
    with pytest.raises(UserError) as caught, _telling_all_mistakes(config, 4):
        raise UserError("parallel.first_stage_layers=4: leaves 0 of the 4 layers of a file\nanother mistake")
    first, second = str(caught.value).splitlines()
    assert first == "another mistake"
    assert second.startswith("parallel.first_stage_layers=4: leaves 0 of the 4 layers of student.path=")


def test_wrong_held_out_prompts(pools: RankPools, tmp_path: Path) -> None:
    """The file is told by its own setting; difficulty is not asked of it."""
    path = tmp_path / "held.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": 2}\n{"prompt": "1+2=", "answer": NaN}\n')
    setting = f"evaluation.path={path}"
    assert "held.jsonl, line 2: 'answer' holds no answer but nan" in refusal(pools, tmp_path / "run", setting)
    fields = ["evaluation.prompt_field=problem", "evaluation.answer_field=solution"]
    told = refusal(pools, tmp_path / "run", setting, *fields)
    assert "line 1: has no 'problem', which evaluation.prompt_field names" in told
    path.write_text("")
    assert refusal(pools, tmp_path / "run", setting).startswith(f"{setting}: holds no prompts")


@pytest.fixture(scope="module")
def recorded(pools: RankPools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("recorded") / "run"
    train_tiny(pools, 1, output, FAST)
    return output


RECORDS = {
    "another prompt": ({"prompt_id": "nobody's"}, 'answers prompt "nobody\'s"'),
    "another vocabulary": ({"response_token_ids": [307], "log_probs": [0.0]}, "line 1: holds a token outside"),
    "no response": ({"response_token_ids": [], "log_probs": []}, "line 1: not a rollout"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_edited_rollouts(pools: RankPools, recorded: Path, tmp_path: Path, case: str) -> None:
    change, told = RECORDS[case]
    folder = shutil.copytree(recorded / "rollouts", tmp_path / "rollouts")
    first, *rest = (folder / "step-0.jsonl").read_text().splitlines()
    edited = json.dumps(json.loads(first) | change)
    (folder / "step-0.jsonl").write_text("".join(line + "\n" for line in [edited, *rest]))
    assert told in refusal(pools, tmp_path / "run", "rollouts.engine=replay", f"rollouts.path={folder}")


def test_rollouts_that_micro_batches_cannot_share(pools: RankPools, recorded: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(recorded / "rollouts", tmp_path / "rollouts")
    lines = (folder / "step-0.jsonl").read_text().splitlines(keepends=True)
    (folder / "step-0.jsonl").write_text("".join(lines[:-1]))
    told = refusal(pools, tmp_path / "run", "rollouts.engine=replay", f"rollouts.path={folder}")
    assert "7 rollouts cannot be shared" in told


def test_the_directory_of_another_run_stays_as_it_is(pools: RankPools, recorded: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in recorded.rglob("*")}
    assert "training.lr is 0.001 there and 0.5 here" in refusal(pools, recorded, "training.lr=0.5")
    assert {path: path.stat().st_mtime_ns for path in recorded.rglob("*")} == before
