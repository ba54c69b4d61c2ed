"""A written model, read by transformers with nothing of ours, gives the prompts and stops on the tokens of its run."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from megatron_sead.config.run import ModelSettings
from megatron_sead.prompts.export import export_tokenizer
from megatron_sead.prompts.tokenizer import load_tokenizer
from tests.prompts.test_chat_prompts import NAMES, TEMPLATES, TURNS, reads_as_sentencepiece, write_model

pytestmark = pytest.mark.transformers_lane

TEXTS = ("What is 1+1?", "  he\n\n", "</s> 1")
SYSTEM = "Say \"he\" in {{ one }} {% word %},\n\tor two: \\n é \U0001f600 '.'\r\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Stops on 2 and 4, and has a template in chat_template.jinja."""
    directory = write_model(tmp_path / "model", NAMES)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4], "temperature": 0.6}))
    (directory / "chat_template.jinja").write_text(TURNS)
    return directory


def export(settings: ModelSettings) -> tuple[Path, list[str]]:
    """The directory that a run writes, without its weights."""
    directory = settings.path.parent / "student-hf"
    shutil.copytree(settings.path, directory)
    return directory, export_tokenizer(load_tokenizer(settings, "student"), settings, directory)


def require_the_same(directory: Path, settings: ModelSettings) -> None:
    """Prompts and stop tokens of a directory, by transformers alone, are those of a run with these settings."""
    ours, theirs = load_tokenizer(settings, "student"), AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        messages = [{"role": "user", "content": text}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert tuple(ids) == ours.encode(ours.render(text))
    assert set(GenerationConfig.from_pretrained(directory).eos_token_id) == set(ours.stop_token_ids)
    named = AutoConfig.from_pretrained(directory).eos_token_id
    assert set(named if isinstance(named, list) else [named]) <= set(ours.stop_token_ids)


def test_a_run_that_changes_nothing_leaves_every_byte(model: Path) -> None:
    directory, told = export(ModelSettings(path=model))
    assert told == []
    assert all((directory / file.name).read_bytes() == file.read_bytes() for file in model.iterdir())


def test_a_chat_template_of_the_settings(model: Path, tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ bos_token }}own " + TURNS + "\n\n")
    others = {"chat_template": [{"name": "default", "template": "old"}, {"name": "rag", "template": "R"}]}
    (model / "tokenizer_config.json").write_text(json.dumps(NAMES | others))
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("T")
    (model / "chat_template.json").write_text(json.dumps({"chat_template": "old"}))
    settings = ModelSettings(path=model, chat_template=tmp_path / "own.jinja")
    directory, told = export(settings)
    require_the_same(directory, settings)
    assert [line.partition(":")[0] for line in told] == ["chat template", "left out", "left out"]
    assert "chat_template" not in json.loads((directory / "tokenizer_config.json").read_text())
    assert not (directory / "chat_template.json").exists()


@pytest.mark.parametrize("template", [*TEMPLATES.values(), "\n\n" + TURNS, "  {% if true %}\n" + TURNS + "{% endif %}"])
def test_a_system_prompt_is_in_the_template(model: Path, tmp_path: Path, template: str) -> None:
    (tmp_path / "own.jinja").write_text(template)
    settings = ModelSettings(path=model, chat_template=tmp_path / "own.jinja", system_prompt=SYSTEM)
    directory, told = export(settings)
    require_the_same(directory, settings)
    assert "begins a conversation that has no system message with student.system_prompt" in told[1] and len(told) == 2
    given = [{"role": "system", "content": "Mine."}, {"role": "user", "content": "1"}]
    before, after = (AutoTokenizer.from_pretrained(place) for place in (model, directory))
    own = before.apply_chat_template(given, chat_template=template, add_generation_prompt=True, tokenize=False)
    assert after.apply_chat_template(given, add_generation_prompt=True, tokenize=False) == own


def test_stop_tokens_of_the_settings(model: Path) -> None:
    settings = ModelSettings(path=model, stop_token_ids=[4])
    directory, told = export(settings)
    require_the_same(directory, settings)
    assert told[0] == "eos_token_id: [4] of student.stop_token_ids, in place of [2, 4]"
    assert "'</s>' (2), is none of these; vLLM stops there as well" in told[1] and len(told) == 2
    assert AutoConfig.from_pretrained(directory).eos_token_id == 4
    assert GenerationConfig.from_pretrained(directory).temperature == 0.6


@pytest.mark.parametrize("named", [{"eos_token_id": "</s>"}, {"eos_token_id": [2, 999]}, {}])
def test_stop_tokens_that_make_up_for_a_file(model: Path, named: dict[str, Any]) -> None:
    (model / "generation_config.json").write_text(json.dumps(named))
    settings = ModelSettings(path=model, stop_token_ids=[2, 4])
    directory, _ = export(settings)
    require_the_same(directory, settings)


