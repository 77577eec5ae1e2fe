"""The selective state space model.

Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv:2312.00752.

Every channel drives a small linear recurrence: a state of N numbers that decays and is written to
at each token. A step size (Δ), what is written (B) and what is read (C) depend on the token itself.
If Δ is large, the state forgets the past and takes in the token. If Δ is near 0, it keeps the past
and skips the token. So the layer selects what to remember and what to ignore. The cost per token
and the size of the state do not grow with the text.

    name        paper   shape
    u                   (B, T, width)  input of the layer
    x, z                (B, T, I)      halves of in_proj, I = expand · width: signal and gate
    dt                  (B, T, R)      what the step size is made from, R = rank
    delta               (B, T, I)      raw step size: Δ = softplus(delta + bias)
    A           A       (I, N)         decay rates, negative; A = -exp(A_log)
    B, C        B, C    (B, T, N)      how x is written to the state, and how the state is read
    skip        D       (I,)           weight with which x itself is added to the output
    state       h       (B, I, N)      in fp32
    window              (B, W-1, I)    the last inputs of the convolution, W taps wide

In a shape B is the batch. I is the inner width, which the paper's Algorithm 2 calls D.

Why the step size has a low rank: a full map from I channels to I step sizes would need I² numbers,
as many as in_proj. Instead each token has R = width / 16 numbers (dt), and the I step sizes are
linear functions of these. The paper finds that more than that helps little.

Where the recurrence comes from: the state obeys the differential equation h' = A h + B x, and each
token is a step of length Δ in which x is constant. The exact solution after the step is exp(ΔA) h +
(exp(ΔA) - 1) / A · B x. The layer uses the factor of h as it is, but replaces the factor of x by
its limit for small ΔA, which is Δ B (Euler's rule). The paper's code does the same, because the
exact factor costs more and gains nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count, NonNegative
from minimodels.layers import Place
from minimodels.ops.before import Before
from minimodels.ops.convolution import CausalConv1d
from minimodels.ops.scan import scan
from minimodels.options import option
from minimodels.parts import RMSNorm
from minimodels.paths import by_token, choose, full_precision


class MambaState(NamedTuple):
    """What a Mamba layer remembers: its size does not grow with the text."""

    window: Tensor  # (B, W-1, I)
    h: Tensor  # (B, I, N) fp32


class Mamba(nn.Module):
    """The selective state space block (Figure 3): convolution, scan and gate.

    The convolution mixes each token with the few before it, the scan is the recurrence, and the
    gate, computed from the same token, multiplies what the scan reads.
    """

    paper = "Gu and Dao, arXiv:2312.00752"
    presets = {"mamba": "mamba*{twice}"}
    operations = ("causal_conv1d", "selective_scan")
    no_weight_decay = ("A_log",)

    @dataclass(frozen=True)
    class Options:
        expand: Count = option(2, "inner width over the model's width")
        state_size: Count = option(16, "N, how many numbers each channel's state has")
        conv_width: Count = option(4, "W, taps of the causal convolution")
        rank: Count | None = option(
            None, "R, rank of the step size; by default width / 16, rounded up"
        )
        conv_bias: bool = option(True, "a bias in the convolution")
        bias: bool = option(False, "biases in the input and the output projection")
        norm: Literal["none", "plain", "learned"] = option(
            "none",
            "RMSNorm of dt, B and C: none, plain (no weights, Falcon-Mamba) or learned (Jamba)",
        )
        norm_eps: NonNegative | None = option(
            None, "epsilon of these norms; by default the model's"
        )

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        I, N = options.expand * config.width, options.state_size
        R = options.rank or math.ceil(config.width / 16)
        self.N, self.R, self.impl = N, R, config.impl
        self.in_proj = nn.Linear(config.width, 2 * I, bias=options.bias)
        self.conv1d = CausalConv1d(I, options.conv_width, options.conv_bias, True, config.impl)
        self.x_proj = nn.Linear(I, R + 2 * N, bias=False)
        self.dt_proj = nn.Linear(R, I, bias=False)
        self.dt_bias = nn.Parameter(torch.rand(I))  # reset_parameters overwrites it
        # A_n = -(n + 1)
        self.A_log = nn.Parameter(torch.arange(1, N + 1).float().log().repeat(I, 1))
        self.D = nn.Parameter(torch.ones(I))
        self.out_proj = nn.Linear(I, config.width, bias=options.bias)
        self.dt_norm = self.B_norm = self.C_norm = nn.Identity()
        if options.norm != "none":
            eps = config.norm_eps if options.norm_eps is None else options.norm_eps
            learned = options.norm == "learned"
            self.dt_norm, self.B_norm, self.C_norm = (
                RMSNorm(width, eps, learned) for width in (R, N, N)
            )
        self.reset_parameters(config.depth)

    @torch.no_grad()
    def reset_parameters(self, depth: int):
        """Initialise the step sizes in [0.001, 0.1] (§3.6), log-uniform as in the paper's code.

        Number n of a state, counted from 0, decays at the rate n + 1, so it remembers 10/(n + 1) to
        1000/(n + 1) tokens. The output projection is divided by √depth, because the residual stream
        sums all layers. As in the paper's code, the other maps keep nn.Linear's initialisation.
        """
        nn.init.uniform_(self.dt_proj.weight, -(self.R**-0.5), self.R**-0.5)
        dt = torch.exp(torch.empty_like(self.dt_bias).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.out_proj.weight.div_(math.sqrt(depth))

    def forward(self, u: Tensor, state: MambaState | None = None, context: Context | None = None):
        context = context or Context()
        window, h = state or (None, None)
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (B, T, I) each
        lengths = None if context.real is None else context.real.sum(1)  # tokens before the padding
        x, window = self.conv1d(x, window, lengths, context.resets)
        # (B, T, R), (B, T, N) twice
        dt, B, C = self.x_proj(x).split((self.R, self.N, self.N), dim=-1)
        dt, B, C = self.dt_norm(dt), self.B_norm(B), self.C_norm(C)
        delta = self.dt_proj(dt)  # (B, T, I); the scan adds the bias, in full precision
        if context.real is not None:  # softplus(-inf) = 0, and Δ = 0 leaves the state as it is
            delta = delta.masked_fill(~context.real.unsqueeze(-1), float("-inf"))
        A = -torch.exp(self.A_log)
        y, h = selective_scan(
            x, delta, A, B, C, self.D, z, self.dt_bias, h, self.impl, context.resets
        )
        return self.out_proj(y), MambaState(window, h)

    def flops(self, context: int) -> float:
        """Forward FLOPs per token, the same at every context: projections, convolution and scan.

        PyTorch's counter counts no elementwise operations, so the scan has a formula: 9 per element
        of the state, as in the authors' own counts. Step by step there are 7: ΔA, its exponential,
        Δx B, decay and sum, product and sum with C.
        """
        maps = (self.in_proj, self.conv1d, self.x_proj, self.dt_proj, self.out_proj)
        return 2 * sum(part.weight.numel() for part in maps) + 9 * self.A_log.numel()

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence."""
        I, _, W = self.conv1d.weight.shape
        return (W - 1) * I * itemsize + I * self.N * 4


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    state: Tensor | Before | None = None,
    impl: str = "auto",
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective scan, Algorithm 2 of the paper, with the operations around it.

        Δ_t = softplus(delta_t + delta_bias)
        h_t = exp(Δ_t A) ⊙ h_{t-1} + Δ_t B_t x_t        equations (2a) and (4)
        y_t = (<C_t, h_t> + skip ⊙ x_t) ⊙ silu(z_t)     equation (2b)

    B is made discrete by Euler's rule, as in the paper's code. If a token begins a document, its
    decay is 0 instead of exp(Δ_t A), which forgets the state before it.

    x, delta, z (B, T, I); A (I, N) negative; B, C (B, T, N); skip, delta_bias (I,); state (B, I,
    N), None for zeros, Before (ops/before.py) if other ranks have the tokens before; resets (B, T)
    bool, True if a token begins a document, None for none. Returns y (B, T, I) in x's dtype and the
    final state (B, I, N). The computation is in fp32, or in fp64 if x is. Raises ValueError if
    shapes disagree.
    """
    if isinstance(state, Before):
        # `find` needs what this rank's tokens write, and what they leave of an earlier state
        _, written = selective_scan(x, delta, A, B, C, skip, None, delta_bias, None, impl, resets)
        state, _ = state.find(total_decay(delta, A, delta_bias, resets), written)
    check_shapes(x, delta, A, B, C, skip, z, delta_bias, state, resets)
    (batch, T, I), N = x.shape, A.shape[1]
    path = choose(impl, "selective_scan", x.device)
    if path == "triton":
        from minimodels.kernels.selective_scan import selective_scan as kernel

        return kernel(x, delta, A, B, C, skip, z, delta_bias, state, resets)
    dtype = x.dtype
    # in full precision, because the state sums over the whole text
    with torch.autocast(x.device.type, enabled=False):
        x, delta, A, B, C = (full_precision(part) for part in (x, delta, A, B, C))
        delta = F.softplus(delta if delta_bias is None else delta + delta_bias)
        state = x.new_zeros(batch, I, N) if state is None else state.to(x.dtype)
        walk = scan if path == "torch" and T > 1 else recurrence
        y, state = walk(x, delta, A, B, C, state, resets)
        y = y + skip * x
        if z is not None:
            y = y * F.silu(full_precision(z))
    return y.to(dtype), state


def check_shapes(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    skip: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    state: Tensor | None,
    resets: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments have the shapes in selective_scan's docstring.

    The kernel uses this check too.
    """
    (batch, T, I), N = x.shape, A.shape[1]
    expected = {
        "delta": (delta, (batch, T, I)), "A": (A, (I, N)),
        "B": (B, (batch, T, N)), "C": (C, (batch, T, N)),
        "skip": (skip, (I,)), "z": (z, (batch, T, I)),
        "delta_bias": (delta_bias, (I,)), "state": (state, (batch, I, N)),
        "resets": (resets, (batch, T)),
    }  # fmt: skip
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"selective_scan: {name} is {tuple(tensor.shape)}; {shape} fits x {tuple(x.shape)}"
            )


