"""Names of the files of a model in Hugging Face's layout."""

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
