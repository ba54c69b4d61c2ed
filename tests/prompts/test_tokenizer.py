"""Where stop tokens, templates and padding come from, for each form that a tokenizer may have."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
from transformers import AutoTokenizer

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.prompts.tokenizer import load_tokenizer

pytestmark = pytest.mark.transformers_lane


@pytest.fixture
def directory(tiny_olmo3: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_olmo3, tmp_path / "model"))


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["1 + 1 = 2", "2 + 3 = 5", "what is the sum"] * 50),
        model_writer=model,
        vocab_size=40,
        model_type="bpe",
        character_coverage=1.0,
        control_symbols=["<|turn|>"],
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    path.write_bytes(model.getvalue())
    return path


def change_json(path: Path, **changes: object) -> None:
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def test_text_goes_both_ways_without_added_tokens(tiny_olmo3: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(path=tiny_olmo3), "student")
    assert tokenizer.decode(tokenizer.encode("boxed 10 ")) == "boxed 10 "
    assert len(tokenizer.encode("10")) == 1  # merged
    assert tokenizer.decode([*tokenizer.encode("10"), 1, 3]) == "10"
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(tiny_olmo3))
    assert (tokenizer.pad_token_id, tokenizer.context_length) == (0, 128)


def test_a_tokenizer_that_adds_tokens_adds_none_here(directory: Path) -> None:
    definition = json.loads((directory / "tokenizer.json").read_text())
    begin = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    definition["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|im_start|>": {"id": "<|im_start|>", "ids": [2], "tokens": ["<|im_start|>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(definition))
    assert AutoTokenizer.from_pretrained(directory).encode("1")[0] == 2
    assert 2 not in load_tokenizer(ModelSettings(path=directory), "student").encode("1")


def test_stop_tokens_by_rank_of_their_source(directory: Path) -> None:
    def stops(**settings: object) -> tuple[tuple[int, ...], str]:
        tokenizer = load_tokenizer(ModelSettings(path=directory, **settings), "student")  # type: ignore[arg-type]
        return tokenizer.stop_token_ids, Path(tokenizer.stop_source).name

    assert stops(stop_token_ids=[5]) == ((5,), "student.stop_token_ids")
    assert stops() == ((1, 3), "generation_config.json")
    change_json(directory / "generation_config.json", eos_token_id=3)
    assert stops() == ((3,), "generation_config.json")
    (directory / "generation_config.json").unlink()
    change_json(directory / "config.json", eos_token_id=2)
    assert stops() == ((2,), "config.json")
    change_json(directory / "config.json", eos_token_id=None)
    assert stops() == ((1,), "model")  # the tokenizer's own


def test_chat_template_by_rank_of_its_source(directory: Path, tmp_path: Path) -> None:
    def rendered(**settings: object) -> str:
        tokenizer = load_tokenizer(ModelSettings(path=directory, **settings), "student")  # type: ignore[arg-type]
        return tokenizer.render("hi")

    change_json(directory / "tokenizer_config.json", chat_template="field {{ messages[-1].content }}")
    assert rendered() == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"  # chat_template.jinja
    override = tmp_path / "own.jinja"
    override.write_text("own {{ messages[-1].content }}{{ eos_token }}")
    assert rendered(chat_template=override) == "own hi<|endoftext|>"
    (directory / "chat_template.jinja").unlink()
    assert rendered() == "field hi"


def test_system_prompt_comes_first(tiny_olmo3: Path) -> None:
    tokenizer = load_tokenizer(ModelSettings(path=tiny_olmo3, system_prompt="be good"), "student")
    assert tokenizer.render("hi").startswith("<|im_start|>system\nbe good<|im_end|>\n<|im_start|>user\nhi")


def test_bare_tokenizers_file(directory: Path) -> None:
    file = directory / "tokenizer.json"
    tokenizer = load_tokenizer(ModelSettings(path=directory, tokenizer=file), "teacher")
    whole = load_tokenizer(ModelSettings(path=directory), "teacher")
    assert tokenizer.encode("1+10=boxed<|im_end|>") == whole.encode("1+10=boxed<|im_end|>")
    # the file itself names neither; they come from the model directory
    assert (tokenizer.stop_token_ids, tokenizer.pad_token_id) == ((1, 3), 0)
    assert tokenizer.render("hi") == whole.render("hi")


def test_sentencepiece_file(directory: Path, sentencepiece_file: Path) -> None:
    template = directory / "turns.jinja"
    template.write_text("<|turn|>{{ messages[-1].content }}</s>")
    (directory / "generation_config.json").unlink()
    change_json(directory / "config.json", eos_token_id=None)
    settings = ModelSettings(path=directory, tokenizer=sentencepiece_file, chat_template=template)
    tokenizer = load_tokenizer(settings, "student")
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert tokenizer.stop_token_ids == (model.eos_id(),)
    ids = tokenizer.encode(tokenizer.render("1 + 1"))
    assert ids == (model.piece_to_id("<|turn|>"), *model.encode("1 + 1"), model.eos_id())
    assert tokenizer.decode(ids) == "1 + 1"
    assert tokenizer.vocab_size == 40


def test_what_cannot_be_read_is_named(directory: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"tokenizer": tmp_path / "nowhere"}, r"student\.tokenizer=.*nowhere: no tokenizer there"),
        ({"chat_template": tmp_path / "no.jinja"}, r"student\.chat_template=.*no\.jinja: cannot be read"),
        ({"stop_token_ids": [999]}, r"student\.stop_token_ids: stop token 999 is not among"),
        ({"tokenizer": directory / "config.json"}, r"config\.json: not a tokenizer"),
    ]
    for settings, message in cases:
        with pytest.raises(UserError, match=message):
            load_tokenizer(ModelSettings(path=directory, **settings), "student")  # type: ignore[arg-type]


def test_no_chat_template_is_told_when_one_is_needed(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()
    tokenizer = load_tokenizer(ModelSettings(path=directory), "student")
    with pytest.raises(UserError, match=r"has no chat template; set student\.chat_template"):
        tokenizer.render("hi")
    broken = directory / "broken.jinja"
    broken.write_text("{% if %}")
    tokenizer = load_tokenizer(ModelSettings(path=directory, chat_template=broken), "student")
    with pytest.raises(UserError, match=r"broken\.jinja: the chat template fails"):
        tokenizer.render("hi")


def test_nothing_says_where_a_response_ends(directory: Path) -> None:
    (directory / "generation_config.json").unlink()
    change_json(directory / "config.json", eos_token_id=None)
    with pytest.raises(UserError, match=r"set student\.stop_token_ids"):
        load_tokenizer(ModelSettings(path=directory, tokenizer=directory / "tokenizer.json"), "student")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": None}, "vocab_size is missing"),
        ({"hidden_size": "64"}, "hidden_size='64': must be a whole number"),
    ],
)
def test_a_config_that_is_at_fault_is_told_and_not_the_tokenizer(
    change: dict[str, object], told: str, directory: Path
) -> None:
    config = directory / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(UserError) as caught:
        load_tokenizer(ModelSettings(path=directory), "student")
    assert str(caught.value).startswith(f"{directory / 'config.json'}: {told}")


@pytest.mark.parametrize("kind", ["directory", "cutting and padding", "file", "sentencepiece"])
def test_many_texts_have_the_tokens_that_each_has_alone(directory: Path, sentencepiece_file: Path, kind: str) -> None:
    definition = json.loads((directory / "tokenizer.json").read_text())
    if kind == "cutting and padding":
        cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
        pad = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
        definition |= {"truncation": cut, "padding": pad | {"pad_to_multiple_of": None}}
        (directory / "tokenizer.json").write_text(json.dumps(definition))
    place = {"file": directory / "tokenizer.json", "sentencepiece": sentencepiece_file}.get(kind)
    settings = ModelSettings(path=directory, tokenizer=place, stop_token_ids=[1])
    texts = ["1 + 1 = 2", "", "<|im_start|>user\n10<|im_end|>", "é\u2028 漢 \x00", " 2 + 3" * 200, "1 + 1 = 2", "what "]
    together = load_tokenizer(settings, "student").encode_all(texts)
    assert together == [load_tokenizer(settings, "student").encode(text) for text in texts]
    assert len(together[4]) > 200 and together[1] == ()
    assert load_tokenizer(settings, "student").encode_all([]) == []


def test_texts_are_encoded_alike_by_the_same_tokenizer_alone(directory: Path, sentencepiece_file: Path) -> None:
    def encodes_alike(*settings: ModelSettings) -> bool:
        one, other = (load_tokenizer(model, "student").codec for model in settings)
        return one.encodes_as(other)

    model = ModelSettings(path=directory)
    other = Path(shutil.copytree(directory, directory.with_name("other")))
    pieces = ModelSettings(path=directory, tokenizer=sentencepiece_file, stop_token_ids=[1])
    assert encodes_alike(model, ModelSettings(path=other)) and encodes_alike(pieces, pieces)
    assert not encodes_alike(model, pieces) and not encodes_alike(pieces, model)
    definition = json.loads((other / "tokenizer.json").read_text())
    definition["added_tokens"][-1]["lstrip"] = not definition["added_tokens"][-1]["lstrip"]
    (other / "tokenizer.json").write_text(json.dumps(definition))
    assert not encodes_alike(model, ModelSettings(path=other))
