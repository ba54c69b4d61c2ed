"""No file of a model, run, checkpoint or data directory can run a program, whoever made it.

`FILES` lists what commands read there, and what parses it. Pickles among them are crafted, with checksums made to fit,
and every way to read them is tried; a test of the sources holds that nothing else unpickles.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from tests.checkpoints.training import Trained, train
from tests.conftest import make_olmo3
from tests.distributed.ranks import RankPool
from tests.models.parity import Layout

ROOT = Path(__file__).parents[2]
FILES = {
    "config.json, generation_config.json, tokenizer_config.json": "json; auto_map is not followed",
    "tokenizer.json": "tokenizers (Rust)",
    "tokenizer.model": "sentencepiece (protocol buffers)",
    "chat_template.jinja, chat_template in tokenizer_config.json": "Jinja's immutable sandbox",
    "*.safetensors, model.safetensors.index.json": "safetensors, json; *.bin, *.pt, *.pth are never opened",
    "config.yaml, a run's settings": "yaml.SafeLoader",
    "prompts: *.jsonl, *.json, *.parquet": "json, pyarrow",
    "rollouts/step-N.jsonl, metrics.jsonl, difficulty files": "json",
    "manifest.json, inputs.json, metadata.json": "json",
    ".metadata": "a restricted unpickler: torch_dist_reader.ALLOWED",
    "common.pt, run_state.pt, objects and tensors in *.distcp": "torch.load, weights only",
}
OLD, NEW = "step-00000001", "step-00000002"


class Program:
    """Unpickled, it makes a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture(scope="module")
def two_checkpoints(ranks: RankPool, hf_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("two")
    ranks.run(train, hf_dir, Layout(), directory, steps=2, save_after=(1, 2))
    return directory


def table(path: Path, program: Program) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(program))


def table_beside_a_program(path: Path, program: Program) -> None:
    """All that Megatron needs, and something more."""
    known = pickle.loads((path / ".metadata").read_bytes())
    known.planner_data = program
    (path / ".metadata").write_bytes(pickle.dumps(known))


def common(path: Path, program: Program) -> None:
    torch.save(torch.load(path / "common.pt") | {"more": program}, path / "common.pt")


def state(path: Path, program: Program) -> None:
    torch.save(torch.load(path / "run_state.pt") | {"more": program}, path / "run_state.pt")


def an_object(path: Path, program: Program) -> None:
    """An ``_extra_state``, which is no tensor: torch.distributed.checkpoint loads it without restriction."""
    replace_object(path, lambda file: torch.save([program], file))


def an_extra_state(path: Path, program: Program) -> None:
    """As Transformer Engine takes it: a tensor of bytes, which it unpickles."""
    content = torch.frombuffer(bytearray(pickle.dumps(program)), dtype=torch.uint8)
    replace_object(path, lambda file: torch.save([content], file))


def replace_object(path: Path, save: Callable[[Any], None]) -> None:
    known = pickle.loads((path / ".metadata").read_bytes())
    index = next(index for index in known.storage_data if "_extra_state" in index.fqn)
    info = known.storage_data[index]
    with open(path / info.relative_path, "ab") as file:
        info.offset = file.tell()
        save(file)
        info.length = file.tell() - info.offset
    (path / ".metadata").write_bytes(pickle.dumps(known))


CRAFTED = [table, table_beside_a_program, common, state, an_object, an_extra_state]


def fit_the_manifest(path: Path) -> None:
    """Anybody can."""
    from megatron_sead.checkpoints.manifest import checksum, read_manifest, write_manifest  # imports Megatron

    manifest = read_manifest(path)
    manifest.files = {name: checksum(path / name) for name in manifest.files}
    write_manifest(path, manifest)


@pytest.fixture
def directory(two_checkpoints: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "checkpoints"))


def resume(ranks: RankPool, hf_dir: Path, directory: Path) -> Trained:
    found: Trained = ranks.run(train, hf_dir, Layout(), directory, steps=0, resume=True)[0]
    return found


@pytest.mark.mcore_lane
@pytest.mark.parametrize("craft", CRAFTED, ids=lambda f: f.__name__)
def test_a_resume_runs_nothing_and_takes_the_one_before(
    ranks: RankPool, hf_dir: Path, directory: Path, tmp_path: Path, craft: Callable[[Path, Program], None]
) -> None:
    if craft is common and not (directory / NEW / "common.pt").exists():
        pytest.skip("this Megatron-Core writes no common.pt")
    canary = tmp_path / "canary"
    craft(directory / NEW, Program(canary))
    fit_the_manifest(directory / NEW)
    found = resume(ranks, hf_dir, directory)
    assert not canary.exists()
    assert found.first_step == 1
    assert "refused" in found.log[0] and "weights_only" not in found.log[0], "no advice to read it all the same"
    assert found.log[1] == f"loaded checkpoint {directory / OLD}"


