"""Attention over the keys that each query sees."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from minimodels.errors import InputError
from minimodels.paths import choose

MASK = 2**25  # most entries of a mask in memory at once; longer chunks go in blocks of queries


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    window: int | None = None,
    impl: str = "auto",
    query_starts: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(QKᵀ/√d) V (equation 1) over the keys that each query sees.

    H/G query heads share each of the G key heads. q (B, H, T, d); k, v (B, G, S, d); the last T
    keys belong to the queries.

    Positions (B, T) and (B, S) ascend along a row, with -1 for an empty place. None: the S keys are
    at positions 0 to S - 1. query_starts (B, T) is the position at which each query's
    document begins, in the same coordinates as the keys' positions, ascending along a row. None:
    every document began before the first key. A query sees the keys from its document's start up to
    its own position, and at most the last `window` positions of these.

    sink (H,): a logit that takes part in each softmax and has no value. softcap c: scores s become
    c tanh(s / c). With impl="auto" the kernel is used only for windows, positions, documents and
    decoding; PyTorch's operation computes plain causal attention. Returns (B, H, T, d), in which
    the output of a query at -1 is meaningless. Raises ValueError if shapes disagree, and InputError
    for impl="triton" with a sink or a softcap, which the kernel does not have.
    """
    check_shapes(q, k, v, query_positions, key_positions, query_starts)
    masked = window is not None or query_positions is not None or query_starts is not None
    # cuDNN and FlashAttention handle the causal mask; the kernel is for the other masks
    plain = not masked and q.shape[2] == k.shape[2]
    lacking = sink is not None or softcap is not None
    # in this case the torch path is only PyTorch's own operation, without a branch on the length
    portable = (
        window is None and query_starts is None and softcap is None and q.shape[2] == k.shape[2]
    )
    path = choose(impl, "attention", q.device, portable)
    weigh = partial(weighted_mean, sink=sink, softcap=softcap)
    if path == "triton" and impl == "auto" and (plain or lacking):
        path = "torch"
    if path == "triton" and lacking:
        accepted = "auto, reference or torch, because the kernel has neither sinks nor a softcap"
        raise InputError("impl", impl, accepted)
    if path == "triton":
        from minimodels.kernels.attention import attention as kernel

        return kernel(q, k, v, query_positions, key_positions, window, query_starts)
    if path == "reference":
        return reference(
            q, k, v, query_positions, key_positions, window, query_starts, sink, softcap
        )
    return fused(q, k, v, query_positions, key_positions, window, query_starts, weigh)


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    query_starts: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments have the shapes in attention's docstring.

    The kernel uses this check too.
    """
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
    if query_starts is not None and query_starts.shape != (B, T):
        raise ValueError(
            f"attention: query_starts {tuple(query_starts.shape)} do not fit q {tuple(q.shape)}"
        )


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    window: int | None,
    starts: Tensor | None,
    sink: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """The equation, with every score in memory."""
    (H, d), G = q.shape[1::2], k.shape[1]
    queries, keys = positions_of(q, k, queries, keys)
    k, v = (repeat(part, "B G S d -> B (G group) S d", group=H // G) for part in (k, v))
    scores = (q @ k.transpose(-1, -2)) * d**-0.5  # (B, H, T, S)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~sees(queries, keys, window, starts), float("-inf"))
    if sink is not None:
        scores = torch.cat((scores, sink.view(-1, 1, 1).expand_as(scores[..., :1])), dim=-1)
    full = torch.promote_types(q.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=full)[..., : k.shape[2]]
    return weights.to(v.dtype) @ v


def sees(queries: Tensor, keys: Tensor, window: int | None, starts: Tensor | None = None) -> Tensor:
    """Which keys each query sees, by their positions: (..., T), (..., S) -> (..., 1, T, S) bool."""
    distance = queries.unsqueeze(-1) - keys.unsqueeze(-2)  # (..., T, S)
    visible = (distance >= 0) & (keys >= 0).unsqueeze(-2)
    if window is not None:
        visible &= distance < window
    if starts is not None:
        visible = visible & (keys.unsqueeze(-2) >= starts.unsqueeze(-1))
    # padding sees every key: its output is dropped, and a softmax needs at least one term
    return (visible | (queries < 0).unsqueeze(-1)).unsqueeze(-3)


def positions_of(
    q: Tensor, k: Tensor, queries: Tensor | None, keys: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The given positions, or 0 to S - 1 for the keys if there are none: (1, T) and (1, S).

    They have two dimensions because PyTorch's fused attention takes no mask of three dimensions.
    """
    if keys is None:
        keys = torch.arange(k.shape[2], device=k.device).unsqueeze(0)
        queries = keys[:, k.shape[2] - q.shape[2] :]
    return queries, keys


