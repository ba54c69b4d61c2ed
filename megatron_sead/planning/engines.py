"""Bytes of a rollout engine on a GPU. No torch, and no engine: what they hold is written out."""

from __future__ import annotations

from megatron_sead.config.rollouts import TransformersRollouts, VllmRollouts
from megatron_sead.config.run import RunConfig
from megatron_sead.planning.shapes import ModelShape

FP32 = 4
PIECE, HEAD_TOKENS, HEAD_ROWS = 1024, 512, 16384  # of `models.streamed`


def engine_bytes(config: RunConfig, student: ModelShape, length: int, gpu_bytes: int) -> int:
    """Weights, cache and activations while it writes rollouts of `length` tokens, prompts included; or its weights, and
    a tensor that comes for them."""
    rollouts, weights = config.rollouts, engine_weights(config, student)
    if isinstance(rollouts, VllmRollouts):
        return max(_given(rollouts, weights, gpu_bytes), weights + _arriving(config, student))
    if isinstance(rollouts, TransformersRollouts):
        writing = _written_by_transformers(rollouts, student, length, _width(config))
        return weights + max(writing, _arriving(config, student))
    return 0


def _arriving(config: RunConfig, student: ModelShape) -> int:
    """The largest of the student's tensors, whole: all ranks' parts, and what is made of them; or one that another
    pipeline stage sends."""
    parallel = config.parallel
    largest = _width(config) * max(student.vocabulary * student.hidden, 2 * student.ffn * student.hidden)
    if parallel.tensor_model_parallel_size > 1:
        return 2 * largest
    return largest if parallel.pipeline_model_parallel_size > 1 else 0


def engine_at_start(config: RunConfig, gpu_bytes: int) -> int:
    """What must be free when the engine starts, before the optimizer has moments: vLLM asks for its share whether or
    not the size of its cache is given."""
    return int(config.rollouts.gpu_memory_utilization * gpu_bytes) if isinstance(config.rollouts, VllmRollouts) else 0


def too_little_for_engine(
    config: RunConfig, student: ModelShape, length: int, gpu_bytes: int
) -> tuple[int, int] | None:
    """Bytes that vLLM is told to take, and those of its weights and of one rollout's cache, where it has not so many:
    it would not start. None: it has."""
    rollouts = config.rollouts
    if not isinstance(rollouts, VllmRollouts):
        return None
    weights = engine_weights(config, student)
    least = weights + _cache(student, length, _width(config), rollouts.tensor_parallel_size)
    given = _given(rollouts, weights, gpu_bytes)
    return (given, least) if given < least else None


def _given(rollouts: VllmRollouts, weights: int, gpu_bytes: int) -> int:
    if rollouts.kv_cache_memory_bytes is not None:
        return weights + rollouts.kv_cache_memory_bytes
    return int(rollouts.gpu_memory_utilization * gpu_bytes)


def _width(config: RunConfig) -> int:
    return 2 if config.training.precision == "bf16" else FP32


def engine_weights(config: RunConfig, student: ModelShape) -> int:
    """On one rank of a copy."""
    shared = config.rollouts.tensor_parallel_size if isinstance(config.rollouts, VllmRollouts) else 1
    return student.parameters * _width(config) // shared


def _cache(student: ModelShape, length: int, width: int, shared: int = 1) -> int:
    """Keys and values of one rollout: layers with a window keep those inside it."""
    kept = sum(min(length, window or length) for window in student.all_windows)
    heads = -(-student.kv_heads // shared)
    return 2 * kept * heads * student.head_dim * width


def _written_by_transformers(rollouts: TransformersRollouts, student: ModelShape, length: int, width: int) -> int:
    """Caches of a batch, and most of what goes through a layer: the prompts at once, or in the end one cache made
    longer by copying it. And a token's logits in fp32, with what sampling makes of them."""
    prompt = length - rollouts.max_new_tokens
    widest = 2 * student.hidden + max(3 * student.ffn, 3 * (student.query_width + 2 * student.key_width))
    reading = _cache(student, prompt, width) + prompt * widest * width
    writing = _cache(student, length, width) + length * student.key_width * width
    return rollouts.batch_size * (max(reading, writing) + 4 * FP32 * student.vocabulary)


def reference_bytes(shape: ModelShape, tokens: int, width: int) -> int:
    """transformers' model on one rank, a layer's weights at a time, as `models.streamed` runs it: the text's hidden
    states, with attention over all heads or a piece of the feed-forward; and at the end the head."""
    layer = width * sum(weight.elements for weight in shape.layer_weights.values())
    attention = width * (2 * shape.query_width + 4 * shape.key_width) + 2 * FP32 * shape.query_width
    feed_forward = 4 * width * shape.ffn * min(PIECE, tokens)
    states = 4 * width * shape.hidden * tokens
    in_layer = layer + states + max(attention * tokens, feed_forward)
    head = (width * shape.vocabulary + FP32 * HEAD_ROWS) * shape.hidden + 2 * FP32 * HEAD_TOKENS * shape.vocabulary
    return max(in_layer, head + states // 4)
