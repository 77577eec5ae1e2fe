"""The causal depthwise convolution: each channel is convolved with its own few taps, then SiLU.

    p_t = bias + Σ_w weight_w ⊙ x_{t-W+1+w}            w = 0 … W-1; x before time 0 is the window
    y_t = p_t ⊙ σ(p_t)                                 with the activation; else y = p

What it must cost: x is read and y written once, 4 bytes an element in bf16, against 2·W operations
and an exponential. So the kernel is as fast as a copy of that many bytes, if each number is loaded
once. Backward reads x and dy and writes dx, 6 bytes. With g_t = dy_t ⊙ (σ(p_t) · (1 + p_t · (1 -
σ(p_t)))), or g = dy without the activation,

    dx_s = Σ_w weight_w ⊙ g_{s+W-1-w}                  for s < 0 it is dwindow
    dweight_w = Σ_t g_t ⊙ x_{t-W+1+w}                  dbias = Σ_t g_t

A program walks along a chunk of the text with a block of channels, and neighbouring threads have
neighbouring channels. It keeps the last W inputs in registers, and in backward also the last W
numbers of g. So only the W-1 tokens at a chunk's borders are loaded twice, and p is recomputed
instead of kept. If a token begins a document, the inputs kept from before it become 0. In backward,
dx of an earlier token takes no g from that token on. A few tokens are loaded ahead of their use to
keep the memory busy.

    name        shape
    x, y        (B, T, D)      x may be a part of a wider tensor, such as half of a projection
    weight      (D, W)
    bias        (D,)           or None
    window      (B, W-1, D)    the inputs before x, None for zeros
    resets      (B, T)         bytes: 1 if a token begins a document; None: no token does
    size        ()             B · T for tuning: rounded up and bounded
    partial     (B · chunks, W+1, D)   each program's share of dweight, and in the last row of dbias
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
    compare_all,
    dense,
    full,
    innermost,
    on,
    report,
    sigmoid,
    size_of,
    tuned,
)
from torch import Tensor

from minimodels.ops.convolution import causal_conv1d as operation
from minimodels.ops.convolution import check_convolution, tokens_within, window_after

# tokens of a program: at W = 4 the borders and the partial sums add 7 % to the bytes of backward
CHUNK = 128
CONFIGS = [  # a thread has 2 to 8 channels, so that a warp reads 128 to 512 bytes at once
    triton.Config({"CHANNELS": 128, "AHEAD": 4}, num_warps=1),
    triton.Config({"CHANNELS": 256, "AHEAD": 4}, num_warps=2),
    triton.Config({"CHANNELS": 256, "AHEAD": 8}, num_warps=2),
    triton.Config({"CHANNELS": 256, "AHEAD": 8}, num_warps=4),
    triton.Config({"CHANNELS": 512, "AHEAD": 4}, num_warps=2),
]


@triton.jit
def load_taps(WEIGHT, channel, inside, W: tl.constexpr, FULL: tl.constexpr):
    """The W weights of each channel."""
    taps = ()
    for w in tl.static_range(W):
        taps += (tl.load(WEIGHT + channel * W + w, inside, 0.0).to(FULL),)
    return taps


@triton.jit
def begins(RESETS, t, T):
    """1 if a document begins at t, else 0."""
    if RESETS is None:
        return 0
    else:
        return tl.load(RESETS + t, (t >= 0) & (t < T), 0).to(tl.int32)


@triton.jit
def forget(past, begins, RESETS):
    """The kept numbers, or 0 if a document begins."""
    if RESETS is None:
        return past
    else:
        kept = ()
        for i in tl.static_range(len(past)):
            kept += (tl.where(begins == 0, past[i], 0.0),)
        return kept


@triton.jit
def load_past(
    X, WINDOW, RESETS, start, stride, T, D, channel, inside, W: tl.constexpr, FULL: tl.constexpr
):
    """The W-1 inputs before `start`.

    Those before time 0 come from the window, and those of earlier documents are 0.
    """
    past = ()
    for w in tl.static_range(W - 1):
        t = start + (w - W + 1)
        past = forget(past, begins(RESETS, t, T), RESETS)
        x = tl.load(X + t * stride + channel, tl.where(t >= 0, inside, False), 0.0).to(FULL)
        if WINDOW is not None:
            x += tl.load(
                WINDOW + (t + W - 1) * D + channel, tl.where(t < 0, inside, False), 0.0
            ).to(FULL)
        past += (x,)
    return past


@triton.jit
def combine(taps, numbers, total, W: tl.constexpr):
    """total + Σ_w taps_w · numbers_w."""
    for w in tl.static_range(W):
        total += taps[w] * numbers[w]
    return total


@triton.jit
def transposed(taps, g, firsts, RESETS, W: tl.constexpr):
    """dx of a token: Σ_w taps_w · g_{W-1-w}, up to the end of its document.

    g and firsts are those of the token and of the W-1 tokens after it; firsts says whether a
    document begins.
    """
    total, same = taps[W - 1] * g[0], 1
    for i in tl.static_range(1, W):
        if RESETS is None:
            total += taps[W - 1 - i] * g[i]
        else:
            same *= 1 - firsts[i]
            total += tl.where(same != 0, taps[W - 1 - i] * g[i], 0.0)
    return total


@triton.jit
def gradient(dy, p, SILU: tl.constexpr):
    """g: the incoming gradient times the activation's derivative."""
    if SILU:
        gate = sigmoid(p)
        return dy * (gate * (1 + p * (1 - gate)))
    else:
        return dy


