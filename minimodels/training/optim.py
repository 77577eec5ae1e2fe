"""The optimizer, and the learning rate over a run."""

from __future__ import annotations

import math

import torch
from torch import nn

from minimodels.errors import InputError


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) that decays only matrices. It decays no norm, no bias, and nothing
    that a layer lists in `no_weight_decay`."""
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
    """Half a cosine, from 1 to a tenth."""
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def wsd(progress: float) -> float:
    """Warmup, stable, decay (arXiv:2404.06395): 1, then linearly to 0 over the last fifth."""
    return min(1.0, 5 * (1 - progress))


def constant(progress: float) -> float:
    """Always 1. A run with this schedule can be extended."""
    return 1.0


SCHEDULES = {schedule.__name__: schedule for schedule in (cosine, wsd, constant)}


def learning_rate(peak: float, schedule: str, step: int, warmup: int, progress: float) -> float:
    """The rate at a step: `peak`, times a linear warmup over `warmup` steps, times the schedule at
    `progress`, the fraction of the run that is done."""
    if schedule not in SCHEDULES:
        raise InputError("schedule", schedule, ", ".join(SCHEDULES))
    return peak * min(1.0, (step + 1) / (warmup + 1)) * SCHEDULES[schedule](min(progress, 1.0))
