"""One training step, the same for train.py and the benchmarks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from minimodels.lm import LM
from minimodels.ranks import whole
from minimodels.training.guard import Guard
from minimodels.training.parallel import synchronise


class Step(NamedTuple):
    """The measurements of a step. Nothing here has waited for the GPU."""

    # this rank's share of the cross-entropy of each forward pass, in nats per token
    losses: list[Tensor]
    # this rank's shares of the last forward pass's "cross_entropy" and of the layers' own losses
    parts: dict[str, Tensor]
    norm: Tensor  # of the gradient, before it was clipped


def training_step(
    model: LM,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, ...]],
    autocast: torch.autocast,
    clip: float = 0.0,
    loss_function: Callable | None = None,
    guard: Guard | None = None,
) -> Step:
    """One optimizer step over the mean loss of the batches: forward, backward, clip, update.

    Each batch is (tokens, targets) or (tokens, targets, starts), (B, T) on the model's device.
    `clip` is the largest norm of the gradient; 0: no limit. `loss_function`, such as a compiled
    one, replaces model.loss. A step that `guard` finds bad changes nothing.
    """
    loss_function = loss_function or model.loss
    batches, losses = list(batches), []
    for number, batch in enumerate(batches, 1):
        synchronise(model, now=number == len(batches))
        with autocast:
            loss, parts = loss_function(*batch)
        (loss / len(batches)).backward()
        losses.append(parts["cross_entropy"])
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf))
    taken = 1.0
    if guard is not None:
        optimizer.found_inf = guard.skip(losses, norm)  # 1 leaves everything as it was
        taken = 1 - optimizer.found_inf
    optimizer.step()
    optimizer.zero_grad()
    model.after_step(taken)
    return Step(losses, parts, norm)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give all parameters one learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate
