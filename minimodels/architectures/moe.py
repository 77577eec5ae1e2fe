"""Mixture of experts: E small MLPs, of which each token visits K.

Shazeer et al., arXiv:1701.06538; Switch, arXiv:2101.03961; Mixtral, arXiv:2401.04088; OLMoE, arXiv:2409.02060;
DeepSeek-V3, arXiv:2412.19437; expert choice, arXiv:2202.09368; z-loss: ST-MoE, arXiv:2202.08906.

A router scores the experts for each token and the token visits the K best, their outputs weighted by the scores.
So the parameters grow with E while the computation stays that of K experts.
Left alone a router favours few experts; a balance loss, or a bias that only selects, keeps all of them in use.

    name        symbol  shape
    x                   (B, T, D)      tokens; flattened (n, D), n = B · T
    logits      Wx      (B, T, E)      the router's scores
    gates       g       (B, T, E)      what an expert's output for a token is multiplied by, where the token visits it
    visits              (B, T, E)      bool: which tokens visit which experts
    token               (A,)           the token of each visit, ordered by expert; A = n · K, a few more under expert choice
    counts      n · f   (E,)           visits per expert
    gate, up            (E, I, D)      the experts' matrices, I the hidden width of one; out (E, D, I)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minimodels.architectures.transformer import SwiGLU, mlp_width
from minimodels.config import Config
from minimodels.layers import flops, full_precision, linear
from minimodels.ops.grouped_mlp import grouped_mlp


class Routing(NamedTuple):
    """The router's decisions of the last forward pass, kept for the losses and the log."""

    logits: Tensor  # (B, T, E)
    visits: Tensor  # (B, T, E)
    probabilities: Tensor  # (B, T, E)
    positions: Tensor | None  # (B, T), as in the layer contract


