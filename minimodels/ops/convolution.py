"""The causal depthwise convolution, as a module with weights and as an operation."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.ops.before import Before
from minimodels.paths import choose


class CausalConv1d(nn.Module):
    """The convolution with its weights (D, 1, W), initialised as in nn.Conv1d."""

    def __init__(
        self,
        channels: int,
        width: int,
        bias: bool = True,
        activation: bool = False,
        impl: str = "auto",
    ):
        super().__init__()
        self.activation, self.impl = activation, impl
        self.weight = nn.Parameter(torch.empty(channels, 1, width))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        if bias:
            nn.init.uniform_(self.bias, -(width**-0.5), width**-0.5)

    def forward(
        self,
        x: Tensor,
        window: Tensor | Before | None = None,
        lengths: Tensor | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results as in causal_conv1d."""
        taps = self.weight.squeeze(1)
        return causal_conv1d(
            x, taps, self.bias, window, lengths, self.activation, self.impl, resets
        )


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | Before | None,
    lengths: Tensor | None = None,
    activation: bool = False,
    impl: str = "auto",
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + Σ_w weight_w ⊙ x_{t-W+1+w}, then SiLU if `activation` is true.

    Each channel is convolved with its own W taps, which see only the current and earlier tokens. A
    tap that would reach into an earlier document reads 0.

    x (B, T, D); weight (D, W); bias (D,), None for zero; window (B, W-1, D), the inputs before x,
    None for zeros, Before if other ranks have them; lengths (B,), how many tokens of x come before
    the padding, None for all; resets (B, T) bool, True if a token begins a document, None for none.
    Returns y (B, T, D) and the window after x, with zeros for tokens of earlier documents. Raises
    ValueError if shapes disagree.
    """
    if isinstance(window, Before):
        window = window_of_ranks(x, weight.shape[1], window, lengths, resets)
    check_convolution(x, weight, bias, window, lengths, resets)
    (batch, T, D), W = x.shape, weight.shape[1]
    path = choose(impl, "causal_conv1d", x.device)
    if path == "triton":
        from minimodels.kernels.causal_conv1d import causal_conv1d as kernel

        return kernel(x, weight, bias, window, lengths, activation, resets)
    if window is None:
        window = x.new_zeros(batch, W - 1, D)
    padded = torch.cat((window, x), dim=1)  # (B, W-1+T, D)
    within = None if resets is None else tokens_within(resets)
    # both a compiler and a GPU would have to stop to look for documents
    fused = x.is_cuda or torch.compiler.is_compiling()
    if path == "reference" or (resets is not None and fused):
        y = sum(weight[:, w] * visible(padded[:, w : w + T], within, W - 1 - w) for w in range(W))
        y = y if bias is None else y + bias
    elif T == 1:  # one product, which costs less than setting up a convolution
        if resets is not None:
            padded = torch.cat((window.masked_fill(resets.unsqueeze(-1), 0), x), dim=1)
        y = (weight.mT * padded).sum(1, keepdim=True)
        y = y if bias is None else y + bias
    else:
        y = Convolution.apply(padded, weight, bias)
        if resets is not None:
            y = repaired(y, padded, weight, bias, within)
    y = F.silu(y) if activation else y
    return y, window_after(x, window, lengths, within)


def window_of_ranks(
    x: Tensor, W: int, before: Before, lengths: Tensor | None, resets: Tensor | None
) -> Tensor:
    """The window before x if other ranks have it: (B, W-1, D).

    x shifts the window by its T tokens, and hides it if a document begins in x.
    """
    batch, T, D = x.shape
    within = None if resets is None else tokens_within(resets)
    own = window_after(x, x.new_zeros(batch, W - 1, D), lengths, within)
    same = x.new_ones(batch) if resets is None else (~resets.any(1)).to(x.dtype)

    def shifted(same: Tensor, window: Tensor) -> Tensor:
        return same[:, None, None] * F.pad(window, (0, 0, 0, T))[:, T:]

    return before.find(same, own, shifted)[0]


def check_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments have the shapes in causal_conv1d's docstring.

    The kernel uses this check too.
    """
    fits = x.ndim == 3 and x.shape[1] > 0 and weight.ndim == 2 and weight.shape[0] == x.shape[2]
    if fits:
        (batch, T, D), W = x.shape, weight.shape[1]
        wanted = (
            (bias, (D,)),
            (window, (batch, W - 1, D)),
            (lengths, (batch,)),
            (resets, (batch, T)),
        )
        fits = all(part is None or part.shape == shape for part, shape in wanted)
    if not fits:
        parts = {"x": x, "weight": weight, "bias": bias, "window": window, "lengths": lengths}
        parts["resets"] = resets
        shapes = ", ".join(
            f"{name} {tuple(part.shape)}" for name, part in parts.items() if part is not None
        )
        raise ValueError(f"causal_conv1d: {shapes} do not fit")


