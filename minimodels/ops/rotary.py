"""Rotary positions: queries and keys are rotated by angles that grow with their position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.

The product of a rotated query and a rotated key then depends only on the distance between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from minimodels.errors import Count, InputError, Positive
from minimodels.grammar import Call, parse_call, write_call
from minimodels.layers import is_transformed
from minimodels.options import OneOf, option, read_options, write_options


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


@dataclass(frozen=True)
class Yarn:
    """Slow frequencies divided, fast ones kept, a ramp between them, and sharper scores.

    arXiv:2309.00071.
    """

    factor: Positive = option(8.0, "by which the slow frequencies are divided")
    context: Count = option(4096, "tokens of context in training")
    fast: Positive = option(
        32.0, "frequencies that turn more often than this within `context` stay as they are"
    )
    slow: Positive = option(
        1.0, "frequencies that turn fewer times than this are divided by the whole factor"
    )
    whole: bool = option(True, "the ramp begins and ends at whole pairs")
    attention_factor: Positive | None = option(
        None, "factor on queries and keys; by default 0.1 ln(factor) + 1"
    )

    @property
    def attention(self) -> float:
        """The factor on queries and keys, whose square sharpens the scores."""
        if self.attention_factor is not None:
            return self.attention_factor
        return 0.1 * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


SCALINGS = {"linear": Linear, "llama3": Llama3, "yarn": Yarn}
Scaling = Annotated[Linear | Llama3 | Yarn | None, OneOf(SCALINGS)]


def rotary(
    positions: Tensor, head_dim: int, base: float, scaling: str = ""
) -> tuple[Tensor, Tensor]:
    """cos and ±sin of the angles p · θ_j of positions p (...): two (..., d) in fp32.

    They cover both halves of a head. The frequencies are θ_j = base^(-2j/d), lowered by `scaling`,
    a call of SCALINGS as text. The pairs are (x_j, x_{j+d/2}): the first of a pair is rotated with
    -sin, the second with sin. Angles are in fp32, as in published models: those of position 100,000
    may be off by 0.004.
    """
    make = angles if is_transformed() else angles_operation
    return make(positions, head_dim, base, scaling)


def angles(positions: Tensor, head_dim: int, base: float, scaling: str) -> tuple[Tensor, Tensor]:
    """As rotary."""
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    frequencies, factor = scaled(base**exponents, base, scaling)  # (d/2,)
    signed = torch.cat((-frequencies, frequencies))  # (d,); cos is even, and sin takes the sign
    turns = positions.contiguous().unsqueeze(-1) * signed  # (..., d)
    if factor != 1.0:
        return turns.cos() * factor, turns.sin() * factor
    return turns.cos(), turns.sin()


# an operation of its own, because a compiler would recompute something so cheap in each rotation, for
# every head and row
angles_operation = torch.library.custom_op("minimodels::rotary", angles, mutates_args=())


@angles_operation.register_fake
def _(positions, head_dim, base, scaling):
    shape = (*positions.shape, head_dim)
    return tuple(positions.new_empty(shape, dtype=torch.float32) for _ in range(2))


def scaled(periods: Tensor, base: float, scaling: str) -> tuple[Tensor, float]:
    """The rotary frequencies for periods base^(2j/d) (d/2,), and the factor on queries and keys."""
    call = parse_call(scaling, "rope_scaling") if scaling else None
    if call is None or call.name != "yarn":
        return slow(periods.reciprocal(), scaling), 1.0
    options = read_options(Yarn, call, scaling, "rope_scaling")
    kept = 1 - yarn_ramp(len(periods), base, options).to(periods.device)
    slowed = (options.factor * periods).reciprocal()  # rounded as transformers does
    return slowed * (1 - kept) + periods.reciprocal() * kept, options.attention


def slow(frequencies: Tensor, scaling: str) -> Tensor:
    """Rotary frequencies (d/2,), lowered so that longer texts rotate no further than in training."""
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


def yarn_ramp(pairs: int, base: float, options: Yarn) -> Tensor:
    """How much each frequency is slowed down, from 0 to 1: (pairs,)."""

    def pair(turns: float) -> float:  # the pair that turns so many times within the trained context
        return pairs * math.log(options.context / (turns * 2 * math.pi)) / math.log(base)

    first, last = pair(options.fast), pair(options.slow)
    if options.whole:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001
    return ((torch.arange(pairs, dtype=torch.float32) - first) / (last - first)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_j, x_{j+d/2}) by its angle.

    If the last dimension is wider than the angles, only its first d numbers are rotated.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def scaling_text(scaling: Linear | Llama3 | Yarn | None) -> str:
    """A scaling as the text that `rotary` takes: "" for None."""
    if scaling is None:
        return ""
    name = next(name for name, kind in SCALINGS.items() if isinstance(scaling, kind))
    return write_call(Call(name, options=write_options(scaling)))