class MoE(nn.Module):
    """Routed experts, each a SwiGLU, beside `shared_experts` that every token visits. No token is dropped, except under expert
    choice; no state."""

    operations = ("grouped_mlp",)

    def __init__(self, config: Config):
        super().__init__()
        E, D, I = config.experts, config.width, expert_width(config)
        self.K, self.route, self.causal = (
            config.experts_per_token,
            ROUTERS[config.router],
            config.router != "expert_choice",
        )
        self.scale, self.impl = config.routed_scale, config.impl
        self.balance, self.balance_loss, self.z_loss = (
            config.balance,
            config.balance_loss,
            config.z_loss,
        )
        self.bias_step = config.bias_step
        std = config.init_std
        self.router = linear(D, E, std)
        self.gate = nn.Parameter(torch.empty(E, I, D).normal_(std=std))
        self.up = nn.Parameter(torch.empty(E, I, D).normal_(std=std))
        self.out = nn.Parameter(torch.empty(E, D, I).normal_(std=std / config.depth**0.5))
        self.shared = SwiGLU(config, config.shared_experts * I) if config.shared_experts else None
        self.register_buffer("bias", torch.zeros(E) if self.route is sigmoid_bias else None)
        self.register_buffer(
            "visited", torch.zeros(E), persistent=False
        )  # visits since the last optimizer step
        self.forget()

    def forget(self):
        """As if there had been no last forward."""
        self.routing: Routing | None = None

    def forward(self, x: Tensor, state=None, positions: Tensor | None = None, memo=None):
        with torch.autocast(x.device.type, enabled=False):  # routing is decided in full precision
            logits = F.linear(full_precision(x), full_precision(self.router.weight))  # (B, T, E)
            gates, visits, probabilities = self.route(logits, self.K, self.bias)
        self.routing = Routing(logits, visits, probabilities, positions)
        if self.training:
            real = visits if positions is None else visits & (positions >= 0).unsqueeze(-1)
            self.visited.add_(real.sum((0, 1)))
        most = self.K if self.causal else None  # where experts choose, any number may visit a token
        flat = (
            part.flatten(0, 1) for part in (x, self.scale * gates, visits)
        )  # (n, D), (n, E), (n, E)
        y = grouped_mlp(*flat, self.gate, self.up, self.out, most, self.impl).view_as(
            x
        )  # (B, T, D)
        if self.shared is not None:
            y = y + self.shared(x)[0]
        return y, None

    def shares(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last forward: f (E,), the visits per token, which carries no gradient; P (E,), the mean probability; and the
        weight of each token in a mean (B, T, 1): 1 / their number, 0 for padding."""
        logits, visits, probabilities, positions = self.routing
        real = (
            logits.new_ones(logits.shape[:2])
            if positions is None
            else (positions >= 0).to(logits.dtype)
        )  # (B, T)
        weight = (real / real.sum().clamp(min=1)).unsqueeze(-1)
        return (visits * weight).sum((0, 1)), (probabilities * weight).sum((0, 1)), weight

    @property
    def auxiliary_losses(self) -> dict[str, Tensor]:
        """Of the last forward, made when asked for: z-loss, mean(logsumexp(logits)²), and balance loss."""
        if self.routing is None:
            return {}
        fraction, mean_probability, weight = self.shares()
        losses = {
            "z": self.z_loss
            * (self.routing.logits.logsumexp(-1, keepdim=True).square() * weight).sum()
        }
        if self.balance == "layer":
            losses["balance"] = self.balance_loss * imbalance(fraction, mean_probability)
        return losses

    @property
    def observed(self) -> dict[str, Tensor]:
        """What the log records of the last forward: each expert's share of the visits, and E times the largest of them."""
        if self.routing is None:
            return {}
        fraction = self.shares()[0]
        load = fraction / fraction.sum().clamp(min=1e-9)
        return {"load": load, "overload": load.amax() * load.numel()}

    @torch.no_grad()
    def after_step(self):
        """Once per optimizer step: move the selection bias against the load (DeepSeek-V3 §2.1.2), reset the visits, and let go
        of the last forward's graph, and of what it holds in memory."""
        if self.route is sigmoid_bias:
            self.bias += self.bias_step * torch.sign(self.visited.mean() - self.visited)
        self.visited.zero_()
        if self.routing is not None:
            self.routing = Routing(
                *(part if part is None else part.detach() for part in self.routing)
            )

    def __getstate__(self) -> dict:
        """A copy has had no forward pass: a graph could not be copied."""
        return {**self.__dict__, "routing": None}

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: the router, K experts, the shared experts."""
        one_expert = 3 * self.out[0].numel()
        shared = 0 if self.shared is None else flops(self.shared, context)
        return 2 * (self.router.weight.numel() + self.K * one_expert) + shared

    def idle_parameters(self) -> float:
        """Parameters that a token does not meet."""
        return (1 - self.K / self.out.shape[0]) * 3 * self.out.numel()


def imbalance(fraction: Tensor, mean_probability: Tensor) -> Tensor:
    """E Σ f_i P_i of visits f (E,), which sum to K, and mean probabilities P (E,): K where all experts share alike. With K = 1
    equation 4 of Switch."""
    return fraction.numel() * (fraction * mean_probability).sum()


def pooled_imbalance(model: nn.Module) -> Tensor:
    """The imbalance of f and P averaged over the MoE layers that took part in the last forward pass. 0 if none did.

    This is what transformers trains with. One layer's load can make up for another's, which the layers' own losses forbid.
    """
    shares = [
        module.shares()[:2]
        for module in model.modules()
        if isinstance(module, MoE) and module.routing is not None
    ]
    return (
        imbalance(*(torch.stack(share).mean(0) for share in zip(*shares, strict=True)))
        if shares
        else torch.zeros(())
    )


def expert_width(config: Config) -> int:
    """Hidden width I of one expert: by default such that a token's experts cost what the dense MLP does."""
    return config.expert_width or -(
        -mlp_width(config) // (config.experts_per_token + config.shared_experts)
    )


# The routers: logits (B, T, E) -> gates (B, T, E), visits (B, T, E) bool, probabilities (B, T, E) for the balance loss.


def softmax_topk(logits: Tensor, K: int, bias: Tensor | None):
    """Mixtral: the softmax over the K best logits, so that the gates sum to one."""
    visits = top(logits, K)
    return logits.masked_fill(~visits, float("-inf")).softmax(-1), visits, logits.softmax(-1)


def softmax(logits: Tensor, K: int, bias: Tensor | None):
    """Switch (K = 1) and OLMoE: the probabilities as they are. Divided by their sum, K = 1 would leave no gradient."""
    probabilities = logits.softmax(-1)
    return probabilities, top(probabilities, K), probabilities


def sigmoid_bias(logits: Tensor, K: int, bias: Tensor):
    """DeepSeek-V3: the bias, which carries no gradient, helps to select and is not in the gates. Not here: V3 selects within
    the best groups of experts only, and takes its balance loss per sequence."""
    scores = logits.sigmoid()
    visits = top(scores + bias, K)
    gates = scores / ((scores * visits).sum(-1, keepdim=True) + 1e-20)
    return gates, visits, scores / (scores.sum(-1, keepdim=True) + 1e-20)


def expert_choice(logits: Tensor, K: int, bias: Tensor | None):
    """Each expert takes the T·K/E tokens of a sequence that want it most: perfect balance, and not causal, for a later
    token can push an earlier one out. Padding competes too."""
    probabilities = logits.softmax(-1)
    _, T, E = logits.shape
    capacity = -(-T * K // E)  # tokens of an expert: at most T, for K is at most E
    return probabilities, top(probabilities.mT, capacity).mT, probabilities


ROUTERS = {
    router.__name__: router for router in (softmax_topk, softmax, sigmoid_bias, expert_choice)
}


def top(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of the last dimension, ties or not exactly that many."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)


# What PyTorch must know of the two operations: shapes, derivative, cost.