# The torch path: PyTorch's fused attention, with as little masking as possible.


def weighted_mean(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None = None,
    causal: bool = False,
    sink: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention over the keys that are `visible` (..., T, S).

    If `causal`, T = S and a query sees the keys up to its own.

    A sink becomes one more key in front of the others, so that PyTorch's fused operation can be
    used. An additional dimension gives this key the score that the query's head has learned; every
    other key has a zero there.
    """
    if softcap is not None:
        return capped(q, k, v, visible, causal, sink, softcap)
    shared = q.shape[1] != k.shape[1]
    if sink is None:
        return F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, enable_gqa=shared)
    (B, H, T, d), scale = q.shape, q.shape[-1] ** -0.5
    logits = (sink / scale).to(q.dtype).view(1, H, 1, 1).expand(B, H, T, 1)
    q, k, v = torch.cat((q, logits), -1), F.pad(k, (0, 1, 1, 0)), F.pad(v, (0, 1, 1, 0))
    k = k + F.pad(k.new_ones(1, 1), (d, 0, 0, k.shape[2] - 1))  # 1 in the sink's last dimension
    if causal:  # an additional query keeps the diagonal in place
        q = F.pad(q, (0, 0, 1, 0))
    if visible is not None:
        visible = F.pad(visible, (1, 0), value=True)
    y = F.scaled_dot_product_attention(
        q, k, v, visible, is_causal=causal, scale=scale, enable_gqa=shared
    )
    return y[:, :, int(causal) :, :d]


def capped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    causal: bool,
    sink: Tensor | None,
    softcap: float,
) -> Tensor:
    """As weighted_mean, with a softcap, which no fused operation supports.

    Only the scores of a block of queries are in memory at a time.
    """
    (B, H, T, d), (G, S) = q.shape, k.shape[1:3]
    q = rearrange(q, "B (G group) T d -> B G group T d", G=G)
    sinks = None if sink is None else sink.view(G, -1, 1, 1)
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    rows, outputs = max(1, MASK // (B * H * S)), []
    for start in range(0, T, rows):
        block = slice(start, start + rows)
        scores = softcap * torch.tanh((q[..., block, :] @ k.mT) * (d**-0.5 / softcap))
        seen = visible
        if causal:
            keys = torch.arange(S, device=q.device)
            seen = (keys <= keys[block, None])[None, None]  # (1, 1, T, S)
        elif visible is not None:
            seen = visible[..., block, :]
        if seen is not None:
            scores = scores.masked_fill(~seen.unsqueeze(2), float("-inf"))
        if sinks is not None:
            scores = torch.cat((scores, sinks.expand_as(scores[..., :1])), dim=-1)
        full = torch.promote_types(q.dtype, torch.float32)
        weights = scores.softmax(-1, dtype=full)[..., :S].to(v.dtype)
        outputs.append((weights @ v).flatten(1, 2))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    window: int | None,
    starts: Tensor | None,
    weigh: Callable[..., Tensor] = weighted_mean,
) -> Tensor:
    """As attention; `weigh` is weighted_mean, with a sink or a softcap if there are any."""
    T, S = q.shape[2], k.shape[2]
    if starts is not None and S == T and not (q.is_cuda or torch.compiler.is_compiling()):
        lengths = document_lengths(q, queries, starts)
        if lengths is not None:
            return by_document(q, k, v, queries, window, lengths, weigh)
    if starts is None and S == T and (window is None or (queries is None and T <= window)):
        # padding comes after every token, so the causal mask hides it
        return weigh(q, k, v, causal=True)
    if starts is None and queries is None and T == 1 and (window is None or S <= window):
        return weigh(q, k, v)
    if window is not None and T > 2 * window:
        return banded(q, k, v, queries, keys, window, starts, weigh)
    queries, keys = positions_of(q, k, queries, keys)
    rows = max(1, MASK // (S * len(keys if starts is None else q)))
    outputs = []
    for start in range(0, T, rows):
        at, end = slice(start, start + rows), S - T + min(start + rows, T)
        visible = sees(
            queries[:, at], keys[:, :end], window, None if starts is None else starts[:, at]
        )
        outputs.append(weigh(q[:, :, at], k[:, :, :end], v[:, :, :end], visible))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def document_lengths(q: Tensor, positions: Tensor | None, starts: Tensor) -> list[list[int]] | None:
    """The length of each document of each row, and of the row's padding at the end.

    None if the starts are not those of consecutive documents.
    """
    B, T = starts.shape
    if positions is None:
        positions = torch.arange(T, device=q.device).expand(B, T)
    token = positions >= 0
    # (B, T-1): whether a token begins a document or padding
    other = (starts.diff(dim=1) != 0) | token.diff(dim=1)
    before = starts[:, 1:] <= positions[:, :-1]  # whether a token sees the one before it
    if (other & before & token[:, 1:]).any():
        return None
    ends = [row.nonzero().flatten().tolist() for row in other]
    return [
        [end - start for start, end in zip((-1, *row), (*row, T - 1), strict=True)] for row in ends
    ]


def by_document(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor | None,
    window: int | None,
    lengths: list[list[int]],
    weigh: Callable[..., Tensor] = weighted_mean,
) -> Tensor:
    """Attention within each document, at the cost of the documents alone, not of the whole row."""
    rows = []
    for b, parts in enumerate(lengths):
        # split, because each slice's gradient would be as large as the row
        documents = zip(*(x[b : b + 1].split(parts, dim=2) for x in (q, k, v)), strict=True)
        at = [None] * len(parts) if positions is None else positions[b : b + 1].split(parts, dim=1)
        outputs = [
            fused(*document, place, place, window, None, weigh)
            for document, place in zip(documents, at, strict=True)
        ]
        rows.append(torch.cat(outputs, dim=2))
    return torch.cat(rows)


def banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Tensor | None,
    keys: Tensor | None,
    window: int,
    starts: Tensor | None,
    weigh: Callable[..., Tensor] = weighted_mean,
) -> Tensor:
    """Attention within a window, at a cost linear in T.

    Each block of `window` tokens sees itself and the block before it. The block before the first is
    the remembered part. Positions may have gaps, but two slots are never further apart than their
    positions, so everything that a query sees is in these two blocks.
    """
    (B, _, T, _), S = q.shape, k.shape[2]
    k, v, keys = latest(k, v, keys, S - T, window)
    remembered, empty = k.shape[2] - T, -T % window
    if keys is None:
        keys = torch.arange(S - T - remembered, S, device=q.device).expand(B, -1)
        queries = keys[:, remembered:]

    def blocks(x: Tensor) -> Tensor:  # (B, H, n · window, d) -> (B · n, H, window, d)
        return rearrange(x, "B H (n w) d -> (B n) H w d", w=window)

    def of_queries(x: Tensor, value: int = 0) -> Tensor:
        return blocks(F.pad(x, (0, 0, 0, empty), value=value))

    def of_keys(x: Tensor, value: int = 0) -> Tensor:  # -> (B · n, H, 2 · window, d)
        x = F.pad(x, (0, 0, window - remembered, empty), value=value)
        return torch.cat((blocks(x[:, :, :-window]), blocks(x[:, :, window:])), dim=2)

    def lines(pack, x: Tensor, value: int) -> Tensor:  # (B, T) -> (B · n, window)
        return pack(x[:, None, :, None], value)[:, 0, :, 0]

    visible = sees(
        lines(of_queries, queries, -1),
        lines(of_keys, keys, -1),
        window,
        None if starts is None else lines(of_queries, starts, 0),
    )
    y = weigh(of_queries(q), of_keys(k), of_keys(v), visible)
    return rearrange(y, "(B n) H w d -> B H (n w) d", B=B)[:, :, :T]


def latest(
    k: Tensor, v: Tensor, keys: Tensor | None, remembered: int, window: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Drop those of the `remembered` slots that no query sees.

    At most window - 1 remembered slots are left.
    """
    drop = max(0, remembered - window + 1)
    if keys is None or not remembered:
        return k[:, :, drop:], v[:, :, drop:], keys
    # empty slots may be among the remembered ones: first move them to the front
    order = keys[:, :remembered].sort(dim=1, stable=True).indices[:, drop:]  # (B, kept)
    index = order[:, None, :, None].expand(-1, k.shape[1], -1, k.shape[3])
    k, v = (
        torch.cat((x[:, :, :remembered].gather(2, index), x[:, :, remembered:]), 2) for x in (k, v)
    )
    keys = torch.cat((keys[:, :remembered].gather(1, order), keys[:, remembered:]), 1)
    return k, v, keys
