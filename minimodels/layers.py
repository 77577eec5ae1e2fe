"""The layer contract, what a forward pass knows and records, and what layers cost.

The layer contract. A sequence layer is an `nn.Module`, made as `Layer(options, config, place)`:

    forward(x: (B, T, D), state=None, context=None) -> (y: (B, T, D), state)

x is the normalised residual stream, and a residual connection (minimodels/residual.py) adds y to the
stream. T
is 1 or more. `state` is all that the layer remembers of the tokens before x; None means that there
were none. Training passes None, prefill is one long chunk, and decoding is T = 1, so there is no
second path for inference. A layer never changes a state that it has returned. States may share
memory, but a caller can continue from any of them, more than once.

`context` is what a forward pass knows about its tokens besides their values; see Context. None
means that x continues where the state ended, as one document without padding.

A wrapper is made as `Wrapper(options, config, place, group)` around a `Stack`. It works on the
residual stream itself: its y replaces x. It passes a context of its own to its group.

`options` is an instance of the class attribute `Options`, a frozen dataclass. `place` is the
layer's Place. A class also has

- `paper`, where the layer was published, and `presets`, models by name (see minimodels/presets.py)

and may have

- `on_stream`: True for a layer that works on the residual stream itself, as a wrapper does
- `causal`: whether no token depends on a later one in the present mode, for a layer of which this
  is not always true
- `waits`: why the host must wait for values in a step of one token, if it must. Such a step cannot
  be a CUDA graph (see minimodels/decoding.py)
- `after_step(taken)`: called once after each optimizer step; taken is 0 if that was skipped, else 1
- `no_weight_decay`: the names of its matrices that do not decay
- `operations`: the names of the operations for which `impl` chooses a path
- `flops(context)`: forward FLOPs per token in a text of `context` tokens, as PyTorch's counter
  finds them on the torch path; by default the FLOPs of its `nn.Linear` parts
- `unrouted_flops(context)`: the same if every token took every path; by default flops
- `state_bytes(context, itemsize)`: bytes that are remembered after `context` tokens
- `inactive_parameters()`: parameters that a token does not use, on average

To count costs, models are made on the meta device, on which tensors have no values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minimodels.ranks import averaged
from minimodels.residual import Residual


class Place(NamedTuple):
    """A layer's place in its model; layers inside wrappers count like the others."""

    index: int = 0  # among the model's layers, from 0; for a shared layer, its first use
    depth: int = 1  # how many layers the model has


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


class Stack(nn.ModuleList):
    """A sequence of layers; its state is the list of their states.

    A stack is itself a layer, so a wrapper can contain one. A module that appears twice is one
    layer with two states.
    """

    def forward(self, x: Tensor, state: list | None = None, context: Context | None = None):
        """x (B, T, D) -> y (B, T, D) and the states of the layers."""
        context = context or Context()
        after, update = [], None
        for layer, before in zip(self, state or [None] * len(self), strict=True):
            if isinstance(layer, Residual):
                x, update, now = layer(x, update, before, context)
            else:
                x, now = layer(x if update is None else x + update, before, context)
                update = None
            after.append(now)
        return x if update is None else x + update, after


def operations(model: nn.Module) -> list[str]:
    """The operations of a model for which `impl` chooses a path, each listed once."""
    named = [name for module in model.modules() for name in getattr(module, "operations", ())]
    return list(dict.fromkeys(named))


# The costs of a part of a model.


def flops(module: nn.Module, context: int) -> float:
    """Forward FLOPs per token of any part of a model, averaged over `context` tokens."""
    if hasattr(module, "flops"):
        return module.flops(context)
    if isinstance(module, nn.Linear):
        return 2 * module.weight.numel()
    return sum(flops(part, context) for part in parts(module))


def unrouted_flops(module: nn.Module, context: int) -> float:
    """The same if every token took every path: every expert, every wrapped layer."""
    if hasattr(module, "unrouted_flops"):
        return module.unrouted_flops(context)
    if hasattr(module, "flops") or isinstance(module, nn.Linear):
        return flops(module, context)
    return sum(unrouted_flops(part, context) for part in parts(module))


def state_bytes(module: nn.Module, context: int, itemsize: int) -> float:
    """Bytes remembered per sequence after `context` tokens.

    The count leaves out the integers that say which tokens are remembered.
    """
    if hasattr(module, "state_bytes"):
        return module.state_bytes(context, itemsize)
    return sum(state_bytes(part, context, itemsize) for part in parts(module))


def parts(module: nn.Module) -> list[nn.Module]:
    """The parts of a module. A stack lists a shared layer once for every use."""
    return list(module) if isinstance(module, Stack) else list(module.children())


def inactive_parameters(module: nn.Module) -> float:
    """Parameters that a token does not use, on average. A shared layer counts once."""
    seen: set[int] = set()

    def count(part: nn.Module) -> float:
        if id(part) in seen:
            return 0
        seen.add(id(part))
        if hasattr(part, "inactive_parameters"):
            return part.inactive_parameters()
        return sum(map(count, part.children()))

    return count(module)
