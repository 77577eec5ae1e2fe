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
    positions           (B, T), (B, S) where a token stands in its text; -1: nothing there
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .config import Config
from .layers import RMSNorm, choose, linear, rotary, rotate


class AttentionState(NamedTuple):
    """What attention remembers. A slot at position -1 holds nothing and is never attended to."""

    keys: Tensor  # (B, G, S, d), rotated
    values: Tensor  # (B, G, S, d)
    positions: Tensor  # (B, S) int64, ascending


class Attention(nn.Module):
    """Causal self-attention over the whole text, or over the last `window` tokens, the current one included."""

    operations = ("attention",)

    def __init__(self, config: Config, window: int | None = None):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or config.width // config.heads
        self.rope_base, self.impl, self.window = config.rope_base, config.impl, window
        self.qkv = linear(config.width, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.out = linear(self.heads * self.head_dim, config.width, std=0.02 / config.depth**0.5)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(self, x: Tensor, state: AttentionState | None = None, positions: Tensor | None = None):
        B, T, _ = x.shape
        ragged = positions is not None  # then slots of the state may hold nothing
        if positions is None:
            start = 0 if state is None else state.positions.amax(1, keepdim=True) + 1
            positions = (torch.arange(T, device=x.device) + start).expand(B, T)

        q, k, v = rearrange(self.qkv(x), "B T (H d) -> B H T d", d=self.head_dim).split(
            (self.heads, self.kv_heads, self.kv_heads), dim=1
        )
        q, k = self.q_norm(q), self.k_norm(k)
        if self.rope_base:
            cos, sin = rotary(positions.unsqueeze(1), self.head_dim, self.rope_base)  # (B, 1, T, d/2)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)

        now = AttentionState(k, v, positions)
        if state is not None:
            now = AttentionState(
                torch.cat((state.keys, k), dim=2),
                torch.cat((state.values, v), dim=2),
                torch.cat((state.positions, positions), dim=1),
            )  # S = remembered + T
        if state is None and (self.window is None or T <= self.window):
            visible = None  # plain causal; padding stands behind every token that could see it
        else:
            visible = sees(positions, now.positions, self.window)
        y = attention(q, now.keys, now.values, visible, self.impl)  # (B, H, T, d)
        return self.out(rearrange(y, "B H T d -> B T (H d)")), self.remember(now, ragged, state is None)

    def remember(self, state: AttentionState, ragged: bool, first: bool) -> AttentionState:
        """Drop what no later token can see: all but window - 1 tokens, and slots that are empty in every row."""
        slots = state.positions.shape[1]
        keep = slots if self.window is None else min(slots, self.window - 1)
        if ragged and not (first and self.window is None):
            order = state.positions.argsort(dim=1, stable=True)  # empty slots to the front
            index = order[:, None, :, None].expand_as(state.keys)
            state = AttentionState(
                state.keys.gather(2, index), state.values.gather(2, index), state.positions.gather(1, order)
            )
            keep = min(keep, int((state.positions >= 0).sum(1).amax()))
        if keep == slots:
            return state
        drop = slots - keep
        return AttentionState(
            state.keys[:, :, drop:].clone(), state.values[:, :, drop:].clone(), state.positions[:, drop:].clone()
        )  # clones, for a view would keep what was dropped in memory

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: the projections, and QKᵀ and PV as full products (a causal kernel may skip half)."""
        scores = 4 * self.heads * self.head_dim * context
        return 2 * (self.qkv.weight.numel() + self.out.weight.numel()) + scores

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence after `context` tokens."""
        slots = context if self.window is None else min(context, self.window - 1)
        return slots * (2 * self.kv_heads * self.head_dim * itemsize + 8)


def sees(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which key each query may attend to, from their positions: (B, T), (B, S) -> (B, 1, T, S) bool."""
    distance = queries[:, :, None] - keys[:, None, :]  # (B, T, S)
    visible = (distance >= 0) & (keys >= 0)[:, None, :]
    if window is not None:
        visible &= distance < window
    visible |= (queries < 0)[:, :, None]  # padding sees anything: its output is dropped, and a softmax needs one term
    return visible.unsqueeze(1)


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, impl: str = "auto") -> Tensor:
    """softmax(QKᵀ/√d) V, each of the G key heads shared by H/G query heads.

    q (B, H, T, d); k, v (B, G, S, d); visible (B, 1, T, S) bool, or None for plain causal attention with S = T.
    Returns (B, H, T, d). Raises ValueError on shapes that disagree.
    """
    H, G = q.shape[1], k.shape[1]
    if k.shape != v.shape or H % G or (visible is None and q.shape[2] != k.shape[2]):
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    path = choose(impl, "attention", q.device)
    if path == "triton":
        from .kernels.attention import attention as kernel

        return kernel(q, k, v, visible)
    if path == "torch":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=visible, is_causal=visible is None, enable_gqa=H != G
        )
    k, v = (repeat(part, "B G S d -> B (G shared) S d", shared=H // G) for part in (k, v))
    if visible is None:
        visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5  # (B, H, T, S)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    return weights.to(v.dtype) @ v


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) ⊙ W_up x): the MLP of the modern decoder. It looks at one token at a time: no state."""

    def __init__(self, config: Config, hidden: int | None = None):
        super().__init__()
        hidden = hidden or mlp_width(config)
        self.gate_up = linear(config.width, 2 * hidden)
        self.out = linear(hidden, config.width, std=0.02 / config.depth**0.5)

    def forward(self, x: Tensor, state=None, positions=None):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.out(F.silu(gate) * up), None


def mlp_width(config: Config) -> int:
    """Hidden width of the dense MLP: 8/3 D, so that its three matrices hold 8 D² as two of width 4 D would; in 32s."""
    return config.mlp_width or -(-8 * config.width // 96) * 32
