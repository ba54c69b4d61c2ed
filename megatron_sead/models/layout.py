"""Does a layout divide a model? No torch here: a plan asks before there is any, and a model again when it is built."""

from __future__ import annotations

from typing import Any

from megatron_sead.errors import UserError


def check_layout(fields: dict[str, Any], source: str, *, tp: int, pp: int, virtual: int | None) -> None:
    """Check that tensor-parallel ranks get equal shards of the model's matrices, and stages equal numbers of layers.

    Args:
        fields: of the model's config.json.
        source: where it is, for messages.

    Raises:
        UserError: names the settings and which values are valid.
    """
    mistakes = []
    for what, count in divided_by_tensor_parallelism(fields).items():
        if count % tp:
            mistakes.append(
                f"parallel.tensor_model_parallel_size={tp}: does not divide the {count} {what} of {source}; "
                f"valid are {', '.join(map(str, tensor_parallel_sizes(fields)))}"
            )
            break
    layers, stages = fields["num_layers"], pp * (virtual or 1)
    if layers % stages:
        valid = [n for n in range(1, layers + 1) if layers % n == 0]
        setting = f"parallel.pipeline_model_parallel_size={pp}"
        if virtual is not None:
            setting += f" x virtual_pipeline_model_parallel_size={virtual}"
        mistakes.append(
            f"{setting}: {stages} stages do not divide the {layers} layers of {source}; valid are "
            f"{', '.join(map(str, valid))} stages in all"
        )
    if mistakes:
        raise UserError("\n".join(mistakes))


def divided_by_tensor_parallelism(fields: dict[str, Any]) -> dict[str, int]:
    """What every tensor-parallel rank has an equal share of, and how many there are."""
    return {
        "attention heads": fields["num_attention_heads"],
        "key/value heads": fields["num_query_groups"],
        "feed-forward rows": fields["ffn_hidden_size"],
        "padded vocabulary rows": fields["padded_vocab_size"],
    }


def tensor_parallel_sizes(fields: dict[str, Any]) -> list[int]:
    """Sizes that divide the model."""
    counts = divided_by_tensor_parallelism(fields).values()
    return [n for n in range(1, min(counts) + 1) if all(count % n == 0 for count in counts)]
