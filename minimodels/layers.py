"""The layer contract: what every architecture is to its model, and what it costs.

A sequence layer is an `nn.Module`, made as `Layer(options, config, place)`:

    forward(x: (B, T, D), state=None, context=None) -> (y: (B, T, D), state)

x is the normalised residual stream, to which a residual connection (minimodels/residual.py) adds
y. T is 1 or more. `state` is all that the layer remembers of the tokens before x; None means that
there were none. Training passes None, prefill is one long chunk, and decoding is T = 1, so there is
no second path for inference. A layer never changes a state that it has returned. States may share
memory, but a caller can continue from any of them, more than once.

`context` is what a forward pass knows about its tokens besides their values, and what its layers
record (minimodels/context.py). None means that x continues where the state ended, as one document
without padding.

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

from typing import NamedTuple

from torch import Tensor, nn

from minimodels.context import Context
from minimodels.residual import Residual


class Place(NamedTuple):
    """A layer's place in its model; layers inside wrappers count like the others."""

    index: int = 0  # among the model's layers, from 0; for a shared layer, its first use
    depth: int = 1  # how many layers the model has


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
