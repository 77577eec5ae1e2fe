"""DeltaNet: a memory that is corrected, not only added to.

DeltaNet: Schlag et al., arXiv:2102.11174; Yang et al., arXiv:2406.06484.
Gated DeltaNet: Yang et al., "Gated Delta Networks: Improving Mamba2 with Delta Rule",
arXiv:2412.06464.
Kimi Delta Attention: Kimi Linear, arXiv:2510.26692.
Negative eigenvalues: Grazzi et al., arXiv:2411.12537. DeltaProduct: Siems et al., arXiv:2502.10297.

Linear attention adds each value to what is already stored under its key, so old values never leave
the memory. The delta rule first reads what is stored under the key, and then writes only the
difference to the new value. This is one step of gradient descent on ½ ‖Sᵀk - v‖² with rate β. A
gate also lets the whole memory decay, which forgets what no key overwrites.

    S_t = (I - β_t k_t k_tᵀ) Diag(α_t) S_{t-1} + β_t k_t v_tᵀ        y_t = S_tᵀ q_t             (1)

    name        symbol  shape
    x                   (B, T, D)      input of the layer
    q, k        q, k    (B, T, G, K)   queries and unit keys of G heads, after convolution and SiLU
    v           v       (B, T, H, V)   values of H heads; H/G of them share a key
    beta        β       (B, T, H)      learning rate in (0, 1), or in (0, 2) with beta_max=2
    g           log α   (B, T, H) or (B, T, H, K)  log-decay per head or per channel of the key
    z                   (B, T, H, V)   output gate
    S           S       (B, H, K, V)   state, in fp32
    window              (B, W-1, C)    the last inputs of the convolution, C channels of q, k and v

The published layers are settings of the options, and each has a preset:

                    gate     beta_max  steps  output_gate  output_rank
    DeltaNet        none     1         1      none                     the defaults
    Gated DeltaNet  scalar   1         1      silu         full        Qwen3.5
    KDA             vector   1         1      sigmoid      head        Kimi Linear
    DeltaProduct    none     2         2      none

OLMo-Hybrid is Gated DeltaNet with beta_max=2. KDA with gate_bound=5 has a bounded gate.
DeltaProduct with gate=scalar is Gated DeltaProduct.

They are one class because each differs from the one before it by a line or two, and their authors
combine them freely. Separate classes would repeat the other lines or inherit them.

What the eigenvalues mean: along a unit key the transition I - β k kᵀ multiplies the state by 1 - β.
With β < 1 this factor is positive, so the memory can only shrink. With β up to 2 the factor reaches
-1, which is a reflection, and a layer can count modulo 2. DeltaProduct takes n steps a token, each
with its own key, value and β. A product of n reflections can be any rotation of an n-dimensional
space, and with rotations a layer can follow a permutation. The operation sees n tokens for each
token: the first one decays the state, and the last one reads it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count, InputError, NonNegative, Positive
from minimodels.layers import Place, flops
from minimodels.ops import delta_rule as rule
from minimodels.ops.convolution import CausalConv1d
from minimodels.ops.decay import step_bias
from minimodels.ops.delta_rule import delta_rule
from minimodels.ops.normalise import gated_norm, l2norm
from minimodels.options import option
from minimodels.parts import RMSNorm, linear
from minimodels.paths import full_precision


class DeltaNetState(NamedTuple):
    """What a DeltaNet layer remembers: its size does not grow with the text."""

    window: Tensor  # (B, W-1, C)
    S: Tensor  # (B, H, K, V) fp32


class DeltaNet(nn.Module):
    """The delta rule with gates: DeltaNet, Gated DeltaNet, Kimi Delta Attention, DeltaProduct."""

    paper = "Yang et al., arXiv:2406.06484"
    presets = {
        "deltanet": "(deltanet mlp)*{n}",
        "gated_deltanet": "(deltanet(gate=scalar, output_gate=silu) mlp)*{n}",
        "kda": "(deltanet(gate=vector, output_gate=sigmoid, output_rank=head) mlp)*{n}",
        "deltaproduct": "(deltanet(beta_max=2, steps=2) mlp)*{n}",
    }
    operations = ("causal_conv1d", "delta_rule")

    @dataclass(frozen=True)
    class Options:
        heads: Count = option(4, "H, heads of values")
        key_heads: Count | None = option(
            None, "G, heads of queries and keys; by default as many as heads"
        )
        head_dim: Count | None = option(None, "K, width of a key; by default width / heads")
        value_dim: Count | None = option(None, "V, width of a value; by default that of a key")
        gate: Literal["none", "scalar", "vector"] = option(
            "none", "decay: none, scalar (one per head) or vector (one per channel of the key)"
        )
        gate_rank: Literal["head", "full"] = option(
            "head", "rank of a vector gate's map: the width of a key, or full (Ling)"
        )
        gate_bound: Positive | None = option(
            None, "b: the log-decay is -b times a sigmoid; by default it is unbounded"
        )
        beta_max: Literal[1, 2] = option(1, "β is below this; 2 lets a step reflect the state")
        steps: Count = option(1, "n, steps of the delta rule for each token")
        output_gate: Literal["none", "silu", "sigmoid"] = option(
            "none", "activation of the gate on the normalised output"
        )
        output_rank: Literal["full", "head"] = option(
            "full", "rank of the output gate's map: full, or the width of a value"
        )
        conv_width: Count = option(4, "W, taps of the causal convolution of q, k and v")
        norm_eps: NonNegative | None = option(
            None, "epsilon of the output's norm; by default the model's"
        )

        def check(self, width: int) -> None:
            """Raise InputError if heads do not fit the width or each other, or if there is a bound
            but no gate."""
            if not self.head_dim and width % self.heads:
                raise InputError("heads", self.heads, f"a divisor of width {width}, or a head_dim")
            if self.key_heads and self.heads % self.key_heads:
                raise InputError("key_heads", self.key_heads, f"a divisor of heads {self.heads}")
            if self.gate_bound and self.gate == "none":
                raise InputError("gate_bound", self.gate_bound, "with gate=scalar or gate=vector")

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        options.check(config.width)
        self.options, self.impl = options, config.impl
        D, std, n = config.width, config.init_std, options.steps
        self.H, self.G = options.heads, options.key_heads or options.heads
        self.K = options.head_dim or D // options.heads
        self.V = options.value_dim or self.K
        self.split = (self.G * self.K, n * self.G * self.K, n * self.H * self.V)  # of q, k and v
        C = sum(self.split)
        self.qkv = linear(D, C, std)
        self.conv1d = CausalConv1d(C, options.conv_width, False, True, config.impl)
        self.beta = linear(D, n * self.H, std)
        self.decay = self.A_log = self.dt_bias = None
        if options.gate != "none":
            rates = self.H if options.gate == "scalar" else self.H * self.K
            self.decay = linear(D, rates, std)
            if options.gate == "vector" and options.gate_rank == "head":
                self.decay = nn.Sequential(linear(D, self.K, std), linear(self.K, rates, std))
            self.A_log = nn.Parameter(torch.zeros(self.H))
            self.dt_bias = nn.Parameter(step_bias(rates))
            if options.gate_bound is None:  # rates from U(1, 16)
                nn.init.uniform_(self.A_log, 1, 16).data.log_()
        self.norm = RMSNorm(
            self.V, config.norm_eps if options.norm_eps is None else options.norm_eps
        )
        self.z = None
        if options.output_gate != "none":
            self.z = linear(D, self.H * self.V, std)
            if options.output_rank == "head":
                self.z = nn.Sequential(linear(D, self.V, std), linear(self.V, self.H * self.V, std))
        self.out = linear(self.H * self.V, D, std / config.depth**0.5)

    def forward(
        self, x: Tensor, state: DeltaNetState | None = None, context: Context | None = None
    ):
        context, n = context or Context(), self.options.steps
        window, S = state or (None, None)
        lengths = None if context.real is None else context.real.sum(1)  # tokens before the padding
        qkv, window = self.conv1d(self.qkv(x), window, lengths, context.resets)
        q, k, v = qkv.split(self.split, dim=-1)
        q = l2norm(q.unflatten(2, (self.G, self.K))) * self.K**-0.5
        k = l2norm(k.unflatten(2, (n, self.G, self.K)))  # (B, T, n, G, K)
        v = full_precision(v).unflatten(2, (n, self.H, self.V))
        beta = self.options.beta_max * torch.sigmoid(full_precision(self.beta(x)))
        beta = beta.unflatten(2, (n, self.H)).unsqueeze(-1)  # (B, T, n, H, 1)
        g = self.log_decay(x)
        if context.real is not None:  # padding neither writes nor erases, and nothing decays
            padding = ~context.real[:, :, None, None]
            k = k.masked_fill(padding.unsqueeze(-1), 0.0)
            g = g.masked_fill(padding if g.ndim == 4 else padding.squeeze(-1), 0.0)
        # β scales the value and the erase vector e (minimodels/ops/delta_rule.py)
        v, e = beta * v, beta * k.repeat_interleave(self.H // self.G, dim=3)
        q, k, v, e = (part.to(qkv.dtype) for part in (q, k, v, e))
        y, S = delta_rule(
            *micro_steps(q, k, v, g, e), S, self.impl, resets_of_steps(context.resets, n)
        )
        y = y[:, n - 1 :: n]  # (B, T, H, V), what the last step of each token reads
        z = None if self.z is None else self.z(x).unflatten(2, (self.H, self.V))
        y = gated_norm(self.norm, y, z, self.options.output_gate)
        return self.out(y.flatten(2).to(x.dtype)), DeltaNetState(window, S)

    def log_decay(self, x: Tensor) -> Tensor:
        """The log-decay g in fp32: (B, T, H), or (B, T, H, K) with a rate per channel.

        It is -exp(A_log) softplus(·), as in Mamba-2. With a bound b it is -b σ(exp(A_log) ·).
        """
        if self.decay is None:
            dtype = torch.promote_types(x.dtype, torch.float32)
            return torch.zeros(*x.shape[:2], self.H, dtype=dtype, device=x.device)
        step = full_precision(self.decay(x)) + full_precision(self.dt_bias)
        rate, bound = full_precision(self.A_log).exp(), self.options.gate_bound
        if self.options.gate == "vector":
            step, rate = step.unflatten(2, (self.H, self.K)), rate.unsqueeze(-1)
        if bound is not None:
            return -bound * torch.sigmoid(rate * step)
        return -rate * F.softplus(step)

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: projections, convolution, and the chunked operation."""
        n, V = self.options.steps, self.V
        C = rule.chunk_length(n * context)
        chunks = n * self.H * rule.flops(C, self.K, V, erase=True)
        maps = sum(flops(part, context) for part in self.children())
        return maps + 2 * self.conv1d.weight.numel() + chunks

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence."""
        channels, _, W = self.conv1d.weight.shape
        return (W - 1) * channels * itemsize + self.H * self.K * self.V * 4


def micro_steps(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, e: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Turn n steps for each of T tokens into n T tokens of the operation.

    The first step of a token decays the state, and the last one reads it. k, v, e (B, T, n, ...), q
    and g (B, T, ...). Returns all of them as (B, n T, ...).
    """
    n = k.shape[2]
    if n > 1:
        q = torch.stack([torch.zeros_like(q)] * (n - 1) + [q], dim=2).flatten(1, 2)
        g = torch.stack([g] + [torch.zeros_like(g)] * (n - 1), dim=2).flatten(1, 2)
    return q, k.flatten(1, 2), v.flatten(1, 2), g, e.flatten(1, 2)


def resets_of_steps(resets: Tensor | None, n: int) -> Tensor | None:
    """Mark the first step of each token that begins a document: (B, T) -> (B, n T)."""
    if resets is None or n == 1:
        return resets
    return F.pad(resets.unsqueeze(2), (0, n - 1)).flatten(1)


def recurrence(
    q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, beta: Tensor, S: Tensor
) -> tuple[Tensor, Tensor]:
    """The reference: equation (1), token by token.

    q (B, T, H, K); k (B, T, n, H, K); v (B, T, n, H, V); alpha (B, T, H, K), in [0, 1]; beta (B, T,
    n, H); S (B, H, K, V). Returns y (B, T, H, V) and the final state.
    """
    identity = torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    outputs = []
    for t in range(q.shape[1]):
        S = alpha[:, t].unsqueeze(-1) * S
        for j in range(k.shape[2]):
            key = k[:, t, j].unsqueeze(-1)  # (B, H, K, 1)
            value = v[:, t, j].unsqueeze(-2)  # (B, H, 1, V)
            rate = beta[:, t, j, :, None, None]
            S = (identity - rate * key @ key.mT) @ S + rate * key @ value
        outputs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outputs, dim=1), S
