"""Rotary positions: queries and keys are turned by angles that grow with their position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.

The product of a query and a key that are turned so depends on the distance between them alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from minimodels.errors import Count, InputError, Positive
from minimodels.grammar import (
    Call,
    OneOf,
    option,
    parse_call,
    read_options,
    write_call,
    write_options,
)


@dataclass(frozen=True)
class Linear:
    """All frequencies divided by a factor (arXiv:2306.15595)."""

    factor: Positive = option(1.0, "how much longer texts may be than those of training")


@dataclass(frozen=True)
class Llama3:
    """Only the slow frequencies divided (arXiv:2407.21783)."""

    factor: Positive = option(8.0, "by which the slow frequencies are divided")
    low: Positive = option(
        1.0, "frequencies that turn fewer times than this within `context` are slow"
    )
    high: Positive = option(4.0, "frequencies that turn more often than this stay as they are")
    context: Count = option(8192, "tokens of context in training")

    def __post_init__(self):
        if not self.low < self.high:
            raise InputError("low", self.low, f"less than high, {self.high}")


SCALINGS = {"linear": Linear, "llama3": Llama3}
Scaling = Annotated[Linear | Llama3 | None, OneOf(SCALINGS)]


@torch.library.custom_op("minimodels::rotary", mutates_args=())
def rotary(
    positions: Tensor, head_dim: int, base: float, scaling: str = ""
) -> tuple[Tensor, Tensor]:
    """cos and ±sin of the angles p · θ_j of positions p (...), for both halves of a head: two (..., d) in fp32.

    The frequencies are θ_j = base^(-2j/d), lowered by `scaling`, a call of SCALINGS as text. The pairs are
    (x_j, x_{j+d/2}): the first of a pair is turned with -sin, the second with sin. This is an operation of
    its own because a compiler would compute anything so cheap again in each rotation, for every head and
    row. Angles are in fp32, as in published models: those of position 100,000 may be off by 0.004.
    """
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    frequencies = slow((base**exponents).reciprocal(), scaling)  # (d/2,)
    signed = torch.cat((-frequencies, frequencies))  # (d,); cos is even, and sin takes the sign
    angles = positions.contiguous().unsqueeze(-1) * signed  # (..., d)
    return angles.cos(), angles.sin()


@rotary.register_fake
def _(positions, head_dim, base, scaling=""):
    shape = (*positions.shape, head_dim)
    return tuple(positions.new_empty(shape, dtype=torch.float32) for _ in range(2))


def slow(frequencies: Tensor, scaling: str) -> Tensor:
    """Rotary frequencies (d/2,), lowered so that a text longer than those of training turns them no further."""
    if not scaling:
        return frequencies
    call = parse_call(scaling, "rope_scaling")
    options = read_options(SCALINGS[call.name], call, scaling, "rope_scaling")
    slowed = frequencies / options.factor
    if isinstance(options, Linear):
        return slowed
    turns = options.context / (2 * math.pi / frequencies)  # rounded as transformers does
    kept = ((turns - options.low) / (options.high - options.low)).clamp(0, 1)
    return (1 - kept) * slowed + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_j, x_{j+d/2}) of the last dimension by its angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def scaling_text(scaling: Linear | Llama3 | None) -> str:
    """A scaling as text, which rotary takes: "" for None."""
    if scaling is None:
        return ""
    name = next(name for name, kind in SCALINGS.items() if isinstance(scaling, kind))
    return write_call(Call(name, options=write_options(scaling)))
