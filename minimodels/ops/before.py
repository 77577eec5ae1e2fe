"""The state before a piece of a text, if other ranks have the pieces before.

In place of a state, an operation may be given a `Before`. It then computes how its own piece
changes any state. The ranks exchange these maps, and each derives its own state from them. None of
them waits for another one's computation.

A recurrence that is linear in its state turns S into P S + W. W is the final state if S is zero,
and P is what is left of S: a decay, or a matrix. For piece c of a text

    S_c = P_{c-1} S_{c-1} + W_{c-1},    S_0 = 0        (1)
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor


class Before:
    """A state that is still to be found. The ranks of the group have the pieces of a text, in
    order."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    def find(
        self, P: Tensor, W: Tensor, apply: Callable[[Tensor, Tensor], Tensor] = torch.mul
    ) -> tuple[Tensor, Tensor]:
        """Equation (1): the states before and after this rank's piece, from its P and W.

        apply(P, S) is P S. All ranks of the group must call this together.
        """
        state, sizes = torch.zeros_like(W), (P.numel(), W.numel())
        for piece in Pieces.apply(torch.cat((P.flatten(), W.flatten())), self.group):
            left, written = piece.split(sizes)
            state = apply(left.view_as(P), state) + written.view_as(W)
        return state, apply(P, state) + W


class Pieces(torch.autograd.Function):
    """x (...) of the N-1 pieces before this one, the nearest last: (N-1, ...).

    A piece that would come before the text is 0. Because every rank has N-1 pieces, every rank
    takes part in backward.
    """

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group, ctx.place, ctx.count = group, dist.get_rank(group), dist.get_world_size(group)
        pieces = [torch.empty_like(x) for _ in range(ctx.count)]
        dist.all_gather(pieces, x, group)
        missing = [torch.zeros_like(x)] * (ctx.count - 1 - ctx.place)
        return torch.stack(missing + pieces[: ctx.place])

    @staticmethod
    def backward(ctx, gradient: Tensor):
        gradients = gradient.new_zeros(ctx.count, *gradient.shape[1:])
        gradients[: ctx.place] = gradient[len(gradient) - ctx.place :]
        dist.all_reduce(gradients, group=ctx.group)
        return gradients[ctx.place], None
