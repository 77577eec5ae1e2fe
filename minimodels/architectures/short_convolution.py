"""The gated short convolution, the smallest mixer of all.

LFM2, Liquid AI, "LFM2 Technical Report", arXiv:2511.23404.

A convolution of three taps mixes each token with the two before it, channel by channel. One gate,
computed from the token itself, decides what enters the convolution, and another decides what leaves
it. So the layer remembers only two tokens. The attention layers in between handle longer distances.

    [B | C | x̃] = W_in x        h = conv(B ⊙ x̃)        y = W_out (C ⊙ h)

    name        paper   shape
    x                   (B, T, D)      input of the layer
    enter       B       (B, T, D)      gate before the convolution, linear in x: no activation
    leave       C       (B, T, D)      gate after the convolution
    value       x̃       (B, T, D)      what is convolved
    window              (B, W-1, D)    the last inputs of the convolution, W taps wide
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.context import Context
from minimodels.errors import Count
from minimodels.layers import Place
from minimodels.ops.convolution import CausalConv1d
from minimodels.options import option
from minimodels.parts import linear


class ShortConvolutionState(NamedTuple):
    """What a gated short convolution remembers."""

    window: Tensor  # (B, W-1, D)


class ShortConvolution(nn.Module):
    """A causal convolution of a few taps between two gates."""

    paper = "Liquid AI, arXiv:2511.23404"
    presets = {"short_convolution": "(short_convolution mlp)*{n}"}
    operations = ("causal_conv1d",)

    @dataclass(frozen=True)
    class Options:
        conv_width: Count = option(3, "W, taps of the causal convolution")
        bias: bool = option(False, "biases in the convolution and in both projections")

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        D, std, bias = config.width, config.init_std, options.bias
        self.in_proj = linear(D, 3 * D, std, bias)
        self.conv1d = CausalConv1d(D, options.conv_width, bias, impl=config.impl)
        self.out_proj = linear(D, D, std / config.depth**0.5, bias)

    def forward(
        self, x: Tensor, state: ShortConvolutionState | None = None, context: Context | None = None
    ):
        context = context or Context()
        window = None if state is None else state.window
        lengths = None if context.real is None else context.real.sum(1)  # tokens before the padding
        enter, leave, value = self.in_proj(x).chunk(3, dim=-1)  # (B, T, D) each
        h, window = self.conv1d(enter * value, window, lengths, context.resets)
        return self.out_proj(leave * h), ShortConvolutionState(window)

    def flops(self, context: int) -> float:
        """Forward FLOPs per token, the same at every context."""
        maps = (self.in_proj, self.conv1d, self.out_proj)
        return 2 * sum(part.weight.numel() for part in maps)

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence."""
        D, _, W = self.conv1d.weight.shape
        return (W - 1) * D * itemsize


def recurrence(
    x: Tensor, layer: ShortConvolution, state: ShortConvolutionState | None = None
) -> tuple[Tensor, ShortConvolutionState]:
    """The reference: the layer, token by token, as a sum over the taps.

    x (B, T, D); state None for zeros. Returns y (B, T, D) and the final state.
    """
    W = layer.conv1d.weight.shape[2]
    inputs = (
        [x.new_zeros(x.shape[0], x.shape[2])] * (W - 1)
        if state is None
        else list(state.window.unbind(1))
    )
    outputs = []
    for x_t in x.unbind(1):
        enter, leave, value = layer.in_proj(x_t).chunk(3, dim=-1)  # (B, D) each
        inputs.append(enter * value)
        taps = layer.conv1d.weight.squeeze(1).unbind(1)  # W of (D,), the oldest first
        h = sum(tap * each for tap, each in zip(taps, inputs[-W:], strict=True))
        h = h if layer.conv1d.bias is None else h + layer.conv1d.bias
        outputs.append(layer.out_proj(leave * h))
    inputs = inputs[len(inputs) - (W - 1) :]
    window = torch.stack(inputs, dim=1) if inputs else x.new_zeros(x.shape[0], 0, x.shape[2])
    return torch.stack(outputs, dim=1), ShortConvolutionState(window)
