"""Rotary positions: queries and keys are rotated by angles that grow with their position.

Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv:2104.09864.

The product of a rotated query and a rotated key then depends only on the distance between them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from minimodels.errors import Count, InputError, Positive
from minimodels.grammar import Call, parse_call, write_call
from minimodels.options import OneOf, option, read_options, write_options
from minimodels.paths import choose, full_precision, is_transformed


@dataclass(frozen=True)
class Linear:
    """All frequencies divided by a factor (arXiv:2306.15595)."""

    factor: Positive = option(1.0, "divisor of all frequencies: how much longer texts may be")

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        return periods.reciprocal() / self.factor


@dataclass(frozen=True)
class Llama3:
    """Only the slow frequencies divided (arXiv:2407.21783)."""

    factor: Positive = option(8.0, "divisor of the slow frequencies")
    low: Positive = option(
        1.0, "frequencies that turn fewer times than this within `context` are slow"
    )
    high: Positive = option(4.0, "frequencies that turn more often than this stay as they are")
    context: Count = option(8192, "tokens of context in training")

    def __post_init__(self):
        if not self.low < self.high:
            raise InputError("low", self.low, f"less than high, {self.high}")

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        frequencies = periods.reciprocal()
        turns = self.context / (2 * math.pi / frequencies)  # rounded as transformers does
        kept = ((turns - self.low) / (self.high - self.low)).clamp(0, 1)
        return (1 - kept) * (frequencies / self.factor) + kept * frequencies


@dataclass(frozen=True)
class Yarn:
    """Slow frequencies divided, fast ones kept, a ramp between them, and sharper scores.

    arXiv:2309.00071.
    """

    factor: Positive = option(8.0, "divisor of the slow frequencies")
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

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        kept = 1 - self.ramp(len(periods), base, periods.device)
        slowed = (self.factor * periods).reciprocal()  # rounded as transformers does
        return slowed * (1 - kept) + periods.reciprocal() * kept

    def ramp(self, pairs: int, base: float, device: torch.device) -> Tensor:
        """How much each frequency is slowed down, from 0 to 1: (pairs,)."""

        def pair(turns: float) -> float:  # the pair that turns so often in the trained context
            return pairs * math.log(self.context / (turns * 2 * math.pi)) / math.log(base)

        first, last = pair(self.fast), pair(self.slow)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        if first == last:
            last += 0.001
        index = torch.arange(pairs, dtype=torch.float32, device=device)
        return ((index - first) / (last - first)).clamp(0, 1)


LENGTH = (
    "the longest text, which sets the frequencies; by default `context`. Longer texts are refused: "
    "published code recomputes the frequencies as a text grows, which changes earlier tokens"
)


@dataclass(frozen=True)
class Dynamic:
    """A larger base for longer texts: the slowest frequency turns no further than in training.

    NTK-aware scaling, arXiv:2309.00071 §3.1.
    """

    factor: Positive = option(2.0, "how much the base grows with the length beyond `context`")
    context: Count = option(2048, "tokens of context in training")
    length: Count | None = option(None, LENGTH)

    @property
    def longest(self) -> int:
        return self.length or self.context

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        pairs = len(periods)
        if self.longest <= self.context or pairs == 1:
            return periods.reciprocal()
        longer = self.factor * self.longest / self.context - (self.factor - 1)
        # (base · longer^(d / (d - 2)))^(j / pairs) for the pair j of d / 2
        exponents = torch.arange(pairs, device=periods.device, dtype=torch.float32) / pairs
        return ((base * longer ** (pairs / (pairs - 1))) ** exponents).reciprocal()


@dataclass(frozen=True)
class LongRope:
    """Every frequency divided by its own factor, with one set of factors for texts up to `context`
    and another for longer ones (arXiv:2402.13753)."""

    short: tuple[Positive, ...] = option((), "each pair's divisor in texts up to `context`")
    long: tuple[Positive, ...] = option((), "each pair's divisor in longer texts")
    context: Count = option(4096, "tokens of context in training")
    attention: Positive = option(1.0, "factor on queries and keys")
    length: Count | None = option(None, LENGTH)

    @property
    def longest(self) -> int:
        return self.length or self.context

    def frequencies(self, periods: Tensor, base: float) -> Tensor:
        factors = self.long if self.longest > self.context else self.short
        if not factors:
            return periods.reciprocal()
        return (
            torch.tensor(factors, dtype=periods.dtype, device=periods.device) * periods
        ).reciprocal()


SCALINGS = {
    "linear": Linear,
    "llama3": Llama3,
    "yarn": Yarn,
    "dynamic": Dynamic,
    "longrope": LongRope,
}
Kind = Linear | Llama3 | Yarn | Dynamic | LongRope
Scaling = Annotated[Kind | None, OneOf(SCALINGS)]


def check_pairs(given: int | None, width: int, heads: int, field: str = "head_dim") -> None:
    """Raise InputError if the number of rotated dimensions of a head is odd. It is the value that
    was `given` for the option `field`, or else width / heads."""
    if given and given % 2:
        raise InputError(field, given, "an even number, because rotation turns pairs")
    if not given and width // heads % 2:
        accepted = (
            "a number that makes heads of an even width, because rotation turns pairs (width "
            f"{width} / {heads} is {width // heads}), or a head_dim"
        )
        raise InputError("heads", heads, accepted)


def rotary(
    positions: Tensor, head_dim: int, base: float, scaling: str = ""
) -> tuple[Tensor, Tensor]:
    """cos and ±sin of the angles p · θ_j of positions p (...): two (..., d) in fp32.

    They cover both halves of a head. The frequencies are θ_j = base^(-2j/d), lowered by `scaling`:
    one of SCALINGS with its options, as text. The pairs are (x_j, x_{j+d/2}): the first of a pair
    is rotated with -sin, the second with sin. Angles are in fp32, as in published models: those of
    position 100,000 may be off by 0.004.
    """
    make = angles if is_transformed() else angles_operation
    return make(positions, head_dim, base, scaling)


def angles(positions: Tensor, head_dim: int, base: float, scaling: str) -> tuple[Tensor, Tensor]:
    """The computation of `rotary`, in PyTorch's own operations."""
    exponents = (
        torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    )
    periods, how = base**exponents, read_scaling(scaling)  # (d/2,)
    refuse_beyond(getattr(how, "longest", None), positions)
    frequencies = periods.reciprocal() if how is None else how.frequencies(periods, base)
    signed = torch.cat((-frequencies, frequencies))  # (d,); cos is even, and sin takes the sign
    turns = positions.contiguous().unsqueeze(-1) * signed  # (..., d)
    factor = getattr(how, "attention", 1.0)
    if factor != 1.0:
        return turns.cos() * factor, turns.sin() * factor
    return turns.cos(), turns.sin()


