"""What a layout asks of micro-batches, and a budget of tokens of the rest of a configuration. No torch here."""

from __future__ import annotations

import math

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError


def length_multiple(parallel: ParallelSettings) -> int:
    """What a micro-batch's length is a multiple of, so that it splits evenly over sequence-parallel ranks, and before
    over context-parallel ones, each of which has two equal pieces."""
    shards, ranks = sequence_shards(parallel), parallel.context_parallel_size
    return shards if ranks == 1 else ranks * math.lcm(2, shards)


def sequence_shards(parallel: ParallelSettings) -> int:
    """How many tensor-parallel ranks share a context-parallel rank's tokens between the parts of a layer."""
    return parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1


def count_multiple(parallel: ParallelSettings) -> int:
    """What the number of a rank's micro-batches is a multiple of: virtual stages run them in groups of stages."""
    return 1 if parallel.virtual_pipeline_model_parallel_size is None else parallel.pipeline_model_parallel_size


def check_token_budget(config: RunConfig, longest_prompt: int = 1) -> None:
    """Check that the longest rollout fits into a packed micro-batch, and that there is attention for such.

    Args:
        longest_prompt: its tokens, where prompts.max_prompt_tokens does not say.

    Raises:
        UserError: says how large training.micro_batch_tokens must be, or which other setting must change.
    """
    training, multiple = config.training, length_multiple(config.parallel)
    budget, new, most = training.micro_batch_tokens, config.rollouts.max_new_tokens, config.prompts.max_prompt_tokens
    _check_attention(config)
    if budget is None:
        return
    needed = -(-((most or longest_prompt) + new) // multiple) * multiple
    if budget < needed:
        prompt = f"prompts.max_prompt_tokens={most}" if most else f"a prompt of {longest_prompt} tokens"
        parallel = config.parallel
        splits = {
            "sequence_parallel": parallel.sequence_parallel,
            "context_parallel_size": parallel.context_parallel_size > 1,
        }
        names = ", ".join(f"parallel.{name}" for name, split in splits.items() if split)
        rounded = f", in {multiple} equal parts ({names})" if names else ""
        raise UserError(
            f"training.micro_batch_tokens={budget}: must be at least {needed}, for the longest rollout: {prompt} and "
            f"rollouts.max_new_tokens={new}{rounded}"
        )


def _check_attention(config: RunConfig) -> None:
    training, ranks = config.training, config.parallel.context_parallel_size
    packs = f"parallel.context_parallel_size={ranks}" if ranks > 1 else None
    if training.micro_batch_tokens is not None:
        packs = f"training.micro_batch_tokens={training.micro_batch_tokens}"
    if packs is not None and training.attention_backend == "transformer_engine" and training.precision == "fp32":
        raise UserError(
            f"{packs}: training.attention_backend='transformer_engine' packs in bf16 alone; set training.precision to "
            "'bf16', not 'fp32', or training.attention_backend to 'torch'"
        )
