"""The delta rule in chunks of C = 64 tokens.

The rule and its chunked form are in minimodels/ops/delta_rule.py.

    A_i,j = Σ_d q_i,d k_j,d exp(G_i - G_j)_d, j <= i;   E with e for q, j < i;   G: sums of g
    U = (I + E)⁻¹ (V - ē S)        Y = q̄ S + A U        S' = ᾱ S + k̄ᵀ U

    sums      G, in powers of two                                  every token
    prepare   (I + E)⁻¹ V and W = (I + E)⁻¹ ē                      every chunk, if there is e
    state     the states before the chunks                         some columns of S, all chunks
    outputs   Y                                                    every chunk and some columns

Backward, with R the gradient of the state after a chunk, prepare runs again, and then

    errors    Z = -(I + E)⁻ᵀ Aᵀ dY and W_R = (I + E)⁻ᵀ k̄          every chunk, if there is e
    state     R, in reverse, with ē for k̄ and W_R for W            some columns of R, all chunks
    values    U, Z and dV                                          every chunk and some columns
    keys      dq, dk, de and dg                                    every chunk and some key channels

In reverse the state kernel computes R <- ᾱ R + q̄ᵀ dY + ēᵀ (Z - W_R R).

So only state_kernel is sequential, over T/C steps. Everything else has a program for each chunk.
Each partial sum has its own place, so nothing depends on the order in which programs run. The
inputs and the states before the chunks are saved.

Every exponent is at most 0. With one gate per head, G_i - G_j is masked before the exponential.
With one per channel, blocks of 32, 16, ... 1 tokens are joined in pairs: q_i has decayed since the
end of the first block, and k_j decays until then. So A takes six products there, but only one with
a gate per head. A document that begins within a chunk cuts it: sums of g start again there, and
pairs of tokens from both sides of the cut are masked.

What it must cost in bf16 with K = V = 128, per token and head: forward reads q, k, v and e and
writes y, 1280 bytes, and takes 98 thousand FLOPs without e and 164 thousand with it. An H200 moves
the bytes in 0.27 ns and computes in 0.1 to 0.2 ns, so memory is the bound. These kernels also write
U, W and the states and read them again, 4.4 KB in all with e (3.1 KB without), because the chunks
wait for each other in between.

Compiled for Hopper (Triton 3.9), registers of a thread with keys of 128 numbers: sums 25, prepare
163 (238 with a gate for each channel), state 122 to 221, outputs 159 to 252, errors 136 to 240,
values 155 to 226, keys 220 to 255. Only `keys` spills, with a gate for each channel: 16 bytes
without e and 250 with it. (If keys have 256 numbers, `state` spills up to 80.) Instructions of a
warp in one turn of a loop: sums 51 to 91, prepare 107 to 596, state 486 to 1227, outputs 188 to
598, errors 192 to 588, values 200 to 605, keys 211 to 623. The assembler expects no loss. This has
not run on a GPU.

    name            shape
    sums            (B, T, H, 1 | K)            G, in fp32
    doc             (B, T) int32                number of the document; the initial state has 0
    U, Z            (B, T, H, V)                in v's dtype, like all factors of products
    W, W_R          (B, T, H, K)
    inverse         (B, T, H, C)                rows of (I + E)⁻¹
    edges, dedges   (B, chunks, H, K, V)        S before each chunk; R after it
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from minimodels.kernels.common import (
    GPU,
    LOG2_E,
    TIMED,
    Case,
    Peer,
    command,
    compare,
    full,
    on,
    report,
)
from torch import Tensor

from minimodels.ops.delta_rule import check_shapes, flops, same_heads
from minimodels.ops.delta_rule import delta_rule as operation

CHUNK = 64  # C, tokens of a chunk: 16, 32 or 64


# The pieces of a chunk. Every kernel works on C tokens t of one head, from `first` on. d are key
# channels, n are value channels, and c are the channels of gates: d itself, or one number for all.


@triton.jit
def product(a, b, TYPE: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """a @ b with factors in TYPE and sums in FULL."""
    return tl.dot(a.to(TYPE), b.to(TYPE), input_precision=PRECISION, out_dtype=FULL)


@triton.jit
def places(batch, t, T, head, heads, d, WIDTH: tl.constexpr):
    """The places of tokens t of one head in (B, T, heads, WIDTH), and which of them exist."""
    at = ((batch * T + t) * heads + head)[:, None] * WIDTH + d[None, :]
    return at, (t < T)[:, None] & (d < WIDTH)[None, :]


@triton.jit
def rows(X, batch, t, T, head, heads, d, WIDTH: tl.constexpr):
    """Tokens t of one head of X (B, T, heads, WIDTH), and 0 after the end of the text."""
    at, real = places(batch, t, T, head, heads, d, WIDTH)
    return tl.load(X + at, real, 0.0)


@triton.jit
def square(place, d, n, K: tl.constexpr, V: tl.constexpr):
    """The places of rows d and columns n of a state in (..., K, V), and which of them exist."""
    return place * (K * V) + d[:, None] * V + n[None, :], (d < K)[:, None] & (n < V)[None, :]


@triton.jit
def sums(SUMS, batch, t, T, head, H, c, GATES: tl.constexpr):
    """The sum of log2-decays from the start of the chunk or document to tokens t.

    After the end of the text it is the same as at its end.
    """
    return rows(SUMS, batch, tl.minimum(t, T - 1), T, head, H, c, GATES)


@triton.jit
def from_start(SUMS, DOC, batch, first, t, T, head, H, c, GATES: tl.constexpr):
    """The decay from the state before the chunk to tokens t.

    It is 0 if a token is in another document than that state.
    """
    decay = tl.exp2(sums(SUMS, batch, t, T, head, H, c, GATES))
    if DOC is not None:
        reached = tl.load(DOC + batch * T + tl.minimum(t, T - 1)) == before(DOC, batch, first, T)
        decay = tl.where(reached[:, None], decay, 0.0)
    return decay


@triton.jit
def before(DOC, batch, first, T):
    """The document of the token before the chunk; the initial state has number 0."""
    return tl.load(DOC + batch * T + first - 1, first > 0, 0)


@triton.jit
def to_end(SUMS, DOC, batch, first, t, T, head, H, c, GATES: tl.constexpr, C: tl.constexpr):
    """The decay from tokens t to the end of the chunk.

    It is 0 if a token is in another document than the chunk's last token.
    """
    last = tl.minimum(first + C, T) - 1 + 0 * t
    end = sums(SUMS, batch, last, T, head, H, c, GATES)
    decay = tl.exp2(tl.minimum(end - sums(SUMS, batch, t, T, head, H, c, GATES), 0.0))
    if DOC is not None:
        kept = tl.load(DOC + batch * T + tl.minimum(t, T - 1)) == tl.load(DOC + batch * T + last)
        decay = tl.where(kept[:, None], decay, 0.0)
    return decay


@triton.jit
def of_chunk(SUMS, DOC, batch, first, T, head, H, c, GATES: tl.constexpr, C: tl.constexpr):
    """The decay of the whole chunk: (channels of gates,), 0 if a document begins in it."""
    last = tl.minimum(first + C, T) - 1
    decay = tl.exp2(tl.load(SUMS + ((batch * T + last) * H + head) * GATES + c, c < GATES, 0.0))
    if DOC is not None:
        whole = tl.load(DOC + batch * T + last) == before(DOC, batch, first, T)
        decay = tl.where(whole, decay, 0.0)
    return decay


@triton.jit
def visible(DOC, batch, t, T, AGAIN: tl.constexpr):
    """(C, C): whether token i sees token j: earlier in its document, or i itself if AGAIN."""
    mask = t[:, None] >= t[None, :] if AGAIN else t[:, None] > t[None, :]
    if DOC is not None:
        document = tl.load(DOC + batch * T + tl.minimum(t, T - 1))
        mask &= document[:, None] == document[None, :]
    return mask


@triton.jit
def between(SUMS, mask, batch, t, T, head, H):
    """One gate per head: (C, C) decays from j to i within the mask, else 0."""
    total = tl.load(SUMS + (batch * T + tl.minimum(t, T - 1)) * H + head)
    return tl.exp2(tl.where(mask, total[:, None] - total[None, :], float("-inf")))


@triton.jit
def joined(SUMS, batch, first, t, T, head, H, c, half, GATES: tl.constexpr):
    """With one gate per channel, the decays in pairs of blocks of `half` tokens.

    Returns the decays from the first block's end to each token of the second, the decays from each
    token of the first block to its end (both are 0 at the other tokens), and which tokens are in
    the same pair of blocks.
    """
    i = t - first
    second = (i // half) % 2 == 1
    here = sums(SUMS, batch, t, T, head, H, c, GATES)
    anchor = first + i // (2 * half) * 2 * half + half - 1  # the first block's last token
    at = sums(SUMS, batch, anchor, T, head, H, c, GATES)
    late = tl.where(second[:, None], tl.exp2(tl.minimum(here - at, 0.0)), 0.0)
    early = tl.where(second[:, None], 0.0, tl.exp2(tl.minimum(at - here, 0.0)))
    pair = i // (2 * half)
    return late, early, pair[:, None] == pair[None, :]


@triton.jit
def scores(
    X, Y, SUMS, DOC, batch, first, t, T, head, group, H, groups, AGAIN: tl.constexpr,
    K: tl.constexpr, GATES: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    TYPE: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(C, C): Σ_d x_i,d y_j,d decayed from j to i; of tokens with themselves only if AGAIN."""
    total = tl.zeros((C, C), FULL)
    for start in tl.static_range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        x = rows(X, batch, t, T, group, groups, d, K)
        y = rows(Y, batch, t, T, group, groups, d, K)
        if GATES == 1:
            total += product(x, tl.trans(y), TYPE, FULL, PRECISION)
        else:
            half = C // 2
            while half > 0:
                late, early, joins = joined(SUMS, batch, first, t, T, head, H, d, half, GATES)
                part = product(x * late, tl.trans(y * early), TYPE, FULL, PRECISION)
                total += tl.where(joins, part, 0.0)
                half //= 2
            if AGAIN:
                own = tl.sum(x.to(FULL) * y.to(FULL), 1)
                total += tl.where(t[:, None] == t[None, :], own[:, None], 0.0)
    mask = visible(DOC, batch, t, T, AGAIN)
    if GATES == 1:
        return total * between(SUMS, mask, batch, t, T, head, H)
    return tl.where(mask, total, 0.0)


