"""The model: Megatron's GPTModel, whose last pipeline stage hands out final hidden states. The loss owns the head."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

from megatron_sead.models.config import ModelConfig
from megatron_sead.models.family import Implementation
from megatron_sead.models.layers import AttentionBackend
from megatron_sead.parallel.context import ParallelContext

# Shapes: s sequence, b batch, h hidden size, V padded vocabulary, tp tensor-parallel ranks


class Decoder(GPTModel):
    """One chunk of a model of any family: called as ``model(tokens [b, s], position_ids, attention_mask=None)``.

    Returns the final hidden states [b, s, h], whole on every tensor-parallel rank, from the chunk with the head; with
    ``sequence_parallel_output`` this rank's shard of them [s/tp, b, h]; from others the activation for the next stage.
    ``labels`` are refused: there are no logits here.
    """

    config: ModelConfig

    def __init__(
        self,
        config: ModelConfig,
        implementation: Implementation,
        parallel: ParallelContext,
        backend: AttentionBackend,
        vp_stage: int | None,
    ) -> None:
        stage = parallel.pp_rank, vp_stage or 0
        super().__init__(
            config=config,
            transformer_layer_spec=implementation.block_spec(config, backend, vp_stage),
            vocab_size=config.padded_vocab_size,
            max_sequence_length=config.max_position_embeddings,
            pre_process=stage == (0, 0),
            post_process=stage == (parallel.pp_size - 1, parallel.chunks - 1),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=config.tied_embeddings,
            pg_collection=parallel.megatron,
            vp_stage=vp_stage,
        )
        self.parallel = parallel
        self.rotary_pos_emb = implementation.rotary(config, parallel.megatron.cp)

    @property
    def head_weight(self) -> torch.nn.Parameter | None:
        """[V/tp, h] on the chunk with the head; rows beyond the true vocabulary are padding. None elsewhere.

        A tied head is the embedding's own parameter; on another pipeline stage it is a copy, whose gradient Megatron
        adds to the embedding's (finalize_model_grads), so that both take the same steps.
        """
        if not self.post_process:
            return None
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def _postprocess(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("labels") is not None:
            raise ValueError("the model gives hidden states, not a loss: labels must be None")
        if not self.post_process or self.config.sequence_parallel_output:
            return hidden_states
        if self.config.sequence_parallel:
            # The loss hands back the whole gradient, already summed over tensor-parallel ranks, equal on each: in
            # backward a rank takes its own part, and must not sum again.
            hidden_states = gather_from_sequence_parallel_region(
                hidden_states, tensor_parallel_output_grad=False, group=self.parallel.tp
            )
        return hidden_states.transpose(0, 1).contiguous()
