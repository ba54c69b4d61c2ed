"""The sums and the gradient as Triton kernels, for CUDA.

`_span_kernel` reads the logits once. A program of it is one warp that walks a span of one row, block by block. One
warp, because a block's maximum must be known before its exponentials: shuffles within a warp, a barrier a block among
several. Spans, because few rows, one program each, would leave most of a GPU idle; `_row_kernel` then puts the spans of
a row together. A block is a tile whose rows follow each other in memory, as wide as a warp's 16-byte loads, so that a
thread adds up its own columns and the sums cross threads once a span. With 128 registers a thread nothing is spilled
and sixteen such warps fit on a multiprocessor.

Only a row's last block is read under a mask: the run-time number of columns would cut a masked load into single
elements. That number, like the number of rows, is not specialised; strides and alignments are, and they do not change
from chunk to chunk. Wide loads need rows that begin at multiples of 16 elements.
"""

# mypy: disable-error-code="no-untyped-def"
# (what @triton.jit compiles has no types that mypy knows)

from __future__ import annotations

import torch
import triton
import triton.language as tl

# Shapes: n rows of V columns, `real` of them tokens; k of the rows chosen; a row of s spans, a span of BLOCKS blocks

BLOCK = 512
BLOCKS = 16
GRADIENT_BLOCK = 2048
OPTIONS = {"enable_fp_fusion": True}  # off by default from triton 3.10 on
MINUS_INFINITY = tl.constexpr(float("-inf"))


