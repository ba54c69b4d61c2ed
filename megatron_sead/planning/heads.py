"""Bytes that the last stage's heads have: hidden states, a chunk's logits, gradients. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megatron_sead.planning.activations import FP32, Layers

ALIGNMENT = 16  # of a row of logits, as in `distillation.heads`
SCORED, WEIGHED = 88, 96  # bytes of a token's sums, targets and weights, while it is scored or weighed


class Chunk(NamedTuple):
    """Tokens that go through the heads together."""

    rows: int
    most: int  # that one rank has of them, which each rank sends so many of


class Heads:
    """Of both models on a rank of the last stage, a micro-batch at a time."""

    def __init__(self, student: Layers, teacher: Layers, scratch_bytes: int) -> None:
        self.student, self.scratch_bytes = student, scratch_bytes
        self.layout, self.responses = student.layout, student.batch.responses
        self.parts = self.layout.tp if self.layout.sequence_parallel else 1
        self.hidden, self.both = student.shape.hidden, student.shape.hidden + teacher.shape.hidden
        self.columns = student.shape.padded_vocabulary // self.layout.tp
        self.by_rank = student.batch.responses_by_part(self.parts)
        self.own = max(self.by_rank)  # rows of the teacher's states
        self.positions = student.share if self.parts > 1 else self.responses

    @property
    def read(self) -> int:
        """Hidden states that the heads read: the teacher's, and spread over all positions of a part of the sequence;
        without sequence parallelism the student's at response positions. And what the student's last norm read and
        wrote; or when scoring, its result and that of the micro-batch before."""
        teacher = self.both - self.hidden
        rows = self.own * teacher + self.positions * (teacher if self.parts > 1 else self.hidden)
        return self.layout.width * rows + 2 * self.student.stream

    def scoring(self) -> int:
        """Both models' logits of the response tokens."""
        chunks = self._chunks(1.0, 1)
        logits = 2 * FP32 * self._width * self._rows(chunks, 1)
        tokens = SCORED * self.positions * self.parts
        return self.read + tokens + logits + max(self._states(chunks, place) for place in range(len(chunks)))

    def loss(self, active: float) -> int:
        """Of a micro-batch, and its gradients in fp32, of the head and of the hidden states.

        Args:
            active: share of the response tokens that have a weight.
        """
        overlaps = self.layout.tp > 1  # a chunk's sums travel while the next is computed
        chunks = self._chunks(active, 1 + overlaps)
        logits = 2 * FP32 * self._width * self._rows(chunks, 1 + overlaps) * min(1 + overlaps, len(chunks))
        computing = logits + max(
            self._backward(chunks, place) + self._states(chunks, place + overlaps) for place in range(len(chunks))
        )
        gradients = FP32 * (self.columns + self.positions) * self.hidden
        handed_over = self.layout.width * (self.columns + (self.layout.width < FP32) * self.positions) * self.hidden
        return self.read + WEIGHED * self.positions * self.parts + gradients + max(computing, handed_over)

    @property
    def _width(self) -> int:
        return -(-self.columns // ALIGNMENT) * ALIGNMENT

    def _size(self, buffers: int) -> int:
        return max(1, self.scratch_bytes // (FP32 * (2 * buffers * self.columns + 4 * self.both)))

    def _rows(self, chunks: list[Chunk], buffers: int) -> int:
        """For which there is memory."""
        return min(sum(chunk.rows for chunk in chunks), max(self._size(buffers), self.parts))

    def _chunks(self, active: float, buffers: int) -> list[Chunk]:
        """As `distillation.chunks` cuts them: of every rank that has tokens left, as many."""
        size = self._size(buffers)
        left = [int(count * active) for count in self.by_rank]

        def cut() -> Iterator[Chunk]:
            while any(left):
                most = max(1, size // sum(count > 0 for count in left))
                counts = [min(count, most) for count in left]
                yield Chunk(sum(counts), max(counts))
                left[:] = [count - now for count, now in zip(left, counts, strict=True)]

        return list(cut()) or [Chunk(1, 1)]

    def _states(self, chunks: list[Chunk], place: int) -> int:
        """Hidden states of a chunk, and of the next, which have come already if they are gathered."""
        if place >= len(chunks):
            return 0
        w, rows = self.layout.width, chunks[place].rows
        if self.parts == 1:
            return w * rows * self.hidden
        whole = rows * self.hidden * (rows < self.parts * chunks[place].most)
        return w * (whole + sum((self.parts + 1) * chunk.most for chunk in chunks[place : place + 2]) * self.both)

    def _backward(self, chunks: list[Chunk], place: int) -> int:
        """A chunk's gradients, of logits in the weights' type, of hidden states in fp32; and its hidden states."""
        rows, most = chunks[place]
        logits = self.layout.width * rows * self._width if self.layout.width < FP32 else 0
        sent = 0
        if self.parts > 1:
            sent = most + (self.parts * most if rows < self.parts * most else 0)
            sent += chunks[place - 1].most if place else 0
        return logits + (self.layout.width * rows + FP32 * (rows + sent)) * self.hidden
