"""The linear scan of channels that do not mix, as in minimodels/ops/linear_scan.py.

    h_t = a_t ⊙ h_{t-1} + x_t
    dx_t = dh_t + a_{t+1} ⊙ dx_{t+1},    da_t = dx_t ⊙ h_{t-1}

What it must cost, per number of x in bf16: forward reads a and x and writes h, 6 bytes. Backward
reads a, h and dh and writes da and dx, 10 bytes. There is one multiply-add a number, so memory is
the bound.

    name      shape
    a, x, h   (B, T, D)
    local     (B, chunks, D)   the state after a chunk that is walked from zero
    share     (B, chunks, D)   the product of a chunk's a: what is left of the state before it

A program walks through time with BLOCK channels. If there are too few channels and texts to fill
the machine, time is split into chunks. A first kernel walks each chunk from zero. Each program then
carries the state over the chunks before its own (in backward, over those after it). That reads a
and x twice, the second time from the L2 cache if they fit there.

Compiled for Hopper (Triton 3.9): 34 to 60 registers and no spills. A round of 8 tokens and 64
channels takes a warp 261 instructions forward and 390 backward, or 339 and 490 if the channels do
not fill the blocks. This has not run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from minimodels.kernels.common import (
    GPU,
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
)
from torch import Tensor

from minimodels.ops.linear_scan import check_shapes
from minimodels.ops.linear_scan import linear_scan as operation

BLOCK = 64  # channels of a program, two for each lane of its warp
STEPS = tl.constexpr(8)  # tokens whose loads are in flight together
SHORTEST = 64  # the fewest tokens of a chunk


@triton.jit
def within(t, T, d, D):
    """Which channels exist; none if the token does not.

    The comparison is between tensors, because the interpreter cannot broadcast a scalar truth
    value.
    """
    return (d < D) & (t + 0 * d < T)


@triton.jit
def decays(A, RESETS, batch, t, T, D, d, FULL: tl.constexpr):
    """a of one token: 0 if it begins a document; 1, which changes nothing, after the text."""
    a = tl.load(A + (batch * T + t) * D + d, within(t, T, d, D), 1.0).to(FULL)
    if RESETS is not None:
        a = tl.where(begins(RESETS, batch, t, T, d), 0.0, a)
    return a


@triton.jit
def begins(RESETS, batch, t, T, d):
    """Whether a document begins at a token, once for each channel."""
    return tl.load(RESETS + batch * T + t + 0 * d, t + 0 * d < T, 0) != 0


@triton.jit
def local_kernel(
    A, X, RESETS, LOCAL, SHARE, T, D, length, chunks, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr
):  # fmt: skip
    """Walk a chunk from zero; in REVERSE it carries gradients: s <- a (s + x)."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s, share = tl.zeros((BLOCK,), FULL), tl.full((BLOCK,), 1.0, FULL)
    for i in range(0, length, STEPS):
        for j in tl.static_range(STEPS):
            t = chunk * length + (length - 1 - i - j if REVERSE else i + j)
            a = decays(A, RESETS, batch, t, T, D, d, FULL)
            x = tl.load(X + (batch * T + t) * D + d, within(t, T, d, D), 0.0).to(FULL)
            s = a * (s + x) if REVERSE else a * s + x
            share *= a
    at = (batch * chunks + chunk) * D + d
    tl.store(LOCAL + at, s, d < D)
    tl.store(SHARE + at, share, d < D)


@triton.jit
def carried(
    FIRST, LOCAL, SHARE, batch, chunk, chunks, D, d, REVERSE: tl.constexpr, FULL: tl.constexpr
):
    """The state before a chunk: the first state, carried over the chunks that come before."""
    s = tl.load(FIRST + batch * D + d, d < D, 0.0).to(FULL)
    for i in range(chunks - 1 - chunk if REVERSE else chunk):
        at = (batch * chunks + (chunks - 1 - i if REVERSE else i)) * D + d
        s = tl.load(SHARE + at, d < D, 0.0) * s + tl.load(LOCAL + at, d < D, 0.0)
    return s


