"""Writes a model with the tokenizer, chat template, system prompt and stop tokens of its run.

Whoever serves the directory then gives the model the prompts that it was trained on, without a setting of ours.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from megatron_sead.config.run import ModelSettings
from megatron_sead.errors import UserError
from megatron_sead.files.names import TOKENIZER_FILES, TOKENIZER_SETTINGS
from megatron_sead.models.token_ids import portable_tokenizer, read_json, stop_token_ids
from megatron_sead.prompts.codecs import HuggingFaceCodec, SentencePieceCodec, one_line
from megatron_sead.prompts.tokenizer import PROBE, ModelTokenizer, load_tokenizer

# Places of other chat templates than chat_template.jinja
OTHER_TEMPLATES = ("chat_template.json", "additional_chat_templates")
PROBES = (PROBE, "  1\n\n = 2 ")  # spaces and newlines at both ends


def export_tokenizer(tokenizer: ModelTokenizer, settings: ModelSettings, directory: Path) -> list[str]:
    """Change a model's directory to the tokenizer, template and stop tokens that a run used, where those are others.

    Args:
        tokenizer: the run's, of `settings`.
        directory: config.json and the tokenizer files of the model that the run began with, all of them copies.

    Returns:
        A line for each change, and for what other software would still do in another way.

    Raises:
        UserError: the tokenizer cannot be written.
        OSError: the disk refuses.
    """
    told = [] if settings.tokenizer is None else [_carry_tokenizer(tokenizer, directory)]
    told += _carry_stop_tokens(tokenizer, directory)  # before the rest, which reads the directory whole
    told += _carry_template(tokenizer, directory)
    return told + _differences(tokenizer, directory)


def _carry_tokenizer(tokenizer: ModelTokenizer, directory: Path) -> str:
    for name in TOKENIZER_FILES:
        _remove(directory / name)
    codec = tokenizer.codec
    if isinstance(codec, SentencePieceCodec):
        shutil.copyfile(codec.path, directory / "tokenizer.model")
        named = {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": False, "add_eos_token": False}
        _write_json(directory / TOKENIZER_SETTINGS, named | codec.special_tokens)
    elif isinstance(codec, HuggingFaceCodec):
        try:
            codec.backend.save_pretrained(directory)
        except Exception as error:  # the tokenizers library raises bare Exception
            raise UserError(f"{tokenizer.path}: the tokenizer cannot be written: {one_line(error)}") from None
        saved = read_json(directory / TOKENIZER_SETTINGS)
        # This class takes tokenizer.json as it is, in every version; others build parts of it anew
        saved |= {"tokenizer_class": "PreTrainedTokenizerFast"}
        kept = {key: saved[key] for key in saved if key not in ("is_local", "local_files_only")}  # of where it was
        _write_json(directory / TOKENIZER_SETTINGS, portable_tokenizer(kept))
    return f"tokenizer: that of {tokenizer.path}, in place of the model's own"


def _carry_template(tokenizer: ModelTokenizer, directory: Path) -> list[str]:
    wanted = exported_template(tokenizer)
    if wanted is None or wanted == _chat_template_in(directory):
        return []
    (directory / "chat_template.jinja").write_text(wanted, encoding="utf-8")
    told = [f"chat template: that of {tokenizer.template_source}, in chat_template.jinja"]
    if tokenizer.system_prompt is not None:
        told.append(
            f"chat template: begins a conversation that has no system message with {tokenizer.role}.system_prompt, "
            f"{tokenizer.system_prompt[:40]!r}"
        )
    settings = read_json(directory / TOKENIZER_SETTINGS)
    if settings.pop("chat_template", None) is not None:
        _write_json(directory / TOKENIZER_SETTINGS, settings)
    for name in OTHER_TEMPLATES:
        if _remove(directory / name):
            told.append(f"left out: {name}, whose templates the run did not use")
    return told


def _chat_template_in(directory: Path) -> str | None:
    """As transformers finds it; None also where it cannot read the tokenizer, which is told at the end."""
    try:
        return load_tokenizer(ModelSettings(path=directory), "student").chat_template
    except UserError:
        return None


def exported_template(tokenizer: ModelTokenizer) -> str | None:
    """The run's chat template, with its system prompt where a conversation brings none of its own."""
    template, system_prompt = tokenizer.chat_template, tokenizer.system_prompt
    if template is None or system_prompt is None:
        return template
    # Jinja reads JSON's escapes. The newline after the block is not written (transformers trims it), and lets the
    # template begin at the beginning of a line, as it did.
    message = f"{{'role': 'system', 'content': {json.dumps(system_prompt, ensure_ascii=False)}}}"
    return (
        "{% if not messages or messages[0]['role'] != 'system' %}"
        f"{{% set messages = [{message}] + messages %}}"
        "{% endif %}\n" + template
    )


def _carry_stop_tokens(tokenizer: ModelTokenizer, directory: Path) -> list[str]:
    stop = tokenizer.stop_token_ids
    try:
        named = stop_token_ids(ModelSettings(path=directory), tokenizer.role)
    except UserError:  # no token ids, for which student.stop_token_ids made up
        named = None
    told = []
    file = directory / "generation_config.json"
    # Whoever reads this file reads no config.json for it, though it name no token
    silent = file.is_file() and not isinstance(ids := read_json(file).get("eos_token_id"), int) and not ids
    if named is None or set(named[0]) != set(stop) or silent:
        _write_json(file, read_json(file) | {"eos_token_id": list(stop)})
        file = directory / "config.json"
        _write_json(file, read_json(file) | {"eos_token_id": stop[0] if len(stop) == 1 else list(stop)})
        instead = "" if named is None or silent else f", in place of {list(named[0])}"
        told.append(f"eos_token_id: {list(stop)} of {tokenizer.stop_source}{instead}")
    own = tokenizer.codec.eos_token_id
    if told and own is not None and own not in stop:
        told.append(
            f"note: the tokenizer's own eos_token, {tokenizer.token_names[own]!r} ({own}), is none of these; "
            "vLLM stops there as well"
        )
    return told


def _differences(tokenizer: ModelTokenizer, directory: Path) -> list[str]:
    """What the directory, read as any model's is, does not do as the run did."""
    without = "the run's prompts are its tokens only as the run made them"
    try:
        written = load_tokenizer(ModelSettings(path=directory), tokenizer.role)
    except UserError as error:  # no reason to lose a model that is trained
        return [f"warning: transformers does not read the tokenizer ({error}); {without}"]
    if set(written.stop_token_ids) != set(tokenizer.stop_token_ids):
        return [f"warning: stops on {list(written.stop_token_ids)}, not on {list(tokenizer.stop_token_ids)}"]
    if any(written.encode(text) != tokenizer.encode(text) for text in PROBES):
        return [f"warning: transformers reads {tokenizer.path} in another way than the run did; {without}"]
    try:
        wanted = [tokenizer.encode(tokenizer.render(text)) for text in PROBES]
    except UserError:
        return []  # no usable template: the run's prompts were plain
    try:
        rendered = [written.encode(written.render(text)) for text in PROBES]
    except UserError as error:
        return [f"warning: {error}; {without}"]
    return [] if rendered == wanted else [f"warning: the chat template writes other prompts than the run's; {without}"]


def _remove(path: Path) -> bool:
    if path.is_dir():
        shutil.rmtree(path)
        return True
    existed = path.exists()
    path.unlink(missing_ok=True)
    return existed


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