@tuned(CONFIGS, key=["size", "D", "W"])
@triton.jit(do_not_specialize=["size"])
def forward_kernel(
    X, WEIGHT, BIAS, WINDOW, RESETS, Y, T, D, size, batch_stride, time_stride, SILU: tl.constexpr,
    W: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr, CHANNELS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """One program has one block of channels and one chunk of one text."""
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    start, batch = tl.program_id(1) * CHUNK, tl.program_id(2).to(tl.int64)
    stride, width = tl.cast(time_stride, tl.int64), tl.cast(D, tl.int64)  # for offsets beyond 2^31
    X += batch * batch_stride
    Y += batch * T * width
    if WINDOW is not None:
        WINDOW += batch * (W - 1) * width
    if RESETS is not None:
        RESETS += batch * T
    taps = load_taps(WEIGHT, channel, inside, W, FULL)
    bias = tl.zeros((CHANNELS,), FULL)
    if BIAS is not None:
        bias += tl.load(BIAS + channel, inside, 0.0).to(FULL)
    past = load_past(X, WINDOW, RESETS, start, stride, T, D, channel, inside, W, FULL)
    for t in range(start, tl.minimum(start + CHUNK, T), AHEAD):
        loaded = ()
        for i in tl.static_range(AHEAD):
            loaded += (
                tl.load(X + (t + i) * stride + channel, tl.where(t + i < T, inside, False), 0.0),
            )
        for i in tl.static_range(AHEAD):
            past = forget(past, begins(RESETS, t + i, T), RESETS)
            past += (loaded[i].to(FULL),)
            y = combine(taps, past, bias, W)
            if SILU:
                y = y * sigmoid(y)
            tl.store(Y + (t + i) * width + channel, y, tl.where(t + i < T, inside, False))
            past = past[1:]


@tuned(CONFIGS, key=["size", "D", "W"])
@triton.jit(do_not_specialize=["size"])
def backward_kernel(
    DY, X, WEIGHT, BIAS, WINDOW, RESETS, DX, DWINDOW, PARTIAL, T, D, size, batch_stride,
    time_stride, SILU: tl.constexpr, W: tl.constexpr, CHUNK: tl.constexpr, FULL: tl.constexpr,
    CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One program has one block of channels and dx of one chunk of one text.

    It walks W-1 tokens further, because dx_s needs g up to t = s+W-1. It sums dweight over the
    tokens that it walks, from the W-th on; the first chunk also counts its first W-1.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    inside = channel < D
    start, batch = tl.program_id(1) * CHUNK, tl.program_id(2).to(tl.int64)
    stride, width = tl.cast(time_stride, tl.int64), tl.cast(D, tl.int64)
    X += batch * batch_stride
    DY += batch * T * width
    DX += batch * T * width
    if WINDOW is not None:
        WINDOW += batch * (W - 1) * width
        DWINDOW += batch * (W - 1) * width
    if RESETS is not None:
        RESETS += batch * T
    taps = load_taps(WEIGHT, channel, inside, W, FULL)
    nothing = tl.zeros((CHANNELS,), FULL)
    bias = nothing
    if BIAS is not None:
        bias += tl.load(BIAS + channel, inside, 0.0).to(FULL)
    past = load_past(X, WINDOW, RESETS, start, stride, T, D, channel, inside, W, FULL)  # W-1 of x
    g = (nothing,) * (W - 1)  # what came before the chunk adds to another chunk's dx
    firsts = (0,) * (W - 1)
    dtaps, dbias = (nothing,) * W, nothing
    first = tl.where(start == 0, inside, False)
    for i in tl.static_range(W - 1):
        t = start + i
        dy = tl.load(DY + t * width + channel, tl.where(t < T, inside, False), 0.0).to(FULL)
        x = tl.load(X + t * stride + channel, tl.where(t < T, inside, False), 0.0).to(FULL)
        firsts += (begins(RESETS, t, T),)
        past = forget(past, firsts[W - 1], RESETS)
        past += (x,)
        g += (gradient(dy, combine(taps, past, bias, W), SILU),)
        if WINDOW is not None:
            tl.store(DWINDOW + t * width + channel, transposed(taps, g, firsts, RESETS, W), first)
        counted = tl.where(first, g[W - 1], 0.0)
        more = ()
        for w in tl.static_range(W):
            more += (dtaps[w] + counted * past[w],)
        dtaps, dbias = more, dbias + counted
        past, g, firsts = past[1:], g[1:], firsts[1:]
    for s in range(start, tl.minimum(start + CHUNK, T), AHEAD):
        loaded, incoming = (), ()
        for i in tl.static_range(AHEAD):
            t = s + i + W - 1
            loaded += (tl.load(X + t * stride + channel, tl.where(t < T, inside, False), 0.0),)
            incoming += (tl.load(DY + t * width + channel, tl.where(t < T, inside, False), 0.0),)
        for i in tl.static_range(AHEAD):
            firsts += (begins(RESETS, s + i + W - 1, T),)
            past = forget(past, firsts[W - 1], RESETS)
            past += (loaded[i].to(FULL),)
            g += (gradient(incoming[i].to(FULL), combine(taps, past, bias, W), SILU),)
            tl.store(
                DX + (s + i) * width + channel,
                transposed(taps, g, firsts, RESETS, W),
                tl.where(s + i < T, inside, False),
            )
            more = ()
            for w in tl.static_range(W):
                more += (dtaps[w] + g[W - 1] * past[w],)
            dtaps, dbias = more, dbias + g[W - 1]
            past, g, firsts = past[1:], g[1:], firsts[1:]
    PARTIAL += (batch * tl.num_programs(1) + tl.program_id(1)) * (W + 1) * width + channel
    for w in tl.static_range(W):
        tl.store(PARTIAL + w * D, dtaps[w], inside)
    tl.store(PARTIAL + W * D, dbias, inside)


@torch.library.custom_op("minimodels::causal_conv1d_forward", mutates_args=())
def causal_conv1d_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, resets: Tensor | None,
    activation: bool
) -> Tensor:  # fmt: skip
    """y (B, T, D)."""
    x, (batch, T, D), W = innermost(x), x.shape, weight.shape[1]
    y = x.new_empty(x.shape)
    with on(x):
        forward_kernel[lambda meta: grid(x, meta)](
            x, *dense(weight, bias, window), as_bytes(resets), y, T, D, size_of(batch * T),
            x.stride(0), x.stride(1), activation, W, CHUNK, full(x),
        )  # fmt: skip
    return y


@torch.library.custom_op("minimodels::causal_conv1d_backward", mutates_args=())
def causal_conv1d_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    resets: Tensor | None,
    activation: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dweight, dbias and dwindow (empty without a window)."""
    dy, x, (batch, T, D), W = dy.contiguous(), innermost(x), x.shape, weight.shape[1]
    dx, dwindow = (
        x.new_empty(x.shape),
        x.new_empty(0) if window is None else window.new_empty(window.shape),
    )
    sums = x.new_empty(
        batch * triton.cdiv(T, CHUNK), W + 1, D, dtype=torch.promote_types(x.dtype, torch.float32)
    )
    with on(x):
        backward_kernel[lambda meta: grid(x, meta)](
            dy, x, *dense(weight, bias, window), as_bytes(resets), dx, dwindow, sums, T, D,
            size_of(batch * T), x.stride(0), x.stride(1), activation, W, CHUNK, full(x),
        )  # fmt: skip
    total = sums.sum(0)  # (W+1, D)
    # a copy, because dweight is a view if W = 1
    dbias = total[W].to(weight.dtype if bias is None else bias.dtype, copy=True)
    return dx, total[:W].t().to(weight.dtype).contiguous(), dbias, dwindow


def grid(x: Tensor, meta: dict) -> tuple[int, int, int]:
    """The grid, channels first, so that programs that start together read neighbouring memory."""
    batch, T, D = x.shape
    return triton.cdiv(D, meta["CHANNELS"]), triton.cdiv(T, meta["CHUNK"]), batch


# What PyTorch must know: shapes, derivative.


@causal_conv1d_forward.register_fake
def _(x, weight, bias, window, resets, activation):
    return x.new_empty(x.shape)


@causal_conv1d_backward.register_fake
def _(dy, x, weight, bias, window, resets, activation):
    dbias = weight.new_empty(weight.shape[:1]) if bias is None else bias.new_empty(bias.shape)
    dwindow = x.new_empty(0) if window is None else window.new_empty(window.shape)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, dwindow


def _save(ctx, inputs, output):
    *tensors, ctx.activation = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx, dy):
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them here
    _, _, bias, window, _ = saved
    dx, dweight, dbias, dwindow = causal_conv1d_backward(dy, *saved, ctx.activation)
    dbias, dwindow = None if bias is None else dbias, None if window is None else dwindow
    return dx, dweight, dbias, dwindow, None, None


causal_conv1d_forward.register_autograd(_differentiate, setup_context=_save)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    lengths: Tensor | None = None,
    activation: bool = False,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As its reference in minimodels.ops.convolution.

    x (B, T, D); weight (D, W); bias (D,), None for zero; window (B, W-1, D), the inputs before x,
    None for zeros; lengths (B,), how many tokens of x come before the padding, None for all; resets
    (B, T) bool, None for none. Returns y (B, T, D) in x's dtype and the window after x. Raises
    ValueError if shapes disagree.
    """
    check_convolution(x, weight, bias, window, lengths, resets)
    (batch, _, D), W = x.shape, weight.shape[1]
    y = causal_conv1d_forward(x, weight, bias, window, resets, activation)
    if window is None:
        window = x.new_zeros(batch, W - 1, D)
    within = None if resets is None else tokens_within(resets)
    return y, window_after(x, window, lengths, within)


def check() -> None:
    """Compare outputs and gradients with the reference in fp64; on a GPU, for bf16 inputs too."""

    def inputs(batch: int, T: int, D: int, W: int, *rest) -> tuple:
        x, window = torch.randn(batch, T, D), torch.randn(batch, W - 1, D)
        return x, torch.randn(D, W), torch.randn(D), window, None, *rest

    odd = [inputs(2, 5, 33, 4, activation) for activation in (False, True)]
    for shape in ((2, 5, 33, 4), (1, CHUNK + 3, 130, 3)):
        odd.append(inputs(*shape, True, torch.rand(shape[:2]) < 0.2))
    full = [inputs(2, 300, 600, 4, True) if GPU else inputs(1, 9, 600, 4, True)]
    compare_all((forward_kernel, backward_kernel), causal_conv1d, reference, odd, full)


def reference(x, weight, bias, window, lengths, activation, resets=None):
    """The reference, with the arguments in the kernel's order."""
    return operation(x, weight, bias, window, lengths, activation, "reference", resets)


def cuda(x: Tensor, weight: Tensor, bias: Tensor, *_) -> Tensor:
    """The CUDA kernel of the package causal_conv1d, which takes (B, D, T), here as a view."""
    from causal_conv1d import causal_conv1d_fn

    return causal_conv1d_fn(x.mT, weight, bias, activation="silu").mT


def fla(x: Tensor, weight: Tensor, bias: Tensor, *_) -> Tensor:
    """The Triton kernel of flash-linear-attention."""
    from fla.modules.causal_conv1d import causal_conv1d as operation

    return operation(x, weight, bias, activation="silu")[0]


PEERS = {"causal_conv1d": Peer("causal_conv1d", cuda), "fla": Peer("fla-core", fla, module="fla")}


def case(batch: int, T: int, D: int, W: int = 4) -> Case:
    """With SiLU: forward moves two numbers an element, and backward three."""

    def inputs() -> tuple:
        x, (weight, bias) = (
            torch.randn(batch, T, D, **TIMED),
            torch.randn(D, W + 1, **TIMED).split((W, 1), dim=1),
        )
        return (
            x.requires_grad_(),
            weight.contiguous().requires_grad_(),
            bias.flatten().requires_grad_(),
            None,
            None,
            True,
        )

    size = batch * T * D
    return Case(f"B {batch}, T {T}, D {D}, W {W}", inputs, 2 * size, 3 * size)


# the launches of minimodels.kernels.compile: with SiLU, without it and padded, and with documents
EXAMPLES = [
    case(2, 300, 1536).inputs,
    lambda: (*case(2, 300, 1536).inputs()[:4], torch.tensor([300, 7]), False),
    lambda: (*case(2, 300, 1536).inputs(), torch.rand(2, 300) < 0.01),
]


if __name__ == "__main__":
    cases = (
        [case(32, 8192, 1536), case(4, 65536, 1536)]
        if GPU
        else [case(1, T, 512) for T in (256, 1024, 4096)]
    )
    command(report("causal_conv1d", causal_conv1d, operation, cases, PEERS, check), __doc__)
