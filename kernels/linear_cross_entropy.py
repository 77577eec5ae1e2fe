"""A language model's loss without its logits: the head's linear map and the cross-entropy in one.

    z_tv = <x_t, weight_v>      lse_t = log Σ_v exp(z_tv)      loss = mean_t (lse_t - z_t,target(t))

The mean is over the targets that are not IGNORE. With share_t = dloss / count for these, else 0,

    g_tv = (exp(z_tv - lse_t) - [v = target(t)]) · share_t      dx = g · weight      dweight = gᵀ · x

What it must cost: three products of 2·n·V·D operations, one forward and two backward, and no (n, V)
tensor. So logits exist only for a chunk of the vocabulary at a time, for all rows. The matrix
library computes the products. A kernel can make everything between them cross the memory only once:
forward reads the chunk (2 bytes a logit in bf16), and backward reads it and writes it in place (4).
At D = 2048 that is about a tenth and a fifth of the time of one product's 2·D operations a logit.
The compiler (Triton 3.9) reports 52 and 32 registers, nothing spilled, and 283 instructions for a
forward step of 4096 columns, 33 of them special. The figures were the same when lse was
stored, with fewer digits, instead of `top` and `total` below.

There are two ways to compute dweight without an (n, V) tensor:

    vocabulary chunks (here)    Σ exp is needed first, so backward recomputes the chunk's logits: 4
                                products. dweight of a chunk is one product, which sums over all
                                rows. dx is added up in fp32, 8·n·D bytes a chunk. Memory
                                beyond inputs and gradients: n · (4·D + 2·chunk) bytes
    row chunks                  (the torch path, Liger) forward computes the gradients: 3 products.
                                dweight is added up in fp32, 8·V·D bytes a chunk. Memory: 4·V·D
                                bytes and the logits' chunk

At n = 16384, D = 4096, V = 131072 that is 0.4 GB against 2.1 GB and a chunk. Row chunks, however
small, never need less than the 2.1 GB. (Liger adds up in bf16 by default, which loses digits of
what a chunk adds. It then needs only the logits' chunk, 2·n·D bytes.) If there is enough memory,
row chunks take up to a quarter less time. The more rows they have, the more they gain, because the
8·V·D bytes of an addition are shared by 6·rows·V·D operations.

    name        shape
    x           (n, D)          the input of the head
    weight      (V, D)          the head's matrix
    targets     (n,)            int64 below V; IGNORE if nothing is to be predicted
    logits      (n, chunk)      of one chunk of the vocabulary, rows padded to a multiple of 64; in
                                backward g replaces them
    top, total  (n,)            lse = top + log(total), with top the largest logit; fp32. The form
                                exp(z - lse) = exp(z - top)/total loses nothing if logits are large:
                                z - top is exact for z near top, but lse would be rounded
"""

from __future__ import annotations

from functools import partial

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
from torch.torch_version import TorchVersion
from torch.utils.flop_counter import register_flop_formula

from minimodels.ops.linear_cross_entropy import IGNORE, check_shapes
from minimodels.ops.linear_cross_entropy import linear_cross_entropy as operation

# the fewest columns of a chunk: the product for dx then does 8192 operations for each element that
# is added up, which moves 8 bytes
COLUMNS = 4096
WORK = 2**25  # logits of a chunk if there are few rows, so that a product fills the machine
# whether addmm can add a product of bf16 factors to an fp32 sum
ADDS = TorchVersion(torch.__version__) >= (2, 11)
BLOCK, WARPS = 4096, 4  # columns of a step: a thread has four loads of 16 bytes in flight


