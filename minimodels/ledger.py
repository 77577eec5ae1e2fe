"""What a model costs, counted without running it: parameters, FLOPs, bytes of state.

    python -m minimodels.ledger                                          every preset
    python -m minimodels.ledger --layers "mamba mlp window mlp" --context 8192

FLOPs are those of matrix products, convolutions and scans, a multiply-add counted as two. Attention counts QKᵀ and PV as full
T × T products, as PyTorch's counter and the usual model-FLOPs utilisation do, though a causal kernel may skip half. A layer
that costs anything but its `nn.Linear` parts has methods `flops(context)`, `state_bytes(context, itemsize)` and, where tokens
meet only part of it, `idle_parameters()`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from .config import Config


@dataclass(frozen=True)
class Ledger:
    """The cost of one model at one context length."""

    context: int
    parameters: int  # all of them, a shared one once
    active: float  # of which a token meets this many on average
    forward_flops: float  # per token
    state_bytes: float  # per sequence, remembered after `context` tokens
    speedup: float  # forward_flops if every token took every layer and expert, over forward_flops

    @property
    def training_flops(self) -> float:
        """Per token: one pass forward, and the backward pass twice its cost."""
        return 3 * self.forward_flops

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.2f}M parameters, {self.active / 1e6:.2f}M active; {self.training_flops / 1e6:.1f} MFLOPs "
            f"per trained token, {self.state_bytes / 1024:.0f} KiB of state at context {self.context}"
        )


def ledger(config: Config, context: int, itemsize: int = 4) -> Ledger:
    """Count the model that `config` describes. `itemsize`: bytes per element of what attention caches."""
    from .lm import LM  # whose layers ask this file for the costs of what they hold
    from .moe import expert_width

    everywhere = replace(config, capacity=1.0, experts_per_token=config.experts, expert_width=expert_width(config))
    with torch.device("meta"):
        model, unrouted = LM(config), LM(everywhere)
    parameters, forward = sum(p.numel() for p in model.parameters()), flops(model, context)
    return Ledger(
        context=context,
        parameters=parameters,
        active=parameters - idle_parameters(model),
        forward_flops=forward,
        state_bytes=state_bytes(model, context, itemsize),
        speedup=flops(unrouted, context) / forward,
    )


def flops(module: nn.Module, context: int) -> float:
    """Forward FLOPs per token of any part of a model, averaged over a sequence of `context` tokens."""
    if hasattr(module, "flops"):
        return module.flops(context)
    if isinstance(module, nn.Linear):
        return 2 * module.weight.numel()
    return sum(flops(child, context) for child in module.children())


def idle_parameters(module: nn.Module) -> float:
    """Parameters that a token does not meet, on average."""
    if hasattr(module, "idle_parameters"):
        return module.idle_parameters()
    return sum(idle_parameters(child) for child in module.children())


def state_bytes(module: nn.Module, context: int, itemsize: int) -> float:
    """Bytes remembered per sequence after `context` tokens."""
    if hasattr(module, "state_bytes"):
        return module.state_bytes(context, itemsize)
    return sum(state_bytes(child, context, itemsize) for child in module.children())