@triton.jit
def forward_kernel(
    A, X, RESETS, STATE, LOCAL, SHARE, H, FINAL, T, D, length, chunks, BLOCK: tl.constexpr,
    FULL: tl.constexpr
):  # fmt: skip
    """All states of a chunk, from the true state before it."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h = carried(STATE, LOCAL, SHARE, batch, chunk, chunks, D, d, False, FULL)
    for i in range(0, length, STEPS):
        for j in tl.static_range(STEPS):
            t = chunk * length + i + j
            at, real = (batch * T + t) * D + d, within(t, T, d, D)
            a = decays(A, RESETS, batch, t, T, D, d, FULL)
            h = a * h + tl.load(X + at, real, 0.0).to(FULL)
            tl.store(H + at, h, real)
    if chunk == chunks - 1:
        tl.store(FINAL + batch * D + d, h, d < D)


@triton.jit
def backward_kernel(
    DH, DFINAL, A, RESETS, STATE, H, LOCAL, SHARE, DA, DX, DSTATE, T, D, length, chunks,
    BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    """da and dx of a chunk, from the gradient of the state after it.

    The first chunk also stores the gradient of the initial state.
    """
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    chunk, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = carried(DFINAL, LOCAL, SHARE, batch, chunk, chunks, D, d, True, FULL)
    initial = tl.load(STATE + batch * D + d, d < D, 0.0).to(FULL)
    for i in range(0, length, STEPS):
        for j in tl.static_range(STEPS):
            t = chunk * length + length - 1 - i - j
            at, real = (batch * T + t) * D + d, within(t, T, d, D)
            a = decays(A, RESETS, batch, t, T, D, d, FULL)
            dx = s + tl.load(DH + at, real, 0.0).to(FULL)
            earlier = real & (t + 0 * d > 0)
            before = tl.where(earlier, tl.load(H + at - D, earlier, 0.0).to(FULL), initial)
            da = dx * before
            if RESETS is not None:
                da = tl.where(begins(RESETS, batch, t, T, d), 0.0, da)
            tl.store(DA + at, da, real)
            tl.store(DX + at, dx, real)
            s = a * dx
    if chunk == 0:
        tl.store(DSTATE + batch * D + d, s, d < D)


@torch.library.custom_op("minimodels::linear_scan_kernel_forward", mutates_args=())
def linear_scan_forward(
    a: Tensor, x: Tensor, state: Tensor, resets: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All states h in x's dtype, and the final one in full precision."""
    a, x, state = (part.contiguous() for part in (a, x, state))
    h, final, resets = torch.empty_like(x), torch.empty_like(state), as_bytes(resets)
    grid, sizes = plan(x)
    with on(x):
        local, share = walk_locally(a, x, resets, state, reverse=False)
        forward_kernel[grid](
            a, x, resets, state, local, share, h, final, *sizes, BLOCK, full(x), num_warps=1
        )
    return h, final


