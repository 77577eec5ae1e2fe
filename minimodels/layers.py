"""The few parts that every architecture shares: normalisation, linear maps, rotary positions, the residual stack.

The layer contract. Every sequence layer is an `nn.Module`, made as `Layer(config)`, with

    forward(x: (B, T, D), state=None, positions=None, memo=None) -> (y: (B, T, D), state)

x is the normed residual stream, y what a `Residual` adds to it. T is 1 or more. `state` is all that the layer remembers of the
tokens before x (None: there were none). Training passes None, prefill is one long chunk, decoding is T = 1: there is no second
path for inference. A state that was handed out never changes: states may use the same memory, yet one can go on from any of
them, more than once.

`positions` (B, T) int64 says where each token stands in its row's text, and -1 marks padding, which stands only behind a row's
last token and touches no state; a row may hold nothing else. What y is there does not matter, but it is finite. None means that
x goes on where the state ended. Mixture-of-depths needs both: it hands its group a few tokens at their original positions, and
in a batch a different number of them per row.

`memo` is a dictionary that a stack makes for one forward pass and hands to its layers in turn: what follows from the positions
alone, such as rotary angles, is computed by the first layer that needs it. None: the layer stands alone.

A wrapper, made as `Wrapper(config, group)` around a `Stack`, stands in the residual stream itself: its y is what becomes of x.
It is not given the memo, for the stack within has positions of its own.

What else a layer may have, and the model then asks for by name:

- two dictionaries of tensors that tell of its last forward: `auxiliary_losses`, already weighted, which are added to the loss;
  `observed`, detached, which the training log records. (A wrapper that runs its group more than once adds them up.)
- `causal`, whether no token depends on a later one in the present mode, if that is not always so
- `after_step()`, called once after each optimizer step; no graph is kept beyond it, so that a model can be copied
- `forget()`, called where a forward pass leaves it out: it then tells of nothing, and not of an older pass
- `no_weight_decay`, the names of its matrices that are not to decay
- `operations`, the names of those for which `impl` chooses a path
- `flops(context)`, as PyTorch's counter finds them on the torch path, `state_bytes(context, itemsize)` and, where tokens meet
  only part of it, `idle_parameters()`, if it costs anything but its `nn.Linear` parts. To count, models are made on the meta
  device, where tensors have no values.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import CHOICES
from minimodels.errors import InputError
from minimodels.kernels import FASTER, require


class RMSNorm(nn.Module):
    """y = w · x / sqrt(mean(x²) + eps) over the last dimension, the mean in fp32 (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-5, learned: bool = True):
        super().__init__()
        self.width, self.eps = width, eps
        self.weight = nn.Parameter(torch.ones(width)) if learned else None  # None: w = 1

    def forward(self, x: Tensor) -> Tensor:
        weight = (
            None if self.weight is None else self.weight.to(x.dtype)
        )  # another type than that of x takes a slow path
        return F.rms_norm(x, (self.width,), weight, self.eps)


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + update, and x + update itself: x, update (..., D), weight (D,) -> two (..., D).

    Under autocast the norm comes in its precision: each of the linear maps that read it would have to cast it otherwise.
    """
    path = choose(impl, "rmsnorm", x.device)
    if path == "triton":
        from minimodels.kernels.rmsnorm import rmsnorm as kernel

        return kernel(x, weight, eps, update)
    x = x if update is None else x + update
    if path == "reference":
        full = full_precision(x)
        y = (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps)).to(x.dtype) * weight
    else:
        y = F.rms_norm(x, weight.shape, weight, eps)
    return y.to(norm_dtype(x)), x


def norm_dtype(x: Tensor) -> torch.dtype:
    """The precision of x's norm: that of autocast where x is in fp32 under it, else that of x."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


class Residual(nn.Module):
    """x + layer(norm(x)): every layer of a model but the wrappers stands in one of these. The sum is left to the next norm,
    so that one kernel reads both: what goes in and comes out is x and the `update` that is still to be added to it."""

    operations = ("rmsnorm",)

    def __init__(self, width: int, layer: nn.Module, eps: float, impl: str = "auto"):
        super().__init__()
        self.norm = RMSNorm(width, eps)
        self.layer = layer
        self.impl = impl

    def forward(self, x: Tensor, update: Tensor | None, state=None, positions=None, memo=None):
        normed, x = rmsnorm(x, self.norm.weight, self.norm.eps, update, self.impl)
        update, state = self.layer(normed, state, positions, memo)
        return x, update, state


class Stack(nn.ModuleList):
    """Layers one after the other; the state is the list of theirs. Itself a layer, so that a wrapper can hold one."""

    def forward(self, x: Tensor, state=None, positions=None):
        after, update, memo = [], None, {}
        for layer, before in zip(self, state or [None] * len(self), strict=True):
            if isinstance(layer, Residual):
                x, update, now = layer(x, update, before, positions, memo)
            else:
                x, now = layer(x if update is None else x + update, before, positions)
                update = None
            after.append(now)
        return x if update is None else x + update, after


def linear(inputs: int, outputs: int, std: float, bias: bool = False) -> nn.Linear:
    """A linear map with weights from N(0, std²) and, if any, biases of zero."""
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def full_precision(x: Tensor) -> Tensor:
    """x in fp32, or in fp64 as it is: what routing decisions and recurrent states are computed in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def choose(impl: str, operation: str, device: torch.device) -> str:
    """Which path an operation takes: "reference", "torch" or "triton". Raises InputError if `impl` cannot be honoured."""
    if impl == "auto":
        return "triton" if device.type == "cuda" and operation in FASTER else "torch"
    if impl not in CHOICES["impl"]:
        raise InputError("impl", impl, ", ".join(CHOICES["impl"]))
    if impl == "triton":
        require(operation, device)
    return impl


# What a part of a model costs.


def flops(module: nn.Module, context: int) -> float:
    """Forward FLOPs per token of any part of a model, averaged over a sequence of `context` tokens."""
    if hasattr(module, "flops"):
        return module.flops(context)
    if isinstance(module, nn.Linear):
        return 2 * module.weight.numel()
    return sum(flops(child, context) for child in module.children())


def idle_parameters(module: nn.Module) -> float:
    """Parameters that a token does not meet, on average."""
    if hasattr(module, "idle_parameters"):
        return module.idle_parameters()
    return sum(idle_parameters(child) for child in module.children())


def state_bytes(module: nn.Module, context: int, itemsize: int) -> float:
    """Bytes remembered per sequence after `context` tokens, but for the integers that say which tokens these are."""
    if hasattr(module, "state_bytes"):
        return module.state_bytes(context, itemsize)
    return sum(state_bytes(child, context, itemsize) for child in module.children())
