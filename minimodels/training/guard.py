"""Skip bad steps before they spoil the weights, and explain them.

A step is bad if its loss or its gradient is not finite, or if its loss is far above that of
guessing. The device decides this, so the CPU never waits: a fused optimizer whose `found_inf` is 1
leaves weights, moments and its count unchanged. After more bad steps than are allowed, all later
steps are skipped too. So when the CPU checks, the weights are still those before the failing step,
which is then repeated to find the layer.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimodels.command import fail
from minimodels.lm import LM
from minimodels.ranks import whole, world
from minimodels.training import checkpoint, shards

HIGHEST = 10  # allowed loss, as a multiple of the loss of guessing


class Guard:
    """Counts the bad steps of a run. `allowed`: how many it may have."""

    def __init__(self, model: LM, allowed: int = 0):
        device = model.device
        self.allowed, self.highest = allowed, HIGHEST * math.log(max(model.config.vocab, 2))
        self.bad = torch.zeros((), device=device)  # steps so far
        self.since = torch.zeros((), device=device)  # steps since the one that failed, inclusive

    def skip(self, losses: list[Tensor], norm: Tensor) -> Tensor:
        """1.0 if a step must be skipped, otherwise 0.0: a tensor on the device, the same for all
        processes.

        losses: cross-entropies in nats, each a scalar. norm: of the gradient.
        """
        bad = ~(norm.isfinite() & (torch.stack(losses) <= self.highest).all())  # NaN is not <=
        bad = bad.to(self.bad.dtype)
        if world() > 1:
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.bad += bad
        failed = (self.bad > self.allowed).to(bad.dtype)
        self.since += failed
        return torch.maximum(bad, failed)

    def failing(self, step: int) -> int | None:
        """How many of the `step` steps came before the one that failed; None if none failed. Waits
        for the device."""
        return step - int(self.since) if self.since else None


def refuse_bad_step(
    failing: int | None,
    model: LM,
    batches: Iterable[tuple[Tensor, ...]],
    autocast: torch.autocast,
    run: Path,
) -> None:
    """Exit with an explanation if a run has failed, before it is saved. `failing`: the number of
    steps before the one that failed, whose batches are given; None if no step failed, so that only
    the weights are checked."""
    if failing is not None:
        reason = f"step {failing + 1} was bad: {explain(model, batches, autocast)}"
    elif not whole(sum(parameter.detach().sum() for parameter in model.parameters())).isfinite():
        reason = "the weights are not finite"
    else:
        return
    leave(reason, run)


def refuse_score(loss: float, run: Path) -> None:
    """Exit if the validation loss is not finite, before it is saved."""
    if not math.isfinite(loss):
        leave("the validation loss is not finite", run)


def leave(reason: str, run: Path) -> NoReturn:
    """Exit with the reason, and say what was saved."""
    again = f"the last checkpoint is good: --resume {shlex.quote(str(run))}"
    kept = again if checkpoint.exists(run) else "nothing was saved"
    fail(f"{reason}; a lower lr may help; {kept}", 1)


def explain(model: LM, batches: Iterable[tuple[Tensor, ...]], autocast: torch.autocast) -> str:
    """Repeat a step, and name the first layer output, or the first gradient, that is not finite,
    and the layer with the largest activation. The weights do not change."""
    seen = Activations()
    hooks = [
        module.register_forward_hook(seen.hook(name))
        for name, module in model.named_modules()
        if name
    ]
    losses = []
    try:
        for batch in batches:
            with autocast:
                loss, parts = model.loss(*batch)
            loss.backward()
            losses.append(parts["cross_entropy"].item())
    finally:
        for hook in hooks:
            hook.remove()
    mine = (seen.largest, seen.place, seen.first, highest(losses))
    reports = shards.gather(mine)  # of all processes, because each has its own tokens
    first = next((report[2] for report in reports if report[2]), "")
    where = "all is finite"
    if first:
        where = f"the first output that is not finite is that of {first}"
    elif gradient := next((n for n, p in model.named_parameters() if not is_finite(p.grad)), ""):
        where = f"the first gradient that is not finite is that of {gradient}"
    model.zero_grad()
    largest, place, _, _ = max(reports)
    loss = highest([report[3] for report in reports])
    return f"the loss is {loss:.4g}; {where}; the largest activation is {largest:.3g}, in {place}"


def highest(losses: list[float]) -> float:
    """The largest loss; NaN counts as the largest."""
    return max(losses, key=lambda loss: math.inf if math.isnan(loss) else loss)


class Activations:
    """What hooks see in the layers' outputs: the name of the first that is not finite, and the
    largest finite value."""

    def __init__(self):
        self.first, self.largest, self.place = "", 0.0, "no layer"

    def hook(self, name: str) -> Callable:
        """A forward hook for the layer of this name."""

        def look(module: nn.Module, given: tuple, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
                return
            finite = tensor.detach()[tensor.isfinite()]
            if finite.numel() < tensor.numel() and not self.first:
                self.first = name
            largest = finite.abs().max().item() if finite.numel() else 0.0
            if largest > self.largest:
                self.largest, self.place = largest, name

        return look


def mean_of_finite(losses: list[Tensor]) -> Tensor:
    """The mean of the finite losses; NaN if there is none."""
    values = torch.stack(losses)
    return values[values.isfinite()].mean()


def is_finite(tensor: Tensor | None) -> bool:
    """Whether every number of a tensor is finite; true without a tensor."""
    return tensor is None or bool(whole(tensor).isfinite().all())
