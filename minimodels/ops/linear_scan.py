"""The linear scan: a recurrence of channels that do not mix.

The RG-LRU, minGRU, MLGRU and HGRN use it. See De et al., "Griffin: Mixing Gated Linear Recurrences
with Local Attention", arXiv:2402.19427, equation (4), and Feng et al., "Were RNNs All We Needed?",
arXiv:2410.01201.

Each channel remembers one number. At each token it keeps a share a of that number and adds x. The
gradient obeys the same recurrence backwards.

    h_t = a_t ⊙ h_{t-1} + x_t        (1)
    dx_t = dh_t + a_{t+1} ⊙ dx_{t+1},    da_t = dx_t ⊙ h_{t-1}

    name        symbol  shape
    a           a       (B, T, D)      decay, usually in [0, 1]
    x           x       (B, T, D)      what is added
    state       h       (B, D)         in fp32 (fp64 for fp64 inputs)
    resets              (B, T) bool    a document begins here: a is 0 whatever its value

Each step is one call of a small operation, so the fast path makes fewer and larger calls. It cuts
time into pieces, walks all pieces at once from a state of zero, and then carries the true states
from piece to piece. A whole piece multiplies the state before it by the product of its a.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from minimodels.ops.before import Before
from minimodels.paths import by_token, choose, full_precision

# numbers in one step of all pieces: with fewer, the call costs more than its arithmetic
WORK = 2**15
GPU_WORK = 2**20  # the same on a GPU, where each call is a launch


def linear_scan(
    a: Tensor,
    x: Tensor,
    state: Tensor | Before | None = None,
    impl: str = "auto",
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equation (1) over a text: h (B, T, D) in x's dtype, and the final state (B, D).

    a, x (B, T, D); state (B, D), None for zeros, Before if other ranks have the tokens before;
    resets (B, T) bool, True if a document begins, which forgets everything before it. A token with
    a = 1 and x = 0 leaves the state exactly as it is, and padding works this way. Raises ValueError
    if shapes disagree.
    """
    if isinstance(state, Before):
        h, end = linear_scan(a, x, None, impl, resets)
        left, all_left = linear_scan(a, torch.zeros_like(x), torch.ones_like(end), impl, resets)
        start, after = state.find(all_left, end)
        return (h + left * start.unsqueeze(1)).to(x.dtype), after
    check_shapes(a, x, state, resets)
    path = choose(impl, "linear_scan", x.device)
    if path == "triton":
        from minimodels.kernels.linear_scan import linear_scan as kernel

        return kernel(a, x, state, resets=resets)
    dtype, (batch, T, D) = x.dtype, x.shape
    with torch.autocast(x.device.type, enabled=False):  # the state sums over the whole text
        a, x = full_precision(a), full_precision(x)
        state = x.new_zeros(batch, D) if state is None else state.to(x.dtype)
        if resets is not None:
            a = a.masked_fill(resets.unsqueeze(2), 0.0)
        step = reference if path == "reference" or T == 1 else linear_scan_forward
        h = step(a, x, state)
    return h.to(dtype), h[:, -1].clone()


def check_shapes(a: Tensor, x: Tensor, state: Tensor | None, resets: Tensor | None) -> None:
    """Raise ValueError unless the arguments have the shapes in linear_scan's docstring.

    The kernel uses this check too.
    """
    fits = x.ndim == 3 and x.shape[1] > 0
    if fits:
        batch, T, D = x.shape
        wanted = ((a, (batch, T, D)), (state, (batch, D)), (resets, (batch, T)))
        fits = all(part is None or part.shape == shape for part, shape in wanted)
    if not fits:
        parts = {"a": a, "x": x, "state": state, "resets": resets}
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in parts.items() if p is not None)
        raise ValueError(
            f"linear_scan: {shapes} do not fit: a, x (B, T, D), state (B, D), resets (B, T), T at least 1"
        )
    if resets is not None and resets.dtype != torch.bool:
        raise ValueError(f"linear_scan: resets are {resets.dtype}; accepted: bool")


