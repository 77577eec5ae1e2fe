"""What every architecture shares: the layer contract, the residual stream, normalisation, costs.

The layer contract. A sequence layer is an `nn.Module`, made as `Layer(options, config, place)`:

    forward(x: (B, T, D), state=None, context=None) -> (y: (B, T, D), state)

x is the normalised residual stream, and a residual connection (RESIDUALS) adds y to the stream. T
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
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import IMPLS, Config, Residuals
from minimodels.errors import InputError, Positive
from minimodels.kernels import FASTER, require
from minimodels.options import option
from minimodels.ranks import averaged


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


class RMSNorm(nn.Module):
    """y = w · x / sqrt(mean(x²) + eps) over the last dimension, with the mean in fp32.

    arXiv:1910.07467. `learned` is false for a norm without w. With several `groups` each part of
    the last dimension has its own mean.
    """

    def __init__(self, width: int, eps: float = 1e-5, learned: bool = True, groups: int = 1):
        super().__init__()
        self.width, self.eps, self.groups = width, eps, groups
        self.weight = nn.Parameter(torch.ones(width)) if learned else None  # None: w = 1

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> (..., D)."""
        # F.rms_norm takes a slow path if the dtypes of x and weight differ
        weight = None if self.weight is None else self.weight.to(x.dtype)
        if self.groups == 1:
            return F.rms_norm(x, (self.width,), weight, self.eps)
        x = x.unflatten(-1, (self.groups, -1))
        x = F.rms_norm(x, x.shape[-1:], None, self.eps).flatten(-2)
        return x if weight is None else x * weight


