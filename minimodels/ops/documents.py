"""Documents within a row: a choice made per document rather than per row."""

from __future__ import annotations

import torch
from torch import Tensor


def top_per_document(
    scores: Tensor, starts: Tensor, fraction: float, real: Tensor | None = None
) -> Tensor:
    """True at the highest scores of each document: a fraction of its tokens, rounded up.

    scores (B, T); starts (B, T), the same for all tokens of a document; real (B, T) bool, False for
    padding, which is never chosen and does not count. Returns (B, T) bool.
    """
    B, T = scores.shape
    real = torch.ones_like(starts, dtype=torch.bool) if real is None else real
    order = scores.masked_fill(~real, float("-inf")).argsort(dim=1, descending=True, stable=True)
    # by document, then by score
    order = order.gather(1, starts.gather(1, order).argsort(dim=1, stable=True))
    begin = starts.gather(1, order)  # (B, T), ascending
    first = torch.ones_like(real)  # whether a document begins here, in this order
    first[:, 1:] = begin[:, 1:] != begin[:, :-1]
    places = torch.arange(T, device=order.device).expand(B, T)
    rank = places - (places * first).cummax(1).values  # a token's rank within its document
    document = first.cumsum(1) - 1
    length = torch.zeros_like(starts).scatter_add(1, document, real.gather(1, order).long())
    count = (length * fraction - 1e-6).ceil().clamp(min=1)  # 0.07 · 100 is 7.000000000000001
    chosen = (rank < count.gather(1, document)) & real.gather(1, order)
    return torch.empty_like(chosen).scatter_(1, order, chosen)
