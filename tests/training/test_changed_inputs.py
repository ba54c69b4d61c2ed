"""A run is continued with the inputs that it began with, or is told which of them has changed, before a model is built.

Most cases compare fingerprints alone; a few start a run of two steps again, after one of its inputs has changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sead.config.run import load_config
from tests.distributed.ranks import RankPools
from tests.training.launching import ROOT, SHORT, metrics_of, train_tiny
from tests.training.launching import TINY as TINY_CONFIG

TINY = ROOT / "examples" / "tiny"
STEPS = 4
SETTINGS = [
    f"training.steps={STEPS}",
    "training.lr_warmup_steps=0",
    "training.global_batch_size=8",
    "checkpoints.interval=2",
    "evaluation.limit=4",
    "evaluation.samples=0",
    "evaluation.teacher=false",
    "rollouts.max_new_tokens=8",
]


def settings(folder: Path) -> list[str]:
    """Of a run whose inputs are all in one folder."""
    paths = {f"{role}.path": folder / role for role in ("student", "teacher")}
    paths |= {f"{role}.chat_template": folder / "chat.jinja" for role in ("student", "teacher")}
    paths |= {"prompts.path": folder / "prompts.jsonl", "evaluation.path": folder / "heldout.jsonl"}
    return [*SETTINGS, *(f"{key}={path}" for key, path in paths.items())]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder: only what is changed there and put back changes."""
    folder = tmp_path_factory.mktemp("inputs")
    for role in ("student", "teacher"):
        shutil.copytree(TINY / role, folder / role)
    shutil.copy(TINY / "student" / "chat_template.jinja", folder / "chat.jinja")
    lines = (TINY / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(lines[:200]))
    (folder / "heldout.jsonl").write_text("".join((TINY / "heldout.jsonl").read_text().splitlines(keepends=True)[:8]))
    return folder


