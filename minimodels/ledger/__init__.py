"""What a model costs, counted without running it: parameters, FLOPs, bytes of state.

    from minimodels import ledger, preset
    ledger(preset("moe", "tiny", "moe.experts=64"), context=8192)

    python -m minimodels.ledger                                          every preset
    python -m minimodels.ledger --layers "mamba mlp attention(window=64) mlp" --context 8192

FLOPs are those of matrix products, convolutions and scans. A multiply-add counts as two. Attention counts
QKᵀ and PV as full T × T products, as PyTorch's counter and the usual model-FLOPs utilisation do, although a
causal kernel may skip half; over a window, from two of its widths on, as products of blocks.
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
    parameters: int  # all of them, a shared one once
    active: float  # of these, how many a token uses, on average
    forward_flops: float  # per token
    state_bytes: float  # per sequence, remembered after `context` tokens
    speedup: float  # FLOPs if every token took every layer and expert, over forward_flops

    @property
    def training_flops(self) -> float:
        """Per token: one pass forward, and the backward pass twice its cost."""
        return 3 * self.forward_flops

    def __str__(self) -> str:
        return (
            f"{self.parameters / 1e6:.2f}M parameters, {self.active / 1e6:.2f}M active; "
            f"{self.training_flops / 1e6:.1f} MFLOPs per trained token, "
            f"{self.state_bytes / 1024:.0f} KiB of state at context {self.context}"
        )


def ledger(config: Config, context: int, itemsize: int = 4) -> Ledger:
    """Count the model that `config` describes, at a context in tokens.

    `itemsize`: bytes per element of keys, values and convolution windows; recurrent states are in fp32.
    Raises InputError for a context below 1, and for layers that cannot be built.
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
