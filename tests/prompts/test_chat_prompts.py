"""A chat prompt's tokens are those of transformers, whatever a template asks for and however a tokenizer is written."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer

from megatron_sead.config.prompts import PromptSettings
from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.dataset import stream_prompts
from megatron_sead.prompts.pair import check_pair
from megatron_sead.prompts.tokenizer import load_tokenizer

pytestmark = pytest.mark.transformers_lane

SPECIAL = ("<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<unk>", "<sep>")
TURNS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEMPLATES = {
    "bos": "{{ bos_token }}" + TURNS,
    "every special token": "{{ bos_token }}{{ unk_token }}{{ sep_token }}{{ pad_token }}{{ eos_token }}" + TURNS,
    "stripped": "{{- bos_token -}}\n  " + TURNS,
    "a test of bos": "{% if bos_token is defined and bos_token %}{{ bos_token }}{% else %}none{% endif %}" + TURNS,
    "tools, documents": "{% if tools is not none %}T{% endif %}{% if documents is defined %}{{ documents }}{% endif %}"
    + TURNS,
    "thinking": "{% if enable_thinking is defined and not enable_thinking %}no{% endif %}" + TURNS,
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "a date": "{% if date is not defined %}{% set date = strftime_now('%Y') %}{% endif %}{{ date }}" + TURNS,
    "its own system prompt": "{% if messages[0].role != 'system' %}<|im_start|>system\nShort.<|im_end|>\n{% endif %}"
    + TURNS,
    "trimmed": "{% for m in messages %}{{ m['content'] | trim }}{{ eos_token }}{% endfor %}",
    "macros": "{%- macro turn(m) -%}{{ bos_token }}{{ m.content }}{%- endmacro -%}{% set n = namespace(i=0) %}"
    "{% for m in messages %}{{ turn(m) }}{% set n.i = n.i + 1 %}{% endfor %}{{ n.i }}\n\n",
}


def added(content: str) -> dict[str, Any]:
    flags = dict.fromkeys(("lstrip", "rstrip", "normalized", "single_word"), False)
    return {"__type": "AddedToken", "content": content, "special": True} | flags


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
# tokenizer_config.json and special_tokens_map.json; None: no such file
FORMS: dict[str, tuple[dict[str, Any] | None, dict[str, Any] | None]] = {
    "strings": (NAMES | {"sep_token": "<sep>"}, None),
    "AddedToken": ({name: added(token) for name, token in NAMES.items()}, None),
    "the map alone": ({}, NAMES | {"eos_token": {"content": "</s>", "lstrip": True}}),
    "both, not the same": (NAMES, NAMES | {"bos_token": "<sep>"}),
    "null": ({"bos_token": None, "eos_token": "</s>", "pad_token": None}, None),
    "nothing named": (None, None),
    "more tokens": ({**NAMES, "additional_special_tokens": ["<|im_start|>"], "image_token": "<sep>"}, None),
    "adds BOS, and a space": ({**NAMES, "add_bos_token": True, "add_prefix_space": True}, None),
    "PreTrainedTokenizerFast": ({**NAMES, "tokenizer_class": "PreTrainedTokenizerFast"}, None),
    "GPT2Tokenizer": ({**NAMES, "tokenizer_class": "GPT2Tokenizer"}, None),
    "LlamaTokenizer": ({**NAMES, "tokenizer_class": "LlamaTokenizer"}, None),
}


def write_model(directory: Path, settings: dict[str, Any] | None, special: dict[str, Any] | None = None) -> Path:
    """A byte-level tokenizer that takes spaces around special tokens, and puts BOS before a text by itself."""
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, lstrip=True, rstrip=t == "</s>", normalized=False) for t in SPECIAL])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text(json.dumps({"model_type": "olmo3", "vocab_size": 300, "eos_token_id": 2}))
    for name, content in (("tokenizer_config.json", settings), ("special_tokens_map.json", special)):
        if content is not None:
            (directory / name).write_text(json.dumps(content))
    return directory


def transformers_ids(directory: Path, system: str | None, text: str) -> list[int]:
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"])


def reads_as_sentencepiece(directory: Path, model: bytes) -> bool:
    """Whether transformers splits a text as sentencepiece does: 5.16 puts no space before one, later versions do."""
    ids = AutoTokenizer.from_pretrained(directory).encode("1 + 1", add_special_tokens=False)
    return bool(ids == sentencepiece.SentencePieceProcessor(model_proto=model).encode("1 + 1"))


def our_ids(directory: Path, system: str | None, text: str, role: str = "student") -> list[int]:
    tokenizer = load_tokenizer(ModelSettings(path=directory, system_prompt=system), role)
    return list(tokenizer.encode(tokenizer.render(text)))


@pytest.mark.parametrize("template", TEMPLATES)
def test_tokens_are_those_of_transformers(tmp_path: Path, template: str) -> None:
    for number, (settings, special) in enumerate(FORMS.values()):
        directory = write_model(tmp_path / str(number), settings, special)
        (directory / "chat_template.jinja").write_text(TEMPLATES[template])
        texts = ((None, " he said </s> hello\n", "student"), (" Be good.\n", "\n\n1", "teacher"))
        for system, text, role in texts:
            assert our_ids(directory, system, text, role) == transformers_ids(directory, system, text), settings


def test_begins_with_bos_once_through_a_prompt_file(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", NAMES | {"chat_template": TEMPLATES["bos"]})
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": " he? ", "answer": "1"}) + "\n")
    student, teacher = (load_tokenizer(ModelSettings(path=directory), role) for role in ("student", "teacher"))
    prompts = list(stream_prompts(PromptSettings(path=str(tmp_path / "prompts.jsonl")), student, teacher))
    assert list(prompts[0].student_token_ids) == transformers_ids(directory, None, " he? ")
    assert prompts[0].student_token_ids[:2] == (1, 3) and prompts[0].teacher_token_ids == prompts[0].student_token_ids
    plain = list(stream_prompts(PromptSettings(path=str(tmp_path / "prompts.jsonl"), template="plain"), student))
    assert plain[0].student_token_ids == student.encode(" he? ") and 1 not in plain[0].student_token_ids
    settings = ModelSettings(path=directory)
    told = {aspect.name: aspect for aspect in check_pair(student, teacher, settings, settings, "plain").aspects}
    assert told["put around text by its tokenizer"].student == "<s>"


WAYS = {
    "a list of named ones": {"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}]},
    "a dictionary": {"chat_template": {"default": "D", "rag": "R"}},
    "text": {"chat_template": "D"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "files", [(), ("chat_template.jinja",), ("chat_template.jinja", "additional_chat_templates/rag.jinja")]
)
def test_the_template_is_the_one_that_transformers_takes(tmp_path: Path, way: str, files: tuple[str, ...]) -> None:
    text = json.dumps(NAMES | WAYS[way]).replace('"D"', '"D{{ messages[0].content }}"')
    directory = write_model(tmp_path / "model", json.loads(text))
    for name in files:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{name} {{{{ messages[0].content }}}}")
    assert our_ids(directory, None, "x") == transformers_ids(directory, None, "x")


def test_a_tokenizer_elsewhere_comes_with_its_template(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", NAMES)
    (model / "chat_template.jinja").write_text("model" + TEMPLATES["bos"])
    other = write_model(tmp_path / "other", NAMES | {"chat_template": "other" + TEMPLATES["bos"]})
    (other / "config.json").unlink()
    tokenizer = load_tokenizer(ModelSettings(path=model, tokenizer=other), "student")
    assert list(tokenizer.encode(tokenizer.render("x"))) == transformers_ids(other, None, "x")
    # A bare file has neither: both are the model's
    tokenizer = load_tokenizer(ModelSettings(path=model, tokenizer=other / "tokenizer.json"), "student")
    assert list(tokenizer.encode(tokenizer.render("x"))) == transformers_ids(model, None, "x")


def test_named_templates_without_a_default_are_told(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", NAMES | {"chat_template": {"rag": "R", "tool_use": "T"}})
    with pytest.raises(UserError, match=r"nothing says which of rag, tool_use is meant; set student\.chat_template"):
        our_ids(directory, None, "x")


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS,
            "no system",
        ),
        ("{{ messages[-1].content }}", "leaves a system message out"),
    ],
)
def test_a_template_without_system_messages_is_told(tmp_path: Path, template: str, told: str) -> None:
    directory = write_model(tmp_path / "model", NAMES | {"chat_template": template})
    assert our_ids(directory, None, "x") == transformers_ids(directory, None, "x")
    with pytest.raises(UserError, match=f"teacher.system_prompt='be good': .*{told}") as caught:
        our_ids(directory, "be good", "x", "teacher")
    assert "\n" not in str(caught.value)


def test_a_template_that_wants_a_list_of_parts_is_told(tmp_path: Path) -> None:
    parts = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}end"
    directory = write_model(tmp_path / "model", NAMES | {"chat_template": parts})
    with pytest.raises(UserError, match="leaves out the user's text"):
        our_ids(directory, None, "x")


def test_a_mark_at_the_beginning_of_a_template_file_is_not_in_the_prompts(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "model", NAMES)
    (tmp_path / "own.jinja").write_text("{{ bos_token }}{{ messages[0].content }}", encoding="utf-8-sig")
    settings = ModelSettings(path=directory, chat_template=tmp_path / "own.jinja")
    assert load_tokenizer(settings, "student").render("x") == "<s>x"


@pytest.mark.parametrize("settings", [None, NAMES | {"tokenizer_class": "LlamaTokenizer", "legacy": False}])
def test_a_sentencepiece_directory(tmp_path: Path, settings: dict[str, Any] | None) -> None:
    model = io.BytesIO()
    lines = ["1 + 1 = 2", "2 + 3 = 5", "what is the sum"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        vocab_size=40,
        model_type="bpe",
        character_coverage=1.0,
        control_symbols=["<|turn|>"],
        minloglevel=2,
    )
    directory = write_model(tmp_path / "model", settings)
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    (directory / "chat_template.jinja").write_text("{{ bos_token }}<|turn|>{{ messages[0].content }}{{ eos_token }}")
    ids = our_ids(directory, None, "1 + 1")
    assert (ids[0], ids[-1]) == (1, 2)
    if settings is not None or reads_as_sentencepiece(directory, model.getvalue()):
        assert ids == transformers_ids(directory, None, "1 + 1")
    else:
        assert ids == [1, 3, *sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).encode("1 + 1"), 2]
    bare = ModelSettings(path=directory, tokenizer=directory / "tokenizer.model")
    tokenizer = load_tokenizer(bare, "student")
    assert tokenizer.render("1") == "<s><|turn|>1</s>"
    assert tokenizer.decode([*tokenizer.encode("1 + 1"), 299]) == "1 + 1"  # a row that only pads the embedding


def test_the_olmo_tokenizer(data_folder: Path, tmp_path: Path) -> None:
    """OLMo-2's chat prompts begin with its BOS, which is its end of text."""
    directory = tmp_path / "model"
    directory.mkdir()
    shutil.copy(data_folder / "tokenizer_dolma2" / "allenai_dolma2.json", directory / "tokenizer.json")
    end = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
    }
    template = "{{ bos_token }}{% for m in messages %}<|user|>\n{{ m.content }}\n{% endfor %}<|assistant|>\n"
    settings = {**end, "tokenizer_class": "GPT2Tokenizer", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = {"model_type": "olmo2", "vocab_size": 100352, "eos_token_id": 100257, "pad_token_id": 100277}
    (directory / "config.json").write_text(json.dumps(config))
    ids = our_ids(directory, None, " What is $1+1$?\n")
    assert ids == transformers_ids(directory, None, " What is $1+1$?\n")
    assert ids[0] == 100257


MARKED = {  # a template, and texts that it has written or that others wrote with a tokenizer that adds no BOS
    "special tokens": (
        TEMPLATES["bos"],
        ["<s><|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n", "<|im_start|>user\n1+1=<|im_end|>"],
    ),
    "a system prompt": (
        TEMPLATES["its own system prompt"],
        ["<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant"],
    ),
    "words": (
        "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}<|assistant|>\n",
        ["<|user|>\n1+1=\n<|assistant|>\n", "<|system|>\nShort.\n<|user|>\n1+1=\n<|assistant|>", "<s><|user|>\n1+1="],
    ),
    "brackets": ("{{ bos_token }}[INST] {{ messages[-1]['content'] }} [/INST]", ["[INST] 1+1= [/INST]", "<s>[INST] 1"]),
    "none": ("{{ messages[-1]['content'] }}", []),
    "a number": (TEMPLATES["macros"], ["<s>1+1=1"]),
}


def with_template(directory: Path, template: str) -> Path:
    write_model(directory, *FORMS["strings"])
    (directory / "chat_template.jinja").write_text(template)
    return directory


@pytest.mark.parametrize("kind", MARKED)
def test_prompts_that_are_rendered_already_are_warned_of_once(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template, rendered = MARKED[kind]
    directory = with_template(tmp_path / "model", template)
    problems = ["1+1=", "user: 1+1=", "a <|im_end|> b", "What is 2-1", "f(1) = [1]", "assistant"]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "answer": 2}) + "\n" for text in [*problems, *rendered]))
    tokenizer = load_tokenizer(ModelSettings(path=directory), "student")
    assert len(list(stream_prompts(PromptSettings(path=str(path)), tokenizer))) == len(problems) + len(rendered)
    told = [record.getMessage() for record in caplog.records if "prompts.template=plain" in record.getMessage()]
    count = f"{len(rendered)} prompt{'s' if len(rendered) > 1 else ''} with a beginning or an end that the student's"
    first = f"the first at {path}, line {len(problems) + 1};"
    assert len(told) == bool(rendered) and all(count in line and first in line for line in told)
    assert list(stream_prompts(PromptSettings(path=str(path), template="plain"), tokenizer))
    assert len([r for r in caplog.records if "prompts.template=plain" in r.getMessage()]) == bool(rendered)


def test_a_rendered_prompt_of_the_teachers_own_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = with_template(tmp_path / "model", TEMPLATES["bos"])
    path, turn = tmp_path / "prompts.jsonl", "<|im_start|>user\n1+1= is 2<|im_end|>\n"
    messages = [{"role": "user", "content": "1+1="}]
    path.write_text(json.dumps({"prompt": messages, "hint": turn, "answer": 2}) + "\n")
    models = [load_tokenizer(ModelSettings(path=directory), role) for role in ("student", "teacher")]
    list(stream_prompts(PromptSettings(path=str(path)), *models, teacher_prompt_field="hint"))
    (told,) = [record.getMessage() for record in caplog.records if "prompts.template=plain" in record.getMessage()]
    assert "1 prompt with a beginning or an end that the teacher's chat template writes" in told
