"""From a Hugging Face directory to this rank's model chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from megatron_sead.config.stages import StageLayers
from megatron_sead.models.config import ModelConfig
from megatron_sead.models.decoder import Decoder
from megatron_sead.models.family import Implementation, family_of, read_config_fields
from megatron_sead.models.huggingface import OpenWeights, check_huggingface_weights, load_huggingface_weights
from megatron_sead.models.layers import AttentionBackend
from megatron_sead.models.layout import check_layout, stage_layers
from megatron_sead.models.tensor_files import TensorFiles
from megatron_sead.parallel.context import ParallelContext

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build_model(
    hf_dir: Path,
    parallel: ParallelContext,
    *,
    precision: Literal["fp32", "bf16"],
    sequence_parallel: bool = False,
    sequence_parallel_output: bool = False,
    recompute_granularity: Literal["full", "selective"] | None = None,
    attention_backend: AttentionBackend = "torch",
    load_weights: bool = True,
    open_weights: OpenWeights = TensorFiles,
) -> list[Decoder]:
    """This rank's chunks of the model in `hf_dir`, one but for virtual pipeline stages. Collective.

    Parameters are made in the precision asked for: no Float16Module is needed, and final hidden states come out in
    that precision.

    Args:
        hf_dir: ``config.json`` and safetensors.
        sequence_parallel_output: under sequence parallelism each rank hands out its shard of the final hidden states.
        load_weights: False leaves Megatron's random initial weights.
        open_weights: where they are read from, if not from the directory's files.

    Raises:
        UserError: another architecture, a layout that does not divide it, or a damaged directory.
    """
    config, implementation = model_config(
        hf_dir,
        parallel,
        precision=precision,
        sequence_parallel=sequence_parallel,
        sequence_parallel_output=sequence_parallel_output,
        recompute_granularity=recompute_granularity,
    )
    if load_weights:
        check_huggingface_weights(config, hf_dir, open_weights)
    chunks = []
    for stage in range(parallel.chunks):
        vp_stage = stage if parallel.vpp_size is not None else None
        model = Decoder(config, implementation, parallel, attention_backend, vp_stage)
        chunks.append(model.to(parallel.device))
    if load_weights:
        load_huggingface_weights(chunks, hf_dir, parallel, open_weights)
    return chunks


def model_config(
    hf_dir: Path,
    parallel: ParallelContext,
    *,
    precision: Literal["fp32", "bf16"],
    sequence_parallel: bool = False,
    sequence_parallel_output: bool = False,
    recompute_granularity: Literal["full", "selective"] | None = None,
) -> tuple[ModelConfig, Implementation]:
    """The model's configuration under this layout, and its family's parts. Raises UserError as `build_model` does."""
    source = hf_dir / "config.json"
    fields = read_config_fields(hf_dir)
    implementation = family_of(fields["model_type"]).implementation()
    check_layout(fields, str(source), tp=parallel.tp_size, split=parallel.split)
    stages = stage_layers(fields, parallel.split, str(source))
    dtype = DTYPES[precision]
    recompute: dict[str, Any] = {"recompute_granularity": recompute_granularity}
    if recompute_granularity == "full":
        recompute |= {"recompute_method": "uniform", "recompute_num_layers": 1}
    config = implementation.config(
        **fields,
        **recompute,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        virtual_pipeline_model_parallel_size=parallel.vpp_size,
        pipeline_model_parallel_layout=_megatron_layout(stages),
        stage_layers=stages,
        context_parallel_size=parallel.cp_size,
        sequence_parallel=sequence_parallel,
        sequence_parallel_output=sequence_parallel and sequence_parallel_output,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=precision == "bf16",
        variable_seq_lengths=parallel.pp_size > 1,  # micro-batches are padded to their own longest rollout
        moe_token_dispatcher_type="alltoall",  # no experts here, but Megatron refuses variable lengths without it
        # With two stages the previous and the next are one peer, whose batched messages would be mixed up.
        batch_p2p_comm=False,
        overlap_p2p_comm=False,
        calculate_per_token_loss=True,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        # SwiGLU compiled to one kernel a pass, which keeps its input alone. The other fusions need CUDA extensions, and
        # numbers that do not depend on them compare across machines.
        bias_activation_fusion=parallel.device.type == "cuda",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
    )
    return config, implementation


def _megatron_layout(stages: StageLayers) -> list[list[str]] | None:
    """What each chunk holds, in the order in which they are passed; None: Megatron's own, even one."""
    counts = [stage[chunk] for chunk in range(len(stages[0])) for stage in stages]
    if len(set(counts)) == 1:
        return None
    held = [["decoder"] * count for count in counts]
    return [["embedding", *held[0]], *held[1:-1], [*held[-1], "loss"]]