# an operation of its own, because a compiler would recompute such cheap numbers in each rotation,
# for every head and row
angles_operation = torch.library.custom_op("minimodels::rotary", angles, mutates_args=())


@angles_operation.register_fake
def _(positions, head_dim, base, scaling):
    shape = (*positions.shape, head_dim)
    return tuple(positions.new_empty(shape, dtype=torch.float32) for _ in range(2))


@cache
def read_scaling(text: str) -> Kind | None:
    """The scaling that a text describes."""
    if not text:
        return None
    call = parse_call(text, "rope_scaling")
    return read_options(SCALINGS[call.name], call, text, "rope_scaling")


def refuse_beyond(longest: int | None, positions: Tensor) -> None:
    """Raise InputError if a position is beyond the longest text of the frequencies."""
    if longest is not None and positions.numel() and positions.amax() >= longest:
        accepted = f"at most {longest} tokens; rope_scaling's `length` allows longer texts"
        raise InputError("text", int(positions.amax()) + 1, accepted)


def norm_rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-5,
    impl: str = "auto",
) -> Tensor:
    """Rotate each head, after an RMSNorm if there is a weight.

    x (B, H, T, d); cos, sin (T, R) or (B, 1, T, R) as from `rotary`, R <= d; weight (d,). Returns
    (B, H, T, d) in x's dtype, also under autocast. Raises ValueError if shapes disagree.
    """
    check_angles(x, cos, sin, weight)
    path = choose(impl, "norm_rotate", x.device)
    if path == "triton":
        from minimodels.kernels.norm_rotate import norm_rotate as kernel

        return kernel(x, cos, sin, weight, eps)
    if weight is not None and path == "reference":
        full = full_precision(x)
        x = (full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)
    elif weight is not None:
        x = F.rms_norm(x, weight.shape, weight.to(x.dtype), eps).to(x.dtype)
    return rotate(x, cos, sin)


def check_angles(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None) -> None:
    """Raise ValueError unless the arguments have the shapes in norm_rotate's docstring.

    The kernel uses this check too.
    """
    (B, _, T, d), R = x.shape, cos.shape[-1]
    fits = cos.shape in ((T, R), (B, 1, T, R)) and sin.shape == cos.shape and R <= d
    if not fits or (weight is not None and weight.shape != (d,)):
        shapes = f"x {tuple(x.shape)}, cos {tuple(cos.shape)}, sin {tuple(sin.shape)}"
        raise ValueError(f"norm_rotate: {shapes} and the weight do not fit")


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair (x_j, x_{j+d/2}) by its angle.

    If a head has more dimensions than there are angles, only its first ones are rotated.
    """
    width = cos.shape[-1]
    if width < x.shape[-1]:
        return torch.cat((rotate(x[..., :width], cos, sin), x[..., width:]), dim=-1)
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


def scaling_text(scaling: Kind | None, rotated: int) -> str:
    """A scaling as the text that `rotary` takes: "" for None. Raises InputError if LongRope's lists
    do not have one factor for each pair of the `rotated` dimensions."""
    if scaling is None:
        return ""
    pairs = rotated // 2
    if isinstance(scaling, LongRope) and not {len(scaling.short), len(scaling.long)} <= {0, pairs}:
        given = f"{len(scaling.short)} and {len(scaling.long)} factors"
        raise InputError("rope_scaling", given, f"{pairs} in each list, one for each rotated pair")
    name = next(name for name, kind in SCALINGS.items() if isinstance(scaling, kind))
    return write_call(Call(name, options=write_options(scaling)))
