"""The experts of a mixture: each token passes through the SwiGLU MLPs that it visits.

No visit is dropped and no row is padded, as in MegaBlocks (arXiv:2211.15841).

    y_t = Σ_e visits_te · gates_te · out_e (silu(g_te) ⊙ u_te)
    g_te = gate_e x_t        u_te = up_e x_t

What it must cost: each of A visits takes three products of I · D multiply-adds. That is 6 A I D
operations forward, and twice that backward. An expert with 2,000 visits does 2,000 operations for
each byte of its weights in bf16, so the tensor cores are the bound. The bytes of the weights are
the bound only if experts have few visits, as in decoding. In addition, each visit's part of y, a
row of D, is written and read again to be summed. g and u are kept for backward, 4 I bytes a visit,
because recomputing them would add two products to backward's six. With h = silu(g) ⊙ u, s = σ(g),
r = out_eᵀ dy_t, and the indices te left out:

    dgates = ⟨r, h⟩    du = gates · r ⊙ silu(g)    dg = gates · r ⊙ u ⊙ (s + silu(g) ⊙ (1 - s))
    dx_t = Σ_e gate_eᵀ dg + up_eᵀ du    dgate_e = Σ_t dg x_tᵀ    dup_e = Σ_t du x_tᵀ
    dout_e = Σ_t dy_t (gates · h)ᵀ

Every visit gets a slot, in the order of experts and then of tokens. Only the GPU knows how many
slots an expert has, and the host does not wait for the answer. It allocates as many slots as there
can be, and launches as many programs as fill the machine. These walk over tiles, blocks of an
expert's slots × blocks of columns, as far as slots are used, and gather rows of x and dy. A
separate kernel sums the visits' parts of a token, expert after expert, so there are no atomic
additions.

    name        shape
    x, y        (n, D)        n tokens
    gates       (n, E)
    visits      (n, E)        bool, A of them true
    gate, up    (E, I, D)
    out         (E, D, I)
    cell        (slots,)      t · E + e of each visit, by expert and then by token; n · E if the
                              slot is not used
    offsets     (E + 1,)      expert e has the slots from offsets[e] to before offsets[e + 1]
    order       (slots,)      the slots by token and then by expert
    starts      (n + 1,)      token t has order[starts[t] : starts[t + 1]]
    g, u, h     (slots, I)    and dg, du
    size        ()            n for tuning: rounded up and bounded
    parts       (slots, D)    what each visit adds to its token, in y or in dx
"""

from __future__ import annotations

import functools
import os
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from minimodels.kernels import require_product
from minimodels.kernels.common import (
    GPU,
    TIMED,
    Case,
    Peer,
    command,
    compare_all,
    full,
    multiprocessors,
    on,
    report,
    sigmoid,
    size_of,
    tuned,
)
from torch import Tensor

from minimodels.ops.grouped_mlp import check_shapes
from minimodels.ops.grouped_mlp import grouped_mlp as operation

# blocks of slots that are computed together, to find their rows and the weights in the L2 cache
GROUP = tl.constexpr(8)
KEY = ["size", "D", "I", "E"]  # the values by which tiles are tuned
# columns of each tile of r, not tuned: dgates is a sum of parts, one for each WIDTH columns
WIDTH = 128


def tiles(*sizes: tuple[int, int, int, int, int]) -> list[triton.Config]:
    """Configurations from small to large.

    Each has the rows and columns of a tile, the depth of one step of its product, warps and stages.
    """
    return [
        triton.Config({"ROWS": r, "COLUMNS": c, "DEPTH": d}, num_warps=w, num_stages=s)
        for r, c, d, w, s in sizes
    ]


def fitting(configs: list[triton.Config], arguments: dict, **_) -> list[triton.Config]:
    """The configurations to try: for fp32 the first two, because it does not use the tensor cores.

    The larger ones would compile for minutes, only to spill.
    """
    return configs if next(iter(arguments.values())).element_size() <= 2 else configs[:2]


