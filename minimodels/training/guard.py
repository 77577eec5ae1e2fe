"""Bad steps are skipped before they spoil the weights, and explained.

A step is bad if its loss or its gradient is not finite, or if its loss is far above that of
guessing. The device decides it, so the CPU never waits: a fused optimizer whose `found_inf` is 1
leaves weights, moments and its count as they were. After more bad steps than are allowed, all later
steps are skipped too. So when the CPU looks, the weights are still those of the failing step, which
is then repeated to find the layer.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from minimodels.lm import LM
from minimodels.training import checkpoint

HIGHEST = 10  # times the loss of guessing


class Guard:
    """Counts the bad steps of a run. `allowed`: how many it may have."""

    def __init__(self, model: LM, allowed: int = 0):
        device = model.embedding.weight.device
        self.allowed, self.highest = allowed, HIGHEST * math.log(max(model.config.vocab, 2))
        self.bad = torch.zeros((), device=device)  # steps so far
        self.since = torch.zeros((), device=device)  # steps since the one that failed, inclusive

    def skip(self, losses: list[Tensor], norm: Tensor) -> Tensor:
        """1.0 if a step must not be taken, 0.0 otherwise; on the device, the same for all
        processes.

        losses: cross-entropies in nats, each a number. norm: of the gradient.
        """
        bad = ~(norm.isfinite() & (torch.stack(losses) <= self.highest).all())  # NaN is not <=
        bad = bad.to(self.bad.dtype)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        self.bad += bad
        failed = (self.bad > self.allowed).to(bad.dtype)
        self.since += failed
        return torch.maximum(bad, failed)

    def failing(self, step: int) -> int | None:
        """The steps that were taken before the one that failed, out of `step`; None if none failed.
        Waits for the device."""
        return step - int(self.since) if self.since else None


def refuse_bad_step(
    failing: int | None,
    model: LM,
    batches: Iterable[tuple[Tensor, ...]],
    autocast: torch.autocast,
    run: Path,
) -> None:
    """Exit with an explanation if a run has failed, before it is saved. `failing`: the steps that
    were taken before the one that failed, whose batches are given; None if only the weights can
    be wrong."""
    if failing is not None:
        reason = f"step {failing + 1} was bad: {explain(model, batches, autocast)}"
    elif not sum(parameter.detach().sum() for parameter in model.parameters()).isfinite():
        reason = "the weights are not finite"
    else:
        return
    again = f"the last checkpoint is good: --resume {shlex.quote(str(run))}"
    kept = again if checkpoint.exists(run) else "nothing was saved"
    sys.exit(f"{reason}; a lower lr may help; {kept}")


def explain(model: LM, batches: Iterable[tuple[Tensor, ...]], autocast: torch.autocast) -> str:
    """Repeat a step, and say which layer's output, or which gradient, is the first that is not
    finite, and where the largest activation is. The weights stay as they are."""
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
    gradients = (name for name, p in model.named_parameters() if not is_finite(p.grad))
    first = seen.first or next(gradients, None)
    what = "output" if seen.first else "gradient"
    where = f"the first {what} that is not finite is that of {first}" if first else "all is finite"
    model.zero_grad()
    said = f"the loss is {max(losses, key=lambda x: math.inf if math.isnan(x) else x):.4g}; {where}"
    return f"{said}; the largest activation is {seen.largest:.3g}, in {seen.place}"


class Activations:
    """What the outputs of layers were: the name of the first that is not finite, and the largest
    finite value."""

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


def mean_of_finite(losses: list[Tensor]) -> float:
    """The mean without those of bad steps; NaN if there is no other."""
    values = torch.stack(losses)
    return values[values.isfinite()].mean().item()


def is_finite(tensor: Tensor | None) -> bool:
    """Whether every number of a tensor is finite, if there is one."""
    return tensor is None or bool(tensor.isfinite().all())
