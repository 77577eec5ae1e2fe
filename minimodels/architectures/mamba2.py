"""Mamba-2: a state space model that is also an attention layer.

Dao and Gu, "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured
State Space Duality", arXiv:2405.21060.

In Mamba every channel and every number of its state decays at its own rate. Mamba-2 gives all
numbers of a head one rate. So the decay between two tokens is a single number per head, and the
layer can be computed as a masked attention matrix, which is fast on matrix units. That is why the
state can be eight times as large as Mamba's at the same cost.

    name        paper   shape
    u                   (B, T, width)  input of the layer
    z                   (B, T, E)      gate; E = heads · head_dim, by default 2 · width
    x           X       (B, T, H, P)   signal, H heads of P channels
    B, C        B, C    (B, T, G, N)   what is written to and read from the state, one per group
    delta       Δ       (B, T, H)      step size
    A           A       (H,)           decay rate, negative; A = -exp(A_log)
    D           D       (H,)           weight of x added to the output
    h           h       (B, H, N, P)   state, in fp32; the paper's, transposed
    window              (B, W-1, E + 2GN)  the last inputs of the convolution, W taps wide

In a shape B is the batch. The same map has three forms, with α_t = exp(Δ_t A):

    recurrence   h_t = α_t h_{t-1} + B_t (Δ_t x_t)ᵀ     y_t = h_tᵀ C_t
    attention    Y = (L ∘ C Bᵀ) (Δ X)                   L_ij = α_{j+1} ... α_i for j <= i, else 0
    chunks       attention within a chunk, the recurrence from one chunk to the next

`recurrence` is linear in T and remembers N P numbers per head; decoding uses it. `attention` has no
state and is quadratic in T. It shows that a token attends to earlier ones with weights that decay.
Chunks (ops/delta_rule.py) are linear in T and consist of matrix products; training uses them. In
that operation C is the query, B the key and Δ x the value.
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
from minimodels.errors import Count, InputError, NonNegative, Positive
from minimodels.layers import Place
from minimodels.ops import delta_rule as rule
from minimodels.ops.convolution import CausalConv1d
from minimodels.ops.decay import step_bias
from minimodels.ops.delta_rule import delta_rule
from minimodels.ops.normalise import gated_norm
from minimodels.options import option
from minimodels.parts import RMSNorm
from minimodels.paths import full_precision


class Mamba2State(NamedTuple):
    """What a Mamba-2 layer remembers: its size does not grow with the text."""

    window: Tensor  # (B, W-1, E + 2GN)
    h: Tensor  # (B, H, N, P) fp32


class Mamba2(nn.Module):
    """The state space dual block (Figure 6): convolution, scan by heads, gated norm."""

    paper = "Dao and Gu, arXiv:2405.21060"
    presets = {"mamba2": "mamba2*{twice}"}
    operations = ("causal_conv1d", "delta_rule")

    @dataclass(frozen=True)
    class Options:
        heads: Count = option(4, "H, heads")
        head_dim: Count | None = option(
            None, "P, channels of a head; by default expand · width / heads"
        )
        state_size: Count = option(128, "N, how many numbers each channel's state has")
        groups: Count = option(1, "G, groups of heads that share B and C")
        expand: Count = option(2, "inner width over the model's width, if head_dim is not given")
        conv_width: Count = option(4, "W, taps of the causal convolution")
        conv_bias: bool = option(True, "a bias in the convolution")
        bias: bool = option(False, "biases in the input and the output projection")
        norm: Literal["gate_norm", "norm_gate", "none"] = option(
            "gate_norm",
            "RMSNorm of each group's output: gate_norm (after the gate), norm_gate (before it, "
            "Falcon-H1) or none",
        )
        norm_eps: NonNegative | None = option(None, "epsilon of this norm; by default the model's")
        step_min: NonNegative = option(0.0, "Δ is at least this")
        step_max: Positive | None = option(None, "Δ is at most this; by default unlimited")

        def check(self, width: int) -> None:
            """Raise InputError if heads do not fit the width or groups, or step_max < step_min."""
            inner = self.expand * width
            if not self.head_dim and inner % self.heads:
                raise InputError("heads", self.heads, f"a divisor of {inner}, or a head_dim")
            if self.heads % self.groups:
                raise InputError("groups", self.groups, f"a divisor of heads {self.heads}")
            if self.step_max is not None and self.step_max < self.step_min:
                raise InputError("step_max", self.step_max, f"at least step_min, {self.step_min}")

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        options.check(config.width)
        self.options, self.impl = options, config.impl
        H, N, G = options.heads, options.state_size, options.groups
        self.P = options.head_dim or options.expand * config.width // H
        self.H, self.E = H, H * self.P
        convolved = self.E + 2 * G * N
        self.in_proj = nn.Linear(config.width, self.E + convolved + H, bias=options.bias)
        self.conv1d = CausalConv1d(
            convolved, options.conv_width, options.conv_bias, True, config.impl
        )
        self.A_log = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.ones(H))
        self.norm = None
        if options.norm != "none":
            eps = config.norm_eps if options.norm_eps is None else options.norm_eps
            self.norm = RMSNorm(self.E, eps, groups=G)
        self.out_proj = nn.Linear(self.E, config.width, bias=options.bias)
        self.reset_parameters(config.depth)

    @torch.no_grad()
    def reset_parameters(self, depth: int):
        """Initialise rates and step sizes as in the paper's code.

        Rates come from U(1, 16), and step sizes are log-uniform in [0.001, 0.1]. So a head starts
        with a memory of about 1 to 1000 tokens.
        """
        self.A_log.uniform_(1, 16).log_()
        self.dt_bias.copy_(step_bias(self.H))
        self.out_proj.weight.div_(math.sqrt(depth))

    def forward(self, u: Tensor, state: Mamba2State | None = None, context: Context | None = None):
        context, options = context or Context(), self.options
        window, h = state or (None, None)
        G, N = options.groups, options.state_size
        z, xBC, dt = self.in_proj(u).split((self.E, self.E + 2 * G * N, self.H), dim=-1)
        lengths = None if context.real is None else context.real.sum(1)  # tokens before the padding
        xBC, window = self.conv1d(xBC, window, lengths, context.resets)
        x, B, C = xBC.split((self.E, G * N, G * N), dim=-1)
        x = full_precision(x).unflatten(2, (self.H, -1))  # (B, T, H, P)
        B, C = B.unflatten(2, (G, N)), C.unflatten(2, (G, N))  # (B, T, G, N) each
        delta = F.softplus(full_precision(dt) + full_precision(self.dt_bias))
        delta = delta.clamp(options.step_min, options.step_max)
        if context.real is not None:  # a step of 0 leaves the state as it is
            delta = delta.masked_fill(~context.real.unsqueeze(-1), 0.0)
        A = -torch.exp(full_precision(self.A_log))
        v = (delta.unsqueeze(-1) * x).to(xBC.dtype)
        y, h = delta_rule(C, B, v, delta * A, None, h, self.impl, context.resets)
        y = y + full_precision(self.D).unsqueeze(-1) * x  # (B, T, H, P)
        y = self.gated(y.flatten(2), z)
        return self.out_proj(y.to(u.dtype)), Mamba2State(window, h)

    def gated(self, y: Tensor, z: Tensor) -> Tensor:
        """Apply the gate and the norm in the order that the options choose: (B, T, E)."""
        if self.norm is None:
            return y * F.silu(full_precision(z))
        return gated_norm(self.norm, y, z, "silu", self.options.norm)

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: projections, convolution, and the chunked operation."""
        maps = (self.in_proj, self.conv1d, self.out_proj)
        N, C = self.options.state_size, rule.chunk_length(context)
        chunks = self.H * rule.flops(C, N, self.P, erase=False)
        return 2 * sum(part.weight.numel() for part in maps) + chunks

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence."""
        channels, _, W = self.conv1d.weight.shape
        return (W - 1) * channels * itemsize + self.E * self.options.state_size * 4


def recurrence(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference, token by token, without D.

    x (B, T, H, P), delta (B, T, H), A (H,), B and C (B, T, G, N), h (B, H, N, P). Returns y (B, T,
    H, P) and the final state.
    """
    B, C = (part.repeat_interleave(x.shape[2] // B.shape[2], 2) for part in (B, C))
    outputs = []
    for x_t, delta_t, B_t, C_t in zip(*(part.unbind(1) for part in (x, delta, B, C)), strict=True):
        decay = torch.exp(delta_t * A)[..., None, None]  # (B, H, 1, 1)
        written = B_t.unsqueeze(-1) * (delta_t.unsqueeze(-1) * x_t).unsqueeze(-2)  # (B, H, N, P)
        h = decay * h + written
        outputs.append((C_t.unsqueeze(-2) @ h).squeeze(-2))  # (B, H, P)
    return torch.stack(outputs, dim=1), h


def attention(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The dual form, quadratic in T, for a text that has no state before it.

    Arguments as in recurrence. Returns y (B, T, H, P).
    """
    B, C = (part.repeat_interleave(x.shape[2] // B.shape[2], 2) for part in (B, C))
    total = (delta * A).cumsum(1).transpose(1, 2)  # (B, H, T)
    between = total.unsqueeze(-1) - total.unsqueeze(-2)  # (B, H, T, T) log of α_{j+1} ... α_i
    future = torch.ones_like(between[0, 0], dtype=torch.bool).triu(1)
    L = between.masked_fill(future, -math.inf).exp()
    scores = C.transpose(1, 2) @ B.permute(0, 2, 3, 1)  # (B, H, T, T)
    return ((L * scores) @ (delta.unsqueeze(-1) * x).transpose(1, 2)).transpose(1, 2)
