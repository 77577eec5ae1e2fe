"""Context parallelism: several ranks share each text, by means of the state that layers carry.

Rank c of N has the c-th piece of the text. For each block it receives the state after all earlier
tokens from the previous rank, applies the block as in inference, and sends its own state on.
While rank 1 applies block l, rank 0 applies block l + 1, so L blocks take L + N - 1 rounds.
Gradients run the other way. Layers need no change, and the result is that of the whole text. With
sharding the ranks wait for each other at every block, because all of them gather its weights.
Models that remember only linear recurrences need not wait, and take the path in prefix.py.

    rank 0    block 0   block 1   block 2             a message is what the block remembers: keys and
    rank 1              block 0   block 1   block 2   values of all tokens before, or a state of
    rank 2                        block 0   block 1   constant size
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from minimodels.errors import InputError
from minimodels.lm import LM
from minimodels.ranks import rank
from minimodels.training.blocks import blocks
from minimodels.training.prefix import is_linear, split_linear


def check_causal(model: LM, pieces: int) -> None:
    """Raise InputError if texts are in pieces, but a layer needs the whole text at once."""
    if pieces > 1 and not model.causal:
        accepted = "1, because a layer routes over the whole text"
        raise InputError("context_parallel", pieces, accepted)


def split_context(model: LM, pieces: int) -> None:
    """Let every `pieces` consecutive ranks share their texts.

    Call this after `recompute`, so that a recomputed block does not send again. Raises InputError
    if a layer needs the whole text at once.
    """
    check_causal(model, pieces)
    if pieces > 1 and is_linear(model):
        split_linear(model, pieces)
    elif pieces > 1:
        for block in blocks(model):
            block.forward = Carried(block.forward, pieces)


class Carried:
    """A block's forward pass, which receives the state before it and sends the one after it."""

    def __init__(self, forward: Callable, pieces: int):
        self.forward, self.pieces = forward, pieces
        self.forms: dict[tuple, Any] = {}  # what sets a state's form -> a state without values

    def __call__(self, x: Tensor, *arguments):
        """As the block: x, perhaps an update, state, context -> x, perhaps an update, state."""
        *update, state, context = arguments
        place, me = rank() % self.pieces, rank()
        key = (x.shape, x.dtype, torch.is_grad_enabled(), context.positions is None)
        new = key not in self.forms
        if place > 0:
            if new:
                self.forms[key] = receive_form(me - 1)
            leaves, structure = tree_flatten(self.forms[key])
            tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            x, *received = Receive.apply(x, me - 1, tensors)
            received = iter(received)
            leaves = [next(received) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            state = tree_unflatten(leaves, structure)
        x, *update, state = self.forward(x, *update, state, context)
        if place < self.pieces - 1:
            if new:
                self.forms.setdefault(key, send_form(state, me + 1))
            tensors = [leaf for leaf in tree_flatten(state)[0] if isinstance(leaf, Tensor)]
            x = Send.apply(x, me + 1, *tensors)
        return x, *update, state


class Receive(torch.autograd.Function):
    """Receive tensors from another rank. Backward sends their gradients to it.

    x passes through, here and in Send, so that every backward runs, in reverse order.
    """

    @staticmethod
    def forward(ctx, x: Tensor, source: int, form: list[Tensor]):
        tensors = [torch.empty_like(each, device=x.device) for each in form]
        for tensor in filter(Tensor.numel, tensors):
            dist.recv(tensor, source)
        ctx.source = source
        ctx.mark_non_differentiable(*(each for each in tensors if not each.is_floating_point()))
        return x.view_as(x), *tensors

    @staticmethod
    def backward(ctx, dx: Tensor, *gradients: Tensor):
        for gradient in filter(has_gradient, gradients):
            dist.send(gradient.contiguous(), ctx.source)
        return dx, None, None


class Send(torch.autograd.Function):
    """Send tensors to another rank. Backward receives their gradients from it."""

    @staticmethod
    def forward(ctx, x: Tensor, target: int, *tensors: Tensor):
        for tensor in filter(Tensor.numel, tensors):
            dist.send(tensor.contiguous(), target)
        ctx.target, ctx.form = target, form_of(tensors)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx: Tensor):
        gradients = [torch.zeros_like(each, device=dx.device) for each in ctx.form]
        for gradient in filter(has_gradient, gradients):
            dist.recv(gradient, ctx.target)
        return dx, None, *gradients


def has_gradient(tensor: Tensor) -> bool:
    """Whether a gradient of this tensor is sent: it is floating-point and not empty."""
    return tensor.is_floating_point() and tensor.numel() > 0


def form_of(state: Any) -> Any:
    """A state with tensors on the meta device: shapes and types without values."""
    return tree_map_only(
        Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device="meta"), state
    )


def send_form(state: Any, target: int) -> Any:
    """Send another rank the form of the states that follow, and return the form."""
    form = form_of(state)
    dist.send_object_list([form], target, device=torch.device("cpu"))
    return form


def receive_form(source: int) -> Any:
    """The form that another rank sends."""
    told = [None]
    dist.recv_object_list(told, source, device=torch.device("cpu"))
    return told[0]
