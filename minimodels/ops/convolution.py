"""The causal depthwise convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from minimodels.layers import choose


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    window: Tensor | None,
    lengths: Tensor | None = None,
    activation: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """y_t = bias + Σ_w weight_w ⊙ x_{t-W+1+w}, then SiLU if there is an `activation`: each channel convolved with its own W
    taps, looking only back.

    x (B, T, D); weight (D, W); bias (D,), None for zero; window (B, W-1, D), the inputs before x, None for zeros; lengths
    (B,), how many tokens of x come before the padding, None for all. Returns y (B, T, D) and the window after x.
    Raises ValueError on shapes that disagree.
    """
    check_convolution(x, weight, bias, window, lengths)
    (batch, T, D), W = x.shape, weight.shape[1]
    path = choose(impl, "causal_conv1d", x.device)
    if path == "triton":
        from minimodels.kernels.causal_conv1d import causal_conv1d as kernel

        return kernel(x, weight, bias, window, lengths, activation)
    if window is None:
        window = x.new_zeros(batch, W - 1, D)
    padded = torch.cat((window, x), dim=1)  # (B, W-1+T, D)
    if path == "reference":
        y = sum(weight[:, w] * padded[:, w : w + T] for w in range(W))
        y = y if bias is None else y + bias
    elif T == 1:  # one product, which costs less than to set a convolution up
        y = (weight.mT * padded).sum(1, keepdim=True)
        y = y if bias is None else y + bias
    else:
        y = Convolution.apply(padded, weight, bias)
    y = F.silu(y) if activation else y
    if lengths is None:
        return y, padded[:, T:].clone()
    last = lengths[:, None, None] + torch.arange(W - 1, device=x.device)[:, None]  # (B, W-1, 1)
    return y, padded.gather(1, last.expand(-1, -1, D))


def check_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor | None, lengths: Tensor | None
) -> None:
    """Raise ValueError unless the arguments have the shapes that causal_conv1d names, here and in its kernel."""
    fits = x.ndim == 3 and x.shape[1] > 0 and weight.ndim == 2 and weight.shape[0] == x.shape[2]
    if fits:
        (batch, _, D), W = x.shape, weight.shape[1]
        wanted = ((bias, (D,)), (window, (batch, W - 1, D)), (lengths, (batch,)))
        fits = all(part is None or part.shape == shape for part, shape in wanted)
    if not fits:
        parts = {"x": x, "weight": weight, "bias": bias, "window": window, "lengths": lengths}
        shapes = ", ".join(
            f"{name} {tuple(part.shape)}" for name, part in parts.items() if part is not None
        )
        raise ValueError(f"causal_conv1d: {shapes} do not fit")


class Convolution(torch.autograd.Function):
    """What causal_conv1d computes of tokens with their window before them: padded (B, W-1+T, D) -> (B, T, D).

    PyTorch's own derivative is slow where the batch is small: of one text of 4,096 tokens it took four times as long.
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
        dpadded = convolve(
            around, weight.flip(1).to(dy.dtype), None
        )  # each input meets the outputs that it had a part in
        dweight = torch.stack([(dy * padded[:, w : w + T]).sum((0, 1)) for w in range(W)], dim=1)
        return dpadded, dweight, dy.sum((0, 1)) if ctx.biased else None


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As an image of height one, for which PyTorch has a fast path with the channels innermost: (B, L, D) -> (B, L-W+1, D)."""
    return (
        F.conv2d(x.mT.unsqueeze(2), weight[:, None, None], bias, groups=weight.shape[0])
        .squeeze(2)
        .mT
    )
