"""How fast a recurrent layer forgets at the start of training."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def step_bias(count: int, low: float = 0.001, high: float = 0.1) -> Tensor:
    """Biases (count,) whose softplus, the step size of a token, is log-uniform in [low, high].

    A state that decays by exp(-step · rate) remembers about 1 / (step · rate) tokens. So the heads
    or channels of a layer begin with memories of many lengths. From Gu and Dao, arXiv:2312.00752,
    §3.6.
    """
    step = torch.empty(count).uniform_(math.log(low), math.log(high)).exp()
    return step + torch.log(-torch.expm1(-step))  # the inverse of softplus
