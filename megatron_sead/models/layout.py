"""Does a layout divide a model? No torch here: a plan asks before there is any, and a model again when it is built."""

from __future__ import annotations

from typing import Any

from megatron_sead.config.stages import PipelineSplit, StageLayers, layers_by_stage
from megatron_sead.errors import UserError, kept


def check_layout(fields: dict[str, Any], source: str, *, tp: int, split: PipelineSplit) -> None:
    """Check that tensor-parallel ranks get equal shards of the model's matrices, and every stage layers.

    Args:
        fields: of the model's config.json.
        source: where it is, for messages.

    Raises:
        UserError: names the settings and which values are valid.
    """
    mistakes: list[str] = []
    for what, count in divided_by_tensor_parallelism(fields).items():
        if count % tp:
            mistakes.append(
                f"parallel.tensor_model_parallel_size={tp}: does not divide the {count} {what} of {source}; "
                f"valid are {', '.join(map(str, tensor_parallel_sizes(fields)))}"
            )
            break
    with kept(mistakes):
        stage_layers(fields, split, source)
    if mistakes:
        raise UserError("\n".join(mistakes))


def stage_layers(fields: dict[str, Any], split: PipelineSplit, source: str) -> StageLayers:
    """The layers of each chunk of each pipeline stage. Raises UserError as `layers_by_stage`."""
    head = _head_in_layers(fields) if split.is_student else 0.0
    return layers_by_stage(fields["num_layers"], split, source, head)


def _head_in_layers(fields: dict[str, Any]) -> float:
    """Products of the head beside those of a layer. The teacher's head, which the loss takes too, is left out."""
    width = fields["kv_channels"] * 2 * (fields["num_attention_heads"] + fields["num_query_groups"])
    return float(fields["padded_vocab_size"] / (width + 3 * fields["ffn_hidden_size"]))


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
