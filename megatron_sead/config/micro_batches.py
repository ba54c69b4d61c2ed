"""What a layout asks of micro-batches, and a budget of tokens of the rest of a configuration. No torch here."""

from __future__ import annotations

from megatron_sead.config.parallel import ParallelSettings
from megatron_sead.config.run import RunConfig
from megatron_sead.errors import UserError


def length_multiple(parallel: ParallelSettings) -> int:
    """What a micro-batch's length is a multiple of, so that it splits evenly over sequence-parallel ranks."""
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
    if budget is None:
        return
    needed = -(-((most or longest_prompt) + new) // multiple) * multiple
    if budget < needed:
        prompt = f"prompts.max_prompt_tokens={most}" if most else f"a prompt of {longest_prompt} tokens"
        rounded = f", in {multiple} equal parts (parallel.sequence_parallel)" if multiple > 1 else ""
        raise UserError(
            f"training.micro_batch_tokens={budget}: must be at least {needed}, for the longest rollout: {prompt} and "
            f"rollouts.max_new_tokens={new}{rounded}"
        )
    if training.attention_backend == "transformer_engine" and training.precision == "fp32":
        raise UserError(
            f"training.micro_batch_tokens={budget}: training.attention_backend='transformer_engine' packs in bf16 "
            "alone; set training.precision to 'bf16', not 'fp32', or training.attention_backend to 'torch'"
        )
