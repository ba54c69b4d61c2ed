"""The pair's tokenizer: byte-level BPE in OLMo's manner, with digits, signs and ``\\boxed{`` as single tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Sequence, Split
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD = "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
PIECES = Regex(r"\\boxed\{|\d|[-+*=;}] ?")  # everything between two pieces may become one token

# OLMo-3's turns; as there, the last answer ends with the end-of-text token in place of <|im_end|>.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] }}
{{- eos_token if loop.last and message['role'] == 'assistant' else '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerBase:
    """A tokenizer over all bytes whose merges come from ``texts``, until no pair of tokens is left in them."""
    tokenizer = Tokenizer(BPE())
    # Splitting comes first: BPE merges inside a piece only, so no merge can cross a digit or a sign.
    tokenizer.pre_tokenizer = Sequence(
        [Split(PIECES, behavior="isolated"), ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=512,
        min_frequency=2,
        initial_alphabet=ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True) for token in (END_OF_TEXT, START_OF_TURN, END_OF_TURN, PAD)],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _with_template(tokenizer)


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """A Hugging Face tokenizer directory, or a JSON file of the ``tokenizers`` library, which gets our chat template.

    Raises ValueError when it cannot be read or lacks ``<|endoftext|>``, ``<|pad|>`` (JSON) or eos and pad (directory).
    """
    if path.is_dir():
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if tokenizer.eos_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(f"{path}: the tokenizer names no eos_token or no pad_token")
        return tokenizer
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{path}: not a file of the tokenizers library ({error})") from error
    for token in (END_OF_TEXT, PAD):
        if tokenizer.token_to_id(token) is None:
            raise ValueError(f"{path}: has no token {token}")
    return _with_template(tokenizer)


def stop_token_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end a response: the end of the text and, where there is one, the end of a turn."""
    end_of_turn = tokenizer.get_vocab().get(END_OF_TURN)
    return [tokenizer.eos_token_id] + ([] if end_of_turn is None else [end_of_turn])


def _with_template(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
