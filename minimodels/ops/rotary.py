"""Rotary positions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minimodels.grammar import parse_scaling


@torch.library.custom_op("minimodels::rotary", mutates_args=())
def rotary(
    positions: Tensor, head_dim: int, base: float, scaling: str = ""
) -> tuple[Tensor, Tensor]:
    """cos and ±sin of the angles p · θ_j of positions p (...), for both halves of a head: (..., d) fp32 each.

    RoPE, arXiv:2104.09864, with the frequencies θ_j = base^(-2j/d), which `scaling` lowers in the terms of Config.rope_scaling,
    and the pairs (x_j, x_{j+d/2}): the first of a pair is turned with -sin, the second with sin. This is an operation of its
    own because a compiler would not keep what is so cheap: it would compute it anew in each rotation, for every head and row.
    Angles are in fp32, as published models have them: those of position 100,000 may be off by 0.004.
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
    """Rotary frequencies, lowered so that texts longer than those of training turn them no further.

    linear (arXiv:2306.15595): all of them by `factor`. llama3 (arXiv:2407.21783): by `factor` those that turn fewer than `low`
    times within the `context` of training, not at all those that turn more than `high` times, and in proportion between.
    """
    if not scaling:
        return frequencies
    kind, options = parse_scaling(scaling)
    slowed = frequencies / options["factor"]
    if kind == "linear":
        return slowed
    turns = options["context"] / (2 * math.pi / frequencies)  # rounded as transformers does
    kept = ((turns - options["low"]) / (options["high"] - options["low"])).clamp(0, 1)
    return (1 - kept) * slowed + kept * frequencies


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x_j, x_{j+d/2}) of the last dimension by its angle, so that <q_m, k_n> depends on m - n alone."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