@triton.jit
def inverse(E, C: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr):
    """(I + E)⁻¹ of a strictly lower (C, C).

    The blocks of 16 on the diagonal are inverted row by row, all at once. The rest is a product,
    because what is left is nilpotent. With D the inverse of those blocks, and P the product of D
    with the rest of E, the result is (I - P + P² - P³) D.
    """
    BLOCKS: tl.constexpr = C // 16
    i, r = tl.arange(0, C), tl.arange(0, 16)
    inside = (i // 16)[:, None] == (i // 16)[None, :]
    blocks = tl.sum(tl.reshape(tl.where(inside, E, 0.0), (BLOCKS, 16, BLOCKS, 16)), 2)
    D = tl.zeros((BLOCKS, 16, 16), FULL) + tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :]
    for n in range(1, 16):
        at = (r == n)[None, :, None]
        row = tl.sum(tl.where(at, blocks, 0.0), 1)  # (BLOCKS, 16)
        D -= tl.where(at, tl.sum(row[:, :, None] * D, 1)[:, None, :], 0.0)
    D = tl.broadcast_to(D[:, :, None, :], (BLOCKS, 16, BLOCKS, 16))
    D = tl.where(inside, tl.reshape(D, (C, C)), 0.0)
    if BLOCKS > 1:
        P = product(D, tl.where(inside, 0.0, E), FULL, FULL, PRECISION)
        rest = tl.where(i[:, None] == i[None, :], 1.0, 0.0) - P
        if BLOCKS > 2:
            rest += product(rest, product(P, P, FULL, FULL, PRECISION), FULL, FULL, PRECISION)
        D = product(rest, D, FULL, FULL, PRECISION)
    return D


