"""Bytes of activations on a rank, a layer at a time: what a pass keeps, and the moments at which most is there.

A moment is what is alive at one line of the code that runs. Those that are left out have less than another at every
shape and layout; `tools/plan_against_trace.py` holds the others against traced steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sead.planning.shapes import ModelShape

FP32, INT64 = 4, 8
QUERY_BLOCK, SMALL_BLOCK, MASK_GRAIN = 1024, 128, 16  # queries that see a window without FlashAttention, and their bias


@dataclass(frozen=True)
class Batch:
    """A micro-batch as a rank has it."""

    rows: int  # 1 where rollouts are packed
    length: int  # tokens of a row, padding included
    prompt: int
    response: int
    packed: bool

    @property
    def longest(self) -> int:
        """Tokens of a sequence that sees itself."""
        return self.prompt + self.response if self.packed else self.length

    @property
    def responses(self) -> int:
        """Tokens that are scored: of packed rollouts, of which the last may be shorter, in proportion."""
        return self.length * self.response // self.longest if self.packed else self.rows * self.response

    def responses_by_part(self, parts: int) -> list[int]:
        """In each of equal parts of the sequence."""
        if parts == 1:
            return [self.responses]
        size, length = self.length // parts, self.prompt + self.response
        starts = range(0, self.length, length) if self.packed else [0]
        counts = [0] * parts
        for start in starts:
            rest = min(length, self.length - start)
            prompt = max(1, rest * self.prompt // length)
            first, end = start + prompt - 1, start + rest - 1
            for part in range(parts):
                counts[part] += max(0, min(end, (part + 1) * size) - max(first, part * size)) * self.rows
        return counts

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def step_bytes(self) -> int:
        """Of what a rank knows of it all through the step: token ids, places of packed ones; and of each response token
        its id, rollout, number, validity and sampled log-probability."""
        return INT64 * self.tokens * (2 if self.packed else 1) + (3 * INT64 + 1 + FP32) * self.responses


@dataclass(frozen=True)
class Layout:
    """How a rank computes."""

    tp: int
    sequence_parallel: bool
    width: int  # bytes of a weight and of an activation
    recompute: str | None
    cp: int = 1

    @property
    def flash(self) -> bool:
        """Is there FlashAttention, packed and with windows?"""
        return self.width == 2


class Layers:
    """Of one model on one rank, by bytes of a micro-batch's tensors: `stream` goes from layer to layer, under sequence
    parallelism a part of the sequence, of which `whole` is all; `query`, `key` and `ffn` are one rank's."""

    def __init__(self, shape: ModelShape, layout: Layout, batch: Batch) -> None:
        self.shape, self.layout, self.batch = shape, layout, batch
        t, w, tp = batch.tokens, layout.width, layout.tp
        self.share = t // tp if layout.sequence_parallel else t  # tokens that norms see
        self.whole, self.stream = w * t * shape.hidden, w * self.share * shape.hidden
        self.query, self.key = w * t * shape.query_width // tp, w * t * shape.key_width // tp
        self.ffn = w * t * shape.ffn // tp
        self.projected = self.query + 2 * self.key
        self.own_keys = 2 * self.key if layout.cp > 1 else 0  # and values, as they are sent to others
        kinds = 2 if shape.layer_types else 1  # of rotary angles
        self.all_angles = kinds * FP32 * shape.head_dim * (t if batch.packed else batch.length)
        self.copies = batch.rows > 1  # tensors of several rows are copied where a matrix is made of them
        self.single_key = shape.kv_heads == tp  # a rank's part of the projection is queries, a key and a value

    # --- What waits for the backward pass ---------------------------------------------------------------------------

    def kept(self, window: int | None) -> int:
        """By a layer of which nothing is computed again: inputs of products and norms, in the order in which they come.

        The layer's input, what its norms read or write, and the sum in the middle; attention; gate and up, and their
        product.
        """
        return 4 * self.stream + 2 * FP32 * self.share + self._attention_kept(window) + 3 * self.ffn

    def _attention_kept(self, window: int | None) -> int:
        normed, in_projection = self._norms_kept()
        selective = self.layout.recompute == "selective"
        if self.layout.cp > 1 and not selective:
            return normed + self.query + self.own_keys + self.query + self._log_sums
        copied = self.copies and self._rows_with_window(window)  # into packed sequences, and back
        # Without FlashAttention, sequences or blocks of a window's queries come one by one, and are put together; of
        # several rows, results come row after row, and are put with a token's rows beside each other
        in_parts = not self.layout.flash and (self.batch.packed or self._is_within(window) or self.copies)
        context = self.query * (2 if copied or in_parts else 1)
        if not selective:
            context += self._log_sums + self._bias(window)
        if self._repeats(window) and not selective:
            attended = 3 * self.query
        elif copied and not selective:
            attended = self.query + 2 * self.key
        else:
            attended, in_projection = self.query + self.key, True  # values are a view of the projection
        return normed + attended + (self.projected if in_projection else 0) + context

    def _norms_kept(self) -> tuple[int, bool]:
        """Of queries and keys; and whether it is the projection that they see."""
        t, heads, tp = self.batch.tokens, self.shape.heads + self.shape.kv_heads, self.layout.tp
        if self.shape.norm == "width":
            return (0 if self.single_key else self.query + self.key) + 2 * FP32 * t, self.single_key
        if self.shape.norm == "head":
            return (0 if self.single_key else self.query) + FP32 * t * heads // tp, True
        return 0, False

    @property
    def _log_sums(self) -> int:
        return FP32 * self.batch.tokens * self.shape.heads // self.layout.tp

    def _rows_with_window(self, window: int | None) -> bool:
        """Are rows longer than their window, and is there FlashAttention for that?"""
        return self._is_within(window) and self.layout.flash and not self.batch.packed

    def _is_within(self, window: int | None) -> bool:
        """Are sequences longer than their window?"""
        return window is not None and self.batch.longest > window

    def _repeats(self, window: int | None) -> bool:
        """Are keys and values repeated for each query that they serve?"""
        packed = self.batch.packed and self.layout.flash
        return self.shape.heads > self.shape.kv_heads and not packed and not self._rows_with_window(window)

    def _bias(self, window: int | None) -> int:
        """Masks of a window, block by block of the queries, where FlashAttention is not there for it."""
        longest = self.batch.longest
        if self.layout.flash or window is None or not self._is_within(window):
            return 0
        block = min(QUERY_BLOCK, max(window, SMALL_BLOCK))
        starts = range(0, longest, block)
        ends = [min(start + block, longest) for start in starts]
        sizes = [
            (end - start) * -(-(end - max(0, start - window + 1)) // MASK_GRAIN) * MASK_GRAIN
            for start, end in zip(starts, ends, strict=True)
        ]
        return FP32 * sum(sizes) * (self.batch.tokens // longest if self.batch.packed else 1)

    def waiting(self, windows: list[int | None]) -> int:
        """By the layers of a stage, of one micro-batch."""
        if self.layout.recompute == "full":
            return len(windows) * self.stream + self.all_angles
        return sum(map(self.kept, windows)) + self.all_angles

    # --- Moments ----------------------------------------------------------------------------------------------------

    def forward(self, *, frozen: bool) -> int:
        """Most of what a pass has that keeps nothing, without its result.

        Args:
            frozen: the model's weights: its products make what they gather anew, where others share Megatron's buffer.
        """
        stream, query, key, ffn = self.stream, self.query, self.key, self.ffn
        gathered = self.whole if self.layout.sequence_parallel else 0
        own_gather = gathered if frozen else 0
        before = stream * (1 if self.shape.post_norm else 2)  # of the attention, or of the feed-forward: its norm
        windows = set(self.shape.all_windows)
        rows = query * (self.copies and any(map(self._rows_with_window, windows)))
        rows += query * (self.batch.packed and not self.layout.flash)
        wide = FP32 // self.layout.width
        turned = 0 if self.shape.norm is None and self.single_key else query
        moments = (
            before + own_gather + self.projected,
            before + 2 * self.projected + wide * (2 if wide > 1 else 1) * query,  # squares
            before + self.projected + turned + key + (3 * wide + 1) * query // 2,  # queries are rotated
            before + self.projected + turned + key + query + (3 * wide + 1) * key // 2,
            before + self.projected + query + key + query + rows + gathered + stream,  # the output's product
            before + self.projected + query + key + self._shared(),
            before + stream + own_gather + 2 * ffn,
            before + stream + 4 * ffn,  # SwiGLU
            before + stream + ffn + gathered + stream,
            stream + before + 3 * stream,  # the last norm's result is added
        )
        embedded = self.whole * (2 if self.copies else 1) + (stream if self.layout.sequence_parallel else 0)
        return self.all_angles + max(embedded, stream + max(moments))

    def _shared(self) -> int:
        """Of attention to keys of other ranks: one's own, all of the group's, and those that each of two pieces sees,
        which are half as many again as a rank holds, at most."""
        return self.own_keys * (2 + 2 * self.layout.cp) if self.layout.cp > 1 else 0

    def backward(self, windows: list[int | None]) -> int:
        """What the backward pass of one layer adds to what waits: where the layer is computed again, all of it."""
        stream, ffn = self.stream, self.ffn
        gathered = self.whole if self.layout.sequence_parallel else 0
        weight = self.layout.width * self.shape.hidden * self.shape.ffn // self.layout.tp
        moments = (
            4 * ffn,  # SwiGLU
            2 * self.query + self._shared() + self.own_keys * self.layout.cp,  # keys that are fetched anew, gradients
            max(gathered, stream) + ffn + weight,  # the second product's
            self.whole + (stream if self.layout.sequence_parallel else 0) - ffn + 2 * weight,  # the first one's
        )
        if self.layout.recompute != "full":
            return max(moments)
        return max(map(self.kept, windows)) + max(moments)
