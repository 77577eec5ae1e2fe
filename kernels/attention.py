"""Causal attention with grouped queries, a window and empty slots.

Scores and weights never reach the memory. The method is FlashAttention, arXiv:2205.14135 and
arXiv:2307.08691, with the online softmax of arXiv:1805.02867. If there are few queries, the keys
are divided among programs, as in Flash-Decoding.

    p_ij = exp(s_ij) / Σ_j exp(s_ij)        s_ij = q_i · k_j / √d over the keys j that query i sees
    y_i  = Σ_j p_ij v_j

What it must cost: half of the T² pairs are visible. Each takes 2d operations for its score and 2d
for its share of y, so forward takes 4·B·H·T²/2·d. Backward takes four products of that kind and the
scores again, 2.5 times as much. The memory moves q, k, v and y, which makes T/4 operations a byte
in bf16: if T exceeds about a thousand, the tensor cores are the bound. There is also one
exponential a pair. A Hopper SM computes 16 of them a clock, or 4096 operations of products. So the
exponentials take as long as forward's two products at d = 64, and half as long at 128.

Decoding, T = 1, is bound by reading k and v. There the H/G heads that share keys are PACKED, as if
they were queries of one head. They fill a block together, and k and v are read once. But B·G
programs would leave most of the machine idle. So if there are few queries, several programs divide
the keys, and the programs' y are joined by means of their lse. For 16 queries and 64 keys at
d = 128 the compiler (Triton 3.9) reports 128 registers, nothing spilled, and 258 instructions a
block of keys (291 with a mask). Before heads were packed the figures were 128, 0 and 258 (320), but
each head walked over the keys. So with 32 heads on 8 key heads, packing issues a quarter of the
instructions.

In forward, a block of queries walks over its keys and keeps the softmax of those met so far:
Σ exp(s - high) v, Σ exp(s - high) and the highest score. When that score grows, both sums are
scaled down. Forward stores lse = log Σ_j exp(s_ij), from which backward computes every p_ij
directly. With dp_ij = dy_i · v_j and mean_dp_i = dy_i · y_i:

    ds_ij = p_ij (dp_ij - mean_dp_i)     dq_i = Σ_j ds_ij k_j / √d
    dk_j = Σ_i ds_ij q_i / √d          dv_j = Σ_i p_ij dy_i

One kernel has a block of queries and sums dq over their keys. It runs first and stores mean_dp. The
other kernel has a block of keys and sums dk and dv over the queries of all heads that share them.
Both compute s and dp, which makes seven products instead of five. This is the price of using no
atomic additions, so that results are the same each time in one process (another process may be
tuned to other blocks). Exponentials are to base 2, as in the hardware.

Blocks of scores in which no query sees a key are skipped, and a block is masked only if some query
does not see all of its keys. If positions are given, any slot may be empty. Then every block is
masked, and only the slots after a query's own are known to be invisible. If starts are given, the
keys of a block of queries begin at the document of its first query, and only the keys of its last
document may go without a mask. The queries of a block of keys end with the last document that it
reaches.

Tensor cores multiply while the other units compute exponentials, but only if the exponentials do
not wait for that product. So forward may start the next block's scores AHEAD of this block's
softmax, at the cost of registers and of one block of scores too many. Backward starts dp ahead of
p. A loop that might not run at all is inside an `if`. Without the `if`, the path around the loop
and the path out of it meet while a product is in flight, and the assembler makes every product wait
for the one before. The results do not show this, but minimodels.kernels.compile does.

    name        shape
    q, y        (B, H, T, d)    H heads; any strides, the last dimension contiguous
    k, v        (B, G, S, d)    G key heads, each shared by H/G heads; the last T slots are those of
                                the queries
    queries     (B, T)          the positions of the queries
    keys        (B, S)          the positions of the keys; -1: empty. None: keys at 0 to S - 1
    starts      (B, T)          where each query's document begins, ascending; None: before all keys
    ends        (B, S)          how many queries begin their document at a key or before it: the end
                                of the queries that see the key
    lse, mean_dp  (B, H, T)       lse to base 2, infinite if a query sees nothing; in full precision
    s, dp       (queries, keys) of two blocks. s lacks its factor 1/√d; `high` includes it and is to
                                base 2 like lse
    size, span  ()              T, and S if queries are few, rounded up to powers of two for tuning
    region      0, 1, 2         a part of the keys of a block of queries: 0 some are hidden by the
                                window or by documents, 1 all are seen, 2 some are in the future. Or
                                of the queries of a block of keys: 0 some keys are in the future, 1
                                all are seen, 2 some are hidden. With positions all keys are in
                                region 2, or all queries in region 0, and masked
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
import triton
import triton.language as tl
from minimodels.kernels import INTERPRETED, require_product
from minimodels.kernels.common import (
    CHECKED,
    GPU,
    LOG2_E,
    TIMED,
    Case,
    Peer,
    command,
    compare_all,
    dense,
    full,
    innermost,
    multiprocessors,
    on,
    report,
    size_of,
    tuned,
)
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from minimodels.ops.attention import attention as operation
from minimodels.ops.attention import check_shapes

# with at most this many queries (one block), several programs divide the keys; more queries give
# enough programs anyway
FEW = 16
KEYS_EACH = 256  # the fewest keys for each of these programs
# the values by which blocks are tuned; Triton adds the arguments' dtypes
KEY = ["size", "span", "window", "WIDTH"]
# the arguments whose special values, such as 1, get no compiled version of their own
COUNTS = ["B", "H", "G", "size", "span"]


@triton.jit
def tile(
    P,
    start,
    stride,
    rows,
    d: tl.constexpr,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Rows start to start + LENGTH of a (rows, d) matrix; 0 from column d on.

    With EDGE there may be fewer rows, and the missing ones are 0.
    """
    row, column = tl.arange(0, LENGTH)[:, None], tl.arange(0, WIDTH)[None, :]
    at = P + start * tl.cast(stride, tl.int64) + (row * stride + column)
    if EDGE:
        x = tl.load(at, (row < rows - start) & (column < d), 0.0)
    elif d < WIDTH:
        x = tl.load(at, column < d, 0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def store(P, x, start, stride, rows, d: tl.constexpr, LENGTH: tl.constexpr, WIDTH: tl.constexpr):
    """Write what `tile` reads."""
    row, column = tl.arange(0, LENGTH)[:, None], tl.arange(0, WIDTH)[None, :]
    at = P + start * tl.cast(stride, tl.int64) + (row * stride + column)
    tl.store(at, x.to(P.dtype.element_ty), (row < rows - start) & (column < d))


@triton.jit
def query_index(start, LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """Which of the T queries each row of a block is.

    With PACKED heads there is one query, number 0.
    """
    i = tl.arange(0, LENGTH)
    return i * 0 if PACKED else start + i


@triton.jit
def query_places(QUERIES, i, T, S):
    """The positions of the queries of a block."""
    if QUERIES is None:
        return S - T + i
    else:
        return tl.load(QUERIES + i, i < T, -1).to(tl.int32)


@triton.jit
def start_places(STARTS, i, T):
    """Where the documents of a block's queries begin; beyond the last query, after all keys."""
    if STARTS is None:
        return None
    else:
        return tl.load(STARTS + i, i < T, 0x7FFFFFFF).to(tl.int32)


@triton.jit
def column_of(places):
    """Positions as a column, one for each row of a block of scores."""
    return None if places is None else places[:, None]


@triton.jit
def row_of(places):
    """Positions as a row, one for each column of transposed scores."""
    return None if places is None else places[None, :]


@triton.jit
def key_places(KEYS, start, S, LENGTH: tl.constexpr):
    """The positions of the keys of a block.

    Those of empty slots are after everything else, where no query sees them.
    """
    j = start + tl.arange(0, LENGTH)
    if KEYS is None:
        return j
    else:
        place = tl.load(KEYS + j, j < S, -1).to(tl.int32)
        return tl.where(place < 0, 0x7FFFFFFF, place)


@triton.jit
def hide(s, query, first, key, window):
    """The scores, -inf if the query does not see the key; `first` is its document's start."""
    seen = key <= query
    if first is not None:
        seen &= key >= first
    if window is not None:
        seen &= key > query - window
    return tl.where(seen, s, float("-inf"))


@triton.jit
def keys_of(start, T, S, window, KEYS, STARTS, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The keys that a block of queries sees: the first, two bounds, the end.

    All of the queries see the keys between the bounds.
    """
    first = S - T + start  # the slot of the first query
    low, whole, edge, end = 0, 0, 0, tl.minimum(first + BLOCK_T, S)
    if KEYS is None:
        edge = (first + 1) // BLOCK_S * BLOCK_S
        if window is not None:
            low = tl.maximum(first - window + 1, 0) // BLOCK_S * BLOCK_S
            whole = tl.minimum(
                tl.cdiv(tl.maximum(first + BLOCK_T - window, 0), BLOCK_S) * BLOCK_S, end
            )
            edge = tl.maximum(edge, whole)
        if STARTS is not None:
            low = tl.maximum(low, tl.load(STARTS + start).to(tl.int32) // BLOCK_S * BLOCK_S)
            last = tl.load(STARTS + tl.minimum(start + BLOCK_T, T) - 1).to(tl.int32)
            whole = tl.maximum(
                whole, tl.minimum(tl.cdiv(tl.maximum(last, 0), BLOCK_S) * BLOCK_S, end)
            )
            edge = tl.maximum(edge, whole)
    return low, whole, edge, end


@triton.jit
def dealt(bounds, BLOCK_S: tl.constexpr):
    """The bounds within this program's share, if keys are divided among several programs.

    All get the same number of blocks, except the last ones, which get fewer or none.
    """
    low, whole, edge, end = bounds
    length = tl.cdiv(tl.cdiv(end - low, BLOCK_S), tl.num_programs(1)) * BLOCK_S
    low += tl.program_id(1) * length
    end = tl.minimum(low + length, end)
    return low, tl.minimum(tl.maximum(whole, low), end), tl.minimum(tl.maximum(edge, low), end), end


@triton.jit
def queries_of(start, T, S, window, KEYS, ENDS, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """The queries that see a block of keys: the first, two bounds, the end.

    The queries between the bounds see all of the keys.
    """
    # the query at the slot of the first key; below 0 if that key comes before all queries
    first = start - (S - T)
    low = tl.maximum(first, 0) // BLOCK_T * BLOCK_T
    whole, edge, end = T, T, T
    if KEYS is None:
        whole = tl.minimum(tl.cdiv(tl.maximum(first + BLOCK_S - 1, 0), BLOCK_T) * BLOCK_T, T)
        if window is not None:
            # below `low` if no query sees the block
            end = tl.minimum(first + BLOCK_S - 1 + window, T)
            whole = tl.minimum(whole, end)
            edge = tl.maximum(
                tl.minimum(tl.maximum(first + window, 0) // BLOCK_T * BLOCK_T, end), whole
            )
        if ENDS is not None:
            end = tl.minimum(end, tl.load(ENDS + tl.minimum(start + BLOCK_S, S) - 1).to(tl.int32))
            whole = tl.minimum(whole, end)
            all_see = tl.load(ENDS + start).to(tl.int32) // BLOCK_T * BLOCK_T
            edge = tl.maximum(tl.minimum(tl.minimum(edge, all_see), end), whole)
    return low, whole, edge, end


@triton.jit
def scores(
    q,
    K,
    start,
    stride,
    S,
    d: tl.constexpr,
    FULL: tl.constexpr,
    WIDTH: tl.constexpr,
    LENGTH: tl.constexpr,
    EDGE: tl.constexpr,
):
    """q · k of a block of queries and a block of keys."""
    k = tile(K, start, stride, S, d, LENGTH, WIDTH, EDGE)
    return tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=FULL)


@triton.jit
def attend(
    total, weight, high, ahead, q, query, first, K, V, KEYS, k_stride, v_stride, low, end, S,
    window, d: tl.constexpr, SCALE: tl.constexpr, FULL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr, AHEAD: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the keys from low to end to Σ_j exp(s - high) v, Σ_j exp(s - high) and `high`.

    With AHEAD the first block's scores come in, and those of the block after the last go out.
    """
    if low < end:
        for start in range(low, end, BLOCK_S):
            if AHEAD:
                s, ahead = (
                    ahead,
                    scores(q, K, start + BLOCK_S, k_stride, S, d, FULL, WIDTH, BLOCK_S, True),
                )
            else:
                s = scores(q, K, start, k_stride, S, d, FULL, WIDTH, BLOCK_S, EDGE)
            if EDGE:
                s = hide(s, query, first, key_places(KEYS, start, S, BLOCK_S)[None, :], window)
            higher = tl.maximum(high, tl.max(s, 1) * (SCALE * LOG2_E))
            p = tl.exp2(s * (SCALE * LOG2_E) - higher[:, None])
            shrink = tl.exp2(high - higher)
            weight = weight * shrink + tl.sum(p, 1)
            v = tile(V, start, v_stride, S, d, BLOCK_S, WIDTH, EDGE)
            total = tl.dot(
                p.to(v.dtype), v, total * shrink[:, None], input_precision="ieee", out_dtype=FULL
            )
            high = higher
    return total, weight, high, ahead


def fitting(configs: list[triton.Config], arguments: dict, **_) -> list[triton.Config]:
    """The configurations whose blocks are not larger than the number of queries.

    For fp32 it is only the first one, because no tensor core multiplies fp32 exactly.
    """
    if arguments["Q"].element_size() > 2:
        return configs[:1]
    return [config for config in configs if config.kwargs["BLOCK_T"] <= max(16, arguments["size"])]


def blocks(*sizes: tuple[int, int, int, int], **also) -> list[triton.Config]:
    """Configurations from BLOCK_T, BLOCK_S, warps and stages, each with the constants in `also`.

    The first one, with small blocks, is for the interpreter, for fp32 and for very wide heads.
    """
    return [
        triton.Config({"BLOCK_T": t, "BLOCK_S": s, **also}, num_warps=warps, num_stages=stages)
        for t, s, warps, stages in sizes
    ]


@tuned(
    blocks(
        (16, 16, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
        AHEAD=True,
    )
    + blocks((16, 64, 4, 3), (16, 128, 4, 2), (64, 64, 4, 3), (128, 64, 4, 3), AHEAD=False)
    + blocks((128, 64, 8, 3), (128, 128, 8, 2), (128, 128, 8, 3), AHEAD=False),
    KEY,
    fitting,
)
@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    Q, K, V, QUERIES, KEYS, STARTS, Y, LSE, q_strides, k_strides, v_strides, y_strides, B, H, G, T,
    S, size, span, window, d: tl.constexpr, SCALE: tl.constexpr, FULL: tl.constexpr,
    WIDTH: tl.constexpr, DEAL: tl.constexpr, PACKED: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program has BLOCK_T queries of one head, and all of their keys or a share (DEAL).

    The programs with the most keys start first, all heads side by side. PACKED: T is H/G and H is
    G, because the one query of each head that shares the keys counts as a query of their key head.
    """
    row, block = tl.program_id(0) % (B * H), tl.program_id(0) // (B * H)
    start = (tl.cdiv(T, BLOCK_T) - 1 - block) * BLOCK_T
    batch, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    key_head = head // (H // G)
    K += batch * k_strides[0] + key_head * k_strides[1]
    V += batch * v_strides[0] + key_head * v_strides[1]
    index, queries = query_index(start, BLOCK_T, PACKED), 1 if PACKED else T
    if KEYS is not None:
        QUERIES += batch * queries
        KEYS += batch * S
    if STARTS is not None:
        STARTS += batch * queries
    query = query_places(QUERIES, index, queries, S)[:, None]
    first = column_of(start_places(STARTS, index, queries))
    q = tile(
        Q + batch * q_strides[0] + head * q_strides[1],
        start,
        q_strides[2],
        T,
        d,
        BLOCK_T,
        WIDTH,
        True,
    )

    total, weight = tl.zeros((BLOCK_T, WIDTH), FULL), tl.zeros((BLOCK_T,), FULL)
    # finite, so that a row that has seen nothing does not subtract infinities
    high = tl.full((BLOCK_T,), -1e38, FULL)
    if PACKED:
        bounds = keys_of(0, 1, S, window, KEYS, STARTS, 1, BLOCK_S)
    else:
        bounds = keys_of(start, T, S, window, KEYS, STARTS, BLOCK_T, BLOCK_S)
    if DEAL:
        bounds = dealt(bounds, BLOCK_S)
    ahead = scores(q, K, bounds[0], k_strides[2], S, d, FULL, WIDTH, BLOCK_S, True) if AHEAD else 0
    for region in tl.static_range(3):
        if region == 2 or (
            KEYS is None and (region == 1 or window is not None or STARTS is not None)
        ):
            total, weight, high, ahead = attend(
                total, weight, high, ahead, q, query, first, K, V, KEYS, k_strides[2], v_strides[2],
                bounds[region], bounds[region + 1], S, window, d, SCALE, FULL, WIDTH, BLOCK_S,
                AHEAD, region != 1,
            )  # fmt: skip

    nothing = weight == 0  # no key seen: y is 0, and an infinite lse makes each p of backward 0
    weight = tl.where(nothing, 1.0, weight)
    y = total / weight[:, None]
    lse = tl.where(nothing, float("inf"), high + tl.log2(weight))
    part = tl.program_id(1)
    Y += part * y_strides[0] + batch * y_strides[1] + head * y_strides[2]
    store(Y, y, start, y_strides[3], T, d, BLOCK_T, WIDTH)
    i = start + tl.arange(0, BLOCK_T)
    tl.store(LSE + ((part * B + batch) * H + head) * T + i, lse, i < T)


@triton.jit
def join_kernel(
    Y_PARTS, LSE_PARTS, Y, LSE, y_strides, B, H, T, d, PARTS: tl.constexpr, WIDTH: tl.constexpr
):
    """One program has one query: y and lse from those of the parts of its keys.

    Each part is weighted by its share of Σ_j exp(s_ij).
    """
    row, part, column = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, WIDTH)
    lse = tl.load(LSE_PARTS + part * (B * H * T) + row)
    lse = tl.where(lse == float("inf"), float("-inf"), lse)  # no key seen
    high = tl.maximum(tl.max(lse, 0), -1e38)
    share = tl.exp2(lse - high)
    weight = tl.sum(share, 0)
    nothing = weight == 0
    weight = tl.where(nothing, 1.0, weight)
    at = (part[:, None] * (B * H * T) + row) * d + column[None, :]
    y = tl.sum(tl.load(Y_PARTS + at, column[None, :] < d, 0.0) * share[:, None], 0) / weight
    Y += row // (H * T) * y_strides[0] + row // T % H * y_strides[1] + row % T * y_strides[2]
    tl.store(Y + column, y.to(Y.dtype.element_ty), column < d)
    tl.store(LSE + row, tl.where(nothing, float("inf"), high + tl.log2(weight)))


@triton.jit
def towards_queries(
    dq, q, dy, lse, mean_dp, query, first, K, V, KEYS, k_stride, v_stride, low, end, S, window,
    d: tl.constexpr, SCALE: tl.constexpr, FULL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_S: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the keys from low to end to Σ_j ds k."""
    if low < end:
        for start in range(low, end, BLOCK_S):
            k = tile(K, start, k_stride, S, d, BLOCK_S, WIDTH, EDGE)
            v = tile(V, start, v_stride, S, d, BLOCK_S, WIDTH, EDGE)
            s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=FULL)
            if EDGE:
                s = hide(s, query, first, key_places(KEYS, start, S, BLOCK_S)[None, :], window)
            dp = tl.dot(dy, tl.trans(v), input_precision="ieee", out_dtype=FULL)
            p = tl.exp2(s * (SCALE * LOG2_E) - lse[:, None])
            ds = p * (dp - mean_dp[:, None])
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee", out_dtype=FULL)
    return dq


@tuned(
    blocks(
        (16, 16, 4, 2),
        (64, 64, 4, 3),
        (64, 64, 8, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
    ),
    KEY,
    fitting,
)
@triton.jit(do_not_specialize=COUNTS)
def backward_queries_kernel(
    Q, K, V, QUERIES, KEYS, STARTS, Y, DY, LSE, MEAN_DP, DQ, q_strides, k_strides, v_strides,
    y_strides, dy_strides, dq_strides, B, H, G, T, S, size, span, window, d: tl.constexpr,
    SCALE: tl.constexpr, FULL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dq and mean_dp. One program has BLOCK_T queries of one head, as in forward."""
    row, block = tl.program_id(0) % (B * H), tl.program_id(0) // (B * H)
    start = (tl.cdiv(T, BLOCK_T) - 1 - block) * BLOCK_T
    batch, head = (row // H).to(tl.int64), (row % H).to(tl.int64)
    key_head = head // (H // G)
    K += batch * k_strides[0] + key_head * k_strides[1]
    V += batch * v_strides[0] + key_head * v_strides[1]
    if KEYS is not None:
        QUERIES += batch * T
        KEYS += batch * S
    if STARTS is not None:
        STARTS += batch * T
    index = query_index(start, BLOCK_T, False)
    query = query_places(QUERIES, index, T, S)[:, None]
    first = column_of(start_places(STARTS, index, T))
    dy = tile(
        DY + batch * dy_strides[0] + head * dy_strides[1],
        start,
        dy_strides[2],
        T,
        d,
        BLOCK_T,
        WIDTH,
        True,
    )
    y = tile(
        Y + batch * y_strides[0] + head * y_strides[1],
        start,
        y_strides[2],
        T,
        d,
        BLOCK_T,
        WIDTH,
        True,
    )
    mean_dp = tl.sum(dy.to(FULL) * y.to(FULL), 1)
    i = start + tl.arange(0, BLOCK_T)
    at = (batch * H + head) * T + i
    tl.store(MEAN_DP + at, mean_dp, i < T)
    lse = tl.load(LSE + at, i < T, 0.0)
    q = tile(
        Q + batch * q_strides[0] + head * q_strides[1],
        start,
        q_strides[2],
        T,
        d,
        BLOCK_T,
        WIDTH,
        True,
    )

    dq = tl.zeros((BLOCK_T, WIDTH), FULL)
    bounds = keys_of(start, T, S, window, KEYS, STARTS, BLOCK_T, BLOCK_S)
    for region in tl.static_range(3):
        if region == 2 or (
            KEYS is None and (region == 1 or window is not None or STARTS is not None)
        ):
            dq = towards_queries(
                dq, q, dy, lse, mean_dp, query, first, K, V, KEYS, k_strides[2], v_strides[2],
                bounds[region], bounds[region + 1], S, window, d, SCALE, FULL, WIDTH, BLOCK_S,
                region != 1,
            )  # fmt: skip
    dq *= SCALE
    store(
        DQ + batch * dq_strides[0] + head * dq_strides[1],
        dq,
        start,
        dq_strides[2],
        T,
        d,
        BLOCK_T,
        WIDTH,
    )


@triton.jit
def towards_keys(
    dk, dv, k, v, key, Q, DY, LSE, MEAN_DP, QUERIES, STARTS, q_strides, dy_strides, low, end, members,
    T, S, window, d: tl.constexpr, SCALE: tl.constexpr, FULL: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Add the queries from low to end of each head to Σ_i ds q and Σ_i p dy.

    The scores are transposed, (keys, queries).
    """
    if low < end:
        head, start = tl.cast(0, tl.int64), low
        # one loop, because a nested one needs more registers
        for _ in range(members * tl.cdiv(end - low, BLOCK_T)):
            q = tile(Q + head * q_strides[1], start, q_strides[2], T, d, BLOCK_T, WIDTH, True)
            dy = tile(DY + head * dy_strides[1], start, dy_strides[2], T, d, BLOCK_T, WIDTH, True)
            i = start + tl.arange(0, BLOCK_T)
            # after the last query q and dy are 0, and so are their contributions
            lse = tl.load(LSE + head * T + i, i < T, 0.0)
            mean_dp = tl.load(MEAN_DP + head * T + i, i < T, 0.0)
            s = tl.dot(k, tl.trans(q), input_precision="ieee", out_dtype=FULL)
            if EDGE:
                query = query_places(QUERIES, i, T, S)[None, :]
                first = row_of(start_places(STARTS, i, T))
                s = hide(s, query, first, key[:, None], window)
            dp = tl.dot(v, tl.trans(dy), input_precision="ieee", out_dtype=FULL)
            p = tl.exp2(s * (SCALE * LOG2_E) - lse[None, :])
            dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee", out_dtype=FULL)
            ds = p * (dp - mean_dp[None, :])
            dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee", out_dtype=FULL)
            last = start + BLOCK_T >= end
            head, start = tl.where(last, head + 1, head), tl.where(last, low, start + BLOCK_T)
    return dk, dv


@tuned(
    blocks(
        (16, 16, 4, 2),
        (64, 64, 4, 2),
        (32, 64, 8, 2),
        (32, 128, 8, 3),
        (64, 128, 8, 2),
        (64, 128, 8, 3),
    ),
    KEY,
    fitting,
)
@triton.jit(do_not_specialize=COUNTS)
def backward_keys_kernel(
    Q, K, V, QUERIES, KEYS, STARTS, ENDS, DY, LSE, MEAN_DP, DK, DV, q_strides, k_strides, v_strides,
    dy_strides, dk_strides, B, H, G, T, S, size, span, window, d: tl.constexpr, SCALE: tl.constexpr,
    FULL: tl.constexpr, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dk and dv. One program has BLOCK_S keys of one key head.

    The programs with the most queries start first.
    """
    row, start = tl.program_id(0) % (B * G), tl.program_id(0) // (B * G) * BLOCK_S
    batch, key_head = (row // G).to(tl.int64), (row % G).to(tl.int64)
    k = tile(
        K + batch * k_strides[0] + key_head * k_strides[1],
        start,
        k_strides[2],
        S,
        d,
        BLOCK_S,
        WIDTH,
        True,
    )
    v = tile(
        V + batch * v_strides[0] + key_head * v_strides[1],
        start,
        v_strides[2],
        S,
        d,
        BLOCK_S,
        WIDTH,
        True,
    )
    if KEYS is not None:
        QUERIES += batch * T
        KEYS += batch * S
    if STARTS is not None:
        STARTS += batch * T
    if ENDS is not None:
        ENDS += batch * S
    key = key_places(KEYS, start, S, BLOCK_S)
    head = key_head * (H // G)  # the first of the heads that share the keys
    Q += batch * q_strides[0] + head * q_strides[1]
    DY += batch * dy_strides[0] + head * dy_strides[1]
    LSE += (batch * H + head) * T
    MEAN_DP += (batch * H + head) * T

    dk, dv = tl.zeros((BLOCK_S, WIDTH), FULL), tl.zeros((BLOCK_S, WIDTH), FULL)
    bounds = queries_of(start, T, S, window, KEYS, ENDS, BLOCK_T, BLOCK_S)
    for region in tl.static_range(3):
        if region == 0 or (
            KEYS is None and (region == 1 or window is not None or STARTS is not None)
        ):
            dk, dv = towards_keys(
                dk, dv, k, v, key, Q, DY, LSE, MEAN_DP, QUERIES, STARTS, q_strides, dy_strides,
                bounds[region], bounds[region + 1], H // G, T, S, window, d, SCALE, FULL, WIDTH,
                BLOCK_T, region != 1,
            )  # fmt: skip
    base = batch * dk_strides[0] + key_head * dk_strides[1]
    store(DK + base, dk * SCALE, start, dk_strides[2], S, d, BLOCK_S, WIDTH)
    store(DV + base, dv, start, dk_strides[2], S, d, BLOCK_S, WIDTH)


@torch.library.custom_op("minimodels::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, queries: Tensor | None, keys: Tensor | None,
    starts: Tensor | None, window: int | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and lse."""
    q, k, v = map(innermost, (q, k, v))
    queries, keys, starts = dense(queries, keys, starts)
    y, lse = (
        heads_like(q),
        q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)),
    )
    packed = q.shape[2] == 1 and q.shape[1] > k.shape[1]
    forward(
        *(pack(x, k) if packed else x for x in (q, y, lse)),
        k,
        v,
        queries,
        keys,
        starts,
        window,
        packed,
    )
    return y, lse


def pack(x: Tensor, k: Tensor) -> Tensor:
    """A query's heads as queries of their key head: (B, H, 1, ...) -> a view (B, G, H/G, ...)."""
    return x[:, :, 0].unflatten(1, (k.shape[1], -1))


def forward(
    q: Tensor, y: Tensor, lse: Tensor, k: Tensor, v: Tensor, queries: Tensor | None,
    keys: Tensor | None, starts: Tensor | None, window: int | None, packed: bool,
) -> None:  # fmt: skip
    """Fill in y and lse."""
    (B, H, T, d), S = q.shape, k.shape[2]
    few = packed or T <= FEW
    met = S if window is None or keys is not None else min(S, T + window)
    parts = parts_of(q, met) if few else 1
    y_parts, lse_parts = (
        (y[None], lse)
        if parts == 1
        else (lse.new_empty(parts, *q.shape), lse.new_empty(parts, *lse.shape))
    )
    with on(q):
        forward_kernel[lambda meta: (B * H * triton.cdiv(T, meta["BLOCK_T"]), parts)](
            q, k, v, queries, keys, starts, y_parts, lse_parts, q.stride(), k.stride(), v.stride(),
            y_parts.stride(), *sizes(q, k, few), window, **constants(q), DEAL=parts > 1,
            PACKED=packed,
        )  # fmt: skip
        if parts > 1:
            join_kernel[(B * H * T,)](
                y_parts, lse_parts, y, lse, y.stride(), B, H, T, d, parts, triton.next_power_of_2(d)
            )


def parts_of(q: Tensor, met: int) -> int:
    """The number of programs, a power of two, among which the keys of a head are divided.

    There are as many as fill the machine, each with KEYS_EACH keys or more.
    """
    (B, H), fill = q.shape[:2], 2 * multiprocessors(q)
    return 2 ** max(0, min(fill // (B * H), met // KEYS_EACH).bit_length() - 1)


@torch.library.custom_op("minimodels::attention_backward", mutates_args=())
def attention_backward(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
    queries: Tensor | None, keys: Tensor | None, starts: Tensor | None, window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv."""
    (B, H, T), (G, S) = q.shape[:3], k.shape[1:3]
    dy, q, k, v = map(innermost, (dy, q, k, v))
    queries, keys, starts = dense(queries, keys, starts)
    ends = None
    if starts is not None and keys is None:
        slots = torch.arange(S, device=q.device, dtype=starts.dtype).repeat(B, 1)
        ends = torch.searchsorted(starts, slots, right=True)
    dq, dk, dv, mean_dp = heads_like(q), heads_like(k), heads_like(v), torch.empty_like(lse)
    known = (*sizes(q, k, T <= FEW), window)
    with on(q):
        backward_queries_kernel[lambda meta: (B * H * triton.cdiv(T, meta["BLOCK_T"]),)](
            q, k, v, queries, keys, starts, y, dy, lse, mean_dp, dq, q.stride(), k.stride(),
            v.stride(), y.stride(), dy.stride(), dq.stride(), *known, **constants(q),
        )  # fmt: skip
        backward_keys_kernel[lambda meta: (B * G * triton.cdiv(S, meta["BLOCK_S"]),)](
            q, k, v, queries, keys, starts, ends, dy, lse, mean_dp, dk, dv,
            q.stride(), k.stride(), v.stride(), dy.stride(), dk.stride(), *known, **constants(q),
        )  # fmt: skip
    return dq, dk, dv


def heads_like(x: Tensor) -> Tensor:
    """An empty (B, H, T, d) in the memory order (B, T, H, d).

    So the projection after it needs no copy.
    """
    B, H, T, d = x.shape
    return x.new_empty(B, T, H, d).transpose(1, 2)


def sizes(q: Tensor, k: Tensor, few: bool) -> tuple[int, ...]:
    """B, H, G, T, S, size and span: the last two are T and S rounded for the tuning."""
    (B, H, T), (G, S) = q.shape[:3], k.shape[1:3]
    return (
        B,
        H,
        G,
        T,
        S,
        size_of(T),
        triton.next_power_of_2(S) if few else 0,
    )


def constants(q: Tensor) -> dict[str, object]:
    """The compile-time constants; WIDTH is d rounded up to the power of two that tl.dot needs."""
    d = q.shape[-1]
    return {"d": d, "SCALE": d**-0.5, "FULL": full(q), "WIDTH": max(16, triton.next_power_of_2(d))}


# What PyTorch must know: shapes, derivative.


@attention_forward.register_fake
def _(q, k, v, queries, keys, starts, window):
    return heads_like(q), q.new_empty(
        q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32)
    )


@attention_backward.register_fake
def _(dy, q, k, v, y, lse, queries, keys, starts, window):
    return heads_like(q), heads_like(k), heads_like(v)


def _save(ctx, inputs, output):
    q, k, v, *places, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, *places)


def _differentiate(ctx, dy, _):
    return *attention_backward(dy, *ctx.saved_tensors, ctx.window), None, None, None, None


attention_forward.register_autograd(_differentiate, setup_context=_save)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    window: int | None = None,
    query_starts: Tensor | None = None,
) -> Tensor:
    """As minimodels.ops.attention.attention: (B, H, T, d).

    q, k and v have one dtype. The output of a query at -1 is 0. Raises ValueError if shapes or
    dtypes disagree.
    """
    require_product(q.dtype)
    check_shapes(q, k, v, query_positions, key_positions, query_starts)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: q {q.dtype}, k {k.dtype}, v {v.dtype} do not fit")
    if query_positions is None and window is not None and window >= k.shape[2]:
        window = None  # selects a kernel without the window's tests
    return attention_forward(q, k, v, query_positions, key_positions, query_starts, window)[0]


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 and fp16 too."""

    def inputs(B: int, H: int, G: int, T: int, S: int, d: int, *masks) -> tuple:
        return torch.randn(B, H, T, d), torch.randn(B, G, S, d), torch.randn(B, G, S, d), *masks

    odd = []
    shapes = (
        (1, 2, 1, 1, 1100, 64, None),
        (1, 2, 2, 1, 33, 64, None),
        (1, 2, 1, 37, 37, 24, None),
        (2, 4, 2, 20, 41, 16, 7),
    )
    for *shape, window in shapes:
        B, T, S = shape[0], *shape[3:5]
        places = torch.arange(S).repeat(B, 1) * 2
        starts = torch.arange(S).repeat(B, 1)[:, S - T :] // 13 * 13
        for positions in ((None, None), (places[:, S - T :], places)):
            odd.append(inputs(*shape, *positions, window))
        odd.append(inputs(*shape, None, None, window, starts))
    T = 300 if GPU else 40
    starts = torch.arange(T).repeat(2, 1) // 23 * 23
    full = [inputs(2, 4, 2, T, T, d) for d in (64, 128)]
    if INTERPRETED:  # on a GPU each case would have to be compiled in every configuration
        full = [inputs(2, 2, 1, T, T, 16), inputs(2, 2, 1, T, T, 16, None, None, 19, starts)]
    kernels = forward_kernel, backward_queries_kernel, backward_keys_kernel
    compare_all(
        kernels, attention, reference, odd, full, (*CHECKED, *([torch.float16] if GPU else []))
    )


def reference(q, k, v, queries=None, keys=None, window=None, starts=None) -> Tensor:
    """The reference, with the arguments in the kernel's order."""
    return operation(q, k, v, queries, keys, window, "reference", starts)


def backend(chosen: SDPBackend, *arguments) -> Tensor:
    """One backend of torch's scaled_dot_product_attention, which would choose one by itself."""
    with sdpa_kernel(chosen):
        return operation(*arguments, impl="torch")


def flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's own Triton attention."""
    return compiled_flex()(q, k, v, block_mask=causal_blocks(q.shape[2], k.shape[2], q.device))


@lru_cache
def compiled_flex():
    """flex_attention compiled once, because it is slow otherwise."""
    return torch.compile(flex_attention, dynamic=False)


@lru_cache
def causal_blocks(T: int, S: int, device: torch.device):
    """The blocks of (T, S) that a causal mask leaves, in the form that flex_attention takes."""
    return create_block_mask(
        lambda b, h, query, key: query + S - T >= key, None, None, T, S, device=device
    )


def fla(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The Triton attention of flash-linear-attention.

    It takes (B, T, H, d), and needs a query for every key.
    """
    from fla.ops.attn import parallel_attn

    if q.shape[2] != k.shape[2]:
        raise ValueError("it takes as many queries as keys")
    return parallel_attn(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


PEERS = {
    "cuDNN": Peer("torch", partial(backend, SDPBackend.CUDNN_ATTENTION)),
    "FlashAttention": Peer("torch", partial(backend, SDPBackend.FLASH_ATTENTION)),
    "flex_attention": Peer("torch", flex),
    "fla": Peer("fla-core", fla, module="fla"),
}


def case(tokens: int, T: int, H: int, d: int) -> Case:
    """Two products forward and five backward; what is computed twice does not count."""
    B = tokens // T

    def inputs() -> tuple:
        parts = torch.randn(3, B, T, H, d, **TIMED)
        return tuple(part.transpose(1, 2).requires_grad_() for part in parts.unbind(0))

    work = 4 * B * H * T * T * d / 2
    return Case(f"B {B}, H {H}, T {T}, d {d}", inputs, work, 2.5 * work, "TFLOP/s")


def decoding(S: int, H: int, G: int, d: int) -> Case:
    """One query: its keys and values are read."""

    def inputs() -> tuple:
        shapes = (1, H), (S, G), (S, G)
        return tuple(torch.randn(1, T, heads, d, **TIMED).transpose(1, 2) for T, heads in shapes)

    return Case(f"decoding: B 1, H {H}, G {G}, S {S}, d {d}", inputs, 2 * G * S * d, 0)


def example(
    call: Case, window: int | None = None, positions: bool = False, documents: bool = False
) -> Callable[[], tuple]:
    """Inputs for a launch of minimodels.kernels.compile."""

    def inputs() -> tuple:
        q, k, v = call.inputs()
        places = torch.arange(k.shape[2]).expand(len(k), -1)
        starts = places // 100 * 100 if documents else None
        given = (places[:, -q.shape[2] :], places) if positions else (None, None)
        return q, k, v, *given, window, starts

    return inputs


EXAMPLES = [
    example(case(512, 256, 4, 64)),
    example(case(512, 256, 4, 128)),
    example(case(512, 256, 4, 128), window=100),
    example(case(512, 256, 4, 128), positions=True),
    example(case(512, 256, 4, 128), documents=True),
    example(decoding(4096, 4, 4, 128)),
    example(decoding(4096, 4, 4, 128), positions=True),
    example(decoding(4096, 32, 8, 128)),
]


if __name__ == "__main__":
    lengths = (1024, 4096, 16384) if GPU else (256, 1024, 4096)
    shapes = [(2**17, 16, 16, 128), (2**17, 32, 8, 128)] if GPU else [(4096, 4, 4, 64)]
    cases = [decoding(*shape) for shape in shapes]
    cases += (
        [case(16384, T, 16, d) for d in (64, 128) for T in lengths]
        if GPU
        else [case(T, T, 4, 64) for T in lengths]
    )
    command(report("attention", attention, operation, cases, PEERS, check), __doc__)
