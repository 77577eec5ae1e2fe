"""The modern decoder: attention and SwiGLU.

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, with rotary positions
(arXiv:2104.09864), grouped queries (arXiv:2305.13245) and SwiGLU (arXiv:2002.05202). The options
add later changes: a sliding window (Mistral, arXiv:2310.06825), QK-norm (Qwen3), layers without
positions (arXiv:2305.19466), an output gate (arXiv:2505.06708), a sink (gpt-oss, after
arXiv:2309.17453) and a softcap (Gemma 2, arXiv:2408.00118).

Each token compares what it looks for (query) with what each earlier token offers (key), and takes
the softmax-weighted mean of their contents (value). The layer must remember every key and every
value, so its state grows with the text unless a window bounds it. The MLP then works on each token
alone.

Why gates and sinks: the weights of a softmax sum to one, so a head must attend to something even if
it has nothing to contribute. It then learns to attend to the first token. A gate lets the head be
silent. A sink is a key without a value that takes the weight.

    name        paper   shape
    x                   (B, T, D)      tokens of this chunk
    q           Q       (B, H, T, d)   queries, H heads of width d
    k, v        K, V    (B, G, S, d)   keys and values in G ≤ H heads; remembered ones first
    positions           (B, T), (B, S) each token's index in its row's text; -1 marks an empty place
    starts              (B, T)         the position at which the token's document begins
    sink                (H,)           a logit that takes part in a head's softmax and has no value
    mix                 (2,)           shares of a layer's own values and of the first layer's
    gate                (B, T, H·d)    or (B, T, H): a sigmoid of x on the heads' outputs

`attention` in minimodels/ops/attention.py is the equation; ops/cache.py is the growing memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count, Fraction, InputError, NonNegative, Positive
from minimodels.layers import Place
from minimodels.ops.activation import GATED, PLAIN
from minimodels.ops.attention import attention
from minimodels.ops.cache import AttentionState, advance, carry
from minimodels.ops.rotary import Scaling, check_pairs, norm_rotate, rotary, scaling_text
from minimodels.options import option
from minimodels.parts import RMSNorm, is_plain, linear
from minimodels.paths import choose


class Attention(nn.Module):
    """Causal self-attention over the whole text, or over a window of it."""

    paper = "Vaswani et al., arXiv:1706.03762"
    presets = {"transformer": "(attention mlp)*{n}"}
    operations = ("attention", "norm_rotate")

    @dataclass(frozen=True)
    class Options:
        heads: Count = option(4, "H, query heads")
        kv_heads: Count | None = option(None, "G, key and value heads; by default as many as heads")
        head_dim: Count | None = option(None, "d, width of a head; by default width / heads")
        window: Count | None = option(
            None, "tokens that a token sees, itself included; by default all"
        )
        rope_base: NonNegative = option(
            10_000.0, "base of the rotary angles; 0 leaves positions out (arXiv:2305.19466)"
        )
        rope_fraction: Fraction = option(1.0, "fraction of a head that is rotated, at its start")
        rope_scaling: Scaling = option(
            None, "slower angles for texts longer than those of training"
        )
        qk_norm: Literal["none", "head", "full", "plain"] = option(
            "none",
            "RMSNorm on queries and keys: none, head (each head, Qwen3), full (all heads, OLMoE) "
            "or plain (each head, without weights, after the rotation, nanochat)",
        )
        bias: bool | Literal["qkv"] = option(
            False, "biases in the four projections; qkv: in all but the last (Qwen2)"
        )
        scale: Positive | None = option(None, "factor on the scores; by default 1 / sqrt(head_dim)")
        softcap: Positive | None = option(
            None,
            "c: scores s become c tanh(s / c) (Gemma 2, arXiv:2408.00118); by default as they are",
        )
        sink: bool = option(
            False, "a logit per head that takes part in the softmax and has no value (gpt-oss)"
        )
        value_residual: bool = option(
            False, "mix the values with those of the model's first such layer (arXiv:2410.17897)"
        )
        gate: Literal["none", "head", "full"] = option(
            "none",
            "sigmoids of the input that multiply the output: none, head (one for each head) or "
            "full (one for each number, arXiv:2505.06708)",
        )

        def check(self, width: int) -> None:
            """Raise InputError if heads do not fit the width or each other."""
            if not self.head_dim and width % self.heads:
                raise InputError("heads", self.heads, f"a divisor of width {width}, or a head_dim")
            if self.rope_base and self.rope_fraction == 1:
                check_pairs(self.head_dim, width, self.heads)
            elif self.rope_base and (self.rotated(width) == 0 or self.rotated(width) % 2):
                accepted = "an even number of rotated dimensions, because rotation turns pairs"
                raise InputError("rope_fraction", self.rope_fraction, accepted)
            if self.kv_heads and self.heads % self.kv_heads:
                raise InputError("kv_heads", self.kv_heads, f"a divisor of heads {self.heads}")

        def rotated(self, width: int) -> int:
            """The number of rotated dimensions of a head."""
            return int((self.head_dim or width // self.heads) * self.rope_fraction)

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        options.check(config.width)
        self.options, self.impl = options, config.impl
        self.heads, self.kv_heads = options.heads, options.kv_heads or options.heads
        self.head_dim = options.head_dim or config.width // options.heads
        self.window, self.rotated = options.window, options.rotated(config.width)
        self.scaling = scaling_text(options.rope_scaling, self.rotated)
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        D, std = config.width, config.init_std
        self.q = linear(D, q_width, std, bool(options.bias))
        self.k = linear(D, kv_width, std, bool(options.bias))
        self.v = linear(D, kv_width, std, bool(options.bias))
        self.out = linear(q_width, D, std / config.depth**0.5, options.bias is True)
        self.q_norm = self.k_norm = self.turned_norm = None
        if options.qk_norm == "plain":
            self.turned_norm = RMSNorm(self.head_dim, config.norm_eps, learned=False)
        elif options.qk_norm != "none":
            full = options.qk_norm == "full"
            self.q_norm = RMSNorm(q_width if full else self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(kv_width if full else self.head_dim, config.norm_eps)
        self.sink = nn.Parameter(torch.zeros(self.heads)) if options.sink else None
        gates = {"none": 0, "head": self.heads, "full": q_width}[options.gate]
        self.gate = linear(D, gates, std) if gates else None
        self.mix = nn.Parameter(torch.full((2,), 0.5)) if options.value_residual else None

    def forward(
        self, x: Tensor, state: AttentionState | None = None, context: Context | None = None
    ):
        context = context or Context()
        B, T, _ = x.shape
        seen, starts = 0 if state is None else state.seen, context.starts
        positions, turned, seen = advance(seen, x, context.positions, starts)

        q, k, v = self.q(x), self.k(x), self.v(x)
        options = self.options
        if options.qk_norm == "full":  # a norm may return another dtype than autocast's
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q = q.view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        # (B, G, T, d)
        k, v = (x.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2) for x in (k, v))
        if self.mix is not None:  # only for this chunk; the remembered values are already mixed
            first = context.cache.setdefault(("values", *v.shape[1::2]), v)
            own, other = self.mix.to(v.dtype)
            v = own * v + other * first
        angles = self.angles(turned, context.cache) if options.rope_base else None
        q, k = self.turn(q, self.q_norm, angles), self.turn(k, self.k_norm, angles)
        if self.turned_norm is not None:
            q, k = self.turned_norm(q).to(v.dtype), self.turned_norm(k).to(v.dtype)
        if options.scale is not None:
            q = q * (options.scale * self.head_dim**0.5)

        joined, after = carry(state, AttentionState(k, v, positions, seen), self.window)  # S keys
        y = attention(
            q, joined.keys, joined.values, positions, joined.positions,
            window=self.window, impl=self.impl, query_starts=starts,
            sink=self.sink, softcap=options.softcap,
        )  # (B, H, T, d)  # fmt: skip
        y = y.transpose(1, 2)  # (B, T, H, d)
        if self.gate is not None:
            y = y * torch.sigmoid(self.gate(x)).view(B, T, self.heads, -1)
        return self.out(y.flatten(2)), after

    def turn(self, x: Tensor, norm: RMSNorm | None, angles: tuple[Tensor, Tensor] | None) -> Tensor:
        """x (B, H, T, d): normalise each head if it has a norm, and rotate it if there are angles.
        A kernel does both at once."""
        norm = norm if self.options.qk_norm == "head" else None
        path = choose(self.impl, "norm_rotate", x.device, portable=True)
        if norm is not None and angles is not None and path == "triton" and is_plain(norm):
            return norm_rotate(x, *angles, norm.weight, norm.eps, path)
        if norm is not None:
            x = norm(x).to(x.dtype)
        return x if angles is None else norm_rotate(x, *angles, impl=self.impl)

    def angles(self, positions: Tensor, cache: dict) -> tuple[Tensor, Tensor]:
        """The angles of `rotary`, computed once for all layers with the same rotation."""
        key = ("rotary", self.rotated, self.options.rope_base, self.scaling)
        if key not in cache:
            cache[key] = rotary(positions, *key[1:])
        return cache[key]

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: projections, and QKᵀ and PV with every key, even if masked."""
        rows, keys, d, w = context, context, self.head_dim, self.window
        if w is not None and context > 2 * w:  # blocks of w tokens; the last is padded
            rows, keys = w * -(-context // w), 2 * w
        if self.sink is not None and self.options.softcap is None:
            # the sink takes one more key and dimension, and one more query if the mask is causal
            rows, keys, d = rows + (w is None or context <= w), keys + 1, d + 1
        maps = [part for part in (self.q, self.k, self.v, self.out, self.gate) if part is not None]
        projections = sum(part.weight.numel() for part in maps)
        return 2 * projections + 4 * self.heads * d * keys * rows / context

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes of keys and values remembered per sequence after `context` tokens."""
        slots = context if self.window is None else min(context, self.window - 1)
        return slots * 2 * self.kv_heads * self.head_dim * itemsize


class SwiGLU(nn.Module):
    """The MLP of the modern decoder: W_out (silu(W_gate x) ⊙ W_up x). It has no state."""

    paper = "Shazeer, arXiv:2002.05202"

    @dataclass(frozen=True)
    class Options:
        width: Count | None = option(
            None,
            "hidden width; by default 8/3 of the model's, rounded up to a multiple of 32, or 4 "
            "times the model's without a gate",
        )
        bias: bool = option(False, "biases in the projections")
        activation: Literal["silu", "gelu", "clamped", "relu2"] = option(
            "silu", "silu (SwiGLU), gelu (GEGLU, Gemma), clamped (gpt-oss) or relu2 (nanochat)"
        )
        gated: bool = option(True, "multiply by the gate; false: W_out act(W_up x) (GPT-2)")

        def __post_init__(self):
            if not self.gated and self.activation not in PLAIN:
                accepted = f"{', '.join(PLAIN)}, because gated is false"
                raise InputError("activation", self.activation, accepted)

        def hidden(self, width: int) -> int:
            """The hidden width for a model of width `width`."""
            return self.width or (default_width(width) if self.gated else 4 * width)

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        hidden, gated = options.hidden(config.width), options.gated
        self.activation = (GATED if gated else PLAIN)[options.activation]
        self.gate = None
        if gated:
            self.gate = linear(config.width, hidden, config.init_std, options.bias)
        self.up = linear(config.width, hidden, config.init_std, options.bias)
        self.out = linear(hidden, config.width, config.init_std / config.depth**0.5, options.bias)

    def forward(self, x: Tensor, state: None = None, context: Context | None = None):
        if self.gate is None:
            return self.out(self.activation(self.up(x))), None
        return self.out(self.activation(self.gate(x), self.up(x))), None


def default_width(width: int) -> int:
    """8/3 D, rounded up to a multiple of 32.

    Three matrices of this hidden width have 8 D² numbers, as many as two of hidden width 4 D.
    """
    return -(-8 * width // 96) * 32
