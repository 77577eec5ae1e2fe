"""RMSNorm (arXiv:1910.07467) of a residual stream, including the addition before it.

    total = x + update                                 the stream after the previous layer
    y     = weight · total / sqrt(mean(total²) + eps)

What it must cost: x, update, y and total each cross the memory once, which is 8 bytes an element in
bf16 (4 without update). There is hardly any arithmetic. So the kernel is as fast as a copy of that
many bytes, if everything happens while a row is in registers. Under autocast the stream is in fp32
and y in bf16, the precision of the linear maps that read it. A y in fp32 would cost 2 bytes more
here, and 6 more for each of these maps, which would cast it (attention has three, the MLP two).
Backward reads dy, total and, if later layers send one, dtotal, and it writes dx: 6 or 8 bytes. With
n = r · total, r = 1/sqrt(mean(total²) + eps), and g = weight · dy:

    dx = dupdate = r · (g - n · mean(g · n)) + dtotal          dweight = Σ_rows dy · n

A program of backward takes many rows, and loads the next two while it computes one. At D = 1024 it
compiles for Hopper to 56 registers and 12 KB of shared memory. An SM then runs 8 programs, 32
warps, with 24 rows in flight. Without loading ahead (48 registers, 4 KB) it ran 4 programs with 4
rows.

    name        shape
    x, update   (..., D)    one row per token
    total       (..., D)    their sum, the stream that later layers read
    dtotal      (..., D)    the gradient of total from later layers
    weight      (D,)
    rstd        (rows,)     r of each row, fp32, kept for backward
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from minimodels.kernels.common import (
    GPU,
    TIMED,
    Case,
    Peer,
    command,
    compare,
    dense,
    full,
    multiprocessors,
    on,
    report,
)
from torch import Tensor

from minimodels.parts import norm_dtype
from minimodels.parts import rmsnorm as operation

WARPS = 32  # of backward on an SM; with 64 registers a thread, no more fit
# rows in flight in a program of backward: the next two are loaded while one is computed
STAGES = tl.constexpr(3)


@triton.jit
def forward_kernel(
    X, UPDATE, WEIGHT, Y, TOTAL, RSTD, D, eps, FULL: tl.constexpr, BLOCK: tl.constexpr
):
    """One program has one row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    x = tl.load(X + row * D + column, inside, 0.0).to(FULL)
    if UPDATE is not None:
        x += tl.load(UPDATE + row * D + column, inside, 0.0).to(FULL)
        tl.store(TOTAL + row * D + column, x, inside)
        x = x.to(TOTAL.dtype.element_ty).to(FULL)  # what backward will read
    rstd = 1 / tl.sqrt(tl.sum(x * x) / D + eps)
    tl.store(RSTD + row, rstd)
    tl.store(Y + row * D + column, x * rstd * tl.load(WEIGHT + column, inside, 0.0), inside)


