"""What a model costs, counted without running it: parameters, FLOPs, bytes of state.

    from minimodels import ledger, preset
    ledger(preset("moe", "tiny", "moe.experts=64"), context=8192)

    python -m minimodels.ledger                                          every preset
    python -m minimodels.ledger --layers "mamba mlp attention(window=64) mlp" --context 8192

FLOPs are those of matrix products, convolutions and scans. A multiply-add counts as two. Attention
counts QKᵀ and PV as full T × T products, although a causal kernel may skip half of them. PyTorch's
counter and the usual model-FLOPs utilisation do the same. Attention with a window counts them as
products of blocks if the context is at least twice the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.layers import flops, inactive_parameters, state_bytes, unrouted_flops
from minimodels.lm import LM


@dataclass(frozen=True)
class Ledger:
    """The cost of one model at one context length."""

    context: int
    parameters: int  # all of them; shared ones count once
    active: float  # the number that a token uses, on average
    forward_flops: float  # per token
    state_bytes: float  # per sequence, remembered after `context` tokens
    speedup: float  # FLOPs if every token took every layer and expert, divided by forward_flops

    @property
    def training_flops(self) -> float:
        """Per token: the forward pass, and a backward pass that costs twice as much."""
        return 3 * self.forward_flops

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.2f}M parameters, {self.active / 1e6:.2f}M active; "
            f"{self.training_flops / 1e6:.1f} MFLOPs per trained token, "
            f"{size_text(self.state_bytes)} of state at context {self.context}"
        )


def ledger(config: Config, context: int, itemsize: int = 4) -> Ledger:
    """Count the model that `config` describes, at a context in tokens.

    `itemsize`: bytes per element of keys, values and convolution windows. Recurrent states are in
    fp32. Raises InputError if the context is below 1, or if the layers cannot be built.
    """
    if context < 1:
        raise InputError("context", context, "1 or more")
    with torch.device("meta"):
        model = LM(config)
    parameters, forward = sum(p.numel() for p in model.parameters()), flops(model, context)
    unrouted = forward - flops(model.layers, context) + unrouted_flops(model.layers, context)
    return Ledger(
        context=context,
        parameters=parameters,
        active=parameters - inactive_parameters(model),
        forward_flops=forward,
        state_bytes=state_bytes(model, context, itemsize),
        speedup=unrouted / forward,
    )


def size_text(count: float) -> str:
    """Bytes in KiB, or in MiB if they are many: "4,096 KiB", "1,152 MiB"."""
    kibibytes = count / 1024
    return f"{kibibytes:,.0f} KiB" if kibibytes < 100_000 else f"{kibibytes / 1024:,.0f} MiB"
