"""Retention: attention without softmax, whose memory is a matrix that decays.

Linear attention: Katharopoulos et al., "Transformers are RNNs", arXiv:2006.16236.
RetNet: Sun et al., "Retentive Network: A Successor to Transformer for Large Language Models",
arXiv:2307.08621.
Lightning: Qin et al., arXiv:2401.04658; as in MiniMax-01, arXiv:2501.08313.
GLA: Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training",
arXiv:2312.06635.

Without the softmax, the sum over earlier tokens fits in one matrix per head, so the cost of a token
does not grow with the text. Such a sum would soon be full, so it decays. Each head has a rate of
its own (RetNet, Lightning), or the token chooses a rate for each channel (GLA). The result of a
read has no bound, so it is divided by the sum of its weights or normalised.

    S_t = Diag(α_t) S_{t-1} + k_t v_tᵀ        y_t = S_tᵀ q_t                                    (1)

    name        symbol  shape
    x           X       (B, T, D)      input of the layer
    q, k        Q, K    (B, T, H, K)   queries and keys of H heads, after feature map or rotation
    v           V       (B, T, H, V)   values
    g           log α   (B, T, H), for GLA (B, T, H, K)   log-decay
    S           S       (B, H, K, V)   state, in fp32; with norm=sum it has one more column
    seen                int or (B,)    the next token's position in its document, if rotated

The published layers are settings of the options below, and each has a preset:

                      feature_map  rope_base  decay     scale  norm  gate
    linear attention  elu          0          none      any    sum   none
    RetNet            none         10,000     heads     true   head  silu     the defaults
    Lightning         silu         0          layers    false  full  sigmoid  v has silu too
    GLA               none         0          channels  true   head  silu

Linear attention is y_t = Σ (q·k_s) v_s / Σ (q·k_s).

They are one class because they differ only in these choices, and each choice is one line below. Any
other combination is a layer as well, such as linear attention with a norm instead of its sum
(feature_map=elu, norm=head).

Deviations. RetNet's own row-wise normalisations of the scores are left out, as in the
implementations in use: they only scale a head's output, and the norm that follows cancels the
scale. The norms do not subtract the mean. GLA's gate has a bias, but q, k and v have none.
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
from minimodels.ops.delta_rule import delta_rule
from minimodels.ops.normalise import ACTIVATIONS, gated_norm
from minimodels.ops.rotary import check_pairs, rotary, rotate
from minimodels.options import option
from minimodels.parts import RMSNorm, linear
from minimodels.paths import full_precision


class RetentionState(NamedTuple):
    """What a retention layer remembers."""

    S: Tensor  # (B, H, K, V) fp32; with norm=sum (B, H, K, V + 1)
    seen: Tensor | int  # the next token's position in its document; stays 0 without rotation


class Retention(nn.Module):
    """Linear attention with a decay: linear attention, RetNet, Lightning and GLA."""

    paper = "Sun et al., arXiv:2307.08621"
    presets = {
        "linear_attention": "(retention(feature_map=elu, rope_base=0, decay=none, norm=sum,"
        " gate=none) mlp)*{n}",
        "retnet": "(retention mlp)*{n}",
        "lightning": "(retention(feature_map=silu, rope_base=0, decay=layers, block=2, scale=false,"
        " norm=full, gate=sigmoid) mlp)*{n}",
        "gla": "(retention(rope_base=0, decay=channels) mlp)*{n}",
    }
    operations = ("delta_rule",)

    @dataclass(frozen=True)
    class Options:
        heads: Count = option(4, "H, heads")
        head_dim: Count | None = option(None, "K, width of a key; by default width / heads")
        value_dim: Count | None = option(None, "V, width of a value; by default width / heads")
        feature_map: Literal["none", "elu", "silu"] = option(
            "none", "map of queries and keys: none, elu (1 + elu, positive) or silu (values too)"
        )
        rope_base: NonNegative = option(
            10_000.0, "base of the rotary angles; 0 leaves positions out"
        )
        decay: Literal["none", "heads", "layers", "channels"] = option(
            "heads",
            "none, heads (a fixed rate per head, RetNet), layers (one per head and layer, "
            "Lightning) or channels (learned, GLA)",
        )
        scale: bool = option(True, "multiply the queries by K^-1/2")
        norm: Literal["none", "sum", "head", "full"] = option(
            "head",
            "norm of the output: none, sum (divide by the weights' sum), head or full (RMSNorm)",
        )
        norm_eps: NonNegative | None = option(None, "epsilon of RMSNorm; by default the model's")
        gate: Literal["none", "silu", "sigmoid"] = option("silu", "activation of the output gate")
        decay_rank: Count = option(16, "rank of the map to the decays by channel")
        decay_divisor: Positive = option(16.0, "divisor of log σ(·) in the decays by channel")
        block: Count = option(
            1, "layers of the model that count as one in Lightning's decay, such as 2 with MLPs"
        )

        def check(self, width: int) -> None:
            """Raise InputError if heads do not fit the width or choices contradict each other."""
            if not (self.head_dim and self.value_dim) and width % self.heads:
                accepted = f"a divisor of width {width}, or head_dim and value_dim"
                raise InputError("heads", self.heads, accepted)
            if self.rope_base:
                check_pairs(self.head_dim, width, self.heads)
            if self.norm == "sum" and (self.feature_map != "elu" or self.rope_base):
                accepted = (
                    "with feature_map=elu and rope_base=0, "
                    "because weights must be positive to divide by their sum"
                )
                raise InputError("norm", self.norm, accepted)

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        options.check(config.width)
        self.options, self.impl = options, config.impl
        H, D, std = options.heads, config.width, config.init_std
        self.H, self.K, self.V = H, options.head_dim or D // H, options.value_dim or D // H
        self.place = Place(place.index // options.block, -(-place.depth // options.block))
        self.q = linear(D, H * self.K, std)
        self.k = linear(D, H * self.K, std)
        self.v = linear(D, H * self.V, std)
        self.decay = None
        if options.decay == "channels":
            rank = options.decay_rank
            self.decay = nn.Sequential(linear(D, rank, std), linear(rank, H * self.K, std, True))
        self.norm = None
        if options.norm in ("head", "full"):
            eps = config.norm_eps if options.norm_eps is None else options.norm_eps
            self.norm = RMSNorm(self.V if options.norm == "head" else H * self.V, eps)
        self.gate = None if options.gate == "none" else linear(D, H * self.V, std)
        self.out = linear(H * self.V, D, std / config.depth**0.5)

    def forward(
        self, x: Tensor, state: RetentionState | None = None, context: Context | None = None
    ):
        context, options = context or Context(), self.options
        S, seen = (None, 0) if state is None else state
        heads = (self.H, -1)
        q, k, v = (part(x).unflatten(2, heads) for part in (self.q, self.k, self.v))
        if options.feature_map == "elu":
            q, k = 1 + F.elu(q), 1 + F.elu(k)
        elif options.feature_map == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        if options.rope_base:
            places, seen = positions(x, seen, context)
            angles = self.angles(places, context.cache)
            q, k = rotate(q, *angles), rotate(k, *angles)
        if options.scale:
            q = q * self.K**-0.5
        if options.norm == "sum":  # reading a value of 1 gives the sum of the weights
            v = F.pad(v, (0, 1), value=1.0)  # (B, T, H, V+1)
        g = self.log_decay(x)
        if context.real is not None:  # padding writes nothing, and nothing decays
            padding = ~context.real[:, :, None, None]
            k, g = (
                k.masked_fill(padding, 0.0),
                g.masked_fill(padding.view(*padding.shape[: g.ndim]), 0.0),
            )
        y, S = delta_rule(q, k, v, g, None, S, self.impl, context.resets)
        gate = None if self.gate is None else self.gate(x).unflatten(2, heads)
        y = self.gated(y, gate).flatten(2)
        return self.out(y.to(x.dtype)), RetentionState(S, seen)

    def log_decay(self, x: Tensor) -> Tensor:
        """The log-decay g in fp32: (B, T, H), or (B, T, H, K) with a rate per channel."""
        kind, head = self.options.decay, torch.arange(self.H, device=x.device)
        if kind == "channels":
            g = F.logsigmoid(full_precision(self.decay(x))) / self.options.decay_divisor
            return g.unflatten(2, (self.H, -1))
        dtype = torch.promote_types(x.dtype, torch.float32)
        g = torch.zeros(self.H, dtype=dtype, device=x.device)
        if kind == "heads":  # RetNet, equation 8
            g = torch.log1p(-(2.0 ** (-5.0 - head.to(dtype))))
        elif kind == "layers":  # the slopes of ALiBi; the decay is slower in each further layer
            slopes = 2.0 ** (-8.0 * (head.to(dtype) + 1) / self.H)
            g = -slopes * (1 - self.place.index / (self.place.depth - 1 + 1e-5) + 1e-5)
        return g.expand(*x.shape[:2], -1)

    def gated(self, y: Tensor, gate: Tensor | None) -> Tensor:
        """Apply norm and gate to a read (B, T, H, V), which has one more column with norm=sum."""
        kind, activation = self.options.norm, self.options.gate
        if kind == "full":
            y, gate = y.flatten(2), None if gate is None else gate.flatten(2)
        if self.norm is not None:
            return gated_norm(self.norm, y, gate, activation)
        if kind == "sum":
            # 1e-6 as in the paper's code, because padding reads a sum of 0
            y = y[..., :-1] / (y[..., -1:] + 1e-6)
        return y if gate is None else y * ACTIVATIONS[activation](gate)

    def angles(self, places: Tensor, cache: dict) -> tuple[Tensor, Tensor]:
        """The angles of `rotary`, computed once for all layers with the same rotation."""
        key = ("rotary of retention", self.K, self.options.rope_base)
        if key not in cache:
            cache[key] = rotary(places.unsqueeze(-1), self.K, self.options.rope_base)
        return cache[key]

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: projections, and the chunked operation."""
        V = self.V + (self.options.norm == "sum")
        chunks = self.H * rule.flops(rule.chunk_length(context), self.K, V, erase=False)
        return sum(flops(part, context) for part in self.children()) + chunks

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence."""
        return self.H * self.K * (self.V + (self.options.norm == "sum")) * 4


def positions(x: Tensor, seen: Tensor | int, context: Context) -> tuple[Tensor, Tensor | int]:
    """The tokens' positions in their documents, (T,) or (B, T), and the next token's position."""
    T = x.shape[1]
    step = torch.arange(T, device=x.device)
    if context.positions is None:
        places = step + seen if isinstance(seen, int) else seen[:, None] + step
        return places, seen + T
    starts = 0 if context.starts is None else context.starts
    places = (context.positions - starts).clamp(min=0)
    count = context.real.sum(1, keepdim=True)  # (B, 1): padding comes last
    last = places.gather(1, (count - 1).clamp(min=0)).squeeze(1)
    return places, torch.where(count.squeeze(1) > 0, last + 1, seen)


def recurrence(q: Tensor, k: Tensor, v: Tensor, alpha: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """The reference: equation (1), token by token.

    q, k (B, T, H, K); v (B, T, H, V); alpha (B, T, H, K), in [0, 1]; S (B, H, K, V). Returns y (B,
    T, H, V) and the final state.
    """
    outputs = []
    for t in range(q.shape[1]):
        S = alpha[:, t].unsqueeze(-1) * S + k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        outputs.append((q[:, t].unsqueeze(-2) @ S).squeeze(-2))
    return torch.stack(outputs, dim=1), S


def parallel(q: Tensor, k: Tensor, v: Tensor, gamma: Tensor | None, divide: bool = False) -> Tensor:
    """Retention as attention, quadratic in T, for decays that are fixed for each head.

    y = (Q Kᵀ ∘ γ^(i-j)) V, and `divide` divides it by the sum of each row's weights. gamma (H,),
    None for 1; other arguments as in recurrence.
    """
    T = q.shape[1]
    distance = torch.arange(T, device=q.device).unsqueeze(1) - torch.arange(T, device=q.device)
    weight = torch.ones_like(distance, dtype=q.dtype)
    if gamma is not None:
        weight = gamma.view(-1, 1, 1) ** distance.clamp(min=0)  # (H, T, T)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * weight.tril()
    y = scores @ v.transpose(1, 2)
    y = y / scores.sum(-1, keepdim=True) if divide else y
    return y.transpose(1, 2)
