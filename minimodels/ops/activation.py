"""The activations of an MLP, with and without a gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) ⊙ up (SwiGLU, arXiv:2002.05202)."""
    return F.silu(gate) * up


def gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) ⊙ up, with gelu approximated by a tanh (GEGLU, Gemma)."""
    return F.gelu(gate, approximate="tanh") * up


def clamped(gate: Tensor, up: Tensor) -> Tensor:
    """gate σ(1.702 gate) ⊙ (up + 1), after clamping gate to <= 7 and up to [-7, 7] (gpt-oss)."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


def relu2(gate: Tensor, up: Tensor) -> Tensor:
    """relu(gate)² ⊙ up (Primer, arXiv:2109.08668)."""
    return squared_relu(gate) * up


GATED = {function.__name__: function for function in (silu, gelu, clamped, relu2)}


def tanh_gelu(x: Tensor) -> Tensor:
    """gelu(x), approximated by a tanh."""
    return F.gelu(x, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)²."""
    return F.relu(x).square()


# for an MLP without a gate
PLAIN = {"silu": F.silu, "gelu": tanh_gelu, "relu2": squared_relu}
