"""The modern decoder: attention and SwiGLU.

Vaswani et al., "Attention Is All You Need", arXiv:1706.03762; with rotary positions (arXiv:2104.09864), grouped queries
(arXiv:2305.13245), SwiGLU (arXiv:2002.05202) and, as options, QK-norm (Qwen3) and a sliding window (Mistral, arXiv:2310.06825).

Each token asks (query) what each earlier token offers (key) and takes the softmax-weighted mean of what they carry (value).
What must be remembered grows with the text: every key and every value, unless a window bounds it.
The MLP then works on each token alone.

    name        paper   shape
    x                   (B, T, D)      tokens of this chunk
    q           Q       (B, H, T, d)   queries, H heads of width d
    k, v        K, V    (B, G, S, d)   keys and values, G ≤ H heads, S ≥ T tokens: those remembered, then this chunk's
    positions           (B, T), (B, S) where a token stands in its text; -1: nothing there. None: without gaps or padding
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.layers import RMSNorm, linear
from minimodels.ops.attention import attention
from minimodels.ops.cache import AttentionState, carry
from minimodels.ops.rotary import rotary, rotate


class Attention(nn.Module):
    """Causal self-attention over the whole text, or over the last `window` tokens, the current one included."""

    operations = ("attention",)

    def __init__(self, config: Config, window: int | None = None):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or config.width // config.heads
        self.rope_base, self.rope_scaling, self.impl, self.window = (
            config.rope_base,
            config.rope_scaling,
            config.impl,
            window,
        )
        D, std, bias = config.width, config.init_std, config.attention_bias
        q_width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = linear(D, q_width, std, bias)
        self.k = linear(D, kv_width, std, bias)
        self.v = linear(D, kv_width, std, bias)
        self.out = linear(q_width, D, std / config.depth**0.5, bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(q_width if full else self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(kv_width if full else self.head_dim, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        state: AttentionState | None = None,
        positions: Tensor | None = None,
        memo=None,
    ):
        B, T, _ = x.shape
        seen = 0 if state is None else state.seen
        if positions is None and isinstance(
            seen, int
        ):  # no gaps, no padding: the same in every row
            turned = torch.arange(seen, seen + T, device=x.device)  # (T,)
            seen = seen + T
        else:
            if positions is None:
                positions = seen[:, None] + torch.arange(T, device=x.device)  # (B, T)
            turned = positions.unsqueeze(1)  # (B, 1, T), the same for every head
            seen = (positions.amax(1) + 1).clamp(min=seen)  # (B,)

        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:  # a norm may leave autocast's precision
            q, k = normalised(q, self.q_norm).to(v.dtype), normalised(k, self.k_norm).to(v.dtype)
        q = q.view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k, v = (
            part.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2) for part in (k, v)
        )  # (B, G, T, d)
        if self.rope_base:
            angles = self.angles(turned, {} if memo is None else memo)
            q, k = rotate(q, *angles), rotate(k, *angles)

        joined, after = carry(
            state, AttentionState(k, v, positions, seen), self.window
        )  # S = remembered + T
        y = attention(
            q, joined.keys, joined.values, positions, joined.positions, self.window, self.impl
        )  # (B, H, T, d)
        return self.out(y.transpose(1, 2).flatten(2)), after

    def angles(self, positions: Tensor, memo: dict) -> tuple[Tensor, Tensor]:
        """As rotary, once for all layers that turn alike."""
        key = ("rotary", self.head_dim, self.rope_base, self.rope_scaling)
        if key not in memo:
            memo[key] = rotary(positions, *key[1:])
        return memo[key]

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: projections, and QKᵀ and PV with every key computed, those masked included."""
        keys, w = context, self.window
        if w is not None and context > 2 * w:  # then in blocks of w tokens, the last one filled up
            keys = 2 * w * w * -(-context // w) / context
        projections = sum(part.weight.numel() for part in (self.q, self.k, self.v, self.out))
        return 2 * projections + 4 * self.heads * self.head_dim * keys

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes of keys and values remembered per sequence after `context` tokens."""
        slots = context if self.window is None else min(context, self.window - 1)
        return slots * 2 * self.kv_heads * self.head_dim * itemsize


def normalised(x: Tensor, norm: RMSNorm) -> Tensor:
    """RMSNorm of x (B, T, heads · d), over each head's d numbers or over all of them, as wide as the norm is."""
    return norm(x.unflatten(-1, (-1, norm.width))).flatten(-2)


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) ⊙ W_up x): the MLP of the modern decoder. It looks at one token at a time: no state."""

    def __init__(self, config: Config, hidden: int | None = None):
        super().__init__()
        hidden, bias = hidden or mlp_width(config), config.mlp_bias
        self.gate = linear(config.width, hidden, config.init_std, bias)
        self.up = linear(config.width, hidden, config.init_std, bias)
        self.out = linear(hidden, config.width, config.init_std / config.depth**0.5, bias)

    def forward(self, x: Tensor, state=None, positions=None, memo=None):
        return self.out(F.silu(self.gate(x)) * self.up(x)), None


def mlp_width(config: Config) -> int:
    """Hidden width of the dense MLP: 8/3 D, so that its three matrices hold 8 D² as two of width 4 D would; in steps of 32."""
    return config.mlp_width or -(-8 * config.width // 96) * 32
