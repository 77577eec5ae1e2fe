"""The paths on which an operation can run: the reference, PyTorch's operations, or a kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minimodels.config import IMPLS
from minimodels.errors import InputError
from minimodels.kernels import FASTER, require


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


def full_precision(x: Tensor) -> Tensor:
    """x in fp32, or unchanged if it is in fp64. Routing and recurrent states use this precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