def tokens_within(resets: Tensor) -> Tensor:
    """How many earlier tokens of its own document each token has in x.

    If the document began before x, the count is at least LONG, so that no tap is hidden.

    (B, T) bool -> (B, T) int64.
    """
    T = resets.shape[1]
    index = torch.arange(T, device=resets.device)
    began = torch.where(resets, index, -LONG).cummax(1).values  # its document's first token
    return index - began


LONG = 2**31  # more than the taps of any convolution


def visible(shifted: Tensor, within: Tensor | None, back: int) -> Tensor:
    """The inputs `back` tokens before each token, 0 in an earlier document: (B, T, D)."""
    return shifted if within is None else shifted.masked_fill((within < back).unsqueeze(-1), 0)


def repaired(
    y: Tensor, padded: Tensor, weight: Tensor, bias: Tensor | None, within: Tensor
) -> Tensor:
    """y with the first W-1 tokens of each document computed again, without earlier documents.

    Overwriting leaves nothing of another document in the result or in a gradient. Subtraction would
    leave a rounding error.
    """
    W = weight.shape[1]
    row, t = (within < W - 1).nonzero(as_tuple=True)  # n tokens
    taps = torch.arange(W, device=y.device)
    inputs = padded[row[:, None], t[:, None] + taps]  # (n, W, D)
    hidden = within[row, t].unsqueeze(1) < W - 1 - taps  # (n, W)
    first = (weight.mT * inputs.masked_fill(hidden.unsqueeze(-1), 0)).sum(1)  # (n, D)
    first = first if bias is None else first + bias
    return y.index_put((row, t), first.to(y.dtype))


def window_after(
    x: Tensor, window: Tensor, lengths: Tensor | None, within: Tensor | None
) -> Tensor:
    """The last W-1 inputs before the padding, 0 in an earlier document: (B, W-1, D)."""
    (_, T, D), kept = x.shape, window.shape[1]
    if lengths is None:
        # an exported program omits max, which would bound the length of a text
        recent = x if torch.compiler.is_exporting() else x[:, max(0, T - kept) :]
        late = torch.cat((window, recent), dim=1)
        after = late[:, late.shape[1] - kept :].clone()
        last = None if within is None else within[:, -1:]  # (B, 1)
    else:
        place = lengths[:, None] + torch.arange(kept, device=x.device)  # in the window, then x
        at = place.unsqueeze(-1).expand(-1, -1, D)  # (B, W-1, D)
        if kept:
            old = window.gather(1, at.clamp(max=kept - 1))
            after = torch.where(at < kept, old, x.gather(1, (at - kept).clamp(min=0)))
        else:
            after = window
        if within is not None:  # an empty row keeps its window
            last = F.pad(within, (1, 0), value=LONG).gather(1, lengths[:, None])  # (B, 1)
    if within is None:
        return after
    back = torch.arange(kept - 1, -1, -1, device=x.device)  # tokens between each and the last one
    return after.masked_fill((last < back).unsqueeze(-1), 0)


class Convolution(torch.autograd.Function):
    """The convolution of padded tokens (B, W-1+T, D), the window first: (B, T, D).

    PyTorch's own derivative is slow if the batch is small: for one text of 4,096 tokens it took
    four times as long.
    """

    @staticmethod
    def forward(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(padded, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        padded, weight, bias = inputs
        ctx.biased = bias is not None
        ctx.save_for_backward(padded, weight)

    @staticmethod
    def backward(ctx, dy: Tensor):
        padded, weight = ctx.saved_tensors
        W, T = weight.shape[1], dy.shape[1]
        around = F.pad(dy, (0, 0, W - 1, W - 1))  # (B, T+2(W-1), D)
        # each input meets the outputs to which it contributed
        dpadded = convolve(around, weight.flip(1).to(dy.dtype), None)
        dweight = torch.stack([(dy * padded[:, w : w + T]).sum((0, 1)) for w in range(W)], dim=1)
        return dpadded, dweight, dy.sum((0, 1)) if ctx.biased else None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution, computed on images of height one: (B, L, D) -> (B, L-W+1, D).

    PyTorch has a fast path for images whose channels are innermost in memory.
    """
    return (
        F.conv2d(x.mT.unsqueeze(2), weight[:, None, None], bias, groups=weight.shape[0])
        .squeeze(2)
        .mT
    )
