"""What a model costs, counted without running it: parameters, FLOPs, bytes of state.

    python -m minimodels.ledger                                          every preset
    python -m minimodels.ledger --layers "mamba mlp window mlp" --context 8192
    ledger(preset("moe", experts=64), context=8192)                      in Python, with any field

FLOPs are those of matrix products, convolutions and scans, a multiply-add counted as two, a scan's as `Mamba.flops` says.
Attention counts QKᵀ and PV as full T × T products, as PyTorch's counter and the usual model-FLOPs utilisation do, though a
causal kernel may skip half; over a window, from two of its widths on, as products of blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro

from minimodels.command import run_command
from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.layers import flops, inactive_parameters, state_bytes, unrouted_flops
from minimodels.lm import LM
from minimodels.presets import PRESETS, preset


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
    """Count the model that `config` describes. `itemsize`: bytes per element of keys, values and convolution windows; the
    state of an SSM is fp32."""
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


@dataclass(frozen=True)
class Options:
    """Print what models cost."""

    layers: str = ""
    """layers to count at the widths of `size`; by default every preset"""
    size: str = "tiny"
    """tiny or small"""
    context: int = 1024
    """tokens of context that FLOPs and state are counted at"""


def main(options: Options) -> None:
    """Print one line for each model."""
    if options.context < 1:
        raise InputError("context", options.context, "1 or more")
    if options.layers:
        configs = {options.layers: preset("transformer", options.size, layers=options.layers)}
    else:
        configs = {model: preset(model, options.size) for model in PRESETS}
    width = max(map(len, configs))
    print(f"{'':{width}}  parameters   active  MFLOPs/trained token  state KiB  unrouted/routed")
    for name, config in configs.items():
        cost = ledger(config, options.context)
        print(
            f"{name:{width}}  {cost.parameters / 1e6:9.2f}M {cost.active / 1e6:7.2f}M  {cost.training_flops / 1e6:20.1f}  "
            f"{cost.state_bytes / 1024:9.0f}  {cost.speedup:14.2f}x"
        )


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
