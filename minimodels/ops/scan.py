"""The selective scan in plain torch, forward and backward, for a CPU. Its reference: `recurrence` in architectures/mamba.py.

It stands apart from mamba.py so that the architecture can be learnt without it. A step of the recurrence is one multiply-add,
so what costs time is memory: all states together are N times as large as x. They are never held at once. Time is cut into
chunks; a chunk's decays and inputs are made in one operation each, then one in-place operation per step turns inputs into
states. Only the states at the chunk boundaries are saved, and the backward pass computes the others again. On a GPU it
runs too, but each step is a launch.

    name        paper   shape
    x                   (B, T, D)      input of the SSM
    delta       Δ       (B, T, D)      step size, after softplus
    A           A       (D, N)         negative; inside, transposed to (N, D)
    B, C        B, C    (B, T, N)      input and output matrix
    state       h       (B, D, N)      inside, (chunk, B, N, D): a chunk of time is one piece of memory, and inner loops run
                                       over channels, of which there are many
    resets              (B, T)         bool: True where a token's decay is 0, because it begins a document; None: nowhere
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

WORK = (
    2**19
)  # numbers in a chunk's states: enough to amortise a call, few enough for its tensors to stay in cache


def scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, D) and the final state (B, D, N), in the arguments' one dtype. All but `resets` may want a gradient."""
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
    """y, the final state, and the states at the chunk boundaries, first and last included: (chunks + 1, B, N, D)."""
    y, final_state, boundaries = empty_outputs(x, delta, A, B, C, state, resets)
    boundaries[0] = state.mT
    x, delta, B, C = swapped(x, delta, B, C)  # time first: (T, B, D) and (T, B, N)
    y = y.view(x.shape)
    for chunk, (now, _, _, _, h) in enumerate(
        walk(delta, delta * x, A.mT.contiguous(), B, resets, boundaries)
    ):
        torch.matmul(
            C[now].unsqueeze(2), h, out=y[now].unsqueeze(2)
        )  # (chunk, B, 1, N) @ (chunk, B, N, D)
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

    g_t = ∂L/∂h_t obeys the same recurrence, backwards: g_t = C_t dy_t + exp(Δ_{t+1} A) g_{t+1}. From it
    d(Δ_t x_t) = B_t · g_t,  dB_t = g_t · Δ_t x_t,  dC_t = h_t · dy_t,  d(Δ_t A) = g_t exp(Δ_t A) h_{t-1}.
    Where a document begins the decay is 0 instead of exp(Δ_t A), and both terms that it is a factor of are 0 with it.
    """
    A, dstate = A.mT.contiguous(), dstate.mT  # (N, D), (B, N, D)
    dy, x, delta, B, C = swapped(dy, x, delta, B, C)  # time first
    dx, ddelta, dB, dC = (tensor.new_empty(tensor.shape) for tensor in (x, delta, B, C))
    inputs = delta * x
    gradient = x.new_empty(min(chunk_length(dstate), len(x)), *dstate.shape)  # (chunk, B, N, D)
    gradient_steps = gradient.unbind()
    dA = torch.zeros_like(
        gradient
    )  # summed over batch and chunk at the end: adding is cheaper than reducing
    for now, start, decay, decay_steps, h in walk(
        delta, inputs, A, B, resets, boundaries, backwards=True
    ):
        steps = len(h)
        g = torch.mul(
            dy[now].unsqueeze(2), C[now].unsqueeze(3), out=gradient[:steps]
        )  # (chunk, B, N, D)
        last = gradient_steps[steps - 1].add_(dstate)
        recur(reversed(decay_steps[1:]), last, reversed(gradient_steps[: steps - 1]))

        torch.matmul(
            B[now].unsqueeze(2), g, out=dx[now].unsqueeze(2)
        )  # of Δx, until the loop is done
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
    """Compute the states chunk by chunk, each chunk from its boundary state, all in the same memory.

    Time comes first: delta and inputs (T, B, D), which are Δx; B (T, B, N). A is (N, D). Yields the chunk's slice of time, its
    boundary state, its decays (whole, and as one view per step) and its states.
    """
    T, length = len(delta), chunk_length(boundaries[0])
    decay, h = delta.new_empty(2, min(length, T), *boundaries[0].shape)  # (chunk, B, N, D) each
    decay_steps, h_steps = (
        decay.unbind(),
        h.unbind(),
    )  # made once: a view costs half as much as its step
    exponent = A * math.log2(math.e)  # exp(ΔA) as a power of two, which is cheaper
    chunks = list(zip(range(0, T, length), boundaries.unbind(), strict=False))
    for first, start in reversed(chunks) if backwards else chunks:
        steps = min(length, T - first)
        now = slice(first, first + steps)
        torch.mul(delta[now].unsqueeze(2), exponent, out=decay[:steps]).exp2_()
        if resets is not None:
            decay[resets[:, now].T.nonzero(as_tuple=True)] = 0  # few; a mask would cost a pass
        torch.mul(inputs[now].unsqueeze(2), B[now].unsqueeze(3), out=h[:steps])
        recur(decay_steps, start, h_steps[:steps])
        yield now, start, decay[:steps], decay_steps[:steps], h[:steps]


def recur(decays: Iterable[Tensor], h: Tensor, inputs: Iterable[Tensor]) -> None:
    """h_t = decay_t h_{t-1} + input_t, step by step, in place of the inputs."""
    for decay, entry in zip(decays, inputs, strict=False):
        h = entry.addcmul_(decay, h)


def chunk_length(state: Tensor) -> int:
    """Steps in a chunk. At least 16: what is saved is then 1/16 of the states, and the two ends."""
    return max(16, WORK // state.numel())


# What PyTorch must know of the two operations: shapes, derivative, precision, cost.


@scan_forward.register_fake
def empty_outputs(x, delta, A, B, C, state, resets=None):
    """y, the final state and the boundaries, not yet filled."""
    batch, D, N = state.shape
    chunks = -(-x.shape[1] // chunk_length(state))
    return torch.empty_like(x), torch.empty_like(state), x.new_empty(chunks + 1, batch, N, D)


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
        operation.register_autocast(
            device, torch.float32
        )  # products of states lose too much in half precision


@register_flop_formula(torch.ops.minimodels.scan_forward)
def _forward_flops(x, delta, A, *_, out_shape=None):
    return 9 * math.prod(x) * A[1]


@register_flop_formula(torch.ops.minimodels.scan_backward)
def _backward_flops(dy, dstate, x, delta, A, *_, out_shape=None):
    return 2 * _forward_flops(x, delta, A)
