"""The residual stream: its norms, and the ways in which a layer is added to it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from minimodels.config import Config, Residuals
from minimodels.context import Context
from minimodels.errors import InputError, Positive
from minimodels.options import option
from minimodels.parts import RMSNorm, is_plain, norm_dtype, rmsnorm, scaled
from minimodels.paths import choose

NORMS = {  # of the residual stream; one kind per model
    "rms": RMSNorm,
    "plain": partial(RMSNorm, learned=False),
    "layer": nn.LayerNorm,
}


def make_norm(config: Config) -> nn.Module:
    """Make a norm of the residual stream."""
    return NORMS[config.norm](config.width, config.norm_eps)


def norm_of_sum(
    norm: nn.Module, x: Tensor, update: Tensor | None, impl: str
) -> tuple[Tensor, Tensor]:
    """norm(x + update), and x + update itself; a kernel computes both at once."""
    if (
        isinstance(norm, RMSNorm)
        and is_plain(norm)
        and choose(impl, "rmsnorm", x.device, portable=True) != "torch"
    ):
        weight = x.new_ones(norm.width) if norm.weight is None else norm.weight
        return rmsnorm(x, weight, norm.eps, update, impl)
    x = x if update is None else x + update
    return norm(x).to(norm_dtype(x)), x


@dataclass(frozen=True)
class Joint:
    """The options that every layer has besides its own: how it is added to the residual stream."""

    residual: Residuals | None = option(
        None,
        "where the layer's norm is: pre_norm (before it), post_norm (after it), sandwich (both) or "
        "deep_norm (on the stream itself); by default as in the model",
    )
    residual_scale: Positive | None = option(
        None, "β, factor on what the layer adds; by default the model's"
    )
    stream_scale: Positive = option(
        1.0, "α, factor on the stream before deep_norm adds the layer to it"
    )


class Residual(nn.Module):
    """A layer with its norm, added to the residual stream. β is 1 unless residual_scale is set.

    The next norm computes the sum, so that one kernel reads both terms. The input and the output
    are therefore x and the `update` that is still to be added to it.
    """

    def __init__(self, config: Config, layer: nn.Module, joint: Joint = Joint()):
        super().__init__()
        self.norm = make_norm(config)
        self.layer, self.impl = layer, config.impl
        self.scale = config.residual_scale
        if joint.residual_scale is not None:
            self.scale = joint.residual_scale
        self.alpha = joint.stream_scale
        if self.alpha != 1.0 and not isinstance(self, DeepNorm):
            raise InputError("stream_scale", self.alpha, "1.0, or residual=deep_norm")

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        """x, update (B, T, D) -> the new x, the new update, and the layer's state."""
        raise NotImplementedError


class PreNorm(Residual):
    """x + β layer(norm(x))."""

    operations = ("rmsnorm",)

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        normed, x = norm_of_sum(self.norm, x, update, self.impl)
        update, state = self.layer(normed, state, context)
        return x, scaled(update, self.scale), state


class PostNorm(Residual):
    """x + β norm(layer(x)) (OLMo 2, arXiv:2501.00656).

    The layer reads the stream itself, and the norm fixes the size of what is added to it.
    """

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        x = x if update is None else x + update
        update, state = self.layer(x, state, context)
        return x, scaled(self.norm(update), self.scale), state


class Sandwich(Residual):
    """x + β after(layer(norm(x))), with a norm on either side (Gemma 2, arXiv:2408.00118)."""

    operations = ("rmsnorm",)

    def __init__(self, config: Config, layer: nn.Module, joint: Joint = Joint()):
        super().__init__(config, layer, joint)
        self.after = make_norm(config)

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        normed, x = norm_of_sum(self.norm, x, update, self.impl)
        update, state = self.layer(normed, state, context)
        return x, scaled(self.after(update), self.scale), state


class DeepNorm(Residual):
    """α n + β layer(n), where n = norm(x): the stream itself is normalised.

    The original transformer (arXiv:1706.03762) normalises every sum in this way. DeepNorm
    (arXiv:2203.00555) adds a factor α above 1, so that a thousand layers train; MiniMax-01
    (arXiv:2501.08313) uses it. Here the next layer has the norm of a sum, and the model has the
    norm of the last one.
    """

    def forward(self, x: Tensor, update: Tensor | None, state=None, context: Context | None = None):
        x = self.norm(x if update is None else x + update)  # in the stream's precision
        update, state = self.layer(x.to(norm_dtype(x)), state, context)
        return scaled(x, self.alpha), scaled(update, self.scale), state


# how a layer is added to the residual stream
RESIDUALS = {
    "pre_norm": PreNorm,
    "post_norm": PostNorm,
    "sandwich": Sandwich,
    "deep_norm": DeepNorm,
}
