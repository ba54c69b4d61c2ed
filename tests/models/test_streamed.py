"""A reference with one layer in memory says what transformers says with all of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from megatron_sead.models import streamed
from megatron_sead.models.tensor_files import TensorFiles
from tests.models.families import FAMILIES, make_model

TOKENS = [7 * i % 299 for i in range(100)]


@pytest.mark.transformers_lane
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_those_of_the_whole_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp32, with a row of padding; and in bf16, where transformers rounds logits that this reference does not."""
    for name, value in {"MLP_TOKENS": 33, "HEAD_TOKENS": 29, "HEAD_ROWS": 77}.items():
        monkeypatch.setattr(streamed, name, value)
    directory = make_model(family, tmp_path / "model")
    for dtype, bound, vocab_size in ((torch.float32, 1e-5, 299), (torch.bfloat16, 3e-2, None)):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        with torch.no_grad():
            logits = model(torch.tensor([TOKENS])).logits[0, :-1, :vocab_size].float()
        expected = logits.log_softmax(-1).gather(1, torch.tensor(TOKENS)[1:, None])[:, 0]
        device = torch.device("cpu")
        found = streamed.streamed_log_probs(directory, TOKENS, dtype=dtype, device=device, vocab_size=vocab_size)
        assert (found - expected).abs().max() < bound


def test_a_layers_weights_come_when_those_of_the_one_before_have_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, events = make_model("olmo3", tmp_path / "model"), list[str]()
    model = streamed._empty_model(directory, torch.float32)
    monkeypatch.setattr(streamed, "_empty_model", lambda *_: model)

    def read(name: str) -> torch.Tensor:
        if name.startswith("model.layers."):
            events.append(name.split(".")[2])
        with TensorFiles(directory) as files:
            return files.read(name)

    def after_layer(layer: int, hidden: torch.Tensor) -> None:
        events.append(f"after {layer}")
        assert all(parameter.is_meta for parameter in model.layers.parameters())
        assert hidden.shape == (1, len(TOKENS), 96)

    tokens = torch.tensor(TOKENS)
    with torch.no_grad():
        streamed.streamed_hidden_states(directory, read, tokens, dtype=torch.float32, after_layer=after_layer)
    assert list(dict.fromkeys(events)) == [event for n in range(4) for event in (f"{n}", f"after {n}")]
