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
from torch import Tensor

from minimodels.layers import full_precision

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def l2norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(Σ x² + eps) over the last dimension, in fp32 (fp64 if x is).

    eps is added to the sum, as in published layers. F.normalize would bound the norm from below.
    """
    x = full_precision(x)
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def gated_rmsnorm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None = None,
    activation: str = "silu",
    order: Literal["norm_gate", "gate_norm"] = "norm_gate",
) -> Tensor:
    """norm(x) · act(gate) or, with order="gate_norm", norm(x · act(gate)).

    norm(x) = weight · x / sqrt(mean(x²) + eps). x and gate (..., d), normalised over d; weight
    (d,), or (groups, d) if x is (..., groups, d). gate None leaves the gate out. activation is one
    of ACTIVATIONS. Returns fp32 (fp64 if x is). Raises ValueError if shapes disagree.
    """
    fits = x.shape[-weight.ndim :] == weight.shape and (gate is None or gate.shape == x.shape)
    if not fits:
        shown = "none" if gate is None else tuple(gate.shape)
        raise ValueError(
            f"gated_rmsnorm: weight {tuple(weight.shape)} and gate {shown} do not fit x {tuple(x.shape)}"
        )
    x, weight = full_precision(x), full_precision(weight)
    gate = None if gate is None else ACTIVATIONS[activation](full_precision(gate))
    if gate is not None and order == "gate_norm":
        x, gate = x * gate, None
    x = F.rms_norm(x, x.shape[-1:], None, eps) * weight
    return x if gate is None else x * gate
