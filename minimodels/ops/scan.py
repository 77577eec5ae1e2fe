"""The selective scan in plain torch, forward and backward, for a CPU.

Its reference is `recurrence` in architectures/mamba.py. It is separate from mamba.py so that the
architecture can be learnt without it. A step of the recurrence is one multiply-add, so memory is
what costs time: all states together are N times as large as x. They never exist all at once. Time
is cut into chunks. One operation makes all decays of a chunk, another all its inputs, and then one
in-place operation per step turns inputs into states. Only the states at the chunk boundaries are
saved, and the backward pass recomputes the others. It also runs on a GPU, but each step is a
launch.

    name        paper   shape
    x                   (B, T, I)      input of the SSM
    delta       Δ       (B, T, I)      step size, after softplus
    A           A       (I, N)         negative; inside, transposed to (N, I)
    B, C        B, C    (B, T, N)      input and output matrix
    state       h       (B, I, N)      inside (chunk, B, N, I): a chunk of time is one piece of
                                       memory, and inner loops run over the many channels
    resets              (B, T)         bool: True if a token begins a document, so its decay is 0;
                                       None: no token does
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

# numbers in a chunk's states: enough to amortise a call, few enough to stay in the cache
WORK = 2**19


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, I) and the final state (B, I, N), in the dtype that all arguments share.

    All arguments but `resets` may require a gradient.
    """
    given = (tensor.contiguous() for tensor in (x, delta, A, B, C, state))
    y, state, _ = scan_forward(*given, resets)
    return y, state


@torch.library.custom_op("minimodels::scan_forward", mutates_args=())
def scan_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states at the chunk boundaries: (chunks + 1, B, N, I).

    The boundaries include the first and the last state.
    """
    y, final_state, boundaries = empty_outputs(x, delta, A, B, C, state, resets)
    boundaries[0] = state.mT
    x, delta, B, C = swapped(x, delta, B, C)  # time first: (T, B, I) and (T, B, N)
    y = y.view(x.shape)
    for chunk, (now, _, _, _, h) in enumerate(
        walk(delta, delta * x, A.mT.contiguous(), B, resets, boundaries)
    ):
        # (chunk, B, 1, N) @ (chunk, B, N, I)
        torch.matmul(C[now].unsqueeze(2), h, out=y[now].unsqueeze(2))
        boundaries[chunk + 1] = h[-1]
    return y.transpose(0, 1).contiguous(), final_state.copy_(boundaries[-1].mT), boundaries


@torch.library.custom_op("minimodels::scan_backward", mutates_args=())
def scan_backward(
    dy: Tensor,
    dstate: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    resets: Tensor | None,
    boundaries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C and the initial state from those of y and the final state.

    g_t = ∂L/∂h_t obeys the same recurrence backwards: g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}. From it follow
    d(Δ_t x_t) = B_t · g_t,  dB_t = g_t · Δ_t x_t,  dC_t = h_t · dy_t,  d(Δ_t A) = g_t exp(Δ_t A) h_{t-1}.
    If a token begins a document, its decay is 0 instead of exp(Δ_t A), so both terms with this
    factor are 0 too.
    """
    A, dstate = A.mT.contiguous(), dstate.mT  # (N, I), (B, N, I)
    dy, x, delta, B, C = swapped(dy, x, delta, B, C)  # time first
    dx, ddelta, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, delta, B, C))
    inputs = delta * x
    gradient = x.new_empty(min(chunk_length(dstate), len(x)), *dstate.shape)  # (chunk, B, N, I)
    gradient_steps = gradient.unbind()
    # summed over batch and chunk at the end, because adding is cheaper than reducing
    dA = torch.zeros_like(gradient)
    for now, start, decay, decay_steps, h in walk(
        delta, inputs, A, B, resets, boundaries, backwards=True
    ):
        steps = len(h)
        # (chunk, B, N, I)
        g = torch.mul(dy[now].unsqueeze(2), C[now].unsqueeze(3), out=gradient[:steps])
        last = gradient_steps[steps - 1].add_(dstate)
        recur(reversed(decay_steps[1:]), last, reversed(gradient_steps[: steps - 1]))

        # the gradient of Δx, until the loop is done
        torch.matmul(B[now].unsqueeze(2), g, out=dx[now].unsqueeze(2))
        torch.matmul(inputs[now].unsqueeze(2), g.mT, out=dB[now].unsqueeze(2))
        torch.matmul(dy[now].unsqueeze(2), h.mT, out=dC[now].unsqueeze(2))

        g *= decay
        dstate = g[0].clone()
        g[0] *= start
        g[1:] *= h[:-1]  # from here on the gradient of ΔA
        dA[:steps].addcmul_(g, delta[now].unsqueeze(2))
        g *= A
        torch.sum(g, 2, out=ddelta[now])
    ddelta.addcmul_(dx, x)
    dx *= delta
    dx, ddelta, dB, dC = (part.contiguous() for part in swapped(dx, ddelta, dB, dC))
    return dx, ddelta, dA.sum((0, 1)).mT.contiguous(), dB, dC, dstate.mT.contiguous()