@triton.jit
def place_kernel(
    VISITS,
    BY_EXPERT,
    BY_TOKEN,
    CELL,
    ORDER,
    n,
    E,
    slots,
    TOKENS: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Put each visit in its slot, and its slot in the token's order.

    The sums BY_EXPERT and BY_TOKEN count the visits up to and including each one.
    """
    t, e = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)[:, None], tl.arange(0, BLOCK_E)[None, :]
    inside = (t < n) & (e < E)
    slot = tl.load(BY_EXPERT + e * n + t, inside, 0) - 1
    place = tl.load(BY_TOKEN + t * E + e, inside, 0) - 1
    visited = inside & (tl.load(VISITS + t * E + e, inside, 0) != 0)
    tl.store(CELL + slot, t * E + e, visited & (slot < slots))
    tl.store(ORDER + place, slot, visited & (place < slots))


@triton.jit
def blocks_until(OFFSETS, E, ROWS: tl.constexpr, BLOCK_E: tl.constexpr):
    """For each expert, the number of blocks of slots that it and all experts before it have."""
    e = tl.arange(0, BLOCK_E)
    count = tl.load(OFFSETS + e + 1, e < E, 0) - tl.load(OFFSETS + e, e < E, 0)
    return tl.cumsum(tl.cdiv(count, ROWS), 0)


@triton.jit
def find(tile, until, OFFSETS, columns, ROWS: tl.constexpr):
    """A tile's expert, its slots, which of these are that expert's, and its block of columns.

    A group of GROUP blocks of slots takes one block of columns after another.
    """
    group = tile // (GROUP * columns)
    within = tile - group * GROUP * columns
    height = tl.minimum(tl.max(until, 0) - group * GROUP, GROUP)
    block = group * GROUP + within % height
    earlier = until <= block
    expert = tl.sum(earlier.to(tl.int32), 0)
    block -= tl.max(tl.where(earlier, until, 0), 0)
    slot = tl.load(OFFSETS + expert) + block * ROWS + tl.arange(0, ROWS)
    return expert.to(tl.int64), slot, slot < tl.load(OFFSETS + expert + 1), within // height


@tuned(
    tiles((16, 16, 16, 4, 2), (64, 32, 32, 4, 3), (128, 64, 64, 4, 3), (128, 128, 64, 8, 4)),
    KEY,
    fitting,
)
@triton.jit(do_not_specialize=["size"])
def hidden_kernel(
    X, GATE, UP, CELL, OFFSETS, G, U, H, size, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr,
    KEEP: tl.constexpr, FULL: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """g and u, which share the rows of x, and h."""
    until = blocks_until(OFFSETS, E, ROWS, BLOCK_E)
    columns = tl.cdiv(I, COLUMNS)
    for tile in range(tl.program_id(0), tl.max(until, 0) * columns, tl.num_programs(0)):
        expert, slot, real, column = find(tile, until, OFFSETS, columns, ROWS)
        i, d = column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        # rows that are not the expert's are computed but not stored
        token = (tl.load(CELL + slot, real, 0) // E).to(tl.int64)
        x_at = X + token[:, None] * D + d[None, :]
        weight_at = expert * I * D + i[None, :] * D + d[:, None]
        g, u = tl.zeros((ROWS, COLUMNS), FULL), tl.zeros((ROWS, COLUMNS), FULL)
        for start in range(0, D, DEPTH):
            x = tl.load(x_at + start, d[None, :] < D - start, 0.0)
            inside = (d[:, None] < D - start) & (i < I)[None, :]
            g = tl.dot(
                x,
                tl.load(GATE + weight_at + start, inside, 0.0),
                g,
                input_precision="ieee",
                out_dtype=FULL,
            )
            u = tl.dot(
                x,
                tl.load(UP + weight_at + start, inside, 0.0),
                u,
                input_precision="ieee",
                out_dtype=FULL,
            )
        at, inside = slot.to(tl.int64)[:, None] * I + i[None, :], real[:, None] & (i < I)[None, :]
        if KEEP:
            tl.store(G + at, g, inside)
            tl.store(U + at, u, inside)
        tl.store(H + at, g * sigmoid(g) * u, inside)


@tuned(
    tiles((16, 16, 16, 4, 2), (64, 64, 32, 4, 3), (128, 128, 64, 4, 3), (128, 256, 64, 8, 4)),
    KEY,
    fitting,
)
@triton.jit(do_not_specialize=["size"])
def parts_kernel(
    P, WP, Q, WQ, GATES, CELL, OFFSETS, Y, size, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr,
    stride_i: tl.constexpr, stride_d: tl.constexpr,
    TWO: tl.constexpr, FULL: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Back from I to D: gates · p WP in forward, and p WP + q WQ (TWO) in backward.

    WP and WQ have one matrix per expert.
    """
    until = blocks_until(OFFSETS, E, ROWS, BLOCK_E)
    columns = tl.cdiv(D, COLUMNS)
    for tile in range(tl.program_id(0), tl.max(until, 0) * columns, tl.num_programs(0)):
        expert, slot, real, column = find(tile, until, OFFSETS, columns, ROWS)
        d, i = column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        at = tl.where(real, slot, 0).to(tl.int64)[:, None] * I + i[None, :]
        weight_at = expert * I * D + d[None, :] * stride_d + i[:, None] * stride_i
        y, depths = tl.zeros((ROWS, COLUMNS), FULL), tl.cdiv(I, DEPTH)
        # one loop for both products, so that the loads of the second start during the first
        for k in range(0, 2 * depths if TWO else depths):
            later = k >= depths
            start = (k - tl.where(later, depths, 0)) * DEPTH
            inside = (i[:, None] < I - start) & (d < D)[None, :]
            p = tl.load(tl.where(later, Q, P) + at + start, i[None, :] < I - start, 0.0)
            weight = tl.load(tl.where(later, WQ, WP) + weight_at + start * stride_i, inside, 0.0)
            y = tl.dot(p, weight, y, input_precision="ieee", out_dtype=FULL)
        if not TWO:
            y *= tl.load(GATES + tl.load(CELL + slot, real, 0), real, 0.0).to(FULL)[:, None]
        tl.store(
            Y + slot.to(tl.int64)[:, None] * D + d[None, :], y, real[:, None] & (d < D)[None, :]
        )


@triton.jit
def sum_kernel(PARTS, ORDER, STARTS, Y, D, FULL: tl.constexpr, BLOCK: tl.constexpr):
    """One program has one token and BLOCK columns: the sum of its visits' parts in expert order."""
    t, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    y = tl.zeros((BLOCK,), FULL)
    for k in range(tl.load(STARTS + t), tl.load(STARTS + t + 1)):
        slot = tl.load(ORDER + k).to(tl.int64)
        y += tl.load(PARTS + slot * D + d, d < D, 0.0).to(FULL)
    tl.store(Y + t * D + d, y, d < D)


@triton.jit
def quarter(r, which: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """One of four blocks of columns."""
    left, right = tl.split(tl.permute(tl.reshape(r, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    half = right if which >= 2 else left
    left, right = tl.split(tl.permute(tl.reshape(half, (ROWS, 2, COLUMNS // 4)), (0, 2, 1)))
    return right if which % 2 == 1 else left


@tuned(
    tiles(
        (16, WIDTH, 16, 4, 2),
        (32, WIDTH, 32, 4, 3),
        (64, WIDTH, 64, 4, 4),
        (128, WIDTH, 64, 8, 4),
        (256, WIDTH, 64, 8, 4),
    ),
    KEY,
    fitting,
)
@triton.jit(do_not_specialize=["size"])
def hidden_backward_kernel(
    DY, OUT, GATES, CELL, OFFSETS, G, U, DG, DU, GH, DGATES, size, D: tl.constexpr, I: tl.constexpr,
    E: tl.constexpr, slots, FULL: tl.constexpr, BLOCK_E: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """dg, du, gates · h (for dout), and for dgates the sum of r ⊙ h over a block of columns."""
    until = blocks_until(OFFSETS, E, ROWS, BLOCK_E)
    columns = tl.cdiv(I, COLUMNS)
    for tile in range(tl.program_id(0), tl.max(until, 0) * columns, tl.num_programs(0)):
        expert, slot, real, column = find(tile, until, OFFSETS, columns, ROWS)
        i, d = column * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
        cell = tl.load(CELL + slot, real, 0)
        dy_at = DY + (cell // E).to(tl.int64)[:, None] * D + d[None, :]
        out_at = OUT + expert * I * D + d[:, None] * I + i[None, :]
        r = tl.zeros((ROWS, COLUMNS), FULL)
        for start in range(0, D, DEPTH):
            dy = tl.load(dy_at + start, d[None, :] < D - start, 0.0)
            out = tl.load(out_at + start * I, (d[:, None] < D - start) & (i < I)[None, :], 0.0)
            r = tl.dot(dy, out, r, input_precision="ieee", out_dtype=FULL)
        # rounded as if it were stored between two products, to use half the registers
        r = r.to(DY.dtype.element_ty)
        gates, dgates = tl.load(GATES + cell, real, 0.0).to(FULL)[:, None], tl.zeros((ROWS,), FULL)
        for part in tl.static_range(4):  # few columns at a time, also to save registers
            i = column * COLUMNS + part * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
            at, inside = (
                slot.to(tl.int64)[:, None] * I + i[None, :],
                real[:, None] & (i < I)[None, :],
            )
            g, u = tl.load(G + at, inside, 0.0).to(FULL), tl.load(U + at, inside, 0.0).to(FULL)
            s, dh = sigmoid(g), quarter(r, part, ROWS, COLUMNS).to(FULL)
            h = g * s * u
            dgates += tl.sum(dh * h, 1)
            tl.store(GH + at, gates * h, inside)
            tl.store(DU + at, gates * dh * (g * s), inside)
            tl.store(DG + at, gates * dh * u * (s + g * s * (1 - s)), inside)
        tl.store(DGATES + tl.cast(slots, tl.int64) * column + slot, dgates, real)


# more stages, because a row's address waits for the token: only every second stage has operands
@tuned(
    tiles((16, 16, 16, 4, 2), (64, 64, 32, 4, 3), (128, 128, 64, 4, 5), (128, 256, 64, 8, 5)),
    KEY,
    fitting,
)
@triton.jit(do_not_specialize=["size"])
def weights_backward_kernel(
    P, X, CELL, OFFSETS, DW, size, D: tl.constexpr, I: tl.constexpr, E: tl.constexpr,
    stride_i: tl.constexpr, stride_d: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Σ p xᵀ over an expert's slots, with x gathered.

    Here the host knows how many tiles there are, so there is one program for each.
    """
    columns = tl.cdiv(D, COLUMNS)
    expert = tl.program_id(0) // (tl.cdiv(I, ROWS) * columns)
    within = tl.program_id(0) % (tl.cdiv(I, ROWS) * columns)
    i, d = (
        within // columns * ROWS + tl.arange(0, ROWS),
        within % columns * COLUMNS + tl.arange(0, COLUMNS),
    )
    last = tl.load(OFFSETS + expert + 1)
    w = tl.zeros((ROWS, COLUMNS), FULL)
    for start in range(tl.load(OFFSETS + expert), last, DEPTH):
        slot = start + tl.arange(0, DEPTH)
        token = (tl.load(CELL + slot, slot < last, 0) // E).to(tl.int64)
        p = tl.load(
            P + slot.to(tl.int64)[None, :] * I + i[:, None],
            (slot < last)[None, :] & (i < I)[:, None],
            0.0,
        )
        x = tl.load(
            X + token[:, None] * D + d[None, :], (slot < last)[:, None] & (d < D)[None, :], 0.0
        )
        w = tl.dot(p, x, w, input_precision="ieee", out_dtype=FULL)
    at = expert.to(tl.int64) * I * D + i[:, None] * stride_i + d[None, :] * stride_d
    tl.store(DW + at, w, (i < I)[:, None] & (d < D)[None, :])


def persistent(tensor: Tensor, accumulators: int) -> tuple[int]:
    """As many programs as run at once if their accumulators take half of an SM's registers."""
    return (multiprocessors(tensor) * max(1, min(8, 2**15 // accumulators)),)


@torch.library.custom_op("minimodels::grouped_mlp_order", mutates_args=())
def grouped_mlp_order(visits: Tensor, slots: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """cell, offsets, order and starts of the visits, of which there may be at most `slots`."""
    visits, (n, E) = visits.contiguous(), visits.shape
    offsets, starts = (
        F.pad(visits.sum(dim).cumsum(0, dtype=torch.int32), (1, 0)) for dim in (0, 1)
    )
    # the GPU tests this, and the host does not wait for the result
    torch._assert_async(starts[-1] <= slots, "grouped_mlp: there are more visits than n · most")
    by_expert, by_token = (
        mask.flatten().cumsum(0, dtype=torch.int32) for mask in (visits.t(), visits)
    )
    cell, order = starts.new_full((slots,), n * E), starts.new_empty(slots)
    with on(visits):
        place_kernel[(triton.cdiv(n, 16),)](
            visits, by_expert, by_token, cell, order, n, E, slots, 16, triton.next_power_of_2(E)
        )
    return cell, offsets, order, starts


@torch.library.custom_op("minimodels::grouped_mlp_forward", mutates_args=())
def grouped_mlp_forward(
    x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, out: Tensor,
    cell: Tensor, offsets: Tensor, order: Tensor, starts: Tensor, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and g and u if they are to be kept (else empty)."""
    x, gates, gate, up, out = (part.contiguous() for part in (x, gates, gate, up, out))
    (E, I, D), h = gate.shape, x.new_empty(len(cell), gate.shape[1])
    g, u = (torch.empty_like(h) if keep else h.new_empty(0) for _ in range(2))
    parts, BLOCK_E, size = x.new_empty(len(cell), D), triton.next_power_of_2(E), size_of(len(x))
    with on(x):
        hidden_kernel[lambda meta: persistent(x, 2 * meta["ROWS"] * meta["COLUMNS"])](
            x, gate, up, cell, offsets, g, u, h, size, D, I, E, keep, full(x), BLOCK_E
        )  # fmt: skip
        parts_kernel[lambda meta: persistent(x, meta["ROWS"] * meta["COLUMNS"])](
            h, out, h, out, gates, cell, offsets, parts, size, D, I, E, 1, I, False, full(x),
            BLOCK_E
        )  # fmt: skip
    return sum_parts(parts, order, starts), g, u


@torch.library.custom_op("minimodels::grouped_mlp_backward", mutates_args=())
def grouped_mlp_backward(
    dy: Tensor, x: Tensor, gates: Tensor, gate: Tensor, up: Tensor, out: Tensor,
    cell: Tensor, offsets: Tensor, order: Tensor, starts: Tensor, g: Tensor, u: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dgates, dgate, dup, dout."""
    dy, x, gates, gate, up, out = (part.contiguous() for part in (dy, x, gates, gate, up, out))
    (E, I, D), slots, BLOCK_E = gate.shape, len(cell), triton.next_power_of_2(gate.shape[0])
    dg, du, gh = (torch.empty_like(g) for _ in range(3))
    size = size_of(len(x))
    dgates_parts = x.new_empty(
        triton.cdiv(I, WIDTH), slots, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    parts, weights = (
        x.new_empty(slots, D),
        tuple(torch.empty_like(weight) for weight in (gate, up, out)),
    )
    with on(x):
        hidden_backward_kernel[lambda meta: persistent(x, meta["ROWS"] * WIDTH)](
            dy, out, gates, cell, offsets, g, u, dg, du, gh, dgates_parts, size, D, I, E, slots,
            full(x), BLOCK_E
        )  # fmt: skip
        parts_kernel[lambda meta: persistent(x, meta["ROWS"] * meta["COLUMNS"])](
            dg, gate, du, up, gates, cell, offsets, parts, size, D, I, E, D, 1, True, full(x),
            BLOCK_E
        )  # fmt: skip
        for p, row, weight, strides in zip(
            (dg, du, gh), (x, x, dy), weights, ((D, 1), (D, 1), (1, I)), strict=True
        ):
            weights_backward_kernel[lambda meta: (E * triton.cdiv(I, meta["ROWS"]) * triton.cdiv(D, meta["COLUMNS"]),)](
                p, row, cell, offsets, weight, size, D, I, E, *strides, full(x)
            )  # fmt: skip
    dgates = gates.new_zeros(gates.numel() + 1)  # the last element is for unused slots
    dgates.scatter_(0, cell.long(), dgates_parts.sum(0).to(gates.dtype))
    return sum_parts(parts, order, starts), dgates[:-1].view_as(gates), *weights


def sum_parts(parts: Tensor, order: Tensor, starts: Tensor) -> Tensor:
    """For each token the sum of its visits' parts: (slots, D) -> (n, D)."""
    n, D = len(starts) - 1, parts.shape[1]
    y, BLOCK = parts.new_empty(n, D), min(1024, triton.next_power_of_2(D))
    with on(parts):
        sum_kernel[(n, triton.cdiv(D, BLOCK))](parts, order, starts, y, D, full(parts), BLOCK)
    return y


# What PyTorch must know: shapes, derivative.


@grouped_mlp_order.register_fake
def _(visits, slots):
    n, E = visits.shape
    return tuple(visits.new_empty(size, dtype=torch.int32) for size in (slots, E + 1, slots, n + 1))


@grouped_mlp_forward.register_fake
def _(x, gates, gate, up, out, cell, offsets, order, starts, keep):
    g, u = (x.new_empty((cell.shape[0], gate.shape[1]) if keep else 0) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.contiguous_format), g, u


@grouped_mlp_backward.register_fake
def _(dy, x, gates, gate, up, out, cell, offsets, order, starts, g, u):
    return tuple(
        torch.empty_like(part, memory_format=torch.contiguous_format)
        for part in (x, gates, gate, up, out)
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:-1], *output[1:])
    ctx.set_materialize_grads(False)  # otherwise autograd makes zeros of the size of g and u


def _differentiate(ctx, dy, dg, du):
    return *grouped_mlp_backward(dy, *ctx.saved_tensors), None, None, None, None, None


grouped_mlp_forward.register_autograd(_differentiate, setup_context=_save)


def grouped_mlp(
    x: Tensor,
    gates: Tensor,
    visits: Tensor,
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    most: int | None = None,
) -> Tensor:
    """As minimodels.ops.grouped_mlp.grouped_mlp: y (n, D).

    x (n, D); gates (n, E) of any dtype; visits (n, E) bool; gate, up (E, I, D) and out (E, D, I) of
    the dtype of x. `most` is the number of visits to allocate for, per token on average over all
    tokens: K for a top-k router, None for all E. If there are more than n · most visits, the
    program stops, on a GPU by a device-side assertion. Raises ValueError if shapes or dtypes
    disagree.
    """
    require_product(x.dtype)
    check_shapes(x, gates, visits, gate, up, out)
    n, E = visits.shape
    if visits.dtype != torch.bool or n * E >= 2**31:
        raise ValueError(
            f"grouped_mlp: visits is {visits.dtype} of {n * E} numbers; "
            "it must be bool, with fewer than 2^31"
        )
    if most is not None and most < 1:
        raise ValueError(f"grouped_mlp: most is {most} and must be 1 or more, or None")
    if not x.dtype == gate.dtype == up.dtype == out.dtype:
        raise ValueError(
            f"grouped_mlp: x {x.dtype}, gate {gate.dtype}, up {up.dtype} and out {out.dtype} must have one dtype"
        )
    keep = torch.is_grad_enabled() and any(part.requires_grad for part in (x, gates, gate, up, out))
    order = grouped_mlp_order(visits, n * min(E, most or E))
    return grouped_mlp_forward(x, gates, gate, up, out, *order, keep)[0]


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs too."""

    def inputs(n: int, E: int, K: int, D: int, I: int) -> tuple:
        gate, up = torch.randn(2, E, I, D).div(D**0.5).unbind(0)
        visits = torch.rand(n, E).argsort(1) < K
        return (
            torch.randn(n, D),
            torch.rand(n, E),
            visits,
            gate,
            up,
            torch.randn(E, D, I) / I**0.5,
            K,
        )

    odd = [inputs(11, 4, 2, 33, 20), inputs(40, 3, 1, 16, 130)]
    full = [inputs(600, 4, 2, 300, 270) if GPU else inputs(20, 2, 1, 33, 20)]
    kernels = hidden_kernel, parts_kernel, hidden_backward_kernel, weights_backward_kernel
    compare_all(kernels, grouped_mlp, reference, odd, full)


reference = partial(operation, impl="reference")


def dense_mlp(x, gates, visits, gate, up, out, most):
    """One MLP as wide as `most` experts, for every token: as many products, and no routing.

    It multiplies by a gate, and it gives the experts that it leaves out gradients of zero. So its
    inputs and outputs are the same as the operation's.
    """
    gate, up, out = (
        gate[:most].flatten(0, 1),
        up[:most].flatten(0, 1),
        out[:most].reshape(x.shape[1], -1),
    )
    return gates[:, :1].to(x.dtype) * F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), out)


LIGER_TUNES = "LIGER_FUSED_MOE_AUTOTUNE"


@functools.lru_cache(maxsize=1)
def for_liger(gate: Tensor, up: Tensor, visits: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """What the caller of liger-kernel already has, made before the clock starts.

    These are the two weights as one, and each token's experts.
    """
    return torch.cat((gate, up), 1), visits.to(torch.int8).topk(most).indices


def liger(x, gates, visits, gate, up, out, most):
    """The fused experts of liger-kernel.

    Its tuning over 240 configurations takes minutes. Set LIGER_FUSED_MOE_AUTOTUNE=1 to enable it.
    """
    os.environ.setdefault(LIGER_TUNES, "0")
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    weights, experts = for_liger(gate, up, visits, most)
    return LigerFusedMoEFunction.apply(x, weights, out, experts.int(), gates.gather(1, experts))


def grouped_mm(x, gates, visits, gate, up, out, most):
    """PyTorch's grouped product, with the tokens sorted by expert."""
    expert, token = visits.t().nonzero(as_tuple=True)
    ends, rows = visits.sum(0).cumsum(0).to(torch.int32), x[token]
    hidden = F.silu(F.grouped_mm(rows, gate.mT, offs=ends)) * F.grouped_mm(rows, up.mT, offs=ends)
    y = F.grouped_mm(hidden, out.mT, offs=ends) * gates[token, expert, None].to(hidden.dtype)
    return torch.zeros_like(x).index_add(0, token, y)


PEERS = {
    "dense, as many FLOPs": Peer("torch", dense_mlp, gpu=False, same=False),
    "grouped_mm": Peer("torch", grouped_mm, gpu=False),
    f"liger{', untuned' * (os.environ.get(LIGER_TUNES, '0') == '0')}": Peer("liger-kernel", liger),
}


def case(n: int, E: int, K: int, D: int, I: int) -> Case:
    """Experts chosen at random: three products forward, six backward."""

    def inputs() -> tuple:
        shapes = (n, D), (E, I, D), (E, I, D), (E, D, I)
        tensors = (torch.randn(shape, **TIMED) * shape[-1] ** -0.5 for shape in shapes)
        x, gate, up, out = (tensor.requires_grad_() for tensor in tensors)
        visits = torch.rand(n, E, device=x.device).argsort(1) < K
        return x, torch.rand(n, E, device=x.device, requires_grad=True), visits, gate, up, out, K

    label, forward = f"{n} tokens, {K} of {E} experts, D {D}, I {I}", 6 * n * K * D * I
    return Case(label, inputs, forward, 2 * forward, "TFLOP/s")


EXAMPLES = [case(256, 16, 2, 2048, 768).inputs]  # the launches of minimodels.kernels.compile


if __name__ == "__main__":
    cases = [case(32768, 128, 8, 2048, 768), case(8192, 8, 2, 2048, 5632)] if GPU else [
        case(n, 8, 2, 512, 688) for n in (256, 1024, 4096)
    ]  # fmt: skip
    command(report("grouped_mlp", grouped_mlp, operation, cases, PEERS, check), __doc__)