@pytest.mark.parametrize("named", [{}, {"eos_token_id": None}, {"eos_token_id": []}], ids=str)
def test_generation_settings_that_name_no_end_get_that_of_the_run(model: Path, named: dict[str, Any]) -> None:
    """Whoever reads that file does not look for it in config.json."""
    (model / "generation_config.json").write_text(json.dumps(named))
    (model / "config.json").write_text(
        json.dumps(json.loads((model / "config.json").read_text()) | {"eos_token_id": 2})
    )
    settings = ModelSettings(path=model)
    directory, told = export(settings)
    require_the_same(directory, settings)
    assert told == [f"eos_token_id: [2] of {model / 'config.json'}"]


def test_the_tokenizers_own_end_is_written_where_no_file_names_one(model: Path) -> None:
    (model / "generation_config.json").unlink()
    (model / "config.json").write_text(json.dumps({"model_type": "olmo3", "vocab_size": 300, "eos_token_id": None}))
    directory, told = export(ModelSettings(path=model))
    require_the_same(directory, ModelSettings(path=model))
    assert [line.partition(":")[0] for line in told] == ["eos_token_id"]


@pytest.mark.parametrize("form", ["directory", "directory of another class", "file"])
def test_a_tokenizer_of_the_settings(model: Path, tmp_path: Path, form: str) -> None:
    extra: dict[str, Any] = {"tokenizer_class": "GPT2Tokenizer"} if "class" in form else {}
    more = {"additional_special_tokens": ["<sep>"], "chat_template": "{{ bos_token }}other" + TURNS}
    other = write_model(tmp_path / "other", NAMES | extra | more)
    (other / "config.json").unlink()
    definition = json.loads((other / "tokenizer.json").read_text())
    vocabulary = definition["model"]["vocab"]
    vocabulary["!"], vocabulary["?"] = vocabulary["?"], vocabulary["!"]
    (other / "tokenizer.json").write_text(json.dumps(definition))
    (model / "special_tokens_map.json").write_text(json.dumps(NAMES | {"bos_token": "<sep>"}))
    (model / "vocab.json").write_text("{}")
    settings = ModelSettings(path=model, tokenizer=other / "tokenizer.json" if form == "file" else other)
    directory, told = export(settings)
    require_the_same(directory, settings)
    assert told[0].startswith("tokenizer: that of") and not any("warning" in line for line in told)
    assert not (directory / "vocab.json").exists()
    saved = json.loads((directory / "tokenizer_config.json").read_text())
    assert "extra_special_tokens" not in saved  # a list, at which 4.57 fails
    assert saved.get("additional_special_tokens") == (None if form == "file" else ["<sep>"])
    written = AutoTokenizer.from_pretrained(directory)
    assert (written.eos_token_id, written.pad_token_id) == (2, 0)
    assert written.bos_token == ("<sep>" if form == "file" else "<s>")


def test_a_sentencepiece_file_of_the_settings(model: Path, tmp_path: Path) -> None:
    pieces = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["What is 1+1?", "he is at 1", "user assistant"] * 50),
        model_writer=pieces,
        vocab_size=40,
        model_type="bpe",
        character_coverage=1.0,
        control_symbols=["<|im_start|>", "<|im_end|>"],
        minloglevel=2,
    )
    (tmp_path / "own.model").write_bytes(pieces.getvalue())
    settings = ModelSettings(path=model, tokenizer=tmp_path / "own.model")
    directory, told = export(settings)
    assert not (directory / "tokenizer.json").exists()
    if reads_as_sentencepiece(directory, pieces.getvalue()):
        require_the_same(directory, settings)
        assert not any("warning" in line for line in told)
    else:
        assert "warning: transformers reads" in told[-1]


def test_what_others_would_do_in_another_way_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ModelSettings(path=model, system_prompt="be good")
    monkeypatch.setattr("megatron_sead.prompts.export.exported_template", lambda tokenizer: "{{ messages[0].content }}")
    assert "warning: the chat template writes other prompts than the run's" in export(settings)[1][-1]


def test_a_directory_that_transformers_does_not_read_is_told_and_kept(model: Path) -> None:
    settings = ModelSettings(path=model)
    tokenizer = load_tokenizer(settings, "student")
    (model / "tokenizer.json").write_text("{}")
    told = export_tokenizer(tokenizer, settings, model)
    assert "warning: transformers does not read the tokenizer" in told[-1] and "\n" not in told[-1]