def rmsnorm(
    x: Tensor, weight: Tensor, eps: float, update: Tensor | None = None, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """RMSNorm of x + update, and x + update itself.

    x, update (..., D), weight (D,) -> two (..., D). Under autocast the norm has autocast's
    precision, because otherwise each of the linear maps that read it would have to cast it.
    """
    path = choose(impl, "rmsnorm", x.device, portable=True)
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
    """The dtype of x's norm: autocast's if x is in fp32 under autocast, else x's own."""
    if x.dtype == torch.float32 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


NORMS = {  # of the residual stream; one kind per model
    "rms": RMSNorm,
    "plain": partial(RMSNorm, learned=False),
    "layer": nn.LayerNorm,
}


def make_norm(config: Config) -> nn.Module:
    """Make a norm of the residual stream."""
    return NORMS[config.norm](config.width, config.norm_eps)


def norm_of_sum(
    norm: nn.Module, x: Tensor, update: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """norm(x + update), and x + update itself; a kernel computes both at once."""
    if (
        isinstance(norm, RMSNorm)
        and is_plain(norm)
        and choose(impl, "rmsnorm", x.device, portable=True) != "torch"
    ):
        weight = x.new_ones(norm.width) if norm.weight is None else norm.weight
        return rmsnorm(x, weight, norm.eps, update, impl)
    x = x if update is None else x + update
    return norm(x).to(norm_dtype(x)), x


@dataclass(frozen=True)
class Joint:
    """The options that every layer has besides its own: how it is added to the residual stream."""

    residual: Residuals | None = option(
        None,
        "where the layer's norm is: pre_norm (before it), post_norm (after it), sandwich (both) or "
        "deep_norm (on the stream itself); by default as in the model",
    )
    residual_scale: Positive | None = option(
        None, "β, factor on what the layer adds; by default the model's"
    )
    stream_scale: Positive = option(
        1.0, "α, factor on the stream before deep_norm adds the layer to it"
    )


class Residual(nn.Module):
    """A layer with its norm, added to the residual stream. β is 1 unless residual_scale is set.

    The next norm computes the sum, so that one kernel reads both terms. The input and the output
    are therefore x and the `update` that is still to be added to it.
    """

    def __init__(self, config: Config, layer: nn.Module, joint: Joint = Joint()):
        super().__init__()
        self.norm = make_norm(config)
        self.layer, self.impl = layer, config.impl
        self.scale = config.residual_scale
        if joint.residual_scale is not None:
            self.scale = joint.residual_scale
        self.alpha = joint.stream_scale
        if self.alpha != 1.0 and not isinstance(self, DeepNorm):
            raise InputError("stream_scale", self.alpha, "1.0, or residual=deep_norm")

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        """x, update (B, T, D) -> the new x, the new update, and the layer's state."""
        raise NotImplementedError


class PreNorm(Residual):
    """x + β layer(norm(x))."""

    operations = ("rmsnorm",)

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        normed, x = norm_of_sum(self.norm, x, update, self.impl)
        update, state = self.layer(normed, state, context)
        return x, scaled(update, self.scale), state


class PostNorm(Residual):
    """x + β norm(layer(x)) (OLMo 2, arXiv:2501.00656).

    The layer reads the stream itself, and the norm fixes the size of what is added to it.
    """

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        x = x if update is None else x + update
        update, state = self.layer(x, state, context)
        return x, scaled(self.norm(update), self.scale), state


class Sandwich(Residual):
    """x + β after(layer(norm(x))), with a norm on either side (Gemma 2, arXiv:2408.00118)."""

    operations = ("rmsnorm",)

    def __init__(self, config: Config, layer: nn.Module, joint: Joint = Joint()):
        super().__init__(config, layer, joint)
        self.after = make_norm(config)

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        normed, x = norm_of_sum(self.norm, x, update, self.impl)
        update, state = self.layer(normed, state, context)
        return x, scaled(self.after(update), self.scale), state


class DeepNorm(Residual):
    """α n + β layer(n), where n = norm(x): the stream itself is normalised.

    The original transformer (arXiv:1706.03762) normalises every sum in this way. DeepNorm
    (arXiv:2203.00555) adds a factor α above 1, so that a thousand layers train; MiniMax-01
    (arXiv:2501.08313) uses it. Here the next layer has the norm of a sum, and the model has the
    norm of the last one.
    """

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        x = self.norm(x if update is None else x + update)  # in the stream's precision
        update, state = self.layer(x.to(norm_dtype(x)), state, context)
        return scaled(x, self.alpha), scaled(update, self.scale), state


# how a layer is added to the residual stream
RESIDUALS = {
    "pre_norm": PreNorm,
    "post_norm": PostNorm,
    "sandwich": Sandwich,
    "deep_norm": DeepNorm,
}


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


class FullPrecisionLinear(nn.Linear):
    """A linear map computed in full precision even if x or the parameters have less.

    Routers need it. Autocast must be off around it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs) in fp32 (fp64 if x is)."""
        bias = None if self.bias is None else full_precision(self.bias)
        return F.linear(full_precision(x), full_precision(self.weight), bias)


def linear(
    inputs: int,
    outputs: int,
    std: float,
    bias: bool = False,
    kind: type[nn.Linear] = nn.Linear,
) -> nn.Linear:
    """A linear map with weights from N(0, std²) and, if any, biases of zero."""
    layer = kind(inputs, outputs, bias=bias)
    nn.init.normal_(layer.weight, std=std)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def is_plain(part: nn.Module) -> bool:
    """Whether a part does nothing but apply its weight, so that an operation may use the weight
    instead of calling the part.

    It does more if it has hooks, an adapter or a quantised weight, or if torch.func.functional_call
    has replaced the weight.
    """
    hooks = (
        part._forward_hooks,
        part._forward_pre_hooks,
        part._backward_hooks,
        part._backward_pre_hooks,
    )
    known = type(part) in (nn.Linear, nn.Embedding, RMSNorm)
    return known and type(part.weight) in (nn.Parameter, type(None)) and not any(hooks)


def scaled(x: Tensor, factor: float) -> Tensor:
    """x times a factor that is rounded to x's precision, as in published models."""
    if factor == 1.0:
        return x
    return x * torch.full((), factor, dtype=x.dtype, device=x.device)


def full_precision(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is in fp64. Routing and recurrent states use this precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def choose(impl: str, operation: str, device: torch.device, portable: bool = False) -> str:
    """The path of an operation: "reference", "torch" or "triton".

    torch.export and torch.func know only PyTorch's own operations. Under them the reference
    replaces the torch path, unless that path is `portable`: made of such operations only. Raises
    InputError if `impl` is unknown or cannot be used.
    """
    if impl not in ("auto", *IMPLS):
        raise InputError("impl", impl, ", ".join(IMPLS))
    if impl in ("auto", "torch") and not portable and is_transformed():
        return "reference"
    if impl == "auto":
        return "triton" if device.type == "cuda" and operation in FASTER else "torch"
    if impl == "triton":
        require(operation, device)
    return impl


def is_transformed() -> bool:
    """Whether torch.export or a transformation of torch.func (grad, vmap, ...) runs the program.

    Then no size and no branch may depend on the values of a tensor.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return torch._C._are_functorch_transforms_active()


def by_token(
    step: Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]],
    state: Tensor,
    parts: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor]:
    """A recurrence step(state, now) -> (state, output) over the second dimension of all parts.

    Returns the outputs (B, T, ...) and the final state. In torch.export it is one loop, so that a
    text may have any length.
    """
    if torch.compiler.is_exporting():
        from torch._higher_order_ops.scan import scan

        state, y = scan(step, state, tuple(part.transpose(0, 1) for part in parts))
        return y.transpose(0, 1), state
    outputs = []
    # unbind, because indexing [:, t] would make the backward pass quadratic in T
    for now in zip(*(part.unbind(1) for part in parts), strict=True):
        state, output = step(state, now)
        outputs.append(output)
    return torch.stack(outputs, dim=1), state


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