@triton.jit
def backward_kernel(
    DY, DTOTAL, TOTAL, WEIGHT, RSTD, DX, DWEIGHT, rows, D, FULL: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program p of P takes rows p, p + P, ...

    Each program writes its own share of dweight, so no two programs write to the same place.
    """
    program = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = tl.load(WEIGHT + column, inside, 0.0).to(FULL)
    dweight = tl.zeros((BLOCK,), FULL)
    width = tl.cast(D, tl.int64)  # for offsets beyond 2^31
    for row in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        at = row * width + column
        dy = tl.load(DY + at, inside, 0.0).to(FULL)
        rstd = tl.load(RSTD + row)
        n = tl.load(TOTAL + at, inside, 0.0).to(FULL) * rstd
        g = weight * dy
        dx = rstd * (g - n * (tl.sum(g * n) / D))
        if DTOTAL is not None:
            dx += tl.load(DTOTAL + at, inside, 0.0).to(FULL)
        tl.store(DX + at, dx, inside)
        dweight += dy * n
    tl.store(DWEIGHT + program * D + column, dweight, inside)


@torch.library.custom_op("minimodels::rmsnorm_forward", mutates_args=())
def rmsnorm_forward(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y in `dtype`, total (empty without update) and rstd."""
    x, D = x.contiguous(), x.shape[-1]
    rows = x.numel() // D
    y = torch.empty_like(x, dtype=dtype)
    rstd = x.new_empty(rows, dtype=torch.promote_types(x.dtype, torch.float32))
    total = x.new_empty(0) if update is None else torch.empty_like(x)
    BLOCK = triton.next_power_of_2(D)
    with on(x):
        forward_kernel[(rows,)](
            x, *dense(update), weight, y, total, rstd, D, eps, full(x), BLOCK,
            num_warps=warps(BLOCK)
        )  # fmt: skip
    return y, total, rstd


@torch.library.custom_op("minimodels::rmsnorm_backward", mutates_args=())
def rmsnorm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """dx, which is also dupdate, and dweight."""
    dy, D = dy.contiguous(), total.shape[-1]
    rows, BLOCK = total.numel() // D, triton.next_power_of_2(D)
    count = multiprocessors(total) * max(1, min(8, WARPS // warps(BLOCK)))
    dx, dweight = torch.empty_like(total), rstd.new_empty(count, D)
    with on(dy):
        backward_kernel[(count,)](
            dy, *dense(dtotal), total, weight, rstd, dx, dweight, rows, D, full(total), BLOCK,
            num_warps=warps(BLOCK)
        )  # fmt: skip
    return dx, dweight.sum(0).to(weight.dtype)


def warps(block: int) -> int:
    """The number of warps with which a thread has about 8 elements of the row."""
    return min(32, max(1, block // 256))


# What PyTorch must know: shapes, derivative.


@rmsnorm_forward.register_fake
def _(x, update, weight, eps, dtype):
    rstd = x.new_empty(x.numel() // x.shape[-1], dtype=torch.promote_types(x.dtype, torch.float32))
    total = x.new_empty(0 if update is None else x.shape)
    return x.new_empty(x.shape, dtype=dtype), total, rstd


@rmsnorm_backward.register_fake
def _(dy, dtotal, total, weight, rstd):
    return torch.empty_like(total), torch.empty_like(weight)


def _save(ctx, inputs, output):
    x, update, weight, _, _ = inputs
    _, total, rstd = output
    ctx.add, ctx.update = update is not None, None if update is None else update.dtype
    ctx.set_materialize_grads(False)  # reading a gradient of zeros would cost time
    ctx.save_for_backward(total if ctx.add else x.contiguous(), weight, rstd)


def _differentiate(ctx, dy, dtotal, _):
    if dy is None:  # only the sum is used
        return dtotal, dtotal, None, None, None
    dx, dweight = rmsnorm_backward(dy, dtotal if ctx.add else None, *ctx.saved_tensors)
    dupdate = None if ctx.update is None else dx.to(ctx.update)
    return dx, dupdate, dweight, None, None


rmsnorm_forward.register_autograd(_differentiate, setup_context=_save)


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As minimodels.parts.rmsnorm: the normalised sum, and the sum in x's dtype.

    x, update (..., D); weight (D,).
    """
    if weight.shape != x.shape[-1:] or (update is not None and update.shape != x.shape):
        raise ValueError(
            f"rmsnorm: x {tuple(x.shape)}, weight {tuple(weight.shape)} and the update do not fit"
        )
    y, total, _ = rmsnorm_forward(x, update, weight, eps, norm_dtype(x))
    return y, x if update is None else total


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs too."""
    for shape in ((3, 5, 33), (4, 768)):
        for add in (False, True):
            x, update, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
            compare(rmsnorm, reference, (x, weight, 1e-5, update if add else None))


reference = partial(operation, impl="reference")


def liger(x: Tensor, weight: Tensor, eps: float, update: Tensor) -> tuple[Tensor, Tensor]:
    """The same fusion in liger-kernel."""
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(update, x, weight, eps)


def llama(x: Tensor, weight: Tensor, eps: float, update: Tensor) -> tuple[Tensor, Tensor]:
    """The addition and the norm of transformers' Llama."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    total = x + update
    return LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=eps), total), total


PEERS = {
    "liger": Peer("liger-kernel", liger),
    "transformers": Peer("transformers", llama, gpu=False),
}


def case(rows: int, D: int) -> Case:
    """With the addition: forward moves four numbers an element, and backward three.

    Backward has no dtotal, because only y is differentiated.
    """

    def inputs() -> tuple:
        x, update = torch.randn(2, rows, D, **TIMED).unbind(0)
        weight = torch.ones(D, **TIMED, requires_grad=True)
        return x.requires_grad_(), weight, 1e-5, update.requires_grad_()

    return Case(f"{rows} rows, D {D}", inputs, 4 * rows * D, 3 * rows * D)


# the launches of minimodels.kernels.compile, with and without an update
EXAMPLES = [case(64, 1024).inputs, lambda: (*case(64, 1024).inputs()[:3], None)]


if __name__ == "__main__":
    cases = (
        [case(2**18, 768), case(2**16, 4096)]
        if GPU
        else [case(rows, 256) for rows in (512, 2048, 8192)]
    )
    command(report("rmsnorm", rmsnorm, operation, cases, PEERS, check), __doc__)