@pytest.mark.parametrize("craft", CRAFTED, ids=lambda f: f.__name__)
def test_a_conversion_runs_nothing(
    hf_dir: Path, directory: Path, tmp_path: Path, craft: Callable[[Path, Program], None]
) -> None:
    """It refuses the table, and looks at nothing beside tables and weights."""
    from megatron_sead.checkpoints.model_files import open_model

    canary = tmp_path / "canary"
    craft(directory / NEW, Program(canary))
    fit_the_manifest(directory / NEW)
    shutil.copy(hf_dir / "config.json", directory / NEW)
    if craft in (table, table_beside_a_program):
        with pytest.raises(UserError, match=r"\.metadata: refused: it calls for posix\.mkdir"):
            open_model(directory / NEW)
    else:
        with open_model(directory / NEW) as model:
            assert all(model.read(named) for named in model.weights)
    assert not canary.exists()


def test_megatrons_own_reading_is_restricted_too(directory: Path, tmp_path: Path) -> None:
    """Were a file exchanged after it was looked at."""
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    from megatron_sead.checkpoints.torch_dist_reader import restricted_loading

    table_beside_a_program(directory / NEW, Program(tmp_path / "canary"))
    reader, program = FileSystemReader(directory / NEW), tmp_path / "object.pt"
    torch.save(Program(tmp_path / "canary"), program)
    with restricted_loading():
        with pytest.raises(pickle.UnpicklingError, match="mkdir"):
            reader.read_metadata()
        with pytest.raises(pickle.UnpicklingError, match="mkdir"):
            torch.load(program, weights_only=False)
    assert not (tmp_path / "canary").exists()
    reader.read_metadata()  # the control: this is what it would have done
    assert (tmp_path / "canary").exists()


def test_values_of_another_make_are_told_in_a_line(ranks: RankPool, hf_dir: Path, directory: Path) -> None:
    for name in (OLD, NEW):
        torch.save({"generators": []}, directory / name / "run_state.pt")
        fit_the_manifest(directory / name)
    with pytest.raises(AssertionError, match=r"UserError: .*step-00000002: is not a checkpoint of this run \(KeyError"):
        resume(ranks, hf_dir, directory)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """With programs wherever a model directory names them."""
    directory = make_olmo3(tmp_path / "model")
    program = f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\n"
    (directory / "theirs.py").write_text(program)
    names = {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M", "AutoTokenizer": ["theirs.T", "theirs.T"]}
    for name in ("config.json", "tokenizer_config.json"):
        settings = json.loads((directory / name).read_text()) if (directory / name).exists() else {}
        (directory / name).write_text(json.dumps(settings | {"auto_map": names}))
    torch.save(Program(tmp_path / "canary"), directory / "pytorch_model.bin")
    return directory


def test_a_models_directory_runs_nothing(model: Path, tmp_path: Path) -> None:
    from megatron_sead.prompts.tokenizer import load_tokenizer
    from megatron_sead.rollouts.engine import Sampling
    from megatron_sead.rollouts.transformers_engine import TransformersEngine
    from megatron_sead.training.parity import probe_tokens

    load_tokenizer(ModelSettings(path=model, stop_token_ids=[0]), "student")
    probe_tokens(model, [(1, 2)])
    with pytest.raises(UserError, match="auto_map"):  # a model's numbers may be its program's
        TransformersEngine(model, sampling=Sampling(0.0, 1.0, 1), stop_token_ids=[0], pad_token_id=0, seed=0)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{ cycler.__init__.__globals__.os.mkdir(CANARY) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.clear() }}",
        "{% include '/etc/passwd' %}",
    ],
)
def test_a_chat_template_runs_nothing(model: Path, tmp_path: Path, template: str) -> None:
    from megatron_sead.prompts.tokenizer import load_tokenizer

    (model / "chat_template.jinja").write_text(template.replace("CANARY", repr(str(tmp_path / "canary"))))
    tokenizer = load_tokenizer(ModelSettings(path=model, stop_token_ids=[0]), "student")
    with pytest.raises(UserError, match="the chat template fails"):
        tokenizer.render("1+1")
    assert not (tmp_path / "canary").exists()


def unsafe_calls(source: str) -> list[str]:
    """Calls that can run what a file says."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
        last = name.rpartition(".")[2]
        unsafe = (
            name in ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "shelve.open")
            or (name == "torch.load" and given.get("weights_only") != "True")
            or (name == "yaml.load" and given.get("Loader") not in ("SettingsLoader", "yaml.SafeLoader"))
            or last in ("full_load", "unsafe_load", "read_pickle")
            or (last == "load" and name.split(".")[0] in ("joblib", "dill", "cloudpickle"))
            or given.get("allow_pickle") == "True"
            or (last in ("from_pretrained", "from_config") and given.get("trust_remote_code") != "False")
        )
        if unsafe:
            found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("folder", ["megatron_sead", "tools"])
def test_nothing_else_unpickles(folder: str) -> None:
    found = {str(path.relative_to(ROOT)): unsafe_calls(path.read_text()) for path in (ROOT / folder).rglob("*.py")}
    own = {
        "megatron_sead/preparation/candidates.py": ["pickle.load(self._spool)"]
    }  # a file without a name, never another's
    assert {path: calls for path, calls in found.items() if calls and calls != own.get(path)} == {}


@pytest.mark.parametrize(
    "call",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pickle.loads(data)",
        "yaml.load(text, Loader=yaml.Loader)",
        "AutoConfig.from_pretrained(directory)",
        "numpy.load(path, allow_pickle=True)",
        "eval(text)",
    ],
)
def test_an_unsafe_call_is_seen(call: str) -> None:
    assert unsafe_calls(call)
