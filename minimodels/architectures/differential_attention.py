"""Differential attention: the difference of two softmaxes, in which their common part cancels.

Ye et al., "Differential Transformer", arXiv:2410.05258 (v1); v2 follows Microsoft's description of
January 2026.

A softmax never gives a weight of zero, so over a long text much of its weight goes to tokens that
do not matter. Two heads look at the same values, and their difference loses this common noise, as
in a differential amplifier.

v1 pairs query head i with head i + H/2. Both read the values of two key heads, side by side. λ is
one number: the layer learns it as an offset from a start λ₀ that grows with depth. A norm makes the
sizes of the outputs equal. v2 has two queries for every head of keys and values, a λ for each token
and head, and no norm.

    name        paper   shape
    x           X       (B, T, D)
    q                   (B, H, T, d) in v1, (B, 2H, T, d) in v2
    k, v        K, V    (B, G, S, d)
    factor      λ       () in v1, (B, T, H, 1) in v2
    start       λ₀      ()            0.8 - 0.6 exp(-0.3 block); blocks of two layers count from 0
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count, InputError, NonNegative
from minimodels.layers import Place, flops
from minimodels.ops.attention import attention
from minimodels.ops.cache import AttentionState, advance, carry
from minimodels.ops.rotary import Scaling, check_pairs, rotary, rotate, scaling_text
from minimodels.options import option
from minimodels.parts import RMSNorm, linear
from minimodels.paths import full_precision


class DifferentialAttention(nn.Module):
    """Causal self-attention by the difference of two softmaxes."""

    paper = "Ye et al., arXiv:2410.05258"
    operations = ("attention",)

    @dataclass(frozen=True)
    class Options:
        version: Literal["v1", "v2"] = option("v2", "v1 (the paper, pairs of heads) or v2")
        heads: Count = option(
            4, "H, query heads; v1 subtracts half of them from the rest, v2 has H more to subtract"
        )
        kv_heads: Count | None = option(None, "G, key and value heads; by default as many as heads")
        head_dim: Count | None = option(None, "d, width of a head; by default width / heads")
        rope_base: NonNegative = option(
            10_000.0, "base of the rotary angles; 0 leaves positions out"
        )
        rope_scaling: Scaling = option(
            None, "slower angles for texts longer than those of training"
        )
        bias: bool = option(False, "biases in the four projections")

        def check(self, width: int) -> None:
            """Raise InputError if heads do not fit the width or each other."""
            if not self.head_dim and width % self.heads:
                raise InputError("heads", self.heads, f"a divisor of width {width}, or a head_dim")
            if self.rope_base:
                check_pairs(self.head_dim, width, self.heads)
            kv_heads = self.kv_heads or self.heads
            if self.heads % kv_heads:
                raise InputError("kv_heads", kv_heads, f"a divisor of heads {self.heads}")
            if self.version == "v1" and kv_heads % 2:
                raise InputError("kv_heads", kv_heads, "an even number, because v1 pairs them")

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        options.check(config.width)
        self.options, self.impl = options, config.impl
        self.heads, self.kv_heads = options.heads, options.kv_heads or options.heads
        self.head_dim = d = options.head_dim or config.width // options.heads
        self.scaling = scaling_text(options.rope_scaling, d)
        D, std, paired = config.width, config.init_std, options.version == "v1"
        self.q = linear(D, self.heads * d * (1 if paired else 2), std, options.bias)
        self.k = linear(D, self.kv_heads * d, std, options.bias)
        self.v = linear(D, self.kv_heads * d, std, options.bias)
        self.out = linear(self.heads * d, D, std / config.depth**0.5, options.bias)
        self.factor = None if paired else linear(D, self.heads, std)
        if paired:
            self.start = 0.8 - 0.6 * math.exp(-0.3 * place.index / 2)
            self.lambda_q1, self.lambda_k1, self.lambda_q2, self.lambda_k2 = (
                nn.Parameter(0.1 * torch.randn(d)) for _ in range(4)
            )
            self.norm = RMSNorm(2 * d, config.norm_eps, learned=False)

    def forward(
        self, x: Tensor, state: AttentionState | None = None, context: Context | None = None
    ):
        context = context or Context()
        B, T, _ = x.shape
        seen, starts = 0 if state is None else state.seen, context.starts
        positions, turned, seen = advance(seen, x, context.positions, starts)
        q, k, v = (
            part(x).view(B, T, -1, self.head_dim).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        if self.options.rope_base:
            angles = self.angles(turned, context.cache)
            q, k = rotate(q, *angles), rotate(k, *angles)
        joined, after = carry(state, AttentionState(k, v, positions, seen), None)

        def attend(values: Tensor) -> Tensor:
            return attention(
                q,
                joined.keys,
                values,
                positions,
                joined.positions,
                impl=self.impl,
                query_starts=starts,
            )

        difference = self.of_pairs if self.factor is None else self.of_doubles
        y = difference(x, attend, joined.values)  # (B, T, H · d)
        return self.out(y), after

    def of_pairs(self, x: Tensor, attend, values: Tensor) -> Tensor:
        """v1: (1 - λ₀) norm((A₁ - λ A₂) V), equations (1) and (3); V is as wide as two heads."""
        halves = [half.repeat(1, 2, 1, 1) for half in values.chunk(2, dim=1)]  # (B, G, S, d) twice
        y = torch.cat([attend(half) for half in halves], dim=-1)  # (B, H, T, 2d)
        first, second = y.chunk(2, dim=1)  # (B, H/2, T, 2d)
        one, other = (
            torch.exp((full_precision(a) * full_precision(b)).sum())
            for a, b in ((self.lambda_q1, self.lambda_k1), (self.lambda_q2, self.lambda_k2))
        )
        factor = (one - other + self.start).to(y.dtype)  # equation (2)
        y = (1 - self.start) * self.norm(first - factor * second)
        return y.to(first.dtype).transpose(1, 2).flatten(2)

    def of_doubles(self, x: Tensor, attend, values: Tensor) -> Tensor:
        """v2: (A₁ - σ(λ) A₂) V; the two queries of a head are side by side."""
        first, second = attend(values).transpose(1, 2).unflatten(2, (-1, 2)).unbind(3)
        return (first - torch.sigmoid(self.factor(x)).unsqueeze(-1) * second).flatten(2)

    def angles(self, positions: Tensor, cache: dict) -> tuple[Tensor, Tensor]:
        """The angles of `rotary`, computed once for all layers with the same rotation."""
        key = ("rotary", self.head_dim, self.options.rope_base, self.scaling)
        if key not in cache:
            cache[key] = rotary(positions, *key[1:])
        return cache[key]

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: linear maps, and QKᵀ and PV twice with all keys, even if
        masked."""
        maps = [part for part in self.children() if isinstance(part, nn.Linear)]
        return sum(flops(part, context) for part in maps) + 8 * self.heads * self.head_dim * context

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes of keys and values remembered per sequence after `context` tokens."""
        return context * 2 * self.kv_heads * self.head_dim * itemsize
