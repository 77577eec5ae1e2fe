"""The norm of each head of queries or keys, then their rotary positions, in one pass.

    n = weight · r · x      r = 1/sqrt(mean(x²) + eps), over a head; without a weight n = x
    y = n ⊙ cos + n' ⊙ sin

n' is n with both halves of the rotated dimensions exchanged, and the angles are those of `rotary` in
minimodels/ops/rotary.py. Dimensions after the rotated ones are only normalised.

What it must cost: x is read and y written, 4 bytes an element in bf16. The angles are 8 bytes a
dimension, but all heads of a token share them. In PyTorch the rotation moves 26 bytes an element: a
product with a result in fp32 (6), a copy with the halves exchanged (4), a product and sum in fp32
(10), a cast (6). The norm moves 20: a cast (6), the norm in fp32 (8), a cast (6). Backward reads dy,
with a norm also x, and writes dx: 4 or 6 bytes. With n̂ = r · x, and ' for the same exchange:

    dn = dy ⊙ cos + (dy ⊙ sin)'      g = weight · dn
    dx = r · (g - n̂ · mean(g · n̂))   dweight = Σ_rows dn · n̂

Each row has three parts: the halves a and b of the rotated dimensions, which are turned as pairs,
and the rest c. So each number is loaded once, and only half of the angles. A small transformer (12
layers of width 768, 32,768 tokens) has 600 M elements of queries and keys. With a norm, 46 bytes
instead of 4 add 25 GB of traffic forward, and more backward: some milliseconds of a step.
torch.compile fuses the operations too.

The compiler (Triton 3.9, Hopper) reports at d = 64 for a block of 32 rows, 16 elements a thread: 40
registers forward; 95 backward, so that 5 programs fit an SM, and 597 instructions. These take an SM
597 clocks, in which the memory delivers two thirds of the block's bytes. With pairs loaded as a
second copy of the row in another order, the three figures were 62, 80 and 711. Without a norm they
are 32, 32 and 194.

    name        shape
    x, y        (B, H, T, d)    any strides, last dimension contiguous; y is stored as (B, T, H, d)
    cos, sin    (T, R) or (B, 1, T, R)   fp32; R ≤ d dimensions are rotated. Both halves of cos are
                                the same, and those of sin differ in sign
    weight      (d,)            of the norm; None: no norm
    row         ()              index of a head of a token, in the order (B, T, H)
    a, b, c     (rows, ...)     the three parts of n, of dn or of g; x, y, z those of n̂; u, v, w those
                                of the weight
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from minimodels.kernels.common import (
    GPU,
    TIMED,
    Case,
    command,
    compare,
    full,
    innermost,
    multiprocessors,
    on,
    report,
)
from torch import Tensor

from minimodels.ops.rotary import check_angles, rotary
from minimodels.ops.rotary import norm_rotate as operation

NUMBERS = 2048  # in a block of rows: 16 for each thread of 4 warps
PROGRAMS = 5  # of the backward kernel on an SM; each has its own share of dweight


@triton.jit
def begins(P, row, strides, T, H):
    """Where each row of a block (batch, token, head) begins: (rows, 1) pointers."""
    batch, token, head = row // (T * H), row // H % T, row % H
    wide = tl.cast(batch, tl.int64) * strides[0] + tl.cast(token, tl.int64) * strides[2]
    return (P + (wide + head * strides[1]))[:, None]


@triton.jit
def load(P, inside, d: tl.constexpr, R: tl.constexpr, FULL: tl.constexpr, HALF: tl.constexpr,
         REST: tl.constexpr):  # fmt: skip
    """The two halves of the rotated dimensions, and the other dimensions, of each row at P."""
    i, j = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    first = tl.load(P + i, inside & (i < R // 2), 0.0).to(FULL)
    second = tl.load(P + R // 2 + i, inside & (i < R // 2), 0.0).to(FULL)
    return first, second, tl.load(P + R + j, inside & (j < d - R), 0.0).to(FULL)


@triton.jit
def store(P, first, second, rest, inside, d: tl.constexpr, R: tl.constexpr, HALF: tl.constexpr,
          REST: tl.constexpr):  # fmt: skip
    """Write what `load` reads."""
    i, j = tl.arange(0, HALF)[None, :], tl.arange(0, REST)[None, :]
    tl.store(P + i, first, inside & (i < R // 2))
    tl.store(P + R // 2 + i, second, inside & (i < R // 2))
    tl.store(P + R + j, rest, inside & (j < d - R))


@triton.jit
def turn(COS, SIN, row, inside, turns, T, H, R: tl.constexpr, HALF: tl.constexpr):
    """The cosines and sines of each row's angles, taken from the second half."""
    i = tl.arange(0, HALF)[None, :]
    at = (row // (T * H) * turns + row // H % T * R + R // 2)[:, None] + i
    angle = inside & (i < R // 2)
    return tl.load(COS + at, angle, 0.0), tl.load(SIN + at, angle, 0.0)


@triton.jit
def dot(a, b, c, x, y, z):
    """The sum of products over each row of three parts: (rows, 1)."""
    return (tl.sum(a * x, 1) + tl.sum(b * y, 1) + tl.sum(c * z, 1))[:, None]


@triton.jit
def forward_kernel(
    X, COS, SIN, WEIGHT, Y, rows, x_strides, turns, T, H, eps, d: tl.constexpr, R: tl.constexpr,
    FULL: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """Each program computes a block of rows."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = (row < rows)[:, None]
    a, b, c = load(begins(X, row, x_strides, T, H), inside, d, R, FULL, HALF, REST)
    if WEIGHT is not None:
        rstd = 1 / tl.sqrt(dot(a, b, c, a, b, c) / d + eps)
        u, v, w = load(WEIGHT, tl.full((1, 1), True, tl.int1), d, R, FULL, HALF, REST)
        a, b, c = a * rstd * u, b * rstd * v, c * rstd * w
    cos, sin = turn(COS, SIN, row, inside, turns, T, H, R, HALF)
    y = Y + tl.cast(row, tl.int64)[:, None] * d
    store(y, a * cos - b * sin, b * cos + a * sin, c, inside, d, R, HALF, REST)


@triton.jit
def backward_kernel(
    DY, X, COS, SIN, WEIGHT, DX, DWEIGHT, rows, dy_strides, x_strides, turns, T, H, eps,
    d: tl.constexpr, R: tl.constexpr, FULL: tl.constexpr, ROWS: tl.constexpr, HALF: tl.constexpr,
    REST: tl.constexpr,
):  # fmt: skip
    """Program p of P takes blocks p, p + P, ... and writes its own share of dweight."""
    one = tl.full((1, 1), True, tl.int1)
    da, db, dc = (
        tl.zeros((1, HALF), FULL),
        tl.zeros((1, HALF), FULL),
        tl.zeros((1, REST), FULL),
    )
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        inside = (row < rows)[:, None]
        a, b, c = load(begins(DY, row, dy_strides, T, H), inside, d, R, FULL, HALF, REST)
        cos, sin = turn(COS, SIN, row, inside, turns, T, H, R, HALF)
        a, b = a * cos + b * sin, b * cos - a * sin  # turned back
        if WEIGHT is not None:
            x, y, z = load(begins(X, row, x_strides, T, H), inside, d, R, FULL, HALF, REST)
            rstd = 1 / tl.sqrt(dot(x, y, z, x, y, z) / d + eps)
            x, y, z = x * rstd, y * rstd, z * rstd
            da += tl.sum(a * x, 0)[None, :]
            db += tl.sum(b * y, 0)[None, :]
            dc += tl.sum(c * z, 0)[None, :]
            u, v, w = load(WEIGHT, one, d, R, FULL, HALF, REST)
            a, b, c = a * u, b * v, c * w
            mean = dot(a, b, c, x, y, z) / d
            a, b, c = rstd * (a - x * mean), rstd * (b - y * mean), rstd * (c - z * mean)
        dx = DX + tl.cast(row, tl.int64)[:, None] * d
        store(dx, a, b, c, inside, d, R, HALF, REST)
    if WEIGHT is not None:
        store(DWEIGHT + tl.program_id(0) * d, da, db, dc, one, d, R, HALF, REST)


@torch.library.custom_op("minimodels::norm_rotate_forward", mutates_args=())
def norm_rotate_forward(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float
) -> Tensor:
    """y."""
    x, y = innermost(x), heads_like(x)
    sizes = constants(x, cos)
    rows = x.numel() // x.shape[-1]
    with on(x):
        forward_kernel[(triton.cdiv(rows, sizes["ROWS"]),)](
            x, *angles(cos, sin), weight, y, rows, x.stride(), *counts(x, cos), eps, **sizes
        )
    return y


@torch.library.custom_op("minimodels::norm_rotate_backward", mutates_args=())
def norm_rotate_backward(
    dy: Tensor, x: Tensor | None, cos: Tensor, sin: Tensor, weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """dx, and dweight (empty without a norm). x is read only for the norm."""
    dy, dx = innermost(dy), heads_like(dy)
    x = dy if x is None else innermost(x)
    sizes, count = constants(dy, cos), PROGRAMS * multiprocessors(dy)
    dweight = dy.new_empty(
        0 if weight is None else (count, dy.shape[-1]),
        dtype=torch.promote_types(dy.dtype, torch.float32),
    )
    with on(dy):
        backward_kernel[(count,)](
            dy, x, *angles(cos, sin), weight, dx, dweight, dy.numel() // dy.shape[-1], dy.stride(),
            x.stride(), *counts(dy, cos), eps, **sizes
        )  # fmt: skip
    return dx, dweight if weight is None else dweight.sum(0).to(weight.dtype)


def heads_like(x: Tensor) -> Tensor:
    """An empty (B, H, T, d) in the memory order (B, T, H, d)."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def angles(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The angles as the kernels read them."""
    return cos.contiguous(), sin.contiguous()


def counts(x: Tensor, cos: Tensor) -> tuple[int, int, int]:
    """The number of angles of one text (0 if all texts share them), T and H."""
    return 0 if cos.ndim == 2 else cos[0].numel(), x.shape[2], x.shape[1]


def constants(x: Tensor, cos: Tensor) -> dict[str, object]:
    """The compile-time constants."""
    d, R = x.shape[-1], cos.shape[-1]
    half, rest = triton.next_power_of_2(R // 2), triton.next_power_of_2(max(1, d - R))
    rows = max(1, NUMBERS // (2 * half))
    return {"d": d, "R": R, "FULL": full(x), "ROWS": rows, "HALF": half, "REST": rest}


# What PyTorch must know: shapes, derivative.


@norm_rotate_forward.register_fake
def _(x, cos, sin, weight, eps):
    return heads_like(x)


@norm_rotate_backward.register_fake
def _(dy, x, cos, sin, weight, eps):
    return heads_like(dy), dy.new_empty(0) if weight is None else torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, cos, sin, weight, ctx.eps = inputs
    ctx.save_for_backward(None if weight is None else x, cos, sin, weight)


def _differentiate(ctx, dy):
    dx, dweight = norm_rotate_backward(dy, *ctx.saved_tensors, ctx.eps)
    weight = ctx.saved_tensors[-1]
    return dx, None, None, None if weight is None else dweight, None


norm_rotate_forward.register_autograd(_differentiate, setup_context=_save)


def norm_rotate(
    x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """As minimodels.ops.rotary.norm_rotate: (B, H, T, d) in x's dtype."""
    check_angles(x, cos, sin, weight)
    return norm_rotate_forward(x, cos, sin, weight, eps)


def turned(call, x: Tensor, positions: Tensor, R: int, weight: Tensor | None) -> Tensor:
    """A call with the angles of positions (T,) or (B, 1, T), which have no gradient."""
    return call(x, *rotary(positions, R, 1e4), weight, 1e-5)


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs too."""
    for B, H, T, d, R in ((2, 3, 5, 6, 4), (1, 2, 37, 16, 16), (1, 4, 300 if GPU else 9, 128, 128)):
        for positions in (torch.arange(T), torch.randint(99, (B, 1, T))):
            for weight in (None, torch.randn(d)):
                given = torch.randn(B, T, H, d).transpose(1, 2), positions, R, weight
                compare(partial(turned, norm_rotate), partial(turned, reference), given)


reference = partial(operation, impl="reference")
PEERS = {}


def case(tokens: int, T: int, H: int, d: int) -> Case:
    """With a norm: forward moves x and y, and backward dy, x and dx."""

    def inputs() -> tuple:
        x = torch.randn(tokens // T, T, H, d, **TIMED).transpose(1, 2)
        cos, sin = rotary(torch.arange(T, device=x.device), d, 1e4)
        weight = torch.ones(d, device=x.device, requires_grad=True)
        return x.requires_grad_(), cos, sin, weight, 1e-5

    return Case(
        f"B {tokens // T}, H {H}, T {T}, d {d}", inputs, 2 * tokens * H * d, 3 * tokens * H * d
    )


# the launches of minimodels.kernels.compile, with a norm and without
EXAMPLES = [
    case(2048, 1024, 12, 64).inputs,
    case(2048, 1024, 16, 128).inputs,
    lambda: case(2048, 1024, 12, 64).inputs()[:3],
]


if __name__ == "__main__":
    cases = (
        [case(2**17, 1024, 12, 64), case(2**16, 4096, 16, 128)]
        if GPU
        else [case(T, T, 4, 64) for T in (256, 1024, 4096)]
    )
    command(report("norm_rotate", norm_rotate, operation, cases, PEERS, check), __doc__)