def total_decay(
    delta: Tensor, A: Tensor, delta_bias: Tensor | None, resets: Tensor | None
) -> Tensor:
    """What is left of a state after all T tokens: (B, I, N). Arguments as in selective_scan."""
    delta, A = full_precision(delta), full_precision(A)
    delta = F.softplus(delta if delta_bias is None else delta + delta_bias)
    decay = torch.exp(delta.sum(1).unsqueeze(-1) * A)
    return decay if resets is None else decay.masked_fill(resets.any(1)[:, None, None], 0)


def recurrence(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h: Tensor,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The reference, token by token.

    Arguments as in selective_scan, except that delta is already after softplus.
    """

    def step(h: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        x_t, delta_t, B_t, C_t, *reset = now
        decay = torch.exp(delta_t.unsqueeze(-1) * A)  # (4): Ā, (B, I, N)
        if reset:
            decay = decay.masked_fill(reset[0][:, None, None], 0)
        h = decay * h + (delta_t * x_t).unsqueeze(-1) * B_t.unsqueeze(1)  # (2a), (B, I, N)
        return h, (h @ C_t.unsqueeze(-1)).squeeze(-1)  # (2b), (B, I)

    return by_token(step, h, (x, delta, B, C) if resets is None else (x, delta, B, C, resets))