@pytest.fixture(scope="module")
def begun(pools: RankPools, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Interrupted after two of its steps."""
    output = tmp_path_factory.mktemp("begun") / "run"
    assert train_tiny(pools, 1, output, settings(inputs), interrupt_at=1) == [False]
    return output


def rows(path: Path, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> None:
    lines = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def in_prompts(change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]) -> Callable[[Path], None]:
    return lambda folder: rows(folder / "prompts.jsonl", change)


def in_json(file: str, **changes: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(values | changes))

    return change


def one_weight(role: str) -> Callable[[Path], None]:
    """The last one of an embedding that no text of the run needs, by one bit."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / role / "model.safetensors")
        tensors["model.embed_tokens.weight"].view(-1)[-1] *= 1 + 2**-20
        save_file(tensors, folder / role / "model.safetensors", {"format": "pt"})

    return change


def one_special_token(folder: Path) -> None:
    """Decoded text changes, and with it grades; no prompt does."""
    for role in ("student", "teacher"):
        values = json.loads((folder / role / "tokenizer.json").read_text())
        for token in values["added_tokens"]:
            token["special"] = token["special"] and token["content"] != "<|im_start|>"
        (folder / role / "tokenizer.json").write_text(json.dumps(values))


def template(folder: Path) -> None:
    (folder / "chat.jinja").write_text("Please: " + (folder / "chat.jinja").read_text())


FIRST = json.loads((TINY / "prompts.jsonl").read_text().splitlines()[0])["id"]
CHANGES: dict[str, tuple[Callable[[Path], None], str, list[str]]] = {
    "all answers": (
        in_prompts(lambda lines: [line | {"answer": "7777"} for line in lines]),
        "prompts",
        ["answers of 200 prompts differ", repr(FIRST)],
    ),
    "one answer": (
        in_prompts(lambda lines: [*lines[:7], lines[7] | {"answer": "7777"}, *lines[8:]]),
        "prompts",
        ["answers of 1 prompt differ"],
    ),
    "rows appended": (
        in_prompts(lambda lines: [*lines, lines[0] | {"id": "one more"}]),
        "prompts",
        ["200 prompts then, 201 now", "number 201, is 'one more' now"],
    ),
    "a row removed": (in_prompts(lambda lines: lines[1:]), "prompts", ["200 prompts then, 199 now", "number 1,"]),
    "the last row removed": (in_prompts(lambda lines: lines[:-1]), "prompts", ["199 now", "number 200, is gone"]),
    "rows reordered": (in_prompts(lambda lines: lines[::-1]), "prompts", ["in another order"]),
    "difficulties": (
        in_prompts(lambda lines: [line | {"difficulty": line["difficulty"] / 2} for line in lines]),
        "prompts",
        ["difficulty of "],
    ),
    "a prompt's text": (
        in_prompts(lambda lines: [lines[0] | {"prompt": "1+1="}, *lines[1:]]),
        "prompts",
        ["student's token ids of 1 prompt differ"],
    ),
    "held-out answers": (
        lambda folder: rows(folder / "heldout.jsonl", lambda lines: [line | {"answer": "7777"} for line in lines]),
        "evaluation",
        ["answers of 8 prompts differ"],
    ),
    "the chat template": (template, "templates", ["student chat template differs"]),
    "a special token": (one_special_token, "tokenizer", ["student decoding differs"]),
    "the teacher's stop tokens": (
        lambda folder: [
            in_json(f"{r}/generation_config.json", eos_token_id=[0, 1, 2])(folder) for r in ("student", "teacher")
        ],
        "templates",
        ["student stop_token_ids was"],
    ),
    "the student's window": (in_json("student/config.json", sliding_window=8), "student", ["was 24 and is 8"]),
}


def found_after(inputs: Path, folder: Path, change: Callable[[Path], object], *overrides: str) -> dict[str, str]:
    """What has changed between the inputs and a copy in `folder`, by name."""
    from megatron_sead.prompts.dataset import stream_prompts
    from megatron_sead.prompts.tokenizer import load_tokenizer
    from megatron_sead.training.input_changes import differences  # imports Megatron: not to be collected
    from megatron_sead.training.inputs import fingerprint

    def examine(folder: Path) -> tuple[Any, Any, Any]:
        config = load_config(TINY_CONFIG, [*SHORT, *settings(folder), "output=unused", *overrides])
        student, teacher = load_tokenizer(config.student, "student"), load_tokenizer(config.teacher, "teacher")
        prompts = list(stream_prompts(config.prompts, student, teacher))
        heldout = list(
            stream_prompts(config.prompts.model_copy(update={"path": config.evaluation.path}), student, teacher)
        )
        return json.loads(json.dumps(fingerprint(config, student, teacher, prompts, heldout))), prompts, heldout

    then, *_ = examine(inputs)
    change(Path(shutil.copytree(inputs, folder)))
    return differences(then, *examine(folder))


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_input_is_named(inputs: Path, tmp_path: Path, case: str) -> None:
    change, name, told = CHANGES[case]
    found = found_after(inputs, tmp_path / "inputs", change)
    assert next(iter(found)) == name, found
    assert all(text in found[name] for text in told), found


UNCHANGED: dict[str, Callable[[Path], object]] = {
    "moved": lambda folder: None,
    "another field of the rows": in_prompts(lambda lines: [line | {"source": "elsewhere"} for line in lines]),
    "another form of the rows": lambda folder: (folder / "prompts.jsonl").write_text(
        json.dumps([json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()], indent=2)
    ),
    "a release noted in config.json": in_json("student/config.json", transformers_version="4.57.0"),
}


@pytest.mark.parametrize("case", UNCHANGED)
def test_what_computing_does_not_depend_on_may_change(inputs: Path, tmp_path: Path, case: str) -> None:
    assert found_after(inputs, tmp_path / "inputs", UNCHANGED[case]) == {}


def test_versions_are_inputs(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the engine and the grader; those of torch and Megatron-Core are told."""
    from megatron_sead.training import inputs as module

    def newer(folder: Path) -> None:
        monkeypatch.setattr(module, "version", lambda package: "99.0")
        monkeypatch.setattr(module, "GRADER_VERSION", "none")

    found = found_after(inputs, tmp_path / "inputs", newer)
    assert list(found) == ["engine", "grader", "software"]
    assert "transformers was" in found["engine"] and "is '99.0'" in found["engine"]
    assert "grader was" in found["grader"] and "is 'none'" in found["grader"]


def test_recorded_rollouts_are_inputs(inputs: Path, tmp_path: Path) -> None:
    """Those of the steps that the run will do; what the other run writes meanwhile is none."""
    folder = tmp_path / "recorded" / "rollouts"
    folder.mkdir(parents=True)
    for step in (0, 1, 2, STEPS):
        (folder / f"step-{step}.jsonl").write_text("recorded\n")

    def change(_: Path) -> None:
        (folder / "step-1.jsonl").write_text("another\n")
        (folder / "step-2.jsonl").unlink()
        (folder / "step-3.jsonl").write_text("new\n")
        (folder / f"step-{STEPS}.jsonl").write_text("not read\n")

    replay = ("rollouts.engine=replay", f"rollouts.path={folder.parent}")
    found = found_after(inputs, tmp_path / "inputs", change, *replay)
    assert found == {"rollouts": "step-1.jsonl differs; step-2.jsonl is missing"}


def start_again(pools: RankPools, begun: Path, folder: Path, *overrides: str) -> str:
    """What refuses it, or ""."""
    try:
        assert train_tiny(pools, 1, begun, [*settings(folder), *overrides]) == [True]
    except AssertionError as error:
        return str(error).strip().splitlines()[-1].removeprefix("megatron_sead.errors.UserError: ")
    return ""


@pytest.fixture
def changed(inputs: Path, tmp_path: Path) -> Iterator[Callable[[Callable[[Path], object]], None]]:
    """Changes the inputs in place, until the test is over: their paths are settings of the run."""
    kept = Path(shutil.copytree(inputs, tmp_path / "kept"))
    yield lambda change: change(inputs) and None
    shutil.copytree(kept, inputs, dirs_exist_ok=True)


Change = Callable[[Callable[[Path], object]], None]


def test_a_resume_with_changed_inputs_is_refused(pools: RankPools, begun: Path, inputs: Path, changed: Change) -> None:
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    changed(in_prompts(lambda lines: lines[1:]))
    told = start_again(pools, begun, inputs)
    assert told.startswith(
        f"output={begun}: inputs are not those of checkpoint step-00000002: prompts "
        f"(prompts.path={inputs}/prompts.jsonl): 200 prompts then, 199 now; "
    )
    assert told.endswith("by checkpoints.allow_changed_inputs='[prompts]'")
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_one_bit_of_a_model_is_seen(pools: RankPools, begun: Path, inputs: Path, changed: Change, role: str) -> None:
    changed(one_weight(role))
    told = start_again(pools, begun, inputs)
    assert f"{role} ({role}.path={inputs}/{role}): weights model.embed_tokens.weight differs; bring" in told


def test_allowed_changes_are_kept_in_mind(
    pools: RankPools, begun: Path, inputs: Path, tmp_path: Path, changed: Change
) -> None:
    """Though the first prompts were the text that proves that the student came back. What is allowed once needs no
    second word, since the next checkpoint is of the new inputs."""
    output = Path(shutil.copytree(begun, tmp_path / "run"))
    changed(in_prompts(lambda lines: lines[2:]))
    assert start_again(pools, output, inputs, "checkpoints.allow_changed_inputs=[prompts]") == ""
    summary = json.loads((output / "summary.json").read_text())
    assert len(summary["changed_inputs"]) == 1 and summary["changed_inputs"][0].startswith("step 2: prompts (")
    assert [line["step"] for line in metrics_of(output)] == list(range(STEPS))
    assert start_again(pools, output, inputs) == ""


def test_another_evaluation_measures_the_initial_student_again(
    pools: RankPools, begun: Path, inputs: Path, tmp_path: Path
) -> None:
    """Before and after are of the same prompts."""
    output = Path(shutil.copytree(begun, tmp_path / "run"))
    assert start_again(pools, output, inputs, "evaluation.limit=6") == ""
    evaluation = json.loads((output / "summary.json").read_text())["evaluation"]
    assert [evaluation[when]["greedy"]["prompts"] for when in ("before", "after")] == [6, 6]
    heldout = json.loads((output / "heldout.json").read_text())
    asked = [json.loads(line) for line in (inputs / "heldout.jsonl").read_text().splitlines()[:6]]
    problems = json.dumps([[row["prompt"], [row["answer"]]] for row in asked])
    assert heldout["problems"] == hashlib.sha256(problems.encode()).hexdigest()
    assert heldout["prompts"] == [row["id"] for row in asked] and len(heldout["after"]["greedy"]) == 6


def test_a_checkpoint_of_an_earlier_version_continues(
    pools: RankPools, begun: Path, inputs: Path, tmp_path: Path
) -> None:
    """Without inputs, and without the text of the proof."""
    output = Path(shutil.copytree(begun, tmp_path / "run"))
    without_inputs(output / "checkpoints" / "step-00000002")
    assert start_again(pools, output, inputs) == ""


def without_inputs(checkpoint: Path) -> None:
    from megatron_sead.checkpoints.manifest import checksum, read_manifest, write_manifest

    (checkpoint / "inputs.json").unlink()
    plain = torch.load(checkpoint / "run_state.pt", weights_only=True)
    for name in ("probe_tokens", "changed_inputs"):
        del plain["state"]["progress"][name]
    torch.save(plain, checkpoint / "run_state.pt")
    manifest = read_manifest(checkpoint)
    del manifest.files["inputs.json"]
    manifest.files["run_state.pt"] = checksum(checkpoint / "run_state.pt")
    write_manifest(checkpoint, manifest)
