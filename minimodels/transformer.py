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
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from .config import Config
from .layers import RMSNorm, choose, linear, rotary, rotate

SPARE = 64  # free slots, or an eighth of those in use: then to move into the next room costs next to nothing


class AttentionState(NamedTuple):
    """What attention remembers.

    Where all rows are texts without gaps or padding, the slots are the last S tokens, and `seen` is a number. Where positions
    were given, a slot at position -1 holds nothing and is never attended to, and `seen` is (B,) int64.
    """

    keys: Tensor  # (B, G, S, d), rotated
    values: Tensor  # (B, G, S, d)
    positions: Tensor | None  # (B, S) int64, ascending but for the empty slots
    seen: Tensor | int  # the position of the next token
    room: Room | None = None  # the memory that the slots lie in, where there is more of it behind them


class Attention(nn.Module):
    """Causal self-attention over the whole text, or over the last `window` tokens, the current one included."""

    operations = ("attention",)

    def __init__(self, config: Config, window: int | None = None):
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads or config.heads
        self.head_dim = config.head_dim or config.width // config.heads
        self.rope_base, self.rope_scaling, self.impl, self.window = config.rope_base, config.rope_scaling, config.impl, window
        D, std, bias = config.width, config.init_std, config.attention_bias
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q = linear(D, queries, std, bias)
        self.k = linear(D, keys, std, bias)
        self.v = linear(D, keys, std, bias)
        self.out = linear(queries, D, std / config.depth**0.5, bias)
        self.q_norm = self.k_norm = None
        if config.qk_norm != "none":
            full = config.qk_norm == "full"
            self.q_norm = RMSNorm(queries if full else self.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(keys if full else self.head_dim, config.norm_eps)

    def forward(self, x: Tensor, state: AttentionState | None = None, positions: Tensor | None = None):
        B, T, _ = x.shape
        seen = 0 if state is None else state.seen
        gapless = positions is None and isinstance(seen, int)
        if gapless:
            positions = torch.arange(seen, seen + T, device=x.device)  # (T,)
        elif positions is None:
            positions = seen[:, None] + torch.arange(T, device=x.device)  # (B, T)

        q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:  # a norm may leave autocast's precision
            q, k = normalised(q, self.q_norm).to(v.dtype), normalised(k, self.k_norm).to(v.dtype)
        q = q.view(B, T, self.heads, self.head_dim).transpose(1, 2)  # (B, H, T, d)
        k, v = (part.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2) for part in (k, v))  # (B, G, T, d)
        if self.rope_base:
            places = positions if gapless else positions.unsqueeze(1)  # (B, 1, T), for all heads
            angles = rotary(places, self.head_dim, self.rope_base, self.rope_scaling)
            q, k = rotate(q, *angles), rotate(k, *angles)

        now = AttentionState(k, v, None, seen + T) if gapless else with_positions(k, v, positions, seen)
        now, after = carry(state, now, self.window)  # S = remembered + T
        y = attention(q, *now[:2], None if gapless else positions, now.positions, self.window, self.impl)  # (B, H, T, d)
        return self.out(y.transpose(1, 2).flatten(2)), after

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


def with_positions(keys: Tensor, values: Tensor, positions: Tensor, seen: Tensor | int) -> AttentionState:
    """The state of tokens at positions (B, S) alone, after `seen` tokens before them."""
    return AttentionState(keys, values, positions, (positions.amax(1) + 1).clamp(min=seen))


def carry(before: AttentionState | None, now: AttentionState, window: int | None) -> tuple[AttentionState, AttentionState]:
    """The slots that a chunk attends to, its own behind those remembered before, and what is remembered after it."""
    if before is None:  # empty slots stay: to count them, every training step would have to wait for the GPU
        return now, compact(now, window, count=False)
    if now.positions is not None and before.positions is None:
        slots = torch.arange(before.seen - before.keys.shape[2], before.seen, device=now.keys.device)
        before = AttentionState(before.keys, before.values, slots.expand(now.keys.shape[0], -1), before.seen)
    replaced = window is not None and now.keys.shape[2] >= window  # nothing of what was remembered is kept
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or replaced:
        keys, values = (torch.cat(parts, dim=2) for parts in zip(before[:2], now[:2], strict=True))
        positions = None if now.positions is None else torch.cat((before.positions, now.positions), dim=1)
        joined = AttentionState(keys, values, positions, now.seen)
        return joined, compact(joined, window)
    room = before.room
    if room is None or not room.claim(before, now):
        before = compact(before, window)
        room = Room(before, now)
    return room.append(before, now, window)


