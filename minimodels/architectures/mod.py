"""Mixture-of-depths: some tokens take a group of layers, the others pass it by.

Raposo et al., "Mixture-of-Depths: Dynamically allocating compute in transformer-based language models", arXiv:2404.02258.

A router scores each token. In training the C · T highest-scored tokens of each sequence go through the group, attend to
one another alone, and have its update, times their score, added; all others keep their value.
So the group costs a fraction C of its linear and C² of its attention computation.
Which tokens are among the highest is only known at the end of the text: to generate, a causal decision, learned in training,
stands in.

    name        paper   shape
    x           X       (B, T, D)      all tokens
    scores      r       (B, T)         what the router gives each token, raw
    weights     r       (B, k, 1)      the same, of the chosen tokens
    capacity            ()             C: the fraction of tokens that take the group; the paper's C is their number k
    index               (B, k)         the tokens that take the group, ascending, then filling; k = C · T in training
    real                (B, k)         bool: False where a row routes fewer than k tokens
    gathered    X̃       (B, k, D)      their values
    output      f(X̃)+X̃  (B, k, D)      what the group makes of them, its residual sums included
    update      r f(X̃)  (B, k, D)      its change to them, times the weights
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.config import Config
from minimodels.layers import Stack, flops, full_precision, idle_parameters, linear, state_bytes


class DepthState(NamedTuple):
    """What the wrapper remembers: the group knows only the tokens that it processed."""

    seen: Tensor  # (B,) int64, the position of the next token
    group: Any  # the group's state


class MixtureOfDepths(nn.Module):
    """A router around any group of layers.

    In training mode the tokens are the top k of the sequence, padding counted in its length, which is not causal. In
    evaluation mode the decision is causal. With mod_route = "router" it is sigmoid(r) > ½, learned by an auxiliary loss that
    moves the rest of the model a little too; with "predictor" it is a small MLP's on the stop-gradient input, whose loss
    trains nothing else. `route` set to "topk" keeps top k in evaluation, to measure what the causal decision costs.
    """

    def __init__(self, config: Config, group: Stack):
        super().__init__()
        self.capacity, self.route, self.mod_loss = (
            config.capacity,
            config.mod_route,
            config.mod_loss,
        )
        self.group = group
        self.forgetful = [layer for layer in group.modules() if hasattr(layer, "forget")]
        self.router = linear(config.width, 1, config.init_std)
        self.predictor = None
        if config.mod_route == "predictor":
            hidden = max(1, config.width // 4)
            self.predictor = nn.Sequential(
                nn.Linear(config.width, hidden), nn.SiLU(), nn.Linear(hidden, 1)
            )

    @property
    def causal(self) -> bool:
        """Whether no token depends on a later one, in the present mode."""
        return not self.training and self.route != "topk"

    def forward(self, x: Tensor, state: DepthState | None = None, positions: Tensor | None = None):
        B, T, _ = x.shape
        seen, remembered = state or (x.new_zeros(B, dtype=torch.int64), None)
        if positions is None:
            positions = seen[:, None] + torch.arange(T, device=x.device)
        with torch.autocast(x.device.type, enabled=False):  # routing is decided in full precision
            scores = score(self.router, x)  # (B, T)
            decision = scores if self.predictor is None else score(self.predictor, x.detach())
        index, real = self.select(scores.detach(), decision, positions)
        seen = torch.maximum(seen, positions.amax(1) + 1)
        if index.shape[1] == 0:  # nobody takes the group
            for layer in self.forgetful:
                layer.forget()
            return x, DepthState(seen, remembered)

        tokens = x.flatten(0, 1)  # (B · T, D)
        chosen = (
            index + T * torch.arange(B, device=x.device).unsqueeze(1)
        ).flatten()  # (B · k,), rows of `tokens`
        gathered = tokens.index_select(0, chosen).view(
            B, -1, x.shape[-1]
        )  # (B, k, D); tokens[chosen] has a slower derivative
        weights = scores.gather(1, index).masked_fill(~real, 0.0).unsqueeze(-1)  # (B, k, 1)
        original = positions.gather(1, index).masked_fill(~real, -1)  # (B, k)
        output, remembered = self.group(gathered, remembered, original)
        update = (weights * (output - gathered)).to(x.dtype)  # equation 1
        return tokens.index_add(0, chosen, update.flatten(0, 1)).view_as(x), DepthState(
            seen, remembered
        )

    def select(self, scores: Tensor, decision: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that take the group, (B, k) ascending, and which of these are not filling.

        To select needs no gradient: it is the weights of the selected that teach the router.
        """
        present = positions >= 0
        if self.training or self.route == "topk":
            k = self.routed(scores.shape[1])
            index = scores.masked_fill(~present, float("-inf")).topk(k).indices.sort(1).values
            taken = torch.zeros_like(present).scatter(1, index, True)
            self.account(decision, taken, present)
            return index, present.gather(1, index)
        taken = (decision > 0) & present
        self.auxiliary_losses, self.observed = (
            {},
            {"routed": taken.sum() / present.sum().clamp(min=1)},
        )
        k = int(taken.sum(1).amax())  # rows that route fewer are filled up
        index = (~taken).long().argsort(dim=1, stable=True)[:, :k]
        return index, taken.gather(1, index)

    def account(self, decision: Tensor, taken: Tensor, present: Tensor):
        """Teach the causal decision to tell the top k, and record for how many tokens it does: never to route is right for
        1 - C of them."""
        target, weight = (
            taken.to(decision.dtype),
            present.to(decision.dtype) / present.sum().clamp(min=1),
        )
        loss = F.binary_cross_entropy_with_logits(decision, target, weight, reduction="sum")
        self.auxiliary_losses = {"mod": self.mod_loss * loss}
        routed = decision > 0
        self.observed = {
            "routed": (routed * weight).sum(),
            "accuracy": ((routed == taken) * weight).sum(),
        }

    def after_step(self):
        """Let go of the last forward's graph, and of what it holds in memory."""
        self.auxiliary_losses = {}

    def __getstate__(self) -> dict:
        """A copy has had no forward pass: a graph could not be copied."""
        return {**self.__dict__, "auxiliary_losses": {}}

    def forget(self):
        """As if there had been no last forward."""
        self.auxiliary_losses, self.observed = {}, {}

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: the routers see all tokens, the group C of them and only C · context of each other."""
        k = self.routed(context)
        predictor = flops(self.predictor, context) if self.predictor else 0
        return flops(self.router, context) + predictor + k / context * flops(self.group, k)

    def routed(self, T: int) -> int:
        """How many of T tokens take the group in training: k = C · T, rounded up."""
        return max(1, math.ceil(round(self.capacity * T, 6)))  # 0.07 · 100 is 7.000000000000001

    def idle_parameters(self) -> float:
        """Parameters that a token does not meet, on average."""
        size = sum(p.numel() for p in self.group.parameters())
        return size - self.capacity * (size - idle_parameters(self.group))

    def state_bytes(self, context: int, itemsize: int) -> float:
        """Bytes remembered per sequence when a fraction C of the tokens is routed."""
        return state_bytes(self.group, self.routed(context), itemsize)


def score(router: nn.Module, x: Tensor) -> Tensor:
    """What a router gives each token, in full precision though its parameters or x be in less: (B, T, D) -> (B, T)."""
    x = full_precision(x)
    for part in router if isinstance(router, nn.Sequential) else (router,):
        if isinstance(part, nn.Linear):
            bias = None if part.bias is None else full_precision(part.bias)
            x = F.linear(x, full_precision(part.weight), bias)
        else:
            x = part(x)
    return x.squeeze(-1)
