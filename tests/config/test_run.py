"""Every mistake in a configuration is one line that names the key, its value and what would be valid."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from megatron_sead.config.checks import (
    config_differences,
    config_warnings,
    opening_line,
    opening_step,
)
from megatron_sead.config.rollouts import AnyRollouts
from megatron_sead.config.run import CurriculumSettings, RunConfig, dump_config, load_config
from megatron_sead.errors import UserError

CONFIGS = sorted((Path(__file__).parents[2] / "examples" / "configs").glob("*.yaml"))
BASE = (
    "output=runs/x",
    "student.path=student",
    "teacher.path=teacher",
    "prompts.path=prompts.jsonl",
    "training.steps=10",
    "training.global_batch_size=8",
)


def config(*overrides: str) -> RunConfig:
    return load_config(None, [*BASE, *overrides])


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config(*overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


ENGINES = [f"'{group.model_fields['engine'].default}'" for group in get_args(AnyRollouts)]
ENGINE_NAMES = f"{', '.join(ENGINES[:-1])} or {ENGINES[-1]}"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads_and_survives_a_round_trip(path: Path, tmp_path: Path) -> None:
    loaded = load_config(path, [])
    (tmp_path / "config.yaml").write_text(dump_config(loaded))
    assert load_config(tmp_path / "config.yaml", []) == loaded


def test_there_are_shipped_configurations() -> None:
    assert {"sead_tiny", "sead_7b", "sead_32b", "gsm8k_smoke"} <= {path.stem for path in CONFIGS}


def test_values_that_yaml_could_change_survive_a_round_trip(tmp_path: Path) -> None:
    loaded = config("prompts.instruction=\"a: b # c\\n'é' \"", "training.lr=5e-9", "student.stop_token_ids=[1, 2]")
    assert loaded.prompts.instruction == "a: b # c\n'é' "
    (tmp_path / "config.yaml").write_text(dump_config(loaded), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml", []) == loaded


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(config("training.lr=1e-3", "zones.rescue_threshold=2")))
    loaded = load_config(tmp_path / "run.yaml", ["training.lr=2e-3", "zones.rescue_threshold=null", "seed=7"])
    assert (loaded.training.lr, loaded.zones.rescue_threshold, loaded.seed) == (2e-3, None, 7)
    assert loaded.training.steps == 10


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("training.stepz", "training.steps"),
        ("tarining.lr", "training.lr"),
        ("steps", "training.steps"),
        ("zones.share", "zones.shares"),
        ("training.tensor_model_parallel_size", "parallel.tensor_model_parallel_size"),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest_one(key: str, nearest: str) -> None:
    assert refusal(f"{key}=1") == f"{key}: unknown setting; did you mean {nearest}?"


def test_an_unknown_key_in_a_file_is_told_the_same_way(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("zones: {share: 1}\n")
    with pytest.raises(UserError, match=r"^zones.share: unknown setting; did you mean zones.shares\?$"):
        load_config(tmp_path / "run.yaml", list(BASE))


# What is given, and what the line must contain: key, value, what is valid
REFUSALS = [
    (["training.lr=fast"], ["training.lr='fast'", "valid number"]),
    (["training.steps=0"], ["training.steps=0", "greater than or equal to 1"]),
    (["training.steps=1.5"], ["training.steps=1.5", "integer"]),
    (["training.precision=fp16"], ["training.precision='fp16'", "'fp32' or 'bf16'"]),
    (["policy.name=my policies:f"], ["policy.name='my policies:f'", "package.module:function"]),
    (["policy.beta=1", "policy.name=gkd"], ["policy.beta=1", "less than 1"]),
    (["curriculum.smoothing=1"], ["curriculum.smoothing=1", "less than 1"]),
    (["policy.name=saed"], ["policy.name='saed'", "'sead'"]),
    (["parallel=5"], ["parallel=5", "tensor_model_parallel_size"]),
    (["zones.shares=50"], ["zones.shares=50", "[50, 40, 10]"]),
    (["zones.shares=[50, 40, 11]"], ["zones.shares=[50.0, 40.0, 11.0]", "sum to 100", "not 101"]),
    (["zones.shares=[60, 50, -10]"], ["zones.shares", "negative"]),
    (["zones.shares=[50, 50]"], ["zones.shares=[50, 50]", "as many values as [50, 40, 10]"]),
    (["zones.shares=[.nan, 50, 50]"], ["zones.shares.0=nan", "finite"]),
    (["training.lr=.inf"], ["training.lr=inf", "finite"]),
    (["curriculum.k=1000000000"], ["curriculum.k=1000000000", "less than or equal to 100"]),
    (["zones.scope=sequence", "zones.thresholds=running"], ["zones.thresholds='running'", "global_step"]),
    (["zones.thresholds=running", "policy.name=opd"], ["zones.thresholds='running'", "sead or zones", "'opd'"]),
    (["curriculum.c0=0.15", "curriculum.k=2"], ["curriculum.c0=0.15", "0.6", "locked", "2.737"]),
    (["training.micro_batch_size=3"], ["global_batch_size=8", "micro_batch_size=3"]),
    (
        ["training.micro_batch_tokens=9000", "training.micro_batch_size=2"],
        ["training.micro_batch_tokens=9000", "must be null", "training.micro_batch_size left at 1, not 2"],
    ),
    (["training.micro_batch_tokens=0"], ["training.micro_batch_tokens=0", "greater than or equal to 1"]),
    (["rollouts.samples_per_prompt=3"], ["global_batch_size=8", "samples_per_prompt=3"]),
    (["rollouts.samples_per_prompt=2", "rollouts.temperature=0"], ["samples_per_prompt=2", "greedy"]),
    (["rollouts.engine=replay"], ["rollouts.engine='replay'", "rollouts.path"]),
    (["rollouts.engine=vlm"], ["rollouts.engine='vlm'", ENGINE_NAMES]),
    (["rollouts.engine=null"], ["rollouts.engine=None", ENGINE_NAMES]),
    (["rollouts.path=x"], ["rollouts.path='x'", "of rollouts.engine 'replay'", "rollouts.engine='transformers' here"]),
    (["rollouts.engine=replay", "rollouts.path=x", "rollouts.temperature=-1"], ["rollouts.temperature=-1"]),
    (["rollouts.engine=vllm", "rollouts.temprature=1"], ["did you mean rollouts.temperature?"]),
    (["rollouts.engine=vllm", "rollouts.temperature=0.005"], ["rollouts.temperature=0.005: engine 'vllm' draws at"]),
    (
        ["rollouts.engine=vllm", "evaluation.path=x.jsonl", "evaluation.temperature=0.009"],
        ["evaluation.temperature=0.009: engine 'vllm' draws at temperatures from 0.01 to 2"],
    ),
    (["rollouts.engine=vllm", "rollouts.temperature=2.5"], ["from 0.01 to 2, and greedily at 0"]),
    (
        ["rollouts.engine=vllm", "rollouts.batch_size=65", "rollouts.max_num_batched_tokens=64"],
        ["rollouts.batch_size=65: must be at most rollouts.max_num_batched_tokens=64"],
    ),
    (["rollouts=5"], ["rollouts=5", "a group of settings: engine, temperature"]),
    (["parallel.sequence_parallel=true"], ["sequence_parallel", "at least 2, not 1"]),
    (["parallel.virtual_pipeline_model_parallel_size=2"], ["pipeline_model_parallel_size", "not 1"]),
    (["parallel.context_parallel_size=0"], ["context_parallel_size=0", "greater than or equal to 1"]),
    (["training.min_lr=1"], ["training.min_lr=1", "training.lr=1e-06"]),
    (["annealing.end=0.9"], ["annealing.end=0.9", "annealing.start=0.8"]),
    (["device=cpu", "training.attention_backend=transformer_engine"], ["attention_backend", "cuda"]),
    (["prompts.template=plain", "student.system_prompt=hi"], ["student.system_prompt", "'plain'"]),
    (["training.lr"], ["'training.lr'", "key=value"]),
    (["training.lr=[1"], ["training.lr=[1", "line 1"]),
]


@pytest.mark.parametrize(
    ("overrides", "parts"), REFUSALS, ids=lambda value: value[0] if isinstance(value, list) else ""
)
def test_a_wrong_value_or_combination_is_refused(overrides: list[str], parts: list[str]) -> None:
    message = refusal(*overrides)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["curriculum.c0=0.25", "curriculum.k=2"],  # c0 * 2^k is exactly 1
        ["curriculum.c0=0.1", "curriculum.mode=none"],
        ["annealing.end=0.9", "annealing.shape=constant"],
        ["zones.thresholds=running", "policy.name=zones"],
        ["training.lr_warmup_steps=10"],
        ["zones.shares=[33.3, 33.3, 33.4]"],
        ["rollouts.engine=replay", "rollouts.path=runs/other"],
        ["rollouts={engine: replay, path: runs/other}"],
        ["training.micro_batch_tokens=9000", "training.micro_batch_size=1", "training.global_batch_size=7"],
        ["rollouts.path=null"],
        ["rollouts.temperature=0.005", "evaluation.path=x.jsonl", "evaluation.temperature=0.009"],
        ["rollouts.engine=vllm", "rollouts.temperature=0.01", "evaluation.temperature=0.009"],
        ["rollouts.engine=vllm", "rollouts.temperature=2.0"],
        ["rollouts.temperature=5.0"],
        [
            "rollouts.engine=vllm",
            "rollouts.temperature=0",
            "rollouts.batch_size=64",
            "rollouts.max_num_batched_tokens=64",
        ],
        ["policy.name=a.b:c", "zones.thresholds=running"],
    ],
    ids=lambda value: value[0],
)
def test_what_lies_just_inside_is_accepted(overrides: list[str]) -> None:
    config(*overrides)


def test_k_that_the_refusal_names_is_accepted() -> None:
    for c0 in (0.05, 0.15, 0.3, 0.7):
        message = refusal(f"curriculum.c0={c0}", "curriculum.k=0.1")
        config(f"curriculum.c0={c0}", f"curriculum.k={message.rpartition(' ')[2]}")


@pytest.mark.parametrize(
    "mistakes",
    [
        ["training.steps=0", "training.lr=x", "zones.shares=[1, 1, 1]"],
        ["training.micro_batch_size=3", "training.min_lr=1"],
        ["training.stepz=1", "student.path=None", "prompts.path=yes", "training.lr=[1", "seed=-1", "training.steps"],
    ],
    ids=len,
)
def test_several_mistakes_are_told_each_in_a_line(mistakes: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        config(*mistakes)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(mistakes)
    for mistake in mistakes:
        assert any(mistake.partition("=")[0] in line for line in lines), mistake


def test_missing_settings_are_told_by_their_whole_keys() -> None:
    with pytest.raises(UserError) as caught:
        load_config(None, ["output=x", "training.steps=None"])
    keys = ["student.path", "teacher.path", "prompts.path", "training.steps", "training.global_batch_size"]
    lines = str(caught.value).splitlines()
    assert sorted(line.partition(":")[0].partition("=")[0] for line in lines) == sorted(keys)
    assert any(line.startswith("student.path: missing; ") and "Hugging Face directory" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("training:\n  steps: 1\n bad: [\n", ["run.yaml, line 3"]),
        ("seed: 1\nseed: 2\n", ["run.yaml, line 2", "'seed' is given twice"]),
        ("- a\n- b\n", ["run.yaml: must hold"]),
    ],
)
def test_a_malformed_file_is_told_with_its_line(text: str, parts: list[str], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file, [])
    assert all(part in str(caught.value) for part in parts)


def test_a_missing_file_is_told() -> None:
    with pytest.raises(UserError, match=r"absent.yaml: cannot be read: No such file"):
        load_config(Path("absent.yaml"), [])


def test_differences_are_dotted_keys() -> None:
    old, new = config(), config("seed=1", "zones.shares=[60, 30, 10]", "student.stop_token_ids=[3]")
    assert config_differences(old, new) == ["seed", "student.stop_token_ids", "zones.shares"]
    assert config_differences(old, config()) == []
    replayed = config("rollouts.engine=replay", "rollouts.path=x")
    assert config_differences(old, replayed) == ["rollouts.engine", "rollouts.path"]
    assert config_differences(replayed, old) == ["rollouts.engine", "rollouts.path"]


@pytest.mark.parametrize(
    ("overrides", "warned"),
    [
        (["training.lr=5e-9", "training.steps=181"], True),  # the paper's literal value
        (["training.lr=1e-6", "training.steps=181"], False),
        (["training.lr=5e-9", "training.precision=fp32"], False),
    ],
)
def test_a_learning_rate_below_bf16_resolution_warns(overrides: list[str], warned: bool) -> None:
    assert any("resolution" in line for line in config_warnings(config(*overrides))) == warned


@pytest.mark.parametrize(("warmup", "warned"), [(9, False), (10, True), (11, True)])
def test_a_warm_up_as_long_as_the_run_is_told(warmup: int, warned: bool) -> None:
    lines = config_warnings(config(f"training.lr_warmup_steps={warmup}"))
    assert any("only rises" in line for line in lines) == warned


@pytest.mark.parametrize(
    ("overrides", "opens", "warned"),
    [
        ([], 26, False),  # 0.5 * 1.26^3 = 1.0002
        (["curriculum.c0=0.25", "curriculum.k=2"], None, True),  # c0 * 2^k = 1: after the last step
        (["curriculum.c0=0.5", "curriculum.k=1.5"], 59, True),
        (["curriculum.c0=0.5", "curriculum.k=1.71"], 50, False),
        (["curriculum.c0=1"], 0, False),
        (["curriculum.mode=none"], 0, False),
        (["curriculum.mode=sorted"], 0, False),
        (["curriculum.mode=competence_cdf"], None, True),
        (["curriculum.mode=mastery"], None, True),  # 3 tiers to open, 50 steps of patience each
        (["curriculum.mode=mastery", "curriculum.patience=16"], 48, False),
    ],
)
def test_it_is_told_when_every_prompt_is_open(overrides: list[str], opens: int | None, warned: bool) -> None:
    run = config("training.steps=100", *overrides)
    assert opening_step(run) == opens
    assert any("later than half" in line for line in config_warnings(run)) == warned
    if "curriculum.mode=sorted" not in overrides:
        assert ("none of 100 steps" if opens is None else f"from step {opens} of 100 on") in opening_line(run)


@pytest.mark.parametrize("mode", ["gated", "competence_cdf", "none"])
@pytest.mark.parametrize("c0", [0.3, 0.5, 1.0])
def test_the_curriculum_opens_when_the_configuration_says(mode: str, c0: float) -> None:
    from megatron_sead.distillation import Curriculum

    run = config("training.steps=40", f"curriculum.mode={mode}", f"curriculum.c0={c0}")
    ladder = [index / 999 for index in range(1000)]
    curriculum = Curriculum(ladder, batch_size=8, total_steps=40, **run.curriculum.model_dump())
    whole = [step for step in range(40) if curriculum.eligible_count(step) == 1000]
    assert opening_step(run) == (whole[0] if whole else None)


def test_the_curriculum_has_the_configuration_s_defaults() -> None:
    from megatron_sead.distillation import Curriculum

    defaults = {name: p.default for name, p in inspect.signature(Curriculum).parameters.items()}
    for name, value in CurriculumSettings().model_dump().items():
        assert defaults[name] == value, name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_no_shipped_configuration_warns(path: Path) -> None:
    assert config_warnings(load_config(path, [])) == []


def test_a_configuration_is_read_without_torch() -> None:
    code = "import sys, megatron_sead.train; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
