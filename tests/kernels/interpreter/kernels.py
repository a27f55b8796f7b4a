"""Small kernels: right ones, and one for each fault that must be found."""

from __future__ import annotations

from megaseq.kernels.triton_runtime import tl, triton


@triton.jit
def convert(X, Y, count, CUT: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + lanes, mask=lanes < count, other=0.0)
    y = x.to(Y.dtype.element_ty, fp_downcast_rounding="rtz") if CUT else x.to(Y.dtype.element_ty)
    tl.store(Y + lanes, y, mask=lanes < count)


@triton.jit
def combine(A, B, C, Y, count, OPERATION: tl.constexpr, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(A + lanes, mask=lanes < count, other=0.0)
    b = tl.load(B + lanes, mask=lanes < count, other=0.0)
    c = tl.load(C + lanes, mask=lanes < count, other=0.0)
    if OPERATION == "add":
        y = a + b
    elif OPERATION == "subtract":
        y = a - b
    elif OPERATION == "multiply":
        y = a * b
    elif OPERATION == "maximum":
        y = tl.maximum(a, b)
    elif OPERATION == "where":
        y = tl.where(a > b, c, -c)
    elif OPERATION == "fma":
        y = tl.fma(a, b, c)
    tl.store(Y + lanes, y, mask=lanes < count)


@triton.jit
def complement(X, Y, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(Y + lanes, ~tl.load(X + lanes))


@triton.jit
def product(A, B, C, WIDTH: tl.constexpr, PRECISION: tl.constexpr):
    lanes = tl.arange(0, WIDTH)
    block = lanes[:, None] * WIDTH + lanes[None, :]
    c = tl.load(C + block)
    c = tl.dot(tl.load(A + block), tl.load(B + block), c, input_precision=PRECISION, out_dtype=c.dtype)
    tl.store(C + block, c)


@triton.jit
def reduce(X, OUT, RUNNING, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    x = tl.load(X + lanes)
    largest, place = tl.max(x, 0, return_indices=True)
    tl.store(OUT, tl.max(x, 0))
    tl.store(OUT + 1, tl.sum(x, 0))
    tl.store(OUT + 2, largest)
    tl.store(OUT + 3, place)
    tl.store(RUNNING + lanes, tl.cumsum(x, 0))


@triton.jit
def add_up(X, OUT, count, num_sums, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + lanes, mask=lanes < count, other=0.0)
    tl.atomic_add(OUT + lanes % num_sums, x, mask=lanes < count, sem="relaxed")


@triton.jit
def scale(X, Y, count, factor, shift, BLOCK: tl.constexpr):
    """Right with shift 0; reads and writes beside the tensors with another."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + lanes + shift, mask=lanes < count, other=0.0)
    tl.store(Y + lanes, x * factor, mask=lanes < count)


@triton.jit
def scale_out_of_bounds(X, Y, count, factor, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(Y + lanes, tl.load(X + lanes, mask=lanes < count, other=0.0) * factor)


@triton.jit
def sum_without_other(X, Y, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(Y, tl.sum(tl.load(X + lanes, mask=lanes < count), 0))


@triton.jit
def write_less(Y, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(Y + lanes, lanes.to(Y.dtype.element_ty), mask=lanes < count - 1)


@triton.jit
def offsets_in_int32(X, Y, stride, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(Y + rows, tl.load(X + rows * stride))


@triton.jit
def offsets_in_int64(X, Y, stride, BLOCK: tl.constexpr):
    rows = tl.arange(0, BLOCK)
    tl.store(Y + rows, tl.load(X + rows.to(tl.int64) * stride))


@triton.jit
def overlapping_blocks(X, Y, step, BLOCK: tl.constexpr):
    """Right with a step of BLOCK; programs write the same elements with a smaller one."""
    lanes = tl.program_id(0) * step + tl.arange(0, BLOCK)
    tl.store(Y + lanes, tl.load(X + lanes))


@triton.jit
def duplicates(Y, num_targets, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(Y + lanes % num_targets, lanes)


@triton.jit
def reads_neighbour(X, BLOCK: tl.constexpr):
    """Each program writes its block and reads the first element of the block before."""
    block = tl.program_id(0) * BLOCK
    before = tl.load(X + tl.maximum(block - BLOCK, 0))
    tl.store(X + block + tl.arange(0, BLOCK), tl.arange(0, BLOCK) + before)


@triton.jit
def plain_counter(COUNTER):
    """Counts with an atomic, and looks without one."""
    tl.atomic_add(COUNTER, 1, sem="relaxed")
    tl.store(COUNTER + 1 + tl.program_id(0), tl.load(COUNTER))


@triton.jit
def turned(X, SCRATCH, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    """Turns a vector around by way of memory: the lanes read what others wrote."""
    lanes = tl.arange(0, BLOCK)
    tl.store(SCRATCH + lanes, tl.load(X + lanes))
    if BARRIER:
        tl.debug_barrier()
    tl.store(X + lanes, tl.load(SCRATCH + BLOCK - 1 - lanes))


@triton.jit
def in_place(X, count, BLOCK: tl.constexpr):
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(2):
        x = tl.load(X + lanes, mask=lanes < count, other=0.0)
        tl.store(X + lanes, x + 1, mask=lanes < count)


@triton.jit
def last_sums(X, PARTS, COUNTER, OUT, num_programs, SEM: tl.constexpr, BLOCK: tl.constexpr):
    """Each program writes a part; the last one, by a counter, sums them. Right where the counter orders them."""
    program = tl.program_id(0)
    tl.store(PARTS + program, tl.sum(tl.load(X + program * BLOCK + tl.arange(0, BLOCK)), 0))
    if tl.atomic_add(COUNTER, 1, sem=SEM) == num_programs - 1:
        total = 0.0
        for part in range(num_programs):
            total += tl.load(PARTS + part)
        tl.store(OUT, total)


@triton.jit
def locked_sum(X, LOCK, TOTAL, BLOCK: tl.constexpr):
    part = tl.sum(tl.load(X + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)), 0)
    while tl.atomic_cas(LOCK, 0, 1) == 1:
        pass
    tl.store(TOTAL, tl.load(TOTAL) + part)
    tl.atomic_xchg(LOCK, 0)


@triton.jit
def _square(x):
    return tl.sum(x * x, 0)


@triton.jit
def nested(X, Y, BLOCK: tl.constexpr):
    tl.store(Y, tl.sigmoid(_square(tl.load(X + tl.arange(0, BLOCK)))))
