"""A time-invariant state space layer in Mamba's block: Mamba without selection.

Gu, Gupta, Goel, Ré, "On the Parameterization and Initialization of Diagonal State Space Models",
arXiv:2206.11893 (S4D-Lin).

Each channel has its own step size, decays and output weights, and no token changes them. So the
layer convolves each channel with one long filter, a sum of decaying oscillations. Mamba has N real
states per channel; this layer has N/2 complex ones. The rest of Mamba's block is unchanged.

    name        paper   shape
    u                   (B, T, width)  input of the layer
    x, z                (B, T, D)      the signal and its gate
    step        Δ       (D,)
    A           A       (D, N/2)       complex, real part negative
    C           C       (D, N/2)       complex; B is fixed at 1, because C can absorb its scale
    filter      K       (D, T)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.architectures.mamba import Mamba
from minimodels.context import Context
from minimodels.ops.convolution import causal_conv1d
from minimodels.paths import full_precision


class S4D(nn.Module):
    """The block of a given Mamba layer, with its parameters, but with S4D instead of the
    selective scan.

    It works only on whole sequences, because it carries no state.
    """

    no_weight_decay = ("log_decay", "frequency", "C")

    def __init__(self, mamba: Mamba):
        super().__init__()
        D, N = mamba.A_log.shape
        self.in_proj, self.conv1d, self.D, self.out_proj = (
            mamba.in_proj,
            mamba.conv1d,
            mamba.D,
            mamba.out_proj,
        )
        self.log_step = nn.Parameter(torch.empty(D).uniform_(math.log(0.001), math.log(0.1)))
        self.log_decay = nn.Parameter(torch.full((D, N // 2), math.log(0.5)))
        self.frequency = nn.Parameter(math.pi * torch.arange(N // 2).float().repeat(D, 1))
        self.C = nn.Parameter(torch.randn(D, N // 2, 2) / math.sqrt(2))  # real and imaginary parts

    def filter(self, T: int) -> Tensor:
        """K_t = 2 Re Σ_n C_n (exp(ΔA_n) - 1)/A_n exp(t ΔA_n), with zero-order hold: (D, T), for t
        from 0 to T - 1."""
        A = torch.complex(-self.log_decay.exp(), self.frequency)
        exponent = self.log_step.exp().unsqueeze(1) * A  # ΔA
        C = torch.view_as_complex(self.C) * torch.expm1(exponent) / A
        powers = torch.exp(exponent.unsqueeze(-1) * torch.arange(T, device=A.device))  # (D, N/2, T)
        return 2 * (C.unsqueeze(1) @ powers).squeeze(1).real

    def forward(self, u: Tensor, state: None = None, context: Context | None = None):
        """(B, T, width) -> (B, T, width), and no state."""
        x, z = self.in_proj(u).chunk(2, dim=-1)  # (B, T, D) each
        x, _ = causal_conv1d(
            x, self.conv1d.weight.squeeze(1), self.conv1d.bias, None, activation=True
        )
        T = x.shape[1]
        with torch.autocast(x.device.type, enabled=False):
            x = full_precision(x)
            # zeros at the end, so that the convolution does not wrap around
            spectrum = torch.fft.rfft(self.filter(T), n=2 * T).mT * torch.fft.rfft(
                x, n=2 * T, dim=1
            )
            y = torch.fft.irfft(spectrum, n=2 * T, dim=1)[:, :T] + self.D * x
        return self.out_proj(y.to(z.dtype) * F.silu(z)), None


def forget_selection(model: nn.Module) -> None:
    """Put S4D in the place of every Mamba layer of a model."""
    for module in model.modules():
        if isinstance(getattr(module, "layer", None), Mamba):
            module.layer = S4D(module.layer)
