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

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .cache import AttentionState, carry
from .config import Config
from .layers import RMSNorm, choose, linear, rotary, rotate


class Attention(nn.Module):
    """Causal self-attention over the whole text, or over the last `window` tokens, the current one included."""

    operations = ("attention",)

    def __init__(self, config: Config, window: int | None = None):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or config.width // config.heads
        self.rope_base, self.rope_scaling, self.impl, self.window = config.rope_base, config.rope_scaling, config.impl, window
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

    def forward(self, x: Tensor, state: AttentionState | None = None, positions: Tensor | None = None, memo=None):
        B, T, _ = x.shape
        seen = 0 if state is None else state.seen
        if positions is None and isinstance(seen, int):  # no gaps, no padding: the same in every row
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
        k, v = (part.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2) for part in (k, v))  # (B, G, T, d)
        if self.rope_base:
            angles = self.angles(turned, {} if memo is None else memo)
            q, k = rotate(q, *angles), rotate(k, *angles)

        joined, after = carry(state, AttentionState(k, v, positions, seen), self.window)  # S = remembered + T
        y = attention(q, joined.keys, joined.values, positions, joined.positions, self.window, self.impl)  # (B, H, T, d)
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


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    window: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """softmax(QKᵀ/√d) V (equation 1) over the keys that each query sees, each of the G key heads shared by H/G query heads.

    q (B, H, T, d); k, v (B, G, S, d); the last T keys are those of the queries. Positions (B, T) and (B, S), ascending along a
    row, -1 where there is nothing; or None, where the keys are S tokens in a row. A query sees the keys up to its own position,
    and of these the last `window` positions. Returns (B, H, T, d); what it holds for a query at -1 is meaningless.
    Raises ValueError on shapes that disagree.
    """
    (B, H, T, d), (G, S) = q.shape, k.shape[1:3]
    check_shapes(q, k, v, query_positions, key_positions)
    path, gapless = choose(impl, "attention", q.device), query_positions is None
    if path == "triton":
        from .kernels.attention import attention as kernel

        return kernel(q, k, v, query_positions, key_positions, window)
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=H != G)
    if path == "torch" and window is None and S == T:
        return sdpa(q, k, v, is_causal=True)  # padding comes after every token, so the causal mask hides it
    if path == "torch" and gapless and T == 1 and (window is None or S <= window):
        return sdpa(q, k, v)
    if gapless:
        key_positions = torch.arange(S, device=q.device).unsqueeze(0)  # (1, S): PyTorch fuses no 3-D mask
        query_positions = key_positions[:, S - T :]
    if path == "torch" and window is not None and S == T > 2 * window:
        return banded(sdpa, q, k, v, key_positions.expand(B, S), window)
    visible = sees(query_positions, key_positions, window)
    if path == "torch":
        return sdpa(q, k, v, attn_mask=visible)
    k, v = (repeat(part, "B G S d -> B (G group) S d", group=H // G) for part in (k, v))  # (B, H, S, d)
    scores = ((q @ k.transpose(-1, -2)) * d**-0.5).masked_fill(~visible, float("-inf"))  # (B, H, T, S)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def check_shapes(q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, key_positions: Tensor | None) -> None:
    """Raise ValueError unless the arguments have the shapes that attention names, here and in its kernel."""
    (B, H, T, d), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, d) or v.shape != k.shape or H % G or T > S:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    shapes = [None if x is None else tuple(x.shape) for x in (query_positions, key_positions)]
    if shapes not in ([None, None], [(B, T), (B, S)]):
        raise ValueError(f"attention: positions {shapes[0]}, {shapes[1]} do not fit q {tuple(q.shape)}, k {tuple(k.shape)}")


def sees(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which key each query attends to, from their positions: (..., T), (..., S) -> (..., 1, T, S) bool."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)  # (..., T, S)
    visible = (distance >= 0) & (keys >= 0).unsqueeze(-2)
    if window is not None:
        visible &= distance < window
    visible |= (queries < 0).unsqueeze(-1)  # padding sees anything: its output is dropped, and a softmax needs one term
    return visible.unsqueeze(-3)


def banded(sdpa: Callable, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """Attention within a window at a cost linear in T: each block of `window` tokens sees itself and the block before.

    Positions may have gaps: slots lie no further apart than their positions, so what a query sees is in these two blocks.
    """
    B, _, T, _ = q.shape
    empty = -T % window

    def blocks(x: Tensor, value: int = 0) -> Tensor:  # (B, H, T, d) -> (B, blocks, H, window, d)
        return rearrange(F.pad(x, (0, 0, 0, empty), value=value), "B H (n w) d -> B n H w d", w=window)

    def with_previous(x: Tensor, value: int = 0) -> Tensor:  # -> (B · blocks, H, 2 · window, d)
        return torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0), value=value)[:, :-1], x), dim=3).flatten(0, 1)

    at = blocks(positions[:, None, :, None], -1)  # (B, blocks, 1, window, 1)
    visible = sees(at.flatten(0, 1)[:, 0, :, 0], with_previous(at, -1)[:, 0, :, 0], window)
    y = sdpa(blocks(q).flatten(0, 1), with_previous(blocks(k)), with_previous(blocks(v)), attn_mask=visible)
    return rearrange(y, "(B n) H w d -> B H (n w) d", B=B)[:, :, :T]


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
