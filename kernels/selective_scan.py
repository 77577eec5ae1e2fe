"""The selective scan of Mamba (arXiv:2312.00752, §3.3.2), with the operations around it.

    Δ_t = softplus(delta_t + delta_bias)
    h_t = exp(Δ_t A) ⊙ h_{t-1} + Δ_t B_t x_t
    y_t = (<C_t, h_t> + skip ⊙ x_t) ⊙ silu(z_t)

What it must cost, per token and channel in bf16: forward reads x and delta and writes y, 6 bytes,
and reads z, 2 more. Backward reads x, delta and dy and writes dx and ddelta, 10 bytes, and reads z
and writes dz, 4 more (6 for a kernel that reads y again and does not recompute it). Forward also
takes N exponentials, of which a Hopper SM does 16 a clock. At N = 16 that is one clock, in which
the memory delivers 14 bytes (H100) to 21 (H200). So arithmetic bounds the scan.

At N = 16 the exponentials of a step of 32 channels take an SM 32 clocks. The forward step compiles
to 130 (Triton 3.6) or 140 (3.9) instructions. An SM issues 4 of them a clock, which makes 33 or 35
clocks. 19 of them are special functions with 2 clocks each, which makes 38. The backward step has
640 instructions, 160 clocks. (`kernels.compile` prints the instructions of a round, which is 4
steps. Backward has two inner loops.)

The compiler reports the following at N = 16 under Triton 3.9. Only a GPU can decide between the
variants, and `benchmarks.all --again` times them (SWEEP):

    forward     87 registers, 137 instructions a step, 23 warps an SM: a plan of 32 takes two waves.
                With 64 registers: 143 instructions, 32 warps, 24 bytes spilled (the default)
    backward    255 registers, 80 bytes spilled, 637 instructions, 50 of them special, 8 warps an SM
                (the default)
                groups of two steps: 249 registers, nothing spilled, 639 instructions, 46 special,
                8 warps; twice the scratch, or shorter intervals and more `starts`
                the same with 168 registers: 124 bytes spilled, 665 instructions, 12 warps; half
                as much scratch again

    name           shape
    x, delta, z    (B, T, D)    signal, step size before softplus and bias, gate
    A, rate        (D, N)       decay rates, negative; rate is log2(e) A, so a decay is one exp2
    B, C           (B, T, N)    input and output of each token
    resets         (B, T)       bytes: 1 if a token begins a document and forgets everything before
                                it; None: no token does
    h, g           (N, channels)    in a program: the state, and its gradient from all later tokens
    starts, ends   (B, intervals, D, N)   h before each interval of 64 steps; g after it

A program is one warp. It keeps the states of 32 channels (16 beyond N = 32) and walks time with all
of them in lock-step. In forward, at N = 16 or less, a lane has all states of its channel, so no
step needs a shuffle or a barrier. Backward also sums over channels, and there a lane has 4 states
of 4 channels. If there are too few programs to fill the machine, time is split into chunks of whole
intervals. Local kernels first walk each chunk from zero, which costs the exponentials once more. A
whole chunk multiplies a state by exp(A ΣΔ), so a small kernel can carry the states over the chunks.
The main kernels then start from the true states. Backward works in the same way, in reverse:

    g_t = C_t dy'_t + a_{t+1} g_{t+1}        a_t = exp(Δ_t A), dy' = dy ⊙ silu(z)
    dB_t = Σ_channels g_t Δ_t x_t    dC_t = Σ_channels dy'_t h_t    dx_t = skip dy'_t + Δ_t <g_t, B_t>
    dΔ_t = <g_t, a_t h_{t-1} A + B_t x_t>    dA = Σ_t g_t a_t h_{t-1} Δ_t

If a token begins a document, its a_t is 0, and so is d(Δ_t A). The sum of a chunk's step sizes is
then infinite.

Backward needs h in reverse. The inputs and `starts` are kept. In each interval a first walk stores
the state of every fourth step (every second beyond N = 16) in a scratch that each program reuses.
From there, groups of four (or two) steps are recomputed into registers. So backward takes nearly 3
N exponentials, or 4 N if time is split. dB and dC are summed over the channels of a program, one
block of channels after the other, and then over programs. dA, dskip and ddelta_bias are summed over
intervals. Each partial sum has its own place, so nothing depends on the order in which programs
run.

Memory at N = 16 (in proportion for more states; groups of two steps need twice the scratch):
`starts` takes one byte per token and channel. While backward runs, `ends` and partial dA take 2
more, partial dB and dC take 4 / share (a program has `share` blocks), and each of about 1000
programs has 32 KiB of scratch. All scratch together fits into the L2 cache. With longer intervals
it would not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from einops import rearrange
from minimodels.kernels.common import (
    GPU,
    LOG2_E,
    TIMED,
    Case,
    Peer,
    as_bytes,
    command,
    compare,
    full,
    multiprocessors,
    on,
    report,
    sigmoid,
)
from numpy.polynomial import Chebyshev, Polynomial
from torch import Tensor

from minimodels.architectures.mamba import check_shapes
from minimodels.architectures.mamba import selective_scan as operation

# What SWEEP may change.
INTERVAL = 64  # steps between the states that are kept for backward
STEPS = 4  # in a group, at most: their loads are in flight together
BACKWARD_STEPS = 4  # the same in backward, which recomputes their states into registers
# registers of a thread, at most, in the forward kernels up to N = 16; None: as the compiler chooses
REGISTERS = 64
BACKWARD_REGISTERS = None  # the same in the backward kernel
WHOLE = 8  # with this many walks per SM or more, time is not split
FILL = 32  # walks per SM that a split aims at
RESIDENT = 8  # programs of the backward kernel that fit on an SM


def log1p_series(degree: int) -> tl.constexpr:
    """Coefficients, highest first, of a polynomial for log(1 + e) / e on [0, 1].

    The polynomial is 1 at 0. A division would cost more.
    """
    series = Chebyshev.interpolate(lambda e: np.log1p(e) / e, degree, domain=[0, 1]).convert(
        kind=Polynomial
    )
    return tl.constexpr((*series.coef[:0:-1].tolist(), 1.0))


LOG1P_32, LOG1P_64 = log1p_series(8), log1p_series(18)  # off by less than 1e-7 and 1e-14


@triton.jit
def softplus(v):
    """log(1 + exp(v)) and its derivative.

    Both keep their digits if they are small, and they are 0 at v = -inf.
    """
    e = tl.exp2(tl.abs(v) * -LOG2_E)
    DEGREE: tl.constexpr = 18 if v.dtype == tl.float64 else 8
    series = tl.zeros_like(e)
    for i in tl.static_range(DEGREE + 1):
        series = series * e + (LOG1P_64[i] if DEGREE == 18 else LOG1P_32[i])
    return tl.maximum(v, 0.0) + e * series, tl.where(v >= 0, 1.0, e) / (1 + e)


@triton.jit
def among(i, count, inside, RAGGED: tl.constexpr):
    """`inside` if i < count, else nothing.

    Without RAGGED it is `inside`, because then all groups are full. The comparison is between
    tensors, because the interpreter cannot broadcast a scalar truth value.
    """
    return inside & (tl.full(inside.shape, i, tl.int32) < count) if RAGGED else inside


@triton.jit
def rows(
    P,
    stride: tl.constexpr,
    count,
    columns,
    inside,
    other,
    STEPS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """STEPS rows, all requested before the first is used.

    If groups may be RAGGED, rows from number `count` on are `other`. The rows keep their dtype. A
    conversion here would change their layout, and each request would wait for the previous one.
    """
    values = ()
    for i in tl.static_range(STEPS):
        values += (tl.load(P + i * stride + columns, among(i, count, inside, RAGGED), other),)
    return values


@triton.jit
def forgets(RESETS, row, count, STEPS: tl.constexpr, RAGGED: tl.constexpr):
    """For each of STEPS tokens a number that is not 0 if the token begins a document."""
    values = ()
    if RESETS is not None:
        for i in tl.static_range(STEPS):
            values += (
                tl.load(RESETS + row + i, i < count, 0) if RAGGED else tl.load(RESETS + row + i),
            )
    return values


@triton.jit
def decay_of(step, rate, RESETS, resets, i: tl.constexpr):
    """exp(Δ A) at each state and channel, or 0 if token i of a group begins a document."""
    decay = tl.exp2(step[None, :] * rate)
    if RESETS is not None:
        decay *= tl.where(resets[i] == 0, 1.0, 0.0)
    return decay


@triton.jit
def tile(block, D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """The channels and state numbers of a block, their places in (D, N), and which exist."""
    d, n = block * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
    # if all exist, this mask costs nothing
    real = d < D if D % BLOCK_D else tl.full((BLOCK_D,), 1, tl.int1)
    used = n < N if N < BLOCK_N else tl.full((BLOCK_N,), 1, tl.int1)
    return d, n, d[None, :] * N + n[:, None], real, used, real[None, :] & used[:, None]


@triton.jit
def lanes(P, d, n, real, N: tl.constexpr, FULL: tl.constexpr):
    """Rows d of a (D, N) matrix, transposed: (BLOCK_N, channels).

    Each lane has all numbers of its channel (if 32 channels make a block), so sums over N need no
    shuffles. A single load of the matrix would spread a channel over several lanes.
    """
    values = tl.zeros((n.shape[0], d.shape[0]), FULL)
    for k in tl.static_range(N):
        values = tl.where(
            (n == k)[:, None], tl.load(P + d * N + k, real, 0.0).to(FULL)[None, :], values
        )
    return values


@triton.jit
def forward_local_kernel(
    X, DELTA, A, B, BIAS, RESETS, LOCAL, SUM, T, steps, blocks, chunks, D: tl.constexpr,
    N: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr,
    RAGGED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Walk each chunk but the last from zero: the final state, and the sum of the step sizes."""
    block, walk = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, chunk = walk // (chunks - 1), walk % (chunks - 1)
    d, n, at, real, used, both = tile(block, D, N, BLOCK_N, BLOCK_D)
    rate = lanes(A, d, n, real, N, FULL) * LOG2_E
    bias = tl.load(BIAS + d, real, 0.0).to(FULL)
    h, total = tl.zeros((BLOCK_N, BLOCK_D), FULL), tl.zeros((BLOCK_D,), FULL)
    for t in range(0, steps, STEPS):
        row, count = batch * T + chunk * steps + t, steps - t
        xs = rows(X + row * D, D, count, d, real, 0.0, STEPS, RAGGED)
        deltas = rows(DELTA + row * D, D, count, d, real, float("-inf"), STEPS, RAGGED)
        Bs = rows(B + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
        resets = forgets(RESETS, row, count, STEPS, RAGGED)
        for i in tl.static_range(STEPS):
            x = xs[i].to(FULL)
            step, _ = softplus(deltas[i].to(FULL) + bias)
            decay = decay_of(step, rate, RESETS, resets, i)
            h = decay * h + Bs[i][:, None] * (step * x)[None, :]
            total += step
            if RESETS is not None:
                total += tl.where(resets[i] == 0, 0.0, float("inf"))
    tl.store(LOCAL + walk * D * N + at, h, both)
    tl.store(SUM + walk * D + d, total, real)


@triton.jit
def carry_kernel(
    LOCAL, SUM, A, EDGES, D, N, intervals, span, chunks, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr
):  # fmt: skip
    """Carry states from the first chunk to the last, or gradients from the last to the first.

    One program has some of the (d, n). LOCAL has no place for the chunk that comes last in this
    order. So in reverse, place r of LOCAL is that of chunk r + 1.
    """
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch, size = tl.program_id(1).to(tl.int64), D * N
    inside = at < size
    rate = tl.load(A + at, inside, 0.0).to(FULL) * LOG2_E
    h = tl.load(EDGES + (batch * intervals + (intervals - 1) * REVERSE) * size + at, inside, 0.0)
    for i in range(chunks - 1):
        chunk = chunks - 2 - i if REVERSE else i
        place = batch * (chunks - 1) + chunk
        total = tl.load(SUM + place * D + at // N, inside, 0.0)
        decay = tl.where(total == float("inf"), 0.0, tl.exp2(total * rate))
        h = decay * h + tl.load(LOCAL + place * size + at, inside, 0.0)
        tl.store(EDGES + (batch * intervals + (chunk + 1) * span - REVERSE) * size + at, h, inside)


@triton.jit
def forward_kernel(
    X, DELTA, A, B, C, SKIP, Z, BIAS, RESETS, Y, STARTS, FINAL, T, z_batch, interval, intervals,
    span, blocks, chunks, Z_ROW: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr,
    FULL: tl.constexpr,
):  # fmt: skip
    """Walk each chunk from its true start: the outputs, and the state before each interval."""
    block, walk = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, chunk = walk // chunks, walk % chunks
    d, n, at, real, used, both = tile(block, D, N, BLOCK_N, BLOCK_D)
    rate = lanes(A, d, n, real, N, FULL) * LOG2_E
    bias, skip = tl.load(BIAS + d, real, 0.0).to(FULL), tl.load(SKIP + d, real, 0.0).to(FULL)
    h = lanes(STARTS + (batch * intervals + chunk * span) * D * N, d, n, real, N, FULL)
    for i in range(chunk * span, tl.minimum(chunk * span + span, intervals)):
        tl.store(STARTS + (batch * intervals + i) * D * N + at, h, both)
        end = tl.minimum(T, i * interval + interval)
        for t in range(i * interval, end, STEPS):
            row, count = batch * T + t, end - t
            xs = rows(X + row * D, D, count, d, real, 0.0, STEPS, RAGGED)
            deltas = rows(DELTA + row * D, D, count, d, real, float("-inf"), STEPS, RAGGED)
            Bs = rows(B + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
            Cs = rows(C + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
            resets = forgets(RESETS, row, count, STEPS, RAGGED)
            if Z is not None:
                zs = rows(
                    Z + batch * z_batch + t * Z_ROW, Z_ROW, count, d, real, 0.0, STEPS, RAGGED
                )
            for j in tl.static_range(STEPS):
                x = xs[j].to(FULL)
                step, _ = softplus(deltas[j].to(FULL) + bias)
                decay = decay_of(step, rate, RESETS, resets, j)
                h = decay * h + Bs[j][:, None] * (step * x)[None, :]
                y = tl.sum(h * Cs[j][:, None], 0) + skip * x
                if Z is not None:
                    z = zs[j].to(FULL)
                    y *= z * sigmoid(z)
                tl.store(Y + (row + j) * D + d, y, among(j, count, real, RAGGED))
    if chunk == chunks - 1:
        tl.store(FINAL + batch * D * N + at, h, both)


@triton.jit
def backward_local_kernel(
    DELTA, A, C, Z, BIAS, RESETS, DY, LOCAL, SUM, T, z_batch, steps, blocks, chunks,
    Z_ROW: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Walk each chunk but the first backwards.

    This gives the gradient of the state before it that comes from the chunk's own outputs.
    """
    block, walk = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    batch, chunk = walk // (chunks - 1), walk % (chunks - 1) + 1
    d, n, at, real, used, both = tile(block, D, N, BLOCK_N, BLOCK_D)
    rate = lanes(A, d, n, real, N, FULL) * LOG2_E
    bias = tl.load(BIAS + d, real, 0.0).to(FULL)
    g, total = tl.zeros((BLOCK_N, BLOCK_D), FULL), tl.zeros((BLOCK_D,), FULL)
    length = tl.minimum(steps, T - chunk * steps)
    groups = tl.cdiv(length, STEPS)
    for i in range(groups):
        t = (groups - 1 - i) * STEPS
        row, count = batch * T + chunk * steps + t, length - t
        deltas = rows(DELTA + row * D, D, count, d, real, float("-inf"), STEPS, RAGGED)
        dys = rows(DY + row * D, D, count, d, real, 0.0, STEPS, RAGGED)
        Cs = rows(C + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
        resets = forgets(RESETS, row, count, STEPS, RAGGED)
        if Z is not None:
            zs = rows(
                Z + batch * z_batch + (chunk * steps + t) * Z_ROW,
                Z_ROW,
                count,
                d,
                real,
                0.0,
                STEPS,
                RAGGED,
            )
        for j in tl.static_range(STEPS - 1, -1, -1):
            step, _ = softplus(deltas[j].to(FULL) + bias)
            dy = dys[j].to(FULL)
            if Z is not None:
                z = zs[j].to(FULL)
                dy *= z * sigmoid(z)
            decay = decay_of(step, rate, RESETS, resets, j)
            g = decay * (g + Cs[j][:, None] * dy[None, :])
            total += step
            if RESETS is not None:
                total += tl.where(resets[j] == 0, 0.0, float("inf"))
    tl.store(LOCAL + walk * D * N + at, g, both)
    tl.store(SUM + walk * D + d, total, real)


@triton.jit
def backward_kernel(
    X, DELTA, A, B, C, SKIP, Z, BIAS, RESETS, DY, STARTS, ENDS, SCRATCH, DX, DDELTA, DA, DB, DC,
    DSKIP, DZ, DBIAS, DSTATE, T, tokens, z_batch, interval, intervals, span, blocks, chunks, share,
    Z_ROW: tl.constexpr, D: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """Walk each chunk backwards by intervals, and in each interval block by block of channels."""
    teams = tl.cdiv(blocks, share)
    team, walk = tl.program_id(0) % teams, (tl.program_id(0) // teams).to(tl.int64)
    batch, chunk = walk // chunks, walk % chunks
    size = tl.cast(D, tl.int64) * N
    first, last = chunk * span, tl.minimum(chunk * span + span, intervals)
    scratch = SCRATCH + tl.program_id(0).to(tl.int64) * tl.cdiv(interval, STEPS) * BLOCK_D * BLOCK_N
    slot = tl.arange(0, BLOCK_D)[None, :] * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    for index in range(first, last):
        here = last - 1 - (index - first)
        length = tl.minimum(interval, T - here * interval).to(tl.int32)
        groups = tl.cdiv(length, STEPS)
        for block in range(team * share, tl.minimum(team * share + share, blocks)):
            d, n, at, real, used, both = tile(block, D, N, BLOCK_N, BLOCK_D)
            rate = tl.load(A + at, both, 0.0).to(FULL) * LOG2_E
            bias, skip = (
                tl.load(BIAS + d, real, 0.0).to(FULL),
                tl.load(SKIP + d, real, 0.0).to(FULL),
            )

            # Forwards: store every STEPS-th state.
            h = tl.load(STARTS + (batch * intervals + here) * size + at, both, 0.0)
            for i in range(groups):
                row, count = batch * T + here * interval + i * STEPS, length - i * STEPS
                tl.store(scratch + i * BLOCK_D * BLOCK_N + slot, h)
                xs = rows(X + row * D, D, count, d, real, 0.0, STEPS, RAGGED)
                deltas = rows(DELTA + row * D, D, count, d, real, float("-inf"), STEPS, RAGGED)
                Bs = rows(B + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
                resets = forgets(RESETS, row, count, STEPS, RAGGED)
                for j in tl.static_range(STEPS):
                    x = xs[j].to(FULL)
                    step, _ = softplus(deltas[j].to(FULL) + bias)
                    decay = decay_of(step, rate, RESETS, resets, j)
                    h = decay * h + Bs[j][:, None] * (step * x)[None, :]
            tl.debug_barrier()  # lanes read below what other lanes have stored

            # Backwards: recompute a group's states from the one before it, then their gradients.
            g = tl.load(ENDS + (batch * intervals + here) * size + at, both, 0.0)
            dA = tl.zeros((BLOCK_N, BLOCK_D), FULL)
            dskip, dbias = tl.zeros((BLOCK_D,), FULL), tl.zeros((BLOCK_D,), FULL)
            for i in range(groups):
                t = (groups - 1 - i) * STEPS
                row, count = batch * T + here * interval + t, length - t
                h = tl.load(scratch + (groups - 1 - i) * BLOCK_D * BLOCK_N + slot)
                xs = rows(X + row * D, D, count, d, real, 0.0, STEPS, RAGGED)
                deltas = rows(DELTA + row * D, D, count, d, real, float("-inf"), STEPS, RAGGED)
                Bs = rows(B + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
                resets = forgets(RESETS, row, count, STEPS, RAGGED)
                hs = ()  # the states before each step
                for j in tl.static_range(STEPS):
                    hs += (h,)
                    x = xs[j].to(FULL)
                    step, _ = softplus(deltas[j].to(FULL) + bias)
                    decay = decay_of(step, rate, RESETS, resets, j)
                    h = decay * h + Bs[j][:, None] * (step * x)[None, :]
                # the barrier makes the compiler recompute everything but these states below,
                # because keeping the rest would need too many registers
                tl.debug_barrier()
                xs = rows(X + row * D, D, count, d, real, 0.0, STEPS, RAGGED)
                deltas = rows(DELTA + row * D, D, count, d, real, float("-inf"), STEPS, RAGGED)
                dys = rows(DY + row * D, D, count, d, real, 0.0, STEPS, RAGGED)
                Bs = rows(B + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
                Cs = rows(C + row * N, N, count, n, used, 0.0, STEPS, RAGGED)
                # this team's sums over its channels so far; there are none before its first block
                earlier, sums = among(team * share, block, used, True), (team * tokens + row) * N
                DBs = rows(DB + sums, N, count, n, earlier, 0.0, STEPS, RAGGED)
                DCs = rows(DC + sums, N, count, n, earlier, 0.0, STEPS, RAGGED)
                if Z is not None:
                    zs = Z + batch * z_batch + (here * interval + t) * Z_ROW
                    zs = rows(zs, Z_ROW, count, d, real, 0.0, STEPS, RAGGED)
                for j in tl.static_range(STEPS - 1, -1, -1):
                    to, use = (row + j) * D + d, among(j, count, real, RAGGED)
                    x = xs[j].to(FULL)
                    step, slope = softplus(deltas[j].to(FULL) + bias)
                    decay = decay_of(step, rate, RESETS, resets, j)
                    kept = decay * hs[j]
                    h = kept + Bs[j][:, None] * (step * x)[None, :]
                    dy = dys[j].to(FULL)
                    if Z is not None:
                        z = zs[j].to(FULL)
                        s = sigmoid(z)
                        gate = z * s
                        y = tl.sum(h * Cs[j][:, None], 0) + skip * x
                        tl.store(DZ + to, dy * y * (s + gate * (1 - s)), use)
                        dy *= gate
                    g += Cs[j][:, None] * dy[None, :]
                    dC = tl.sum(h * dy[None, :], 1)
                    dB = tl.sum(g * (step * x)[None, :], 1)
                    dinput = tl.sum(g * Bs[j][:, None], 0)  # the gradient of Δ_t x_t
                    dexponent = g * kept  # the gradient of Δ_t A
                    ddelta = slope * (x * dinput + tl.sum(dexponent * rate, 0) / LOG2_E)
                    tl.store(DX + to, skip * dy + step * dinput, use)
                    tl.store(DDELTA + to, ddelta, use)
                    dA += dexponent * step[None, :]
                    dskip += dy * x
                    dbias += ddelta
                    g *= decay
                    use_n = among(j, count, used, RAGGED)
                    tl.store(DB + sums + j * N + n, dB + DBs[j], use_n)
                    tl.store(DC + sums + j * N + n, dC + DCs[j], use_n)
            tl.store(DA + (batch * intervals + here) * size + at, dA, both)
            tl.store(DSKIP + (batch * intervals + here) * D + d, dskip, real)
            tl.store(DBIAS + (batch * intervals + here) * D + d, dbias, real)
            if here == 0:
                tl.store(DSTATE + batch * size + at, g, both)
            elif here > first:
                tl.store(ENDS + (batch * intervals + here - 1) * size + at, g, both)
            # as above, for the sums, the ends and the scratch in the next block or interval
            tl.debug_barrier()


@torch.library.custom_op("minimodels::selective_scan_forward", mutates_args=())
def selective_scan_forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, z: Tensor | None,
    bias: Tensor | None, state: Tensor | None, resets: Tensor | None, interval: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the final state, and the states at the start of each interval (B, intervals, D, N)."""
    batch, T, D, N, precise, z, bias, resets, (x, delta, A, B, C, skip) = prepare(
        z, bias, resets, x, delta, A, B, C, skip
    )
    intervals, blocks, span, chunks, _ = plan(x, N, interval)
    y, starts, final = (
        torch.empty_like(x),
        precise.new_empty(batch, intervals, D, N),
        precise.new_empty(batch, D, N),
    )
    starts[:, 0] = 0 if state is None else state
    z_batch, z_row = (0, 0) if z is None else z.stride()[:2]
    sizes = sizes_of(x, N, interval, STEPS, REGISTERS if N <= 16 else None)
    with on(x):
        if chunks > 1:
            local, total = (
                precise.new_empty(batch, chunks - 1, D, N),
                precise.new_empty(batch, chunks - 1, D),
            )
            forward_local_kernel[(blocks * batch * (chunks - 1),)](
                x, delta, A, B, bias, resets, local, total, T, span * interval, blocks, chunks,
                **sizes
            )  # fmt: skip
            carry(local, total, A, starts, span, reverse=False)
        forward_kernel[(blocks * batch * chunks,)](
            x, delta, A, B, C, skip, z, bias, resets, y, starts, final, T, z_batch, interval,
            intervals, span, blocks, chunks, Z_ROW=z_row, **sizes,
        )  # fmt: skip
    return y, final, starts


@torch.library.custom_op("minimodels::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    dy: Tensor, dfinal: Tensor, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    skip: Tensor, z: Tensor | None, bias: Tensor | None, resets: Tensor | None, starts: Tensor,
    interval: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, ddelta, dA, dB, dC, dskip, dz (empty without z), dbias, dstate."""
    given = (A, B, C, skip, bias)
    batch, T, D, N, precise, z, bias, resets, (x, delta, A, B, C, skip, dy) = prepare(
        z, bias, resets, x, delta, A, B, C, skip, dy
    )
    intervals, blocks, span, chunks, share = plan(x, N, interval)
    teams = triton.cdiv(blocks, share)
    ends, dstate = (
        torch.empty_like(starts),
        torch.empty_like(dfinal, memory_format=torch.contiguous_format),
    )
    ends[:, -1] = dfinal
    dx, ddelta, dz = (
        torch.empty_like(x),
        torch.empty_like(delta),
        x.new_empty(0) if z is None else z.new_empty(x.shape),
    )
    dA, dskip, dbias = (
        torch.empty_like(starts),
        precise.new_empty(batch, intervals, D),
        precise.new_empty(batch, intervals, D),
    )
    dB, dC = precise.new_empty(teams, batch, T, N), precise.new_empty(teams, batch, T, N)
    sizes = sizes_of(x, N, interval, BACKWARD_STEPS, BACKWARD_REGISTERS)
    z_batch, z_row = (0, 0) if z is None else z.stride()[:2]
    scratch = precise.new_empty(
        teams * batch * chunks * triton.cdiv(interval, sizes["STEPS"]),
        sizes["BLOCK_D"],
        sizes["BLOCK_N"],
    )
    with on(x):
        if chunks > 1:
            local, total = (
                precise.new_empty(batch, chunks - 1, D, N),
                precise.new_empty(batch, chunks - 1, D),
            )
            backward_local_kernel[(blocks * batch * (chunks - 1),)](
                delta, A, C, z, bias, resets, dy, local, total, T, z_batch, span * interval, blocks,
                chunks, Z_ROW=z_row, **sizes,
            )  # fmt: skip
            carry(local, total, A, ends, span, reverse=True)
        backward_kernel[(teams * batch * chunks,)](
            x, delta, A, B, C, skip, z, bias, resets, dy, starts, ends, scratch, dx, ddelta, dA, dB,
            dC, dskip, dz, dbias, dstate, T, batch * T, z_batch, interval, intervals, span, blocks,
            chunks, share, Z_ROW=z_row, **sizes,
        )  # fmt: skip
    sums = dA.sum((0, 1)), dB.sum(0), dC.sum(0), dskip.sum((0, 1)), dbias.sum((0, 1))
    dA, dB, dC, dskip, dbias = (
        s if g is None else s.to(g.dtype) for s, g in zip(sums, given, strict=True)
    )
    return dx, ddelta, dA, dB, dC, dskip, dz, dbias, dstate


def carry(local: Tensor, total: Tensor, A: Tensor, edges: Tensor, span: int, reverse: bool) -> None:
    """Run carry_kernel: fill in `edges` (B, intervals, D, N) at the chunks' starts.

    In reverse it fills in their ends.
    """
    batch, intervals, D, N = edges.shape
    carry_kernel[(triton.cdiv(D * N, 256), batch)](
        local,
        total,
        A,
        edges,
        D,
        N,
        intervals,
        span,
        local.shape[1] + 1,
        int(reverse),
        256,
        full(edges),
        num_warps=2,
    )


def prepare(
    z: Tensor | None, bias: Tensor | None, resets: Tensor | None, *tensors: Tensor
) -> tuple:
    """The sizes, an empty tensor in the precision of the computation, and the kernels' tensors.

    `tensors` are x, delta, A, B, C and more. B and C are converted to full precision, because every
    channel reads each of their numbers.
    """
    x, delta, A, B, C, *rest = tensors
    batch, T, D = x.shape
    precise = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    if z is not None and z.stride(2) != 1:  # half of a projection needs no copy
        z = z.contiguous()
    bias = precise.new_zeros(D) if bias is None else bias.contiguous()
    tensors = (x, delta, A, B.to(precise.dtype), C.to(precise.dtype), *rest)
    return (
        batch,
        T,
        D,
        A.shape[1],
        precise,
        z,
        bias,
        as_bytes(resets),
        tuple(tensor.contiguous() for tensor in tensors),
    )


def sizes_of(
    x: Tensor, N: int, interval: int, steps: int, registers: int | None
) -> dict[str, object]:
    """The constants for which the kernels are compiled.

    `STEPS` is the number of steps whose states fit into 64 registers a lane. `RAGGED` says whether
    some group of steps is not full.
    """
    (_, T, D), width = x.shape, triton.next_power_of_2(N)
    steps = min(steps, 64 * 32 // (width * block(N)))
    sizes = {
        "D": D,
        "N": N,
        "BLOCK_N": width,
        "BLOCK_D": block(N),
        "STEPS": steps,
        "FULL": full(x),
        "num_warps": 1,
        "maxnreg": None if x.dtype == torch.float64 else registers,
    }
    return {**sizes, "RAGGED": bool(T % steps or interval % steps)}


def block(N: int) -> int:
    """Channels of a program: one for each lane of its warp.

    There are fewer if their states would not fit into the registers.
    """
    return 32 if N <= 32 else 16


def plan(x: Tensor, N: int, interval: int) -> tuple[int, int, int, int, int]:
    """How the work is divided.

    Returns the number of intervals, blocks of channels, intervals in a chunk, chunks, and blocks in
    a program of the backward pass.
    """
    batch, T, D = x.shape
    intervals, blocks = triton.cdiv(T, interval), triton.cdiv(D, block(N))
    span, share = divide(batch * blocks, intervals, multiprocessors(x))
    return intervals, blocks, span, triton.cdiv(intervals, span), min(share, blocks)


def divide(walks: int, intervals: int, multiprocessors: int) -> tuple[int, int]:
    """Intervals in a chunk, and blocks in a program of the backward pass, for a number of walks.

    `walks` is blocks of channels times batch, and a walk is one warp's work. If each of an SM's
    four schedulers has two walks (WHOLE), time is not split, because a split makes the forward pass
    compute its exponentials twice. If there are fewer, chunks make about 32 warps an SM (FILL). 8
    programs of the backward pass fit on an SM (RESIDENT). If there would be more, each program sums
    over more channels instead.
    """
    span = intervals
    if walks < WHOLE * multiprocessors:
        span = max(1, intervals * walks // (FILL * multiprocessors))
    return span, triton.cdiv(walks * triton.cdiv(intervals, span), RESIDENT * multiprocessors)


# What PyTorch must know: shapes, derivative.


@selective_scan_forward.register_fake
def _(x, delta, A, B, C, skip, z, bias, state, resets, interval):
    (batch, T, D), N = x.shape, A.shape[1]
    precise = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    starts = precise.new_empty(batch, (T + interval - 1) // interval, D, N)
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        precise.new_empty(batch, D, N),
        starts,
    )


@selective_scan_backward.register_fake
def _(dy, dfinal, x, delta, A, B, C, skip, z, bias, resets, starts, interval):
    dbias = starts.new_empty(skip.shape, dtype=starts.dtype if bias is None else bias.dtype)
    plain = [tensor.new_empty(tensor.shape) for tensor in (x, delta, A, B, C, skip)]
    return (
        *plain,
        x.new_empty(0) if z is None else z.new_empty(z.shape),
        dbias,
        dfinal.new_empty(dfinal.shape),
    )


def _save(ctx, inputs, output):
    *tensors, state, resets, interval = inputs
    ctx.interval, ctx.state = interval, None if state is None else state.dtype
    ctx.save_for_backward(*tensors, resets, output[2])


def _differentiate(ctx, dy, dfinal, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them here
    *gradients, dz, dbias, dstate = selective_scan_backward(dy, dfinal, *saved, ctx.interval)
    *_, z, bias, _, _ = saved
    dz, dbias = None if z is None else dz, None if bias is None else dbias
    dstate = None if ctx.state is None else dstate.to(ctx.state)
    return *gradients, dz, dbias, dstate, None, None


selective_scan_forward.register_autograd(_differentiate, setup_context=_save)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As minimodels.architectures.mamba.selective_scan.

    x, delta, z (B, T, D); A (D, N) negative; B, C (B, T, N); skip, delta_bias (D,); state (B, D,
    N), None for zeros; resets (B, T) bool, None for none. N <= 64. Returns y (B, T, D) in x's dtype
    and the final state (B, D, N). Raises ValueError if shapes disagree.
    """
    check_shapes(x, delta, A, B, C, skip, z, delta_bias, state, resets)
    T, N = x.shape[1], A.shape[1]
    if not (T and 0 < N <= 64):
        raise ValueError(
            f"selective_scan: {T} steps of {N} states a channel; "
            "the kernel takes 1 or more steps, of 1 to 64 states"
        )
    y, final, _ = selective_scan_forward(
        x, delta, A, B, C, skip, z, delta_bias, state, resets, INTERVAL
    )
    return y, final


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs and in
    chunks too."""
    shapes = (
        [(2, 701, 64, 16), (1, 320, 48, 16), (1, 260, 48, 16), (1, 67, 48, 33)]
        if GPU
        else [(2, 9, 48, 16), (1, 8, 32, 16), (1, 5, 20, 33)]
    )
    for batch, T, D, N in (*shapes, (2, 1, 48, 16)):
        resets = torch.rand(batch, T) < 0.1
        for given in (arguments(batch, T, D, N, plain=True), (*arguments(batch, T, D, N), resets)):
            compare(selective_scan, reference, given)


def reference(x, delta, A, B, C, skip, z=None, bias=None, state=None, resets=None):
    """The reference, with the arguments in the kernel's order."""
    return operation(x, delta, A, B, C, skip, z, bias, state, "reference", resets)


def arguments(batch: int, T: int, D: int, N: int, plain: bool = False) -> tuple:
    """Random arguments; `plain` ones have no gate, bias and state."""
    x, delta, z = torch.randn(3, batch, T, D).unbind(0)
    B, C = torch.randn(2, batch, T, N).unbind(0)
    optional = (None, None, None) if plain else (z, torch.randn(D), torch.randn(batch, D, N))
    return x, delta - 2, -torch.rand(D, N) * N, B, C, torch.randn(D), *optional


def mamba_ssm(x, delta, A, B, C, skip, z, bias):
    """The CUDA kernel of the paper's authors.

    It takes (B, D, T), and its time includes the transpositions.
    """
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    x, delta, B, C, z = (tensor.mT.contiguous() for tensor in (x, delta, B, C, z))
    return selective_scan_fn(x, delta, A, B, C, skip, z, bias, delta_softplus=True).mT


def by_states(scan: Callable) -> Callable:
    """The operation by means of a scan h_t = decay_t · h_(t-1) + new_t.

    The scan keeps the states of all times in memory, (B, T, D, N).
    """

    def operation(x, delta, A, B, C, skip, z, bias):
        step = F.softplus(delta + bias).float().unsqueeze(-1)  # (B, T, D, 1)
        states = scan(torch.exp(step * A), step * x.unsqueeze(-1) * B.unsqueeze(2))
        y = (states @ C.float().unsqueeze(-1)).squeeze(-1) + skip * x
        return (y * F.silu(z)).to(x.dtype)

    return operation


def mambapy(decay: Tensor, new: Tensor) -> Tensor:
    """The parallel scan of mambapy."""
    from mambapy.pscan import pscan

    return pscan(decay, new)


def accelerated_scan(decay: Tensor, new: Tensor) -> Tensor:
    """The Triton scan of accelerated-scan, which takes (B, channels, T)."""
    from accelerated_scan.scalar import scan

    decay, new = (rearrange(part, "b t d n -> b (d n) t").contiguous() for part in (decay, new))
    return rearrange(scan(decay, new), "b (d n) t -> b t d n", n=N_TIMED)


# other settings that may be faster: benchmarks.all --again compares and times each
SWEEP = [
    {"REGISTERS": None},
    {"REGISTERS": 96},
    {"WHOLE": 4},
    {"WHOLE": 16},
    {"INTERVAL": 32},
    {"BACKWARD_STEPS": 2},
    {"BACKWARD_STEPS": 2, "INTERVAL": 32},
    {"BACKWARD_STEPS": 2, "INTERVAL": 32, "BACKWARD_REGISTERS": 168, "RESIDENT": 12},
    {"BACKWARD_STEPS": 2, "INTERVAL": 16, "BACKWARD_REGISTERS": 168, "RESIDENT": 12},
]
N_TIMED = 16
PEERS = {
    "mamba_ssm": Peer("mamba_ssm", mamba_ssm),
    "mambapy": Peer("mambapy", by_states(mambapy), gpu=False),
    "accelerated-scan": Peer("accelerated-scan", by_states(accelerated_scan)),
}


def case(tokens: int, T: int, D: int, N: int = N_TIMED) -> Case:
    """With a gate: forward moves x, delta, z and y.

    Backward reads x, delta, z and dy, and writes dx, ddelta and dz.
    """

    def inputs() -> tuple:
        with torch.device(TIMED["device"]):
            x, delta, A, B, C, skip, z, bias, _ = arguments(tokens // T, T, D, N)
        x, delta, B, C, z = (tensor.to(TIMED["dtype"]) for tensor in (x, delta, B, C, z))
        return tuple(tensor.requires_grad_() for tensor in (x, delta, A, B, C, skip, z, bias))

    return Case(f"B {tokens // T}, T {T}, D {D}, N {N}", inputs, 4 * tokens * D, 7 * tokens * D)


# the launches of minimodels.kernels.compile: also without a gate, with sizes that fill no block,
# and with documents
EXAMPLES = [
    case(8192, 4096, 1536).inputs,
    lambda: case(300, 300, 1500, 50).inputs()[:6],
    lambda: (*case(8192, 4096, 1536).inputs(), None, torch.rand(2, 4096) < 0.01),
]


if __name__ == "__main__":
    cases = (
        [case(65536, T, 1536) for T in (1024, 4096, 16384, 65536)]
        if GPU
        else [case(T, T, 512) for T in (256, 1024, 4096)]
    )
    command(report("selective_scan", selective_scan, operation, cases, PEERS, check), __doc__)
