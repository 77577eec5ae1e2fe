"""Attention over the keys that each query sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from minimodels.layers import choose


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
        from minimodels.kernels.attention import attention as kernel

        return kernel(q, k, v, query_positions, key_positions, window)
    sdpa = partial(F.scaled_dot_product_attention, enable_gqa=H != G)
    if path == "torch" and window is None and S == T:
        return sdpa(
            q, k, v, is_causal=True
        )  # padding comes after every token, so the causal mask hides it
    if path == "torch" and gapless and T == 1 and (window is None or S <= window):
        return sdpa(q, k, v)
    if gapless:
        key_positions = torch.arange(S, device=q.device).unsqueeze(
            0
        )  # (1, S): PyTorch fuses no 3-D mask
        query_positions = key_positions[:, S - T :]
    if path == "torch" and window is not None and S == T > 2 * window:
        return banded(sdpa, q, k, v, key_positions.expand(B, S), window)
    visible = sees(query_positions, key_positions, window)
    if path == "torch":
        return sdpa(q, k, v, attn_mask=visible)
    k, v = (
        repeat(part, "B G S d -> B (G group) S d", group=H // G) for part in (k, v)
    )  # (B, H, S, d)
    scores = ((q @ k.transpose(-1, -2)) * d**-0.5).masked_fill(
        ~visible, float("-inf")
    )  # (B, H, T, S)
    return scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype) @ v


def check_shapes(
    q: Tensor, k: Tensor, v: Tensor, query_positions: Tensor | None, key_positions: Tensor | None
) -> None:
    """Raise ValueError unless the arguments have the shapes that attention names, here and in its kernel."""
    (B, H, T, d), (G, S) = q.shape, k.shape[1:3]
    if k.shape != (B, G, S, d) or v.shape != k.shape or H % G or T > S:
        raise ValueError(
            f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit"
        )
    shapes = [None if x is None else tuple(x.shape) for x in (query_positions, key_positions)]
    if shapes not in ([None, None], [(B, T), (B, S)]):
        raise ValueError(
            f"attention: positions {shapes[0]}, {shapes[1]} do not fit q {tuple(q.shape)}, k {tuple(k.shape)}"
        )


def sees(queries: Tensor, keys: Tensor, window: int | None) -> Tensor:
    """Which key each query attends to, from their positions: (..., T), (..., S) -> (..., 1, T, S) bool."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)  # (..., T, S)
    visible = (distance >= 0) & (keys >= 0).unsqueeze(-2)
    if window is not None:
        visible &= distance < window
    visible |= (queries < 0).unsqueeze(
        -1
    )  # padding sees anything: its output is dropped, and a softmax needs one term
    return visible.unsqueeze(-3)


def banded(
    sdpa: Callable, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, window: int
) -> Tensor:
    """Attention within a window at a cost linear in T: each block of `window` tokens sees itself and the block before.

    Positions may have gaps: slots lie no further apart than their positions, so what a query sees is in these two blocks.
    """
    B, _, T, _ = q.shape
    empty = -T % window

    def blocks(x: Tensor, value: int = 0) -> Tensor:  # (B, H, T, d) -> (B, blocks, H, window, d)
        return rearrange(
            F.pad(x, (0, 0, 0, empty), value=value), "B H (n w) d -> B n H w d", w=window
        )

    def with_previous(x: Tensor, value: int = 0) -> Tensor:  # -> (B · blocks, H, 2 · window, d)
        return torch.cat(
            (F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0), value=value)[:, :-1], x), dim=3
        ).flatten(0, 1)

    at = blocks(positions[:, None, :, None], -1)  # (B, blocks, 1, window, 1)
    visible = sees(at.flatten(0, 1)[:, 0, :, 0], with_previous(at, -1)[:, 0, :, 0], window)
    y = sdpa(
        blocks(q).flatten(0, 1),
        with_previous(blocks(k)),
        with_previous(blocks(v)),
        attn_mask=visible,
    )
    return rearrange(y, "(B n) H w d -> B H (n w) d", B=B)[:, :, :T]