def reference(a: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """The recurrence, token by token: all states (B, T, D)."""

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        a_t, x_t = now
        h = a_t * h + x_t  # (1), (B, D)
        return h, h.clone()

    return by_token(step, h, (a, x))[0]


@torch.library.custom_op("minimodels::linear_scan_forward", mutates_args=())
def linear_scan_forward(a: Tensor, x: Tensor, state: Tensor) -> Tensor:
    """All states h (B, T, D)."""
    return scan(a, x, state)


@torch.library.custom_op("minimodels::linear_scan_backward", mutates_args=())
def linear_scan_backward(
    dh: Tensor, a: Tensor, state: Tensor, h: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    following = torch.cat((a[:, 1:], torch.zeros_like(a[:, :1])), dim=1)  # a_{t+1}
    dx = scan(following, dh, torch.zeros_like(state), backwards=True)
    before = torch.cat((state.unsqueeze(1), h[:, :-1]), dim=1)  # h_{t-1}
    return dx * before, dx, dx[:, 0] * a[:, 0]


def scan(a: Tensor, x: Tensor, state: Tensor, backwards: bool = False) -> Tensor:
    """Equation (1) in P pieces of L steps, from the first token to the last, or backwards."""
    (batch, T, D), pieces = x.shape, count_pieces(x)
    L = -(-T // pieces)
    # both are 0 after the end of the text
    h, share = (x.new_zeros(batch, pieces * L, D) for _ in range(2))
    h[:, :T], share[:, :T] = x, a
    h, share = h.unflatten(1, (pieces, L)), share.unflatten(1, (pieces, L))  # (B, P, L, D)
    order = slice(None, None, -1) if backwards else slice(None)
    steps, shares = h.unbind(2)[order], share.unbind(2)[order]  # (B, P, D) each
    first = pieces - 1 if backwards else 0
    steps[0][:, first].addcmul_(shares[0][:, first], state)
    for l in range(1, L):
        steps[l].addcmul_(shares[l], steps[l - 1])
    if pieces > 1:
        for l in range(1, L):
            shares[l].mul_(shares[l - 1])  # the share of the state before the piece that is left
        starts = torch.zeros_like(steps[0])  # of each piece; h already includes the first one's
        carried = zip(
            *(part.unbind(1)[order] for part in (steps[-1], shares[-1], starts)), strict=True
        )
        _, *later = starts.unbind(1)[order]
        for (end, left, start), following in zip(carried, later, strict=False):
            torch.addcmul(end, left, start, out=following)  # (B, D)
        h.addcmul_(share, starts.unsqueeze(2))
    return h.flatten(1, 2)[:, :T].contiguous()


def count_pieces(x: Tensor) -> int:
    """P: as many pieces as make each step large enough, up to the number with the fewest calls.

    The number of calls is 2 L + P, with L = T / P, so P = √(2 T) needs the fewest.
    """
    batch, T, D = x.shape
    return max(1, min((WORK if x.is_cpu else GPU_WORK) // (batch * D), math.isqrt(2 * T)))


# What PyTorch must know about the two operations: shapes, derivative, precision, cost.


@linear_scan_forward.register_fake
def _(a, x, state):
    return x.new_empty(x.shape)


@linear_scan_backward.register_fake
def _(dh, a, state, h):
    return a.new_empty(a.shape), a.new_empty(a.shape), a.new_empty(state.shape)


def _save(ctx, inputs, output):
    a, _, state = inputs
    ctx.save_for_backward(a, state, output)


def _differentiate(ctx, dh):
    return linear_scan_backward(dh, *ctx.saved_tensors)


linear_scan_forward.register_autograd(_differentiate, setup_context=_save)

for operation in (linear_scan_forward, linear_scan_backward):
    for device in ("cpu", "cuda"):
        operation.register_autocast(device, torch.float32)


@register_flop_formula(torch.ops.minimodels.linear_scan_forward)
def _forward_flops(a, x, *_, out_shape=None):
    return 2 * math.prod(x)


@register_flop_formula(torch.ops.minimodels.linear_scan_backward)
def _backward_flops(dh, a, *_, out_shape=None):
    return 3 * math.prod(a)