@torch.library.custom_op("minimodels::linear_scan_kernel_backward", mutates_args=())
def linear_scan_backward(
    dh: Tensor, dfinal: Tensor, a: Tensor, state: Tensor, resets: Tensor | None, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    dh, dfinal, a, state = (part.contiguous() for part in (dh, dfinal, a, state))
    da, dx, dstate, resets = (
        torch.empty_like(a), torch.empty_like(h), torch.empty_like(state), as_bytes(resets)
    )  # fmt: skip
    grid, sizes = plan(h)
    with on(h):
        local, share = walk_locally(a, dh, resets, state, reverse=True)
        backward_kernel[grid](
            dh, dfinal, a, resets, state, h, local, share, da, dx, dstate, *sizes, BLOCK, full(h),
            num_warps=1
        )  # fmt: skip
    return da, dx, dstate


def walk_locally(
    a: Tensor, x: Tensor, resets: Tensor | None, state: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The local state and the share of each chunk; not computed if there is only one chunk."""
    grid, sizes = plan(x)
    local, share = (state.new_empty(x.shape[0], sizes[3], x.shape[2]) for _ in range(2))
    if sizes[3] > 1:
        local_kernel[grid](a, x, resets, local, share, *sizes, reverse, BLOCK, full(x), num_warps=1)
    return local, share


def plan(x: Tensor) -> tuple[tuple[int, int, int], tuple[int, int, int, int]]:
    """The grid, and T, D, the tokens of a chunk and the number of chunks."""
    batch, T, D = x.shape
    blocks = triton.cdiv(D, BLOCK)
    length = chunk_length(T, blocks * batch, multiprocessors(x))
    chunks = triton.cdiv(T, length)
    return (blocks, chunks, batch), (T, D, length, chunks)


def chunk_length(T: int, walks: int, multiprocessors: int) -> int:
    """Tokens of a chunk, so that there are enough chunks for 16 warps an SM.

    The result is a multiple of STEPS, and at least SHORTEST.
    """
    chunks = max(1, 16 * multiprocessors // walks)
    return triton.cdiv(max(SHORTEST, triton.cdiv(T, chunks)), STEPS.value) * STEPS.value


# What PyTorch must know: shapes, derivative.


@linear_scan_forward.register_fake
def _(a, x, state, resets):
    return x.new_empty(x.shape), state.new_empty(state.shape)


@linear_scan_backward.register_fake
def _(dh, dfinal, a, state, resets, h):
    return tuple(part.new_empty(part.shape) for part in (a, h, state))


def _save(ctx, inputs, output):
    a, _, state, resets = inputs
    ctx.save_for_backward(a, state, resets, output[0])


def _differentiate(ctx, dh, dfinal):
    return *linear_scan_backward(dh, dfinal, *ctx.saved_tensors), None


linear_scan_forward.register_autograd(_differentiate, setup_context=_save)


def linear_scan(
    a: Tensor, x: Tensor, state: Tensor | None = None, resets: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As minimodels.ops.linear_scan.linear_scan: h (B, T, D) and the final state (B, D).

    h has x's dtype. The computation is in fp32 (fp64 if x is). Raises ValueError if shapes
    disagree.
    """
    check_shapes(a, x, state, resets)
    precise = torch.promote_types(x.dtype, torch.float32)
    state = (
        x.new_zeros(x.shape[0], x.shape[2], dtype=precise) if state is None else state.to(precise)
    )
    return linear_scan_forward(a, x, state, resets)


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs and in
    chunks too."""
    for batch, T, D in [(2, 701, 100), (1, 4096, 64)] if GPU else [(2, 20, 70), (1, 200, 3)]:
        a, x, state = torch.rand(batch, T, D), torch.randn(batch, T, D), torch.randn(batch, D)
        for resets in (None, torch.rand(batch, T) < 0.05):
            compare(linear_scan, reference, (a, x, state, resets))


def reference(a, x, state=None, resets=None):
    """The reference, with the arguments in the kernel's order."""
    return operation(a, x, state, impl="reference", resets=resets)


def mambapy(a: Tensor, x: Tensor) -> Tensor:
    """The parallel scan of mambapy, which takes one more dimension."""
    from mambapy.pscan import pscan

    return pscan(a.unsqueeze(3), x.unsqueeze(3)).squeeze(3)


def accelerated_scan(a: Tensor, x: Tensor) -> Tensor:
    """The Triton scan of accelerated-scan, which takes (B, D, T)."""
    from accelerated_scan.scalar import scan

    return scan(a.mT.contiguous(), x.mT.contiguous()).mT


PEERS = {
    "mambapy": Peer("mambapy", mambapy, gpu=False),
    "accelerated-scan": Peer("accelerated-scan", accelerated_scan),
}


def case(tokens: int, T: int, D: int) -> Case:
    """Forward reads a and x and writes h; backward reads a, h and dh and writes da and dx."""

    def inputs() -> tuple:
        size = (tokens // T, T, D)
        parts = torch.rand(size, device=TIMED["device"]), torch.randn(size, device=TIMED["device"])
        return tuple(part.to(TIMED["dtype"]).requires_grad_() for part in parts)

    return Case(f"B {tokens // T}, T {T}, D {D}", inputs, 3 * tokens * D, 5 * tokens * D)


# the launches of minimodels.kernels.compile: one chunk and several, and channels that fill no block
EXAMPLES = [case(2**17, 512, 4096).inputs, case(4096, 4096, 1500).inputs]


if __name__ == "__main__":
    cases = (
        [case(65536, T, 2048) for T in (2048, 16384, 65536)]
        if GPU
        else [case(T, T, 512) for T in (1024, 4096)]
    )
    command(report("linear_scan", linear_scan, operation, cases, PEERS, check), __doc__)