@triton.jit
def forward_kernel(
    LOGITS, TARGETS, TOP, TOTAL, WANTED, first, columns, stride,
    BEGIN: tl.constexpr, FULL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the chunk whose first column is `first` to top and total, and store the target's logit.

    One program has one row. The target's logit is stored if it is in the chunk.
    """
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    column = tl.arange(0, BLOCK)
    top, total = tl.full((), float("-inf"), FULL), tl.full((), 0, FULL)
    if not BEGIN:
        top, total = tl.load(TOP + row), tl.load(TOTAL + row)
    for start in range(0, columns, BLOCK):
        logit = tl.load(LOGITS + start + column, start + column < columns, float("-inf")).to(FULL)
        higher = tl.maximum(top, tl.max(logit))
        total = total * tl.exp2((top - higher) * LOG2_E) + tl.sum(
            tl.exp2((logit - higher) * LOG2_E)
        )
        top = higher
    tl.store(TOP + row, top)
    tl.store(TOTAL + row, total)
    target = tl.load(TARGETS + row) - first
    here = (target >= 0) & (target < columns)
    tl.store(WANTED + row, tl.load(LOGITS + target, here, 0.0).to(FULL), here)


@triton.jit
def backward_kernel(
    LOGITS, TARGETS, TOP, TOTAL, SHARE, first, columns, stride, ignore, FULL: tl.constexpr,
    BLOCK: tl.constexpr
):  # fmt: skip
    """Replace the logits by g. One program has one block of a row."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    target = tl.load(TARGETS + row)
    share = tl.where(target == ignore, 0.0, tl.load(SHARE))
    LOGITS += row * stride
    p = tl.exp2((tl.load(LOGITS + column, inside, 0.0).to(FULL) - tl.load(TOP + row)) * LOG2_E)
    p /= tl.load(TOTAL + row)
    tl.store(LOGITS + column, (p - tl.where(column == target - first, 1.0, 0.0)) * share, inside)


@torch.library.custom_op("minimodels::linear_cross_entropy_forward", mutates_args=())
def linear_cross_entropy_forward(
    x: Tensor, weight: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, top and total."""
    targets = targets.contiguous()
    precision = torch.promote_types(x.dtype, torch.float32)
    top, total = (x.new_empty(len(x), dtype=precision) for _ in range(2))
    wanted = torch.full_like(top, float("nan"))
    for at, logits in chunks(x, weight):
        with on(x):
            forward_kernel[(len(x),)](
                logits, targets, top, total, wanted, at.start, logits.shape[1], logits.stride(0),
                at.start == 0, full(x), BLOCK, num_warps=WARPS,
            )  # fmt: skip
    present = targets != IGNORE
    loss = torch.where(present, top - wanted + total.log(), 0.0).sum() / present.sum()
    return loss, top, total


@torch.library.custom_op("minimodels::linear_cross_entropy_backward", mutates_args=())
def linear_cross_entropy_backward(
    dloss: Tensor, x: Tensor, weight: Tensor, targets: Tensor, top: Tensor, total: Tensor
) -> tuple[Tensor, Tensor]:
    """dx and dweight."""
    targets = targets.contiguous()
    share = dloss / (targets != IGNORE).sum()
    dx, dweight = top.new_zeros(x.shape), weight.new_empty(weight.shape)
    for at, logits in chunks(x, weight):
        n, columns = logits.shape
        with on(x):
            backward_kernel[(n, triton.cdiv(columns, BLOCK))](
                logits, targets, top, total, share, at.start, columns, logits.stride(0), IGNORE,
                full(x), BLOCK, num_warps=WARPS
            )  # fmt: skip
        torch.mm(logits.t(), x, out=dweight[at])
        add_product(dx, logits, weight[at])
    return dx.to(x.dtype), dweight


def chunks(x: Tensor, weight: Tensor):
    """Slices of the vocabulary, of about equal size, with their logits (n, columns).

    All logits use the same memory, so each slice overwrites the one before.
    """
    (n, _), V = x.shape, len(weight)
    count = triton.cdiv(V, max(COLUMNS, WORK // max(n, 1)))
    size = 64 * triton.cdiv(V, 64 * count) if count > 1 else V
    # each row starts at a multiple of 128 bytes, whatever V is
    buffer = x.new_empty(n, 64 * triton.cdiv(size, 64))
    for first in range(0, V, size):
        at = slice(first, min(first + size, V))
        yield at, torch.mm(x, weight[at].t(), out=buffer[:, : at.stop - first])


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a · b, in the precision of `total`, which may be higher than that of a and b."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif not a.is_cuda:  # only on GPUs do PyTorch's products have a higher output precision
        total.addmm_(a.to(total.dtype), b.to(total.dtype))
    elif ADDS:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += torch.mm(a, b, out_dtype=total.dtype)


# What PyTorch must know: shapes, derivative, FLOPs (recomputation included).


@linear_cross_entropy_forward.register_fake
def _(x, weight, targets):
    top = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return top.new_empty(()), top, torch.empty_like(top)


@linear_cross_entropy_backward.register_fake
def _(dloss, x, weight, targets, top, total):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dloss, *_):
    return *linear_cross_entropy_backward(dloss, *ctx.saved_tensors), None


linear_cross_entropy_forward.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.minimodels.linear_cross_entropy_forward)
def _flops_forward(x, weight, targets, out_shape=None):
    return 2 * x[0] * weight[0] * weight[1]


@register_flop_formula(torch.ops.minimodels.linear_cross_entropy_backward)
def _flops_backward(dloss, x, weight, targets, *_, out_shape=None):
    return 6 * x[0] * weight[0] * weight[1]


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """As minimodels.ops.linear_cross_entropy: a scalar in full precision, in nats.

    It is mean_t (logsumexp(W x_t) - (W x_t)_target) over the targets that are not IGNORE. It is NaN
    if every target is IGNORE, or if one is not a row of weight. x (n, D); weight (V, D); targets
    (n,). Raises ValueError if shapes disagree.
    """
    check_shapes(x, weight, targets)
    # autocast does not reach into the operation
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    return linear_cross_entropy_forward(x, weight, targets)[0]


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs too."""
    for n, D, V in ((5, 7, 33), (70, 64, 5000)):
        targets = torch.randint(V, (n,))
        targets[1] = IGNORE
        arguments = torch.randn(n, D), torch.randn(V, D) / D**0.5, targets
        compare(linear_cross_entropy, reference, arguments)


reference = partial(operation, impl="reference")


def plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The loss with all logits in memory."""
    return F.cross_entropy(F.linear(x, weight).float(), targets, ignore_index=IGNORE)


def liger(accumulate: torch.dtype | None):
    """Liger's fused operation. It adds dweight up in `accumulate`, or in its own dtype if None."""

    def fused(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import (
            LigerFusedLinearCrossEntropyFunction as Function,
        )

        # IGNORE, weight of the z-loss, label smoothing, reduction, softcap, whether to return the
        # z-loss, dtype of the sum
        return Function.apply(
            x, weight, targets, None, None, IGNORE, 0.0, 0.0, "mean", None, False, accumulate
        )[0]

    return fused


def whole(operation):
    """Forward and backward in one call, because some providers compute gradients in forward."""

    def both(x: Tensor, weight: Tensor, targets: Tensor, **impl: str) -> Tensor:
        with torch.enable_grad():
            loss = operation(x, weight, targets, **impl)
            torch.autograd.grad(loss, (x, weight))
            return loss.detach()

    return both


PEERS = {
    "plain": Peer("torch", whole(plain), gpu=False),
    "liger": Peer("liger-kernel", whole(liger(None))),
    "liger, fp32": Peer("liger-kernel", whole(liger(torch.float32))),
}


def case(n: int, D: int, V: int) -> Case:
    """The useful work is three products."""

    def inputs() -> tuple:
        x, weight = torch.randn(n, D, **TIMED), torch.randn(V, D, **TIMED) * D**-0.5
        return x.requires_grad_(), weight.requires_grad_(), torch.randint(V, (n,), device=x.device)

    return Case(f"n {n}, D {D}, V {V}: both passes", inputs, 6 * n * D * V, 0, "TFLOP/s")


EXAMPLES = [case(64, 256, 50304).inputs]  # the launches of minimodels.kernels.compile


if __name__ == "__main__":
    cases = (
        [case(8192, 2048, 50304), case(16384, 4096, 131072)]
        if GPU
        else [case(n, 256, 8192) for n in (256, 1024, 4096)]
    )
    command(
        report(
            "linear_cross_entropy",
            whole(linear_cross_entropy),
            whole(operation),
            cases,
            PEERS,
            check,
        ),
        __doc__,
    )