# The kernels.


@triton.jit
def sums_kernel(G, DOC, SUMS, T, N, C: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr):
    """Sums of log2-decays from the start of each chunk, or of a document in it.

    The gate of a document's first token does not count.
    """
    first, batch = tl.program_id(0) * C, tl.program_id(1).to(tl.int64)
    n = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    # so low that exp2 of it is 0, but sums of it stay finite
    LOWEST: tl.constexpr = -1200.0 if FULL == tl.float64 else -160.0
    total = tl.zeros((BLOCK,), FULL)
    for t in range(first, tl.minimum(first + C, T)):
        at = (batch * T + t) * N + n
        total += tl.maximum(tl.load(G + at, n < N, 0.0).to(FULL) * LOG2_E, LOWEST)
        if DOC is not None:
            starts = tl.load(DOC + batch * T + t) != before(DOC, batch, t, T)
            total = tl.where(starts, 0.0, total)
        tl.store(SUMS + at, total, n < N)


@triton.jit
def prepare_kernel(
    KEYS, ERASE, VALUES, SUMS, DOC, U, W, INVERSE, T, H, groups, K: tl.constexpr, V: tl.constexpr,
    GATES: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TYPE: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The inverse of I + E, and its products with V and ē."""
    first, batch, head = (
        tl.program_id(0) * C,
        (tl.program_id(1) // H).to(tl.int64),
        tl.program_id(1) % H,
    )
    t, group = first + tl.arange(0, C), head // (H // groups)
    E = scores(
        ERASE, KEYS, SUMS, DOC, batch, first, t, T, head, group, H, groups,
        False, K, GATES, C, BLOCK_K, TYPE, FULL, PRECISION,
    )  # fmt: skip
    X = inverse(E, C, FULL, PRECISION)
    if INVERSE is not None:
        at, real = places(batch, t, T, head, H, tl.arange(0, C), C)
        tl.store(INVERSE + at, X, real)
    for start in range(0, V, BLOCK_V):
        at, real = places(batch, t, T, head, H, start + tl.arange(0, BLOCK_V), V)
        tl.store(U + at, product(X, tl.load(VALUES + at, real, 0.0), TYPE, FULL, PRECISION), real)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        c = d if GATES > 1 else tl.arange(0, 1)
        e = rows(ERASE, batch, t, T, group, groups, d, K) * from_start(
            SUMS, DOC, batch, first, t, T, head, H, c, GATES
        )
        at, real = places(batch, t, T, head, H, d, K)
        tl.store(W + at, product(X, e, TYPE, FULL, PRECISION), real)


@triton.jit
def state_kernel(
    KEYS, VALUES, W, KEYS_TOO, VALUES_TOO, SUMS, DOC, FIRST, EDGES, LAST, T, H, groups,
    REVERSE: tl.constexpr, K: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr, C: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_V: tl.constexpr, TYPE: tl.constexpr, FULL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Walk the chunks: S <- ᾱ S + keysᵀ (values - W S), and store the S before each chunk.

    In forward the keys are k̄. In REVERSE S is the gradient of the state, the keys are ē, and
    q̄ᵀ dY is added too; without e, the keys are q̄ and the values dY.
    """
    batch, head = (tl.program_id(1) // H).to(tl.int64), tl.program_id(1) % H
    group, chunks = head // (H // groups), tl.cdiv(T, C)
    d, n = tl.arange(0, WIDTH), tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    c = d if GATES > 1 else tl.arange(0, 1)
    at, real = square(batch * H + head, d, n, K, V)
    S = tl.load(FIRST + at, real, 0.0).to(FULL)
    for i in range(chunks):
        chunk = chunks - 1 - i if REVERSE else i
        first = chunk * C
        t = first + tl.arange(0, C)
        edge, _ = square((batch * chunks + chunk) * H + head, d, n, K, V)
        tl.store(EDGES + edge, S, real)
        values = rows(VALUES, batch, t, T, head, H, n, V)
        if W is not None:
            values = values - product(rows(W, batch, t, T, head, H, d, K), S, TYPE, FULL, PRECISION)
        keys = rows(KEYS, batch, t, T, group, groups, d, K)
        if REVERSE:
            decay = from_start(SUMS, DOC, batch, first, t, T, head, H, c, GATES)
        else:
            decay = to_end(SUMS, DOC, batch, first, t, T, head, H, c, GATES, C)
        S = S * of_chunk(SUMS, DOC, batch, first, T, head, H, c, GATES, C)[:, None]
        S += product(tl.trans(keys * decay), values, TYPE, FULL, PRECISION)
        if KEYS_TOO is not None:
            keys = rows(KEYS_TOO, batch, t, T, group, groups, d, K) * decay
            values = rows(VALUES_TOO, batch, t, T, head, H, n, V)
            S += product(tl.trans(keys), values, TYPE, FULL, PRECISION)
    tl.store(LAST + at, S, real)


@triton.jit
def outputs_kernel(
    Q, KEYS, U, W, SUMS, DOC, EDGES, Y, T, H, groups, K: tl.constexpr, V: tl.constexpr,
    GATES: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TYPE: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Y = q̄ S + A (U - W S)."""
    chunk, batch, head = (
        tl.program_id(0),
        (tl.program_id(1) // H).to(tl.int64),
        tl.program_id(1) % H,
    )
    first, group = chunk * C, head // (H // groups)
    t, n = first + tl.arange(0, C), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    A = scores(
        Q, KEYS, SUMS, DOC, batch, first, t, T, head, group, H, groups,
        True, K, GATES, C, BLOCK_K, TYPE, FULL, PRECISION,
    )  # fmt: skip
    at, real = places(batch, t, T, head, H, n, V)
    y, u = tl.zeros((C, BLOCK_V), FULL), tl.load(U + at, real, 0.0).to(FULL)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        c = d if GATES > 1 else tl.arange(0, 1)
        edge, inside = square((batch * tl.num_programs(0) + chunk) * H + head, d, n, K, V)
        S = tl.load(EDGES + edge, inside, 0.0)
        q = rows(Q, batch, t, T, group, groups, d, K) * from_start(
            SUMS, DOC, batch, first, t, T, head, H, c, GATES
        )
        y += product(q, S, TYPE, FULL, PRECISION)
        if W is not None:
            u -= product(rows(W, batch, t, T, head, H, d, K), S, TYPE, FULL, PRECISION)
    tl.store(Y + at, y + product(A, u, TYPE, FULL, PRECISION), real)


@triton.jit
def errors_kernel(
    Q, KEYS, DY, INVERSE, SUMS, DOC, Z, W, T, H, groups, K: tl.constexpr, V: tl.constexpr,
    GATES: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    TYPE: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The counterpart of prepare: the products of the transposed inverse with -Aᵀ dY and k̄."""
    first, batch, head = (
        tl.program_id(0) * C,
        (tl.program_id(1) // H).to(tl.int64),
        tl.program_id(1) % H,
    )
    t, group = first + tl.arange(0, C), head // (H // groups)
    A = tl.trans(scores(
        Q, KEYS, SUMS, DOC, batch, first, t, T, head, group, H, groups,
        True, K, GATES, C, BLOCK_K, TYPE, FULL, PRECISION,
    ))  # fmt: skip
    X = tl.trans(rows(INVERSE, batch, t, T, head, H, tl.arange(0, C), C))
    for start in range(0, V, BLOCK_V):
        at, real = places(batch, t, T, head, H, start + tl.arange(0, BLOCK_V), V)
        dU = product(A, tl.load(DY + at, real, 0.0), TYPE, FULL, PRECISION)
        tl.store(Z + at, -product(X, dU, TYPE, FULL, PRECISION), real)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        c = d if GATES > 1 else tl.arange(0, 1)
        k = rows(KEYS, batch, t, T, group, groups, d, K) * to_end(
            SUMS, DOC, batch, first, t, T, head, H, c, GATES, C
        )
        at, real = places(batch, t, T, head, H, d, K)
        tl.store(W + at, product(X, k, TYPE, FULL, PRECISION), real)


@triton.jit
def values_kernel(
    Q, KEYS, DY, U, WS, Z, WR, SUMS, DOC, EDGES, DEDGES, DV, T, H, groups, K: tl.constexpr,
    V: tl.constexpr, GATES: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, TYPE: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With erasing, replace U and Z by U - W S and Z - W R; then dV = -Z.

    Without erasing, dV = Aᵀ dY + k̄ R.
    """
    chunk, batch, head = (
        tl.program_id(0),
        (tl.program_id(1) // H).to(tl.int64),
        tl.program_id(1) % H,
    )
    first, group = chunk * C, head // (H // groups)
    t, n = first + tl.arange(0, C), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    at, real = places(batch, t, T, head, H, n, V)
    if Z is not None:
        u, dv = tl.load(U + at, real, 0.0).to(FULL), -tl.load(Z + at, real, 0.0).to(FULL)
    else:
        A = scores(
            Q, KEYS, SUMS, DOC, batch, first, t, T, head, group, H, groups,
            True, K, GATES, C, BLOCK_K, TYPE, FULL, PRECISION,
        )  # fmt: skip
        dv = product(tl.trans(A), tl.load(DY + at, real, 0.0), TYPE, FULL, PRECISION)
    for start in range(0, K, BLOCK_K):
        d = start + tl.arange(0, BLOCK_K)
        edge, inside = square((batch * tl.num_programs(0) + chunk) * H + head, d, n, K, V)
        R = tl.load(DEDGES + edge, inside, 0.0)
        if Z is not None:
            S = tl.load(EDGES + edge, inside, 0.0)
            u -= product(rows(WS, batch, t, T, head, H, d, K), S, TYPE, FULL, PRECISION)
            dv += product(rows(WR, batch, t, T, head, H, d, K), R, TYPE, FULL, PRECISION)
        else:
            c = d if GATES > 1 else tl.arange(0, 1)
            k = rows(KEYS, batch, t, T, group, groups, d, K)
            k = k * to_end(SUMS, DOC, batch, first, t, T, head, H, c, GATES, C)
            dv += product(k, R, TYPE, FULL, PRECISION)
    tl.store(DV + at, dv, real)
    if Z is not None:
        tl.store(U + at, u, real)
        tl.store(Z + at, -dv, real)


@triton.jit
def keys_kernel(
    Q, KEYS, ERASE, U, DY, Z, SUMS, DOC, EDGES, DEDGES, DQ, DK, DE, DG, B, T, H, groups,
    K: tl.constexpr, V: tl.constexpr, GATES: tl.constexpr, C: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, TYPE: tl.constexpr, FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, dk, de of one head, in some channels, and dg.

    With one gate per head, this dg is the part that comes from these channels.
    """
    chunk, batch, head = (
        tl.program_id(0),
        (tl.program_id(1) // H).to(tl.int64),
        tl.program_id(1) % H,
    )
    first, group = chunk * C, head // (H // groups)
    t, d = first + tl.arange(0, C), tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    c = d if GATES > 1 else tl.arange(0, 1)

    # The gradients from the states.
    dA, dq, dk = tl.zeros((C, C), FULL), tl.zeros((C, BLOCK_K), FULL), tl.zeros((C, BLOCK_K), FULL)
    dE, de, end = tl.zeros((C, C), FULL), tl.zeros((C, BLOCK_K), FULL), tl.zeros((BLOCK_K,), FULL)
    for start in range(0, V, BLOCK_V):
        n = start + tl.arange(0, BLOCK_V)
        edge, inside = square((batch * tl.num_programs(0) + chunk) * H + head, d, n, K, V)
        S, R = tl.load(EDGES + edge, inside, 0.0), tl.load(DEDGES + edge, inside, 0.0)
        u, dy = rows(U, batch, t, T, head, H, n, V), rows(DY, batch, t, T, head, H, n, V)
        dA += product(dy, tl.trans(u), TYPE, FULL, PRECISION)
        dq += product(dy, tl.trans(S), TYPE, FULL, PRECISION)
        dk += product(u, tl.trans(R), TYPE, FULL, PRECISION)
        end += tl.sum(S.to(FULL) * R.to(FULL), 1)
        if ERASE is not None:
            z = rows(Z, batch, t, T, head, H, n, V)
            dE += product(z, tl.trans(u), TYPE, FULL, PRECISION)
            de += product(z, tl.trans(S), TYPE, FULL, PRECISION)
    mask = visible(DOC, batch, t, T, True)
    dA = tl.where(mask, dA, 0.0)
    q = rows(Q, batch, t, T, group, groups, d, K)
    k = rows(KEYS, batch, t, T, group, groups, d, K)
    since = from_start(SUMS, DOC, batch, first, t, T, head, H, c, GATES)
    dk *= to_end(SUMS, DOC, batch, first, t, T, head, H, c, GATES, C)
    end = end * of_chunk(SUMS, DOC, batch, first, T, head, H, c, GATES, C) + tl.sum(k * dk, 0)
    dq *= since
    if ERASE is not None:
        e = rows(ERASE, batch, t, T, group, groups, d, K)
        dE = tl.where(visible(DOC, batch, t, T, False), dE, 0.0)
        de *= since

    # The gradients from A and E.
    if GATES == 1:
        decay = between(SUMS, mask, batch, t, T, head, H)
        dA *= decay
        dq += product(dA, k, TYPE, FULL, PRECISION)
        dk += product(tl.trans(dA), q, TYPE, FULL, PRECISION)
        if ERASE is not None:
            dE *= decay
            de += product(dE, k, TYPE, FULL, PRECISION)
            dk += product(tl.trans(dE), e, TYPE, FULL, PRECISION)
    else:
        half = C // 2
        while half > 0:
            late, early, joins = joined(SUMS, batch, first, t, T, head, H, c, half, GATES)
            part = tl.where(joins, dA, 0.0)
            dq += late * product(part, k * early, TYPE, FULL, PRECISION)
            dk += early * product(tl.trans(part), q * late, TYPE, FULL, PRECISION)
            if ERASE is not None:
                part = tl.where(joins, dE, 0.0)
                de += late * product(part, k * early, TYPE, FULL, PRECISION)
                dk += early * product(tl.trans(part), e * late, TYPE, FULL, PRECISION)
            half //= 2

    # The gates: with their sums G, q and e are scaled by exp(G), and k by exp(-G). Each gate is in
    # all later sums of its document.
    dG = q * dq - k * dk
    if ERASE is not None:
        dG += e * de
        at, real = places(batch, t, T, head, H, d, K)
        tl.store(DE + at, de, real)
    dG += tl.where((t == first + C - 1)[:, None], end[None, :], 0.0)
    later = tl.trans(mask)
    if GATES == 1:
        dg = tl.sum(tl.where(later, tl.sum(dG, 1)[None, :], 0.0), 1)
        part = tl.program_id(2).to(tl.int64) * B + batch
        tl.store(DG + (part * T + t) * H + head, dg, t < T)
    else:
        own = tl.sum(tl.where(t[:, None] == t[None, :], dA, 0.0), 1)[:, None]  # does not decay
        dq += own * k
        dk += own * q
        at, real = places(batch, t, T, head, H, d, K)
        # in full precision, because dG is a difference
        EXACT: tl.constexpr = "ieee" if FULL == tl.float64 else "tf32x3"
        dg = product(tl.where(later, 1.0, 0.0), dG, FULL, FULL, EXACT)
        tl.store(DG + at, dg, real)
    at, real = places(batch, t, T, head, H, d, K)
    tl.store(DQ + at, dq, real)
    tl.store(DK + at, dk, real)


# The functions that launch them.


@torch.library.custom_op("minimodels::delta_rule_kernel_forward", mutates_args=())
def delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states before the chunks (B, chunks, H, K, V), in v's dtype."""
    q, k, v, g, state = (part.contiguous() for part in (q, k, v, g, state))
    e = None if e is None else e.contiguous()
    (batch, T, H, V), c = v.shape, constants(v, k, g)
    y, final, edges = empty_outputs(q, k, v, g, e, state, resets)
    chunks, sizes = edges.shape[1], (T, H, k.shape[2])
    with on(v):
        doc, totals = documents(resets), sums_of(g, resets, c["C"])
        U, W, _ = prepare(k, v, e, totals, doc, c, None)
        walk(k, U, W, None, None, totals, doc, state, edges, final, sizes, False, c)
        outputs_kernel[(chunks, batch * H, triton.cdiv(V, c["BLOCK_V"]))](
            q, k, U, W, totals, doc, edges, y, *sizes, **c
        )
    return y, final, edges


@torch.library.custom_op("minimodels::delta_rule_kernel_backward", mutates_args=())
def delta_rule_backward(
    dy: Tensor,
    dfinal: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    resets: Tensor | None,
    edges: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, e (empty without e) and the initial state."""
    dy, dfinal, q, k, v, g = (part.contiguous() for part in (dy, dfinal, q, k, v, g))
    e = None if e is None else e.contiguous()
    (batch, T, H, V), (groups, K), c = v.shape, k.shape[2:], constants(v, k, g)
    chunks, sizes = edges.shape[1], (T, H, groups)
    dinitial, dedges, dv = torch.empty_like(dfinal), torch.empty_like(edges), torch.empty_like(v)
    heads = v.dtype if groups == H else g.dtype  # precise if heads are still to be summed
    dq, dk, de = (v.new_empty(batch, T, H, K, dtype=heads) for _ in range(3))
    blocks = triton.cdiv(K, c["BLOCK_K"])
    dg = g.new_empty(g.shape if c["GATES"] > 1 else (blocks, *g.shape))
    with on(v):
        doc, totals = documents(resets), sums_of(g, resets, c["C"])
        if e is None:
            U, W, Z, WR = v, None, None, None
            walk(q, dy, None, None, None, totals, doc, dfinal, dedges, dinitial, sizes, True, c)
        else:
            X = v.new_empty(batch, T, H, c["C"])
            U, W, _ = prepare(k, v, e, totals, doc, c, X)
            Z, WR = torch.empty_like(v), torch.empty_like(W)
            errors_kernel[(chunks, batch * H)](q, k, dy, X, totals, doc, Z, WR, *sizes, **c)
            walk(e, Z, WR, q, dy, totals, doc, dfinal, dedges, dinitial, sizes, True, c)
        values_kernel[(chunks, batch * H, triton.cdiv(V, c["BLOCK_V"]))](
            q, k, dy, U, W, Z, WR, totals, doc, edges, dedges, dv, *sizes, **c
        )
        keys_kernel[(chunks, batch * H, blocks)](
            q, k, e, U, dy, Z, totals, doc, edges, dedges, dq, dk, de, dg, batch, *sizes, **c,
            num_warps=8, num_stages=1,
        )  # fmt: skip
    dg = dg if c["GATES"] > 1 else dg.sum(0)
    if resets is not None:
        dg = dg.masked_fill(resets[:, :, None, None], 0)
    dq, dk, de = (
        part if groups == H else part.unflatten(2, (groups, -1)).sum(3).to(v.dtype)
        for part in (dq, dk, de)
    )
    return dq, dk, dv, dg, v.new_empty(0) if e is None else de, dinitial


def prepare(k, v, e, totals, doc, c, X) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """U, W, and the inverse if X is there to hold it. Without erasing U is V, and W is None."""
    if e is None:
        return v, None, None
    batch, T, H, _ = v.shape
    U, W = torch.empty_like(v), v.new_empty(batch, T, H, k.shape[3])
    prepare_kernel[(triton.cdiv(T, c["C"]), batch * H)](
        k, e, v, totals, doc, U, W, X, T, H, k.shape[2], **c
    )
    return U, W, X


def walk(
    keys, values, W, keys_too, values_too, totals, doc, first, edges, last, sizes, reverse, c
) -> None:
    """Run state_kernel, forward or in reverse."""
    batch, H, K, V = first.shape
    columns = min(c["BLOCK_V"], 32 if K <= 128 else 16)  # of S, with K rows each, in a program
    widths = {"WIDTH": max(16, triton.next_power_of_2(K)), "BLOCK_V": columns}
    c = {name: part for name, part in c.items() if name != "BLOCK_K"} | widths
    state_kernel[(triton.cdiv(V, c["BLOCK_V"]), batch * H)](
        keys, values, W, keys_too, values_too, totals, doc, first, edges, last, *sizes, reverse,
        **c, num_warps=8 if c["GATES"] > 1 else 4, num_stages=2 if K <= 128 else 1,
    )  # fmt: skip


def sums_of(g: Tensor, resets: Tensor | None, C: int) -> Tensor:
    """The sums of log2-decays (B, T, H, 1 | K) from the start of the chunk or document."""
    (batch, T), N = g.shape[:2], g[0, 0].numel()
    size = min(128, triton.next_power_of_2(N))
    totals = torch.empty_like(g)
    sums_kernel[(triton.cdiv(T, C), batch, triton.cdiv(N, size))](
        g, documents(resets), totals, T, N, C, size, full(g), num_warps=1
    )
    return totals


def documents(resets: Tensor | None) -> Tensor | None:
    """The number of each token's document in its row; the initial state has number 0."""
    return None if resets is None else resets.cumsum(1, dtype=torch.int32)


def constants(v: Tensor, k: Tensor, g: Tensor) -> dict[str, object]:
    """The compile-time constants."""
    (T, K), V = k.shape[1::2], v.shape[3]
    block = lambda width: max(16, min(64, triton.next_power_of_2(width)))  # noqa: E731
    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    # other dtypes are coarser than tf32
    precisions = {torch.float64: "ieee", torch.float32: "tf32x3"}
    return {
        "K": K,
        "V": V,
        "GATES": g.shape[3],
        "C": chunk_length(T),
        "BLOCK_K": block(K),
        "BLOCK_V": block(V),
        "TYPE": types.get(v.dtype, full(v)),
        "FULL": full(v),
        "PRECISION": precisions.get(v.dtype, "tf32"),
    }


def chunk_length(T: int) -> int:
    """C: CHUNK, or a power of two that is enough for a shorter text.

    It is at least 16, because a product of tiles needs that many.
    """
    return max(16, min(CHUNK, triton.next_power_of_2(T)))


# What PyTorch must know: shapes, derivative.


@delta_rule_forward.register_fake
def empty_outputs(q, k, v, g, e, state, resets):
    """y, the final state and the edges, not yet filled."""
    (batch, T), (H, K, V) = v.shape[:2], state.shape[1:]
    C = chunk_length(T)
    edges = v.new_empty(batch, (T + C - 1) // C, H, K, V)
    return v.new_empty(v.shape), state.new_empty(state.shape), edges


@delta_rule_backward.register_fake
def _(dy, dfinal, q, k, v, g, e, resets, edges):
    de = v.new_empty(0 if e is None else e.shape)
    plain = [part.new_empty(part.shape) for part in (q, k, v, g)]
    return *plain, de, dfinal.new_empty(dfinal.shape)


def _save(ctx, inputs, output):
    q, k, v, g, e, _, resets = inputs
    ctx.save_for_backward(q, k, v, g, e, resets, output[2])


def _differentiate(ctx, dy, dfinal, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them here
    *gradients, de, dinitial = delta_rule_backward(dy, dfinal, *saved)
    return *gradients, None if saved[4] is None else de, dinitial, None


delta_rule_forward.register_autograd(_differentiate, setup_context=_save)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None = None,
    state: Tensor | None = None,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As minimodels.ops.delta_rule.delta_rule: y (B, T, H, V) and the final state (B, H, K, V).

    y has v's dtype. q, k, v and e are multiplied in v's dtype; gates, sums and states are in fp32
    (fp64 for fp64 values). K <= 256. Raises ValueError if shapes disagree.
    """
    check_shapes(q, k, v, g, e, state, resets)
    (batch, _, H, V), K = v.shape, k.shape[3]
    if K > 256:
        raise ValueError(f"delta_rule: keys of {K} numbers; the kernel takes 256 or fewer")
    precise = torch.promote_types(v.dtype, torch.float32)
    g = (g if g.ndim == 4 else g.unsqueeze(3)).to(precise)
    state = v.new_zeros(batch, H, K, V, dtype=precise) if state is None else state.to(precise)
    q, k, e = same_heads(q, k, g, e)
    q, k, e = (part if part is None else part.to(v.dtype) for part in (q, k, e))
    y, final, _ = delta_rule_forward(q, k, v, g, e, state, resets)
    return y, final


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs and with
    several chunks and blocks too."""
    shapes = [(2, 301, 2, 4, 96, 80), (1, 64, 1, 1, 128, 64)] if GPU else [(1, 17, 1, 2, 5, 3)]
    for batch, T, groups, H, K, V in shapes:
        for vector in (False, True):
            for erase in (False, True):
                for packed in (False, True):
                    given = arguments(batch, T, groups, H, K, V, vector, erase, packed)
                    compare(delta_rule, reference, given)


def reference(q, k, v, g, e=None, state=None, resets=None):
    """The reference, with the arguments in the kernel's order."""
    return operation(q, k, v, g, e, state, impl="reference", resets=resets)


def arguments(
    batch: int,
    T: int,
    groups: int,
    H: int,
    K: int,
    V: int,
    vector: bool = False,
    erase: bool = True,
    packed: bool = False,
) -> tuple:
    """Random arguments as a layer makes them: k of length 1, e a share of it.

    `packed` adds documents.
    """
    q, k, e = F.normalize(torch.randn(3, batch, T, groups, K), dim=-1).unbind(0)
    g = -torch.rand(batch, T, H, *([K] if vector else []))
    v, state = torch.randn(batch, T, H, V), torch.randn(batch, H, K, V)
    e = torch.rand(batch, T, groups, 1) * k if erase else None
    return q, k, v, g, e, state, torch.rand(batch, T) < 0.1 if packed else None


def with_rate(q, k, v, g, beta=None, impl="triton"):
    """The operation as DeltaNet uses it, with a rate beta (B, T, H), which the peers take.

    Without beta, nothing is erased.
    """
    if beta is None:
        return operation(q, k, v, g, impl=impl)
    beta = beta.unsqueeze(3)
    return operation(q, k, beta * v, g, beta * k, impl=impl)


def fla(q, k, v, g, beta=None):
    """The Triton kernels of flash-linear-attention.

    There is one for each kind of gate. All need as many heads of keys as of values.
    """
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla
    from fla.ops.kda import chunk_kda
    from fla.ops.simple_gla import chunk_simple_gla

    q, k = (part.repeat_interleave(v.shape[2] // k.shape[2], 2) for part in (q, k))
    if beta is None:
        rule = chunk_simple_gla if g.ndim == 3 else chunk_gla
        return rule(q, k, v, g=g, scale=1.0)[0]
    rule = chunk_gated_delta_rule if g.ndim == 3 else chunk_kda
    return rule(q, k, v, g=g, beta=beta, scale=1.0)[0]


def mamba_ssm(q, k, v, g, beta=None):
    """The Triton kernels of Mamba-2's authors.

    They scale v by the step size, which is -g here. So the result differs, but the amount of work
    is the same.
    """
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    if beta is not None or g.ndim == 4:
        raise NotImplementedError("it has one gate a head and erases nothing")
    return mamba_chunk_scan_combined(v, -g, -torch.ones_like(g[0, 0]), k, q, chunk_size=256)


PEERS = {
    "fla": Peer("flash-linear-attention", fla, module="fla"),
    "mamba_ssm": Peer("mamba_ssm", mamba_ssm, same=False),
}


def case(
    label: str, tokens: int, T: int, groups: int, H: int, K: int, V: int, vector=False, erase=True
) -> Case:
    """A case with rates in (0, 1) and an initial state of zero.

    FLOPs backward count as twice those forward.
    """

    def inputs() -> tuple:
        q, k, v, g, *_ = arguments(tokens // T, T, groups, H, K, V, vector)
        beta = torch.rand(tokens // T, T, H) if erase else None
        parts = [part.to(TIMED["device"], TIMED["dtype"]) for part in (q, k, v)]
        parts += [part if part is None else part.to(TIMED["device"]) for part in (0.1 * g, beta)]
        return tuple(part if part is None else part.requires_grad_() for part in parts)

    work = tokens * H * flops(CHUNK, K, V, erase)
    sizes = f"B {tokens // T}, T {T}, H {H}, K {K}, V {V}"
    return Case(f"{label}: {sizes}", inputs, work, 2 * work, "TFLOP/s")


def cases(tokens: int, T: int, H: int = 16, K: int = 128) -> list[Case]:
    """Mamba-2, Gated DeltaNet and Kimi Delta Attention at one length."""
    return [
        case("Mamba-2", tokens, T, 1, 2 * H, K, K // 2, erase=False),
        case("gated delta", tokens, T, H, H, K, K),
        case("KDA", tokens, T, H, H, K, K, vector=True),
    ]


def example(*sizes: int, **kind: bool) -> Callable[[], tuple]:
    """Arguments of the operation in bf16, except for gates and state."""

    def inputs() -> tuple:
        q, k, v, g, e, state, resets = arguments(*sizes, **kind)
        parts = [part if part is None else part.to(**TIMED) for part in (q, k, v, e)]
        q, k, v, e = (part if part is None else part.requires_grad_() for part in parts)
        return q, k, v, g.requires_grad_(), e, state.requires_grad_(), resets

    return inputs


# the launches of minimodels.kernels.compile: every kind of gate; documents, and sizes that fill no
# block; the widest keys
EXAMPLES = [
    example(2, 4096, 1, 16, 128, 64, erase=False),
    example(2, 4096, 16, 16, 128, 128),
    example(2, 4096, 16, 16, 128, 128, vector=True),
    example(2, 4096, 16, 16, 128, 128, vector=True, erase=False),
    example(2, 300, 2, 4, 96, 80, packed=True),
    example(1, 512, 2, 2, 256, 256, vector=True),
]


if __name__ == "__main__":
    timed = (
        [c for T in (2048, 16384, 65536) for c in cases(65536, T)]
        if GPU
        else cases(1024, 1024, 4, 64)
    )
    command(
        report("delta_rule", with_rate, with_rate, timed, PEERS, check),
        __doc__,
    )
