"""Norms and gates around a recurrence: unit keys, and an output with a norm and a gate.

Recurrent layers take unit keys because a step of the delta rule is then a projection. They
normalise their output because a sum over a text has no bound. Architectures differ in what a norm
spans (a head, a group of heads or all of them), in the activation of the gate, and in which of the
two comes first.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.paths import full_precision

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last dimension, in fp32 (fp64 if x is).

    eps is added to the sum, as in published layers. F.normalize would bound the norm from below.
    """
    x = full_precision(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def gated_norm(
    norm: nn.Module,
    x: Tensor,
    gate: Tensor | None = None,
    activation: str = "silu",
    order: Literal["norm_gate", "gate_norm"] = "norm_gate",
) -> Tensor:
    """norm(x) · act(gate) or, with order="gate_norm", norm(x · act(gate)).

    x and gate (..., d); without a gate, norm(x). activation is one of ACTIVATIONS. Returns
    fp32 (fp64 if x is). Raises ValueError if shapes disagree.
    """
    if gate is not None and gate.shape != x.shape:
        shapes = f"gate {tuple(gate.shape)} does not fit x {tuple(x.shape)}"
        raise ValueError(f"gated_norm: {shapes}")
    x = full_precision(x)
    gate = None if gate is None else ACTIVATIONS[activation](full_precision(gate))
    if gate is not None and order == "gate_norm":
        x, gate = x * gate, None
    x = norm(x)
    return x if gate is None else x * gate
