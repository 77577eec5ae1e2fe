"""The processes that train one model together. Each of them is a rank.

Every rank has a copy of the model, or a part of it, and its own tokens of each batch. The loss of a
rank is its share: the loss of the batch is the mean of the shares, so the gradient of the batch is
the mean of the gradients. A loss that is not a sum over tokens, such as a product of two means, is
computed from the sums of all ranks. All ranks must call the functions here together.

In one process they change nothing.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from minimodels.errors import InputError

Result = TypeVar("Result")
_alone = False


def joined() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """The number of this process, from 0. Rank 0 prints and writes."""
    if joined():
        return dist.get_rank()
    # torchrun numbers the processes before they join
    return int(os.environ.get("RANK", "0")) if os.environ.get("WORLD_SIZE", "1") != "1" else 0


def world() -> int:
    """How many ranks compute together."""
    return dist.get_world_size() if joined() and not _alone else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this block a rank computes on its own, like a single process."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


class Total(torch.autograd.Function):
    """The sum of a tensor over the ranks, on each of them. Its gradient is summed likewise."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return Total.apply(gradient)


def total(x: Tensor) -> Tensor:
    """The sum of x over the ranks, with its gradient."""
    return x if world() == 1 else Total.apply(x)


def average(x: Tensor) -> Tensor:
    """The mean of x over the ranks, with its gradient."""
    return x if world() == 1 else Total.apply(x) / world()


def averaged(tree: Any) -> Any:
    """A tree of lists, tuples and dicts with each tensor replaced by its mean over the ranks, which
    takes one message."""
    if world() == 1:
        return tree
    leaves, structure = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors:
        return tree
    means = average(torch.cat([tensor.flatten() for tensor in tensors]))
    means = iter(means.split([tensor.numel() for tensor in tensors]))
    leaves = [next(means).view_as(x) if isinstance(x, Tensor) else x for x in leaves]
    return tree_unflatten(leaves, structure)


def largest(*values: float) -> list[float]:
    """The largest of each value over the ranks. It does not wait for a GPU."""
    if world() == 1:
        return list(values)
    values = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values.tolist()


def from_first(make: Callable[[], Result]) -> Result:
    """What `make` returns on rank 0, where alone it runs. All ranks raise its InputError."""
    if world() == 1:
        return make()
    result, error = None, None
    if rank() == 0:
        try:
            result = make()
        except InputError as raised:
            error = (raised.field, raised.value, raised.accepted, raised.excerpt)
    sent = [result, error]
    dist.broadcast_object_list(sent, device=torch.device("cpu"))
    if sent[1] is not None:
        raise InputError(*sent[1])
    return sent[0]


def whole(x: Tensor) -> Tensor:
    """A tensor that may be distributed over the ranks, as one tensor in each of them."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
