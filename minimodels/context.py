"""What a forward pass knows about its tokens, and what its layers share and record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimodels.ranks import averaged


class Record:
    """What the layers record in a forward pass, besides their outputs.

    A finished record ignores further values, because a layer that is recomputed in the backward
    pass records them again.

    losses      weighted losses, to be added to the loss
    observed    values for the log: one entry for each layer that records something
    traces      whole tensors, such as each token's experts; None: not kept
    """

    def __init__(self, traces: dict[str, list[Tensor]] | None = None):
        self.losses: dict[str, Tensor] = {}
        self.observed: dict[str, list[Tensor]] = {}
        self.pools: dict[str, list] = {}
        self.settlers: dict[str, Callable[[Record, list], None]] = {}
        self.traces = traces
        self.finished = False

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add a weighted loss. Losses with the same name are summed."""
        if self.finished:
            return
        self.losses[name] = self.losses[name] + value if name in self.losses else value

    def add_mean(self, name: str, weight: float, total: Tensor, count: Tensor) -> None:
        """Add a loss: a weight times a mean over all tokens. `total` is the sum over the layer's
        tokens, and `count` is their number."""
        self.pool(name, add_means, (name, weight, total, count))

    def observe(self, name: str, value: Tensor) -> None:
        """Append a value to the list of that name."""
        if not self.finished:
            self.observed.setdefault(name, []).append(value.detach())

    def pool(self, name: str, settle: Callable[[Record, list], None], sums: object) -> None:
        """Append a layer's sums over its tokens to a pool.

        After the pass every tensor in the pool is averaged over the ranks. Then
        `settle(record, pool)` turns the whole pool into losses and observations. So losses that are
        not sums over tokens are those of the whole batch.
        """
        if not self.finished:
            self.settlers[name] = settle
            self.pools.setdefault(name, []).append(sums)

    def trace(self, name: str, value: Tensor) -> None:
        """Append a whole tensor, such as each token's experts, if the caller asked for traces."""
        if self.traces is not None and not self.finished:
            self.traces.setdefault(name, []).append(value.detach())

    def finish(self) -> dict[str, Tensor]:
        """Finish the record, and return all losses, including those of the pools."""
        for name, sums in averaged(self.pools).items():
            self.settlers[name](self, sums)
        self.pools, self.finished = {}, True
        return self.losses


def add_means(record: Record, sums: list[tuple[str, float, Tensor, Tensor]]) -> None:
    """What Record.add_mean adds after the pass."""
    for name, weight, total, count in sums:
        record.add_loss(name, weight * (total / count.clamp(min=1)))


@dataclass
class Context:
    """What a forward pass knows about its tokens besides their values, and what its layers share.

    positions   (B, T) int64: each token's index in its row's text; -1 marks padding, which appears
                only at the end of a row and never changes the state. None: x continues where the
                state ended
    starts      (B, T) int64: the position at which the token's document begins, for rows with
                several documents. A token sees nothing of earlier documents. None: one document
    resets      (B, T) bool: whether a token is the first of its document that the layer sees;
                computed from starts
    tokens      (B, T) int64: the token ids; None outside a model
    embedded    (B, T, D): their embeddings; None outside a model
    cache       values that several layers use, such as rotary angles: the first layer that needs
                one computes it
    record      losses and observations of the pass
    """

    positions: Tensor | None = None
    starts: Tensor | None = None
    resets: Tensor | None = None
    tokens: Tensor | None = None
    embedded: Tensor | None = None
    cache: dict | None = None
    record: Record | None = None

    def __post_init__(self):
        self.cache = {} if self.cache is None else self.cache
        self.record = self.record or Record()
        if self.starts is None:
            return
        if self.positions is None:
            B, T = self.starts.shape
            self.positions = torch.arange(T, device=self.starts.device).expand(B, T)
        if self.resets is None:
            self.resets = (self.positions == self.starts) & (self.positions >= 0)

    def take(self, index: Tensor, positions: Tensor, resets: Tensor | None) -> Context:
        """The context of the tokens (B, k) at an index, at the given positions.

        Both contexts share the record.
        """

        def chosen(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.gather(1, index)

        embedded = self.embedded
        if embedded is not None:
            embedded = embedded.gather(1, index.unsqueeze(-1).expand(-1, -1, embedded.shape[-1]))
        return Context(
            positions,
            chosen(self.starts),
            resets,
            chosen(self.tokens),
            embedded,
            record=self.record,
        )

    @property
    def real(self) -> Tensor | None:
        """(B, T) bool: which tokens are not padding. None: all of them are real."""
        return None if self.positions is None else self.positions >= 0