def compact(state: AttentionState, window: int | None, count: bool = True) -> AttentionState:
    """Drop what no later token can see: all but window - 1 tokens and, if they may be counted, slots empty in every row."""
    keys, values, positions, seen, _ = state
    slots = keys.shape[2]
    keep = slots if window is None else min(slots, window - 1)
    if positions is not None:
        positions, order = positions.sort(dim=1, stable=True)  # empty slots first: what is dropped is dropped there
        index, empty = order[:, None, :, None].expand_as(keys), (positions < 0)[:, None, :, None]
        keys, values = (part.gather(2, index).masked_fill(empty, 0) for part in (keys, values))
        if count:
            keep = min(keep, int((positions >= 0).sum(1).amax()))
    if keep < slots:  # cloned, for a view would keep what is dropped in memory
        keys, values = (part[:, :, slots - keep :].clone() for part in (keys, values))
        positions = None if positions is None else positions[:, slots - keep :].clone()
    return AttentionState(keys, values, positions, seen)


class Room:
    """Memory with free slots behind those in use, so that one more token is not a copy of all before it.

    It serves where nothing is differentiated. What is in use is never overwritten, and only the newest state is written
    behind, once: an earlier one, a copy or one of some of its rows begins a room of its own. So every state stays good, after
    an error and among threads too.
    """

    newest: tuple | None = None  # the tensors of the newest state; None: claimed, or never given out

    def __init__(self, state: AttentionState, now: AttentionState):
        self.used = state.keys.shape[2]
        free = now.keys.shape[2] + max(SPARE, self.used // 8)
        dtype = torch.promote_types(state.keys.dtype, now.keys.dtype)  # as if they were joined
        self.keys, self.values = (F.pad(part.to(dtype), (0, 0, 0, free)) for part in state[:2])
        self.positions = None if state.positions is None else F.pad(state.positions, (0, free))

    def __reduce__(self):
        return type(None), ()  # a copy of a state, in another process too, has no room

    def claim(self, before: AttentionState, now: AttentionState) -> bool:
        """Whether the slots of `now` may be written behind `before`, which nobody may from then on."""
        newest = self.newest
        if newest is None or any(mine is not given for mine, given in zip(newest, before[:3], strict=True)):
            return False
        writable = torch.is_inference_mode_enabled() or not self.keys.is_inference()
        exact = torch.promote_types(self.keys.dtype, now.keys.dtype) == self.keys.dtype
        fits = self.used + now.keys.shape[2] <= self.keys.shape[2]
        return writable and exact and fits and self.__dict__.pop("newest", None) is newest  # one thread alone gets it

    def append(self, before: AttentionState, now: AttentionState, window: int | None) -> tuple[AttentionState, AttentionState]:
        """As carry. Slots that are empty or outside the window stay among those with positions until the room is full."""
        first, start, self.used = self.used - before.keys.shape[2], self.used, self.used + now.keys.shape[2]
        self.keys[:, :, start : self.used], self.values[:, :, start : self.used] = now.keys, now.values
        if self.positions is not None:
            self.positions[:, start : self.used] = now.positions

        def state(first: int) -> AttentionState:
            keys, values = (part[:, :, first : self.used] for part in (self.keys, self.values))
            positions = None if self.positions is None else self.positions[:, first : self.used]
            return AttentionState(keys, values, positions, now.seen, self)

        now = after = state(first)
        oldest = first if window is None or self.positions is not None else self.used - window + 1
        if oldest > first:
            after = state(oldest)
        self.newest = after[:3]
        return now, after


def normalised(x: Tensor, norm: RMSNorm) -> Tensor:
    """x (B, T, heads · d) with each run of as many numbers as the norm is wide, a head or all of them, normalised."""
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
    if (k.shape, v.shape) != ((B, G, S, d), (B, G, S, d)) or H % G or T > S:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    path, gapless = choose(impl, "attention", q.device), query_positions is None and key_positions is None
    if not gapless and (query_positions.shape, key_positions.shape) != ((B, T), (B, S)):
        raise ValueError(f"attention: positions {tuple(query_positions.shape)}, {tuple(key_positions.shape)} do not fit")
    if path == "triton":
        from .kernels.attention import attention as kernel

        return kernel(q, k, v, query_positions, key_positions, window)
    if path == "torch":
        fast = partial(F.scaled_dot_product_attention, enable_gqa=H != G)
        if window is None and S == T:
            return fast(q, k, v, is_causal=True)  # padding stands behind every query that could see it
        if gapless and T == 1 and (window is None or S <= window):
            return fast(q, k, v)
    if gapless:
        key_positions = torch.arange(S, device=q.device)
        query_positions = key_positions[S - T :]
    if path == "torch":
        if window is not None and S == T > 2 * window:
            return banded(fast, q, k, v, key_positions.expand(B, S), window)
        return fast(q, k, v, attn_mask=sees(query_positions, key_positions, window))
    k, v = (repeat(part, "B G S d -> B (G shared) S d", shared=H // G) for part in (k, v))
    scores = (q @ k.transpose(-1, -2)) * d**-0.5  # (B, H, T, S)
    scores = scores.masked_fill(~sees(query_positions, key_positions, window), float("-inf"))
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def sees(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which key each query attends to, from their positions: (..., T), (..., S) -> (..., 1, T, S) bool."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)  # (..., T, S)
    visible = (distance >= 0) & (keys >= 0).unsqueeze(-2)
    if window is not None:
        visible &= distance < window
    visible |= (queries < 0).unsqueeze(-1)  # padding sees anything: its output is dropped, and a softmax needs one term
    return visible.unsqueeze(-3)


def banded(fast: Callable, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int) -> Tensor:
    """Attention within a window at a cost linear in T: each block of `window` tokens sees itself and the block before.

    Positions may have gaps: tokens less than `window` positions apart are less than `window` places apart.
    """
    B, _, T, _ = q.shape
    empty = -T % window

    def blocks(x: Tensor, value: int = 0) -> Tensor:  # (B, H, T, d) -> (B, blocks, H, window, d)
        return rearrange(F.pad(x, (0, 0, 0, empty), value=value), "B H (n w) d -> B n H w d", w=window)

    def with_previous(x: Tensor, value: int = 0) -> Tensor:  # -> (B · blocks, H, 2 · window, d)
        return torch.cat((F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0), value=value)[:, :-1], x), dim=3).flatten(0, 1)

    at = blocks(positions[:, None, :, None], -1)  # (B, blocks, 1, window, 1)
    visible = sees(at.flatten(0, 1)[:, 0, :, 0], with_previous(at, -1)[:, 0, :, 0], window)
    y = fast(blocks(q).flatten(0, 1), with_previous(blocks(k)), with_previous(blocks(v)), attn_mask=visible)
    return rearrange(y, "(B n) H w d -> B H (n w) d", B=B)[:, :, :T]


class SwiGLU(nn.Module):
    """W_out (silu(W_gate x) ⊙ W_up x): the MLP of the modern decoder. It looks at one token at a time: no state."""

    def __init__(self, config: Config, hidden: int | None = None):
        super().__init__()
        hidden, bias = hidden or mlp_width(config), config.mlp_bias
        self.gate = linear(config.width, hidden, config.init_std, bias)
        self.up = linear(config.width, hidden, config.init_std, bias)
        self.out = linear(hidden, config.width, config.init_std / config.depth**0.5, bias)

    def forward(self, x: Tensor, state=None, positions=None):
        return self.out(F.silu(self.gate(x)) * self.up(x)), None


def mlp_width(config: Config) -> int:
    """Hidden width of the dense MLP: 8/3 D, so that its three matrices hold 8 D² as two of width 4 D would; in 32s."""
    return config.mlp_width or -(-8 * config.width // 96) * 32
