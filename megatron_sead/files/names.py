"""Names of the files of a model in Hugging Face's layout."""

from pathlib import Path

TOKENIZER_SETTINGS = "tokenizer_config.json"
# What a tokenizer may consist of
TOKENIZER_FILES = (
    "tokenizer.json",
    TOKENIZER_SETTINGS,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)
INDEX = "model.safetensors.index.json"


def no_directory(place: Path) -> str:
    """Why a path is no directory, in words."""
    return "is a file; must be a directory" if place.exists() else "no such directory"