def pair_sums(
    student: torch.Tensor, teacher: torch.Tensor, rows: torch.Tensor, real: int, *, with_columns: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Maxima [k, 2], sums A to F [k, 6] and the maxima's columns [k, 2] of the rows [k] of logits [n, V].

    fp32 from bf16, fp16 or fp32, of any strides. A NaN logit makes A (the student's) or B (the teacher's) NaN.
    """
    tokens, device = len(rows), student.device
    maxima = torch.empty(tokens, 2, device=device)
    sums = torch.empty(tokens, 6, device=device)
    columns = torch.empty(tokens, 2, dtype=torch.int64, device=device) if with_columns else None
    if real == 0 or tokens == 0:
        return maxima.fill_(-torch.inf), sums.zero_(), None if columns is None else columns.zero_()
    spans = triton.cdiv(real, BLOCKS * BLOCK)
    partial = torch.empty(tokens, spans, 8, device=device)
    blocks = torch.empty(tokens, spans, 2, dtype=torch.int32, device=device)
    width = 32 * 16 // student.element_size()
    with torch.cuda.device_of(student):
        _span_kernel[(tokens * spans,)](
            student, teacher, rows, partial, blocks, real, spans,
            *student.stride(), *teacher.stride(),
            HEIGHT=BLOCK // width, WIDTH=width, SPAN=BLOCKS * BLOCK, num_warps=1, maxnreg=128, **OPTIONS,
        )  # fmt: skip
        _row_kernel[(tokens,)](
            student, teacher, rows, partial, blocks, maxima, sums, columns, real, spans,
            *student.stride(), *teacher.stride(),
            SPANS=triton.next_power_of_2(spans), BLOCK=BLOCK, num_warps=1, **OPTIONS,
        )  # fmt: skip
    return maxima, sums, columns


def single_sums(logits: torch.Tensor, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Maxima [n, 1] and sums A, C [n, 2] of one model's logits [n, V].

    As a pair with itself, whose second read comes from the L1 cache: never slower than a pair, for no code of its own.
    """
    rows = torch.arange(len(logits), device=logits.device)
    maxima, sums, _ = pair_sums(logits, logits, rows, real, with_columns=False)
    return maxima[:, :1], sums[:, 0:3:2]


def write_gradient(
    out: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, coefficients: torch.Tensor, real: int
) -> None:
    """out = e^x (α - β (y-x)) - γ e^y [n, V], zero beyond `real`.

    A row whose α, β, γ are all zero is zero, and its logits are not read.

    Args:
        out: of any strides; may be `student` itself.
        coefficients: [n, 5] fp32, rows contiguous: α, -β, -γ, and both maxima.
    """
    tokens, columns = out.shape
    blocks = triton.cdiv(columns, GRADIENT_BLOCK)
    if out.numel() == 0:
        return
    with torch.cuda.device_of(out):
        _gradient_kernel[(tokens * blocks,)](
            out, student, teacher, coefficients.contiguous(), real, columns, blocks,
            *out.stride(), *student.stride(), *teacher.stride(),
            BLOCK=GRADIENT_BLOCK, num_warps=4, **OPTIONS,
        )  # fmt: skip


@triton.jit(
    do_not_specialize=["real", "spans"],
    do_not_specialize_on_alignment=["rows", "partial", "blocks"],
)
def _span_kernel(
    student, teacher, rows, partial, blocks, real, spans,
    student_row, student_column, teacher_row, teacher_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    row = tl.load(rows + program // spans)
    first = (program % spans).to(tl.int64) * SPAN
    last = tl.minimum(first + SPAN, real)
    student += row * student_row
    teacher += row * teacher_row
    mz, mw, bz, bw, a, b, c, d, e, f = _span(
        student, teacher, first, last, student_column, teacher_column, HEIGHT, WIDTH, False
    )
    if c + d != c + d:  # a logit of -inf or NaN, rare: only now the guarded pass is paid for
        mz, mw, bz, bw, a, b, c, d, e, f = _span(
            student, teacher, first, last, student_column, teacher_column, HEIGHT, WIDTH, True
        )
    partial += program.to(tl.int64) * 8
    tl.store(partial, mz)
    tl.store(partial + 1, mw)
    tl.store(partial + 2, a)
    tl.store(partial + 3, b)
    tl.store(partial + 4, c)
    tl.store(partial + 5, d)
    tl.store(partial + 6, e)
    tl.store(partial + 7, f)
    blocks += program.to(tl.int64) * 2
    tl.store(blocks, bz)
    tl.store(blocks + 1, bw)


@triton.jit
def _span(
    student, teacher, first, last, student_column, teacher_column,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, GUARDED: tl.constexpr,
):  # fmt: skip
    """Maxima, first columns of the blocks that hold them, and sums A to F of the columns from `first` to `last`."""
    tile = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    student_tile = tile.to(tl.int64) * student_column
    teacher_tile = tile.to(tl.int64) * teacher_column
    mz = MINUS_INFINITY
    mw = MINUS_INFINITY
    bz = first
    bw = first
    zeros = tl.zeros([WIDTH], tl.float32)
    sums = (zeros, zeros, zeros, zeros, zeros, zeros)
    whole = last - (last - first) % (HEIGHT * WIDTH)
    for block in range(first, whole, HEIGHT * WIDTH):
        z = tl.load(student + block * student_column + student_tile).to(tl.float32)
        w = tl.load(teacher + block * teacher_column + teacher_tile).to(tl.float32)
        mz, mw, bz, bw, sums = _add_block(mz, mw, bz, bw, sums, z, w, block, GUARDED)
    if whole < last:
        inside = tile < last - whole
        z = tl.load(student + whole * student_column + student_tile, inside, MINUS_INFINITY)
        w = tl.load(teacher + whole * teacher_column + teacher_tile, inside, MINUS_INFINITY)
        mz, mw, bz, bw, sums = _add_block(mz, mw, bz, bw, sums, z.to(tl.float32), w.to(tl.float32), whole, True)
    a, b, c, d, e, f = sums
    return mz, mw, bz, bw, tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d), tl.sum(e), tl.sum(f)


@triton.jit
def _add_block(mz, mw, bz, bw, sums, z, w, block, GUARDED: tl.constexpr):
    """One more tile of logits. GUARDED: where an exponential is zero, its products are, whatever the other factor."""
    new_z = tl.max(z)
    new_w = tl.max(w)
    if (new_z > mz) | (new_w > mw):
        bz = tl.where(new_z > mz, block, bz)
        bw = tl.where(new_w > mw, block, bw)
        new_z = tl.maximum(new_z, mz)
        new_w = tl.maximum(new_w, mw)
        sums = _move(sums, mz, mw, new_z, new_w)
        mz = new_z
        mw = new_w
    a, b, c, d, e, f = sums
    # a row that is -inf so far has no probability, and -inf - -inf would be NaN
    x = z - tl.where(mz == MINUS_INFINITY, 0.0, mz)
    y = w - tl.where(mw == MINUS_INFINITY, 0.0, mw)
    p = tl.exp(x)
    q = tl.exp(y)
    px = p * x
    qy = q * y
    pd = p * (y - x)
    qd = q * (y - x)
    if GUARDED:
        px = tl.where(p == 0.0, 0.0, px)
        qy = tl.where(q == 0.0, 0.0, qy)
        pd = tl.where(p == 0.0, 0.0, pd)
        qd = tl.where(q == 0.0, 0.0, qd)
    a += tl.sum(p, 0)
    b += tl.sum(q, 0)
    c += tl.sum(px, 0)
    d += tl.sum(qy, 0)
    e += tl.sum(pd, 0)
    f += tl.sum(qd, 0)
    return mz, mw, bz, bw, (a, b, c, d, e, f)


@triton.jit
def _move(sums, own_z, own_w, to_z, to_w):
    """Sums relative to the maxima `own`, made relative to `to`: see `partial_sums`."""
    a, b, c, d, e, f = sums
    dx = tl.where(own_z == MINUS_INFINITY, 0.0, own_z - to_z)  # nothing summed yet: nothing to scale
    dy = tl.where(own_w == MINUS_INFINITY, 0.0, own_w - to_w)
    scale_x = tl.exp(dx)
    scale_y = tl.exp(dy)
    # zero times an infinite divergence is zero; A and B are left to carry the NaN of a NaN logit
    e = tl.where(scale_x == 0.0, 0.0, scale_x * (e + (dy - dx) * a))
    f = tl.where(scale_y == 0.0, 0.0, scale_y * (f + (dy - dx) * b))
    return scale_x * a, scale_y * b, scale_x * (c + dx * a), scale_y * (d + dy * b), e, f


@triton.jit(
    do_not_specialize=["real", "spans"],
    do_not_specialize_on_alignment=["student", "teacher", "rows", "partial", "blocks", "maxima", "sums", "columns"],
)
def _row_kernel(
    student, teacher, rows, partial, blocks, maxima, sums, columns, real, spans,
    student_row, student_column, teacher_row, teacher_column,
    SPANS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row's spans together; and its maxima's columns, if asked for, from the one block that holds each of them."""
    program = tl.program_id(0).to(tl.int64)
    span = tl.arange(0, SPANS)
    exists = span < spans
    partial += (program * spans + span) * 8
    own_z = tl.load(partial, exists, MINUS_INFINITY)
    own_w = tl.load(partial + 1, exists, MINUS_INFINITY)
    own = (
        tl.load(partial + 2, exists, 0.0),
        tl.load(partial + 3, exists, 0.0),
        tl.load(partial + 4, exists, 0.0),
        tl.load(partial + 5, exists, 0.0),
        tl.load(partial + 6, exists, 0.0),
        tl.load(partial + 7, exists, 0.0),
    )
    mz = tl.max(own_z)
    mw = tl.max(own_w)
    own = _move(own, own_z, own_w, mz, mw)
    tl.store(maxima + program * 2, mz)
    tl.store(maxima + program * 2 + 1, mw)
    for index in tl.static_range(6):
        tl.store(sums + program * 6 + index, tl.sum(own[index]))
    if columns is not None:
        blocks += (program * spans + span) * 2
        # the first span of those with the maximum, since its blocks come first
        bz = tl.min(tl.where(own_z == mz, tl.load(blocks, exists, real), real))
        bw = tl.min(tl.where(own_w == mw, tl.load(blocks + 1, exists, real), real))
        row = tl.load(rows + program)
        student += row * student_row
        teacher += row * teacher_row
        tl.store(columns + program * 2, _column(student, student_column, mz, bz, real, BLOCK))
        tl.store(columns + program * 2 + 1, _column(teacher, teacher_column, mw, bw, real, BLOCK))


@triton.jit
def _column(logits, stride, maximum, first, real, BLOCK: tl.constexpr):
    """First column of a block that holds the maximum; 0 where none does, of a row of NaN."""
    columns = first + tl.arange(0, BLOCK)
    inside = columns < real
    values = tl.load(logits + columns.to(tl.int64) * stride, inside, MINUS_INFINITY).to(tl.float32)
    column = tl.min(tl.where(inside & (values == maximum), columns, real))
    return tl.where(column == real, 0, column)


@triton.jit(
    do_not_specialize=["real", "columns", "blocks"],
    do_not_specialize_on_alignment=["coefficients"],
)
def _gradient_kernel(
    out, student, teacher, coefficients, real, columns, blocks,
    out_row, out_column, student_row, student_column, teacher_row, teacher_column,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A block of a row. All of it is read before any of it is written, so `out` may be `student`."""
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    first = (program % blocks).to(tl.int64) * BLOCK
    coefficients += row * 5
    alpha = tl.load(coefficients)
    minus_beta = tl.load(coefficients + 1)
    minus_gamma = tl.load(coefficients + 2)
    maximum_z = tl.load(coefficients + 3)
    maximum_w = tl.load(coefficients + 4)
    teaches = (alpha != 0.0) | (minus_beta != 0.0) | (minus_gamma != 0.0)
    offsets = tl.arange(0, BLOCK).to(tl.int64)
    out += row * out_row + first * out_column + offsets * out_column
    student += row * student_row + first * student_column + offsets * student_column
    teacher += row * teacher_row + first * teacher_column + offsets * teacher_column
    if first + BLOCK <= real:
        gradient = tl.zeros([BLOCK], tl.float32)
        if teaches:
            x = tl.load(student).to(tl.float32) - maximum_z
            y = tl.load(teacher).to(tl.float32) - maximum_w
            gradient = _gradient(x, y, alpha, minus_beta, minus_gamma)
        tl.store(out, gradient.to(out.dtype.element_ty))
    else:
        inside = first + offsets < tl.where(teaches, real, 0)
        x = tl.load(student, inside, 0.0).to(tl.float32) - maximum_z
        y = tl.load(teacher, inside, 0.0).to(tl.float32) - maximum_w
        gradient = tl.where(inside, _gradient(x, y, alpha, minus_beta, minus_gamma), 0.0)
        tl.store(out, gradient.to(out.dtype.element_ty), first + offsets < columns)


@triton.jit
def _gradient(x, y, alpha, minus_beta, minus_gamma):
    p = tl.exp(x)
    # a weight of zero wins over an infinite difference, and so does a probability of zero
    from_student = p * tl.where(minus_beta == 0.0, alpha, alpha + minus_beta * (y - x))
    from_teacher = tl.where(minus_gamma == 0.0, 0.0, minus_gamma * tl.exp(y))
    return tl.where(p == 0.0, 0.0, from_student) + from_teacher
