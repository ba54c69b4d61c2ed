"""Plans: exact parameter counts, bytes that add up over ranks, layouts and files refused before anything is built."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import ModelSettings, RunConfig, load_config
from megatron_sead.errors import UserError
from megatron_sead.models.hf_config import padded_vocabulary
from megatron_sead.planning.plan import make_plan
from megatron_sead.planning.preflight import check_inputs
from megatron_sead.planning.shapes import read_shape

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes"
GIB = 2**30


def plan_7b(*overrides: str) -> RunConfig:
    shapes = [f"student.path={SHAPES / 'olmo3-7b'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]
    return load_config(ROOT / "examples/configs/sead_7b.yaml", [*shapes, *overrides])


@pytest.mark.parametrize(("name", "parameters"), [("olmo3-7b", 7_298_011_136), ("olmo3-32b", 32_233_522_176)])
def test_parameters_are_those_of_the_released_checkpoints(name: str, parameters: int) -> None:
    assert read_shape(ModelSettings(path=SHAPES / name), "student").parameters == parameters


@pytest.mark.parametrize("size", [(3, 96, 3, 1, 160), (4, 64, 4, 2, 128)], ids=str)
def test_parameters_are_those_that_transformers_makes(size: tuple[int, ...], tmp_path: Path) -> None:
    from transformers import Olmo3Config, Olmo3ForCausalLM

    layers, hidden, heads, kv_heads, ffn = size
    config = Olmo3Config(
        vocab_size=50,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=ffn,
        pad_token_id=0,
        eos_token_id=1,
    )
    config.save_pretrained(tmp_path)
    with torch.device("meta"):
        expected = sum(p.numel() for p in Olmo3ForCausalLM(config).parameters())
    assert read_shape(ModelSettings(path=tmp_path), "student").parameters == expected


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (4, 4), (8, 2), (1, 5)])
def test_ranks_hold_the_model_once_and_replicas_only_of_norms(tp: int, pp: int) -> None:
    shape = read_shape(ModelSettings(path=SHAPES / "olmo3-32b"), "student")
    parallel = ParallelSettings(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp)
    held = tp * sum(shape.rank_parameters(stage, parallel) for stage in range(pp))
    padding = 2 * (padded_vocabulary(shape.vocabulary) - shape.vocabulary) * shape.hidden
    replicas = (tp - 1) * (2 * shape.layers + 1) * shape.hidden
    assert held == shape.parameters + padding + replicas


def test_olmo_vocabulary_is_padded_to_a_size_that_every_power_of_two_divides() -> None:
    assert padded_vocabulary(100_278) == 100_352 == 49 * 2048


def test_a_plan_counts_packed_micro_batches_by_the_longest_rollouts() -> None:
    """18,432 tokens each: 96 rollouts on four data-parallel ranks."""
    assert make_plan(plan_7b("training.micro_batch_tokens=null"), 32).micro_batches == 24
    for budget, expected in ((18432, 24), (36863, 24), (36864, 12)):
        assert make_plan(plan_7b(f"training.micro_batch_tokens={budget}"), 32).micro_batches == expected
    one, two = (make_plan(plan_7b(f"training.micro_batch_tokens={n}"), 32).stages[0] for n in (18432, 36864))
    assert 1.9 < two.activations / one.activations < 2.1
    with pytest.raises(UserError, match=r"training\.micro_batch_tokens=18424: must be at least 18432"):
        make_plan(plan_7b("training.micro_batch_tokens=18424"), 32)


def test_bytes_follow_precision_and_sharding() -> None:
    stage = make_plan(plan_7b(), 32).stages[0]
    assert (stage.weights, stage.gradients) == (2 * stage.parameters, 4 * stage.parameters)
    assert stage.optimizer == 12 * stage.parameters // 4  # over four data-parallel ranks
    whole = make_plan(plan_7b("training.use_distributed_optimizer=false"), 32).stages[0]
    assert whole.optimizer == 12 * stage.parameters
    fp32 = make_plan(plan_7b("training.precision=fp32"), 8).stages[0]
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == tuple(n * stage.parameters for n in (4, 4, 8))
    # An eighth of 18,432 x 5,120 in bf16 are 22.5 MiB, and torch pins powers of two
    assert stage.teacher_hidden_host == 24 * 2**25


def test_stages_differ_by_embedding_head_and_loss() -> None:
    first, middle, last = (
        make_plan(plan_7b("parallel.pipeline_model_parallel_size=4"), 32).stages[i] for i in (0, 1, 3)
    )
    embedding = 100_352 // 8 * 4096
    assert first.parameters - middle.parameters == embedding
    assert last.parameters - middle.parameters == embedding + 4096
    assert first.teacher_hidden_host == middle.teacher_hidden_host == 0 < last.teacher_hidden_host
    assert last.phases["student scores"] - last.resident > 2**28 / 4  # logits
    assert first.activations > middle.activations > last.activations  # micro-batches in flight


def test_a_plan_tells_where_the_layers_are_if_stages_differ() -> None:
    notes = make_plan(plan_7b("parallel.pipeline_model_parallel_size=3"), 24).notes
    assert "student layers by pipeline stage: 11, 12, 9" in notes
    assert "teacher layers by pipeline stage: 21, 21, 22" in notes
    moved = ["parallel.pipeline_model_parallel_size=4", "parallel.last_stage_layers=6"]
    assert "student layers by pipeline stage: 8, 9, 9, 6" in make_plan(plan_7b(*moved), 32).notes


def test_recompute_keeps_less() -> None:
    full, none = (make_plan(plan_7b(f"training.recompute_granularity={g}"), 32).stages[0] for g in ("full", "null"))
    assert full.activations < 2 * GIB < none.activations


@pytest.mark.parametrize(
    ("overrides", "world_size", "parts"),
    [
        (
            ["parallel.tensor_model_parallel_size=16"],
            32,
            ["40 attention heads of teacher.path=", "1, 2, 4, 8"],
        ),
        (
            ["parallel.pipeline_model_parallel_size=33"],
            264,
            ["pipeline_model_parallel_size=33: 33 stages for the 32 layers of student.path="],
        ),
        (
            ["parallel.pipeline_model_parallel_size=4", "parallel.virtual_pipeline_model_parallel_size=9"],
            32,
            ["=4 x virtual_pipeline_model_parallel_size=9: 36 stages", "32 layers"],
        ),
        (["rollouts.max_new_tokens=65536"], 32, ["rollouts.max_new_tokens=65536", "65536"]),
        ([], 20, ["20 ranks"]),
        (["training.micro_batch_tokens=null"], 40, ["global_batch_size=96", "multiple of 5"]),
    ],
)
def test_a_layout_that_does_not_fit_is_refused(overrides: list[str], world_size: int, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        make_plan(plan_7b(*overrides), world_size)
    assert all(part in str(caught.value) for part in parts), caught.value


def test_a_plan_tells_all_that_does_not_fit(tmp_path: Path) -> None:
    config = plan_7b("parallel.tensor_model_parallel_size=3", "parallel.pipeline_model_parallel_size=33")
    config.teacher.path = tmp_path / "missing"
    config.rollouts.max_new_tokens = 10**6
    config.training.micro_batch_tokens = None
    with pytest.raises(UserError) as caught:
        make_plan(config, 32)
    assert [line.partition("=")[0].partition(": ")[0] for line in str(caught.value).splitlines()] == [
        "32 ranks",
        "parallel.tensor_model_parallel_size",
        "parallel.pipeline_model_parallel_size",
        "teacher.path",
        "rollouts.max_new_tokens",
    ]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model_type": "olmo_hybrid"}, "model_type='olmo_hybrid' is not supported"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"vocab_size": 100_000}, "vocab_size is 100000 in"),
    ],
)
def test_a_foreign_model_is_refused(change: dict[str, Any], part: str, tmp_path: Path) -> None:
    values = json.loads((SHAPES / "olmo3-7b" / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(UserError, match=part):
        make_plan(plan_7b(f"student.path={tmp_path}"), 32)


@pytest.fixture
def run_inputs(tmp_path: Path) -> Path:
    """All files of a run, whole: two models with the same tokenizer, and prompts."""
    tokenizer = {
        "model": {"vocab": {"a": 0, "b": 1}, "merges": ["a b"]},
        "added_tokens": [{"id": 2, "content": "<eos>"}],
    }
    for role in ("student", "teacher"):
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text((SHAPES / "olmo3-7b" / "config.json").read_text())
        (tmp_path / role / "tokenizer.json").write_text(json.dumps(tokenizer))
        save_file({"weight": torch.zeros(4, 4)}, tmp_path / role / "model.safetensors")
    rows = [{"prompt": f"{i}+1=", "answer": f"{i + 1}", "difficulty": 0.5} for i in range(96)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def inputs_config(folder: Path, *overrides: str) -> RunConfig:
    paths = [f"student.path={folder / 'student'}", f"teacher.path={folder / 'teacher'}"]
    paths += [f"prompts.path={folder / 'prompts.jsonl'}", f"output={folder / 'run'}"]
    return plan_7b(*paths, "rollouts.engine=transformers", *overrides)


def test_whole_inputs_pass(run_inputs: Path) -> None:
    assert check_inputs(inputs_config(run_inputs)) == []


def test_an_engine_that_is_not_there_is_a_mistake_of_a_run_and_a_note_of_a_plan(
    run_inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sead.config.rollouts._installed", lambda package: None)
    config = inputs_config(run_inputs, "rollouts.engine=vllm")
    with pytest.raises(UserError, match=r"^rollouts\.engine='vllm': vllm is not installed here"):
        check_inputs(config)
    assert check_inputs(config, weights_may_come_later=True) == []
    assert any("vllm is not installed here" in note for note in make_plan(config, 32).notes)


def test_a_model_that_is_not_there_is_told_once(run_inputs: Path) -> None:
    shutil.rmtree(run_inputs / "student")
    with pytest.raises(UserError, match=r"^student.path=.*/student: no such directory; it is to hold") as caught:
        check_inputs(inputs_config(run_inputs))
    assert "\n" not in str(caught.value)


def test_the_same_tokenizer_written_by_another_version_passes(run_inputs: Path) -> None:
    file = run_inputs / "teacher" / "tokenizer.json"
    values = json.loads(file.read_text())
    values["model"] = {"vocab": values["model"]["vocab"] | {"<eos>": 2}, "merges": [["a", "b"]]}
    file.write_text(json.dumps(values))
    assert check_inputs(inputs_config(run_inputs)) == []


def truncate(path: Path, size: int) -> None:
    with path.open("r+b") as stream:
        stream.truncate(size)


def damage(folder: Path, what: str) -> None:
    student, prompts = folder / "student", folder / "prompts.jsonl"
    match what:
        case "truncated weights":
            truncate(student / "model.safetensors", (student / "model.safetensors").stat().st_size - 3)
        case "truncated header":
            truncate(student / "model.safetensors", 20)
        case "missing weights":
            (student / "model.safetensors").unlink()
        case "missing shard":
            (student / "model.safetensors").rename(student / "model-1.safetensors")
            index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
            (student / "model.safetensors.index.json").write_text(json.dumps(index))
        case "another embedding":
            save_file({"model.embed_tokens.weight": torch.zeros(4, 4)}, student / "model.safetensors")
        case "no tokenizer":
            (student / "tokenizer.json").unlink()
        case "other tokenizer":
            text = (student / "tokenizer.json").read_text()
            (student / "tokenizer.json").write_text(text.replace('"b": 1', '"c": 1'))
        case "other merges":
            text = (student / "tokenizer.json").read_text()
            (student / "tokenizer.json").write_text(text.replace('"a b"', '"b a"'))
        case "empty prompts":
            prompts.write_text("\n")
        case "malformed prompt":
            prompts.write_text(prompts.read_text() + '{"prompt": \n')
        case "binary prompts":
            prompts.write_bytes(b"\xff\xfe")
        case "no answer":
            prompts.write_text('{"prompt": "1+1="}\n')
        case "no difficulty":
            prompts.write_text('{"prompt": "1+1=", "answer": "2"}\n')
        case "no prompts":
            prompts.unlink()


@pytest.mark.parametrize(
    ("what", "part"),
    [
        ("truncated weights", r"student/model.safetensors: not a whole .*truncated: \d+ bytes, its header says \d+"),
        ("truncated header", r"student/model.safetensors: not a whole safetensors file \(truncated"),
        ("missing weights", "student.path=.*: holds neither model.safetensors nor"),
        ("missing shard", "student.path=.*: model-2.safetensors not found"),
        ("another embedding", "model.safetensors: model.embed_tokens.weight has 4 rows; vocab_size .* is 100278"),
        ("no tokenizer", "student.path=.*: no tokenizer"),
        ("other tokenizer", "different tokenizers"),
        ("other merges", "different tokenizers"),
        ("empty prompts", "prompts.jsonl: holds no prompts"),
        ("malformed prompt", "prompts.jsonl, line 97: not valid JSON"),
        ("binary prompts", "prompts.jsonl: not UTF-8 text at byte 0"),
        ("no answer", "line 1: has no 'answer', which prompts.answer_field names; it has 'prompt'"),
        ("no difficulty", "line 1: has no 'difficulty'.*curriculum.mode=none"),
        ("no prompts", "prompts.path=.*: no such file"),
    ],
)
def test_a_missing_or_damaged_file_is_told(what: str, part: str, run_inputs: Path) -> None:
    damage(run_inputs, what)
    with pytest.raises(UserError, match=part) as caught:
        check_inputs(inputs_config(run_inputs))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "found"), [("tests.training.own_policy:gentle", True), ("no_such_file:mine", False)])
def test_the_module_of_a_policy_of_ones_own_is_looked_for(name: str, found: bool, run_inputs: Path) -> None:
    config = inputs_config(run_inputs)
    config.policy.name = name
    if found:
        assert check_inputs(config) == []
        return
    with pytest.raises(UserError, match=r"^policy.name=no_such_file:mine: there is no module no_such_file here or in"):
        check_inputs(config)


def test_everything_that_is_wrong_is_told_together(run_inputs: Path) -> None:
    for what in ("truncated weights", "malformed prompt"):
        damage(run_inputs, what)
    with pytest.raises(UserError) as caught:
        check_inputs(
            inputs_config(run_inputs, "rollouts.engine=replay", f"rollouts.path={run_inputs / 'prompts.jsonl'}")
        )
    lines = str(caught.value).splitlines()
    assert [part in line for part, line in zip(("truncated", "line 97", "is a file"), lines, strict=True)] == [True] * 3


def test_prompts_too_few_for_a_step_are_told_before_it(run_inputs: Path) -> None:
    (run_inputs / "prompts.jsonl").write_text((run_inputs / "prompts.jsonl").read_text().splitlines()[0])
    with pytest.raises(UserError, match=r"training.global_batch_size=96: .*rollouts.samples_per_prompt=1.* has 1;"):
        check_inputs(inputs_config(run_inputs))


def test_problems_that_are_trained_on_are_no_held_out_ones(run_inputs: Path) -> None:
    heldout = run_inputs / "heldout.jsonl"
    heldout.write_text('{"question": "1+1= ", "answer": 2}\n{"question": "7-1=", "answer": 6}\n')
    config = inputs_config(run_inputs, f"evaluation.path={heldout}", "evaluation.prompt_field=question")
    (line,) = check_inputs(config)
    assert line.startswith(f"evaluation.path={heldout}: 1 of 2 prompts are trained on too (the first is '0')")


def test_a_teacher_that_is_the_student_is_noted(run_inputs: Path) -> None:
    same = f"teacher.path={run_inputs / 'student'}"
    (line,) = check_inputs(inputs_config(run_inputs, same))
    assert line.startswith("student.path and teacher.path are both")
    assert check_inputs(inputs_config(run_inputs, same, "teacher.prompt_field=prompt")) == []


def test_a_plan_may_come_before_the_weights(run_inputs: Path) -> None:
    damage(run_inputs, "missing weights")
    assert len(check_inputs(inputs_config(run_inputs), weights_may_come_later=True)) == 1


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("NPROC", "NNODES", "WORLD_SIZE", "RANK")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def test_dry_run_prints_the_plan(run_inputs: Path) -> None:
    overrides = [f"{role}.path={run_inputs / role}" for role in ("student", "teacher")]
    overrides += [f"prompts.path={run_inputs / 'prompts.jsonl'}", f"output={run_inputs / 'run'}"]
    config = "examples/configs/sead_7b.yaml"
    done = command("-m", "megatron_sead.train", "--config", config, "--dry-run", "--world-size", "32", *overrides)
    assert (done.returncode, done.stderr) == (0, "")
    assert "7,298,011,136" in done.stdout
    assert "install version 0.32 or 0.33: pip install -c constraints-gpu.txt -e '.[gpu]'" in done.stdout


@pytest.mark.parametrize("flags", [["--check"], ["--dry-run"], []], ids=str)
def test_a_mistake_is_one_line_and_exit_code_2(flags: list[str]) -> None:
    done = command("-m", "megatron_sead.train", "--config", "examples/configs/sead_7b.yaml", *flags, "training.stepz=1")
    assert done.returncode == 2
    assert done.stderr == "error: training.stepz: unknown setting; did you mean training.steps?\n"


def test_the_tool_needs_only_config_json() -> None:
    paths = [f"student.path={SHAPES / 'olmo3-7b'}", f"teacher.path={SHAPES / 'olmo3-32b'}"]
    done = command("tools/plan.py", "--config", "examples/configs/sead_7b.yaml", "--world-size", "32", *paths)
    assert done.returncode == 0, done.stderr
    assert "32,233,522,176" in done.stdout
    done = command("tools/plan.py", "--config", "absent.yaml")
    assert (done.returncode, done.stderr) == (2, "error: absent.yaml: cannot be read: No such file or directory\n")
