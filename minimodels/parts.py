"""The parts of which layers are made: linear maps and norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.paths import choose, full_precision


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
