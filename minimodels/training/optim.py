"""The optimizer and the learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from minimodels.errors import InputError


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) that decays matrices only: no norm, no bias, nothing that a layer names in `no_weight_decay`."""
    spared = {
        id(getattr(module, name))
        for module in model.modules()
        for name in getattr(module, "no_weight_decay", ())
    }
    decayed, kept = [], []
    for parameter in model.parameters():
        (decayed if parameter.ndim >= 2 and id(parameter) not in spared else kept).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


def cosine(progress: float) -> float:
    """From 1 to a tenth along half a cosine."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def wsd(progress: float) -> float:
    """Warmup, stable, decay (arXiv:2404.06395): 1, and over the last fifth linearly to 0."""
    return min(1.0, 5 * (1 - progress))


def constant(progress: float) -> float:
    """1: a run that can be extended."""
    return 1.0


SCHEDULES = {schedule.__name__: schedule for schedule in (cosine, wsd, constant)}


def learning_rate(peak: float, schedule: str, step: int, warmup: int, progress: float) -> float:
    """The rate at a step: linear over `warmup` steps, times the schedule at `progress`, the fraction of the run done."""
    if schedule not in SCHEDULES:
        raise InputError("schedule", schedule, ", ".join(SCHEDULES))
    return peak * min(1.0, (step + 1) / (warmup + 1)) * SCHEDULES[schedule](min(progress, 1.0))