def swapped(*tensors: Tensor) -> Iterator[Tensor]:
    """(B, T, ...) -> (T, B, ...), or back."""
    return (tensor.transpose(0, 1) for tensor in tensors)


def walk(
    delta: Tensor,
    inputs: Tensor,
    A: Tensor,
    B: Tensor,
    resets: Tensor | None,
    boundaries: Tensor,
    backwards: bool = False,
) -> Iterator[tuple[slice, Tensor, Tensor, tuple[Tensor, ...], Tensor]]:
    """Compute the states chunk by chunk, each from its boundary state, all in the same memory.

    Time comes first: `inputs` (T, B, I) is Δx, like delta; B (T, B, N). A is (N, I). Yields the
    chunk's slice of time, its boundary state, its decays (whole, and as one view per step) and its
    states.
    """
    T, length = len(delta), chunk_length(boundaries[0])
    decay, h = delta.new_empty(2, min(length, T), *boundaries[0].shape)  # (chunk, B, N, I) each
    # the views are made once, because a view costs half as much as its step
    decay_steps, h_steps = decay.unbind(), h.unbind()
    exponent = A * math.log2(math.e)  # exp(ΔA) as a power of two, which is cheaper
    chunks = list(zip(range(0, T, length), boundaries.unbind(), strict=False))
    for first, start in reversed(chunks) if backwards else chunks:
        steps = min(length, T - first)
        now = slice(first, first + steps)
        torch.mul(delta[now].unsqueeze(2), exponent, out=decay[:steps]).exp2_()
        if resets is not None:
            # resets are few, and a mask would cost a whole pass
            decay[resets[:, now].T.nonzero(as_tuple=True)] = 0
        torch.mul(inputs[now].unsqueeze(2), B[now].unsqueeze(3), out=h[:steps])
        recur(decay_steps, start, h_steps[:steps])
        yield now, start, decay[:steps], decay_steps[:steps], h[:steps]


def recur(decays: Iterable[Tensor], h: Tensor, inputs: Iterable[Tensor]) -> None:
    """h_t = decay_t h_{t-1} + input_t, step by step; h contains the inputs and is overwritten."""
    for decay, entry in zip(decays, inputs, strict=False):
        h = entry.addcmul_(decay, h)


def chunk_length(state: Tensor) -> int:
    """Steps in a chunk. With at least 16, at most 1/16 of the states is saved, plus both ends."""
    return max(16, WORK // state.numel())


# What PyTorch must know about the two operations: shapes, derivative, precision, cost.


@scan_forward.register_fake
def empty_outputs(x, delta, A, B, C, state, resets=None):
    """y, the final state and the boundaries, not yet filled."""
    batch, I, N = state.shape
    chunks = -(-x.shape[1] // chunk_length(state))
    return torch.empty_like(x), torch.empty_like(state), x.new_empty(chunks + 1, batch, N, I)


@scan_backward.register_fake
def _(dy, dstate, x, delta, A, B, C, resets, boundaries):
    return tuple(torch.empty_like(tensor) for tensor in (x, delta, A, B, C, dstate))


def _save(ctx, inputs, output):
    *arguments, _, resets = inputs
    _, _, boundaries = output
    ctx.save_for_backward(*arguments, resets, boundaries)


def _differentiate(ctx, dy, dstate, _):
    return *scan_backward(dy.contiguous(), dstate.contiguous(), *ctx.saved_tensors), None


scan_forward.register_autograd(_differentiate, setup_context=_save)

for operation in (scan_forward, scan_backward):
    for device in ("cpu", "cuda"):
        # products of states lose too much in half precision
        operation.register_autocast(device, torch.float32)


@register_flop_formula(torch.ops.minimodels.scan_forward)
def _forward_flops(x, delta, A, *_, out_shape=None):
    return 9 * math.prod(x) * A[1]


@register_flop_formula(torch.ops.minimodels.scan_backward)
def _backward_flops(dy, dstate, x, delta, A, *_, out_shape=None):
    return 2 * _forward_flops(x, delta, A)
