"""Mixture of experts: E small MLPs, of which each token visits K.

Shazeer et al., arXiv:1701.06538; Switch, arXiv:2101.03961; Mixtral, arXiv:2401.04088; OLMoE,
arXiv:2409.02060; DeepSeek-V3, arXiv:2412.19437; expert choice, arXiv:2202.09368; z-loss: ST-MoE,
arXiv:2202.08906.

A router scores the experts for each token. The token visits the K best ones, and the scores weight
their outputs. So the number of parameters grows with E, but the computation stays that of K
experts. A router without further guidance favours a few experts. A balance loss, or a bias that
only affects the selection, keeps all of them in use. The z-loss keeps the router's scores small,
because large ones make training unstable.

    name        symbol  shape
    x                   (B, T, D)      tokens; flattened (n, D), n = B · T
    logits      Wx      (B, T, E)      the router's scores
    gates       g       (B, T, E)      the weight of an expert's output if the token visits it
    visits              (B, T, E)      bool: which tokens visit which experts
    fraction    f       (E,)           visits per token, which sum to K
    probability P       (E,)           mean probability that the router gives each expert
    gate, up            (E, I, D)      the experts' matrices, with hidden width I; out (E, D, I)

minimodels/ops/grouped_mlp.py computes the experts together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from minimodels.architectures.transformer import SwiGLU, default_width
from minimodels.config import Config
from minimodels.context import Context, Record
from minimodels.errors import Count, InputError, Natural, NonNegative
from minimodels.layers import Place, flops
from minimodels.ops.documents import top_per_document
from minimodels.ops.grouped_mlp import grouped_mlp, path_of
from minimodels.options import option
from minimodels.parts import FullPrecisionLinear, linear
from minimodels.paths import is_transformed
from minimodels.ranks import total


class MoE(nn.Module):
    """Routed experts, each a SwiGLU; every token also visits the shared ones."""

    paper = "Shazeer et al., arXiv:1701.06538; Fedus et al., arXiv:2101.03961"
    presets = {"moe": "(attention moe)*{n}"}
    operations = ("grouped_mlp",)
    no_weight_decay = ("gate_bias", "up_bias", "out_bias")

    @dataclass(frozen=True)
    class Options:
        experts: Count = option(8, "E, routed experts")
        experts_per_token: Count = option(2, "K, routed experts that a token visits")
        expert_width: Count | None = option(
            None,
            "hidden width of one expert; by default a token's experts together cost what mlp costs",
        )
        shared_experts: Natural = option(0, "experts that every token visits besides its K")
        router: Literal["softmax_topk", "softmax", "sigmoid_bias", "expert_choice"] = option(
            "softmax_topk",
            "softmax_topk (Mixtral), softmax (Switch, OLMoE), sigmoid_bias (DeepSeek-V3) or "
            "expert_choice, which is not causal",
        )
        groups: Count = option(
            1, "groups of experts; a token visits only some groups (DeepSeek-V3: 8)"
        )
        groups_per_token: Count = option(1, "groups that a token visits (DeepSeek-V3: 4)")
        routed_scale: NonNegative = option(
            1.0, "factor on the routed experts' weights (DeepSeek-V3: 2.5)"
        )
        balance_loss: NonNegative = option(
            0.01, "weight of the balance loss, which is K at an even load (DeepSeek-V3: 0.0001)"
        )
        balance: Literal["layer", "pooled"] = option(
            "layer",
            "layer (balance the loads of each layer) or pooled (their mean, as transformers does)",
        )
        z_loss: NonNegative = option(0.001, "weight of the router's z-loss (DeepSeek-V3 has none)")
        bias_step: NonNegative = option(
            0.001, "how far each training step moves the selection bias of sigmoid_bias"
        )
        bias: bool = option(False, "biases in the shared experts")
        expert_bias: bool = option(False, "biases in the router and the routed experts (gpt-oss)")
        activation: Literal["silu", "gelu", "clamped"] = option(
            "silu", "silu (SwiGLU), gelu (GEGLU) or clamped (gpt-oss), of all experts"
        )
        shared_width: Count | None = option(
            None, "total hidden width of the shared experts; by default that of as many routed ones"
        )
        shared_gate: bool = option(
            False, "multiply the shared experts' output by a sigmoid of the input (Qwen2 MoE)"
        )

        def __post_init__(self):
            if self.experts_per_token > self.experts:
                raise InputError(
                    "experts_per_token", self.experts_per_token, f"1 to experts {self.experts}"
                )
            if self.experts_per_token == 1 and self.router in ("softmax_topk", "sigmoid_bias"):
                accepted = (
                    "2 or more, or router=softmax: "
                    "a single gate is always 1 and teaches the router nothing"
                )
                raise InputError("experts_per_token", self.experts_per_token, accepted)
            if self.groups > 1:
                self.check_groups()

        def check_groups(self) -> None:
            """Raise InputError if groups do not fit the router, the experts or each other."""
            size, least = self.experts // self.groups, GROUPED.get(self.router)
            if least is None:
                accepted = f"1, because only these routers have groups: {', '.join(GROUPED)}"
                raise InputError("groups", self.groups, accepted)
            if self.experts % self.groups or size < least:
                accepted = f"a divisor of experts {self.experts}, with {least} or more in a group"
                raise InputError("groups", self.groups, accepted)
            least = -(-self.experts_per_token // size)
            if not least <= self.groups_per_token <= self.groups:
                accepted = f"{least} to {self.groups}"
                raise InputError("groups_per_token", self.groups_per_token, accepted)

    def __init__(self, options: Options, config: Config, place: Place = Place()):
        super().__init__()
        self.options, self.impl = options, config.impl
        self.route, self.causal = ROUTERS[options.router], options.router != "expert_choice"
        if options.groups > 1:
            groups = (options.groups, options.groups_per_token)
            self.route = partial(self.route, groups=groups)
        visited = options.experts_per_token + options.shared_experts
        E, D = options.experts, config.width
        I = options.expert_width or -(-default_width(D) // visited)
        std = config.init_std
        self.router = linear(D, E, std, options.expert_bias, FullPrecisionLinear)
        self.gate = nn.Parameter(torch.empty(E, I, D).normal_(std=std))
        self.up = nn.Parameter(torch.empty(E, I, D).normal_(std=std))
        self.out = nn.Parameter(torch.empty(E, D, I).normal_(std=std / config.depth**0.5))
        self.gate_bias = self.up_bias = self.out_bias = self.shared = self.shared_gate = None
        if options.expert_bias:
            self.gate_bias = nn.Parameter(torch.zeros(E, I))
            self.up_bias = nn.Parameter(torch.zeros(E, I))
            self.out_bias = nn.Parameter(torch.zeros(E, D))
        if options.shared_experts:
            width = options.shared_width or options.shared_experts * I
            shared = SwiGLU.Options(width, options.bias, options.activation)
            self.shared = SwiGLU(shared, config, place)
            self.shared_gate = linear(D, 1, std) if options.shared_gate else None
        biased = options.router == "sigmoid_bias"
        # the selection bias; the option `bias` is about the shared experts
        self.register_buffer("bias", torch.zeros(E) if biased else None)
        # visits since the last optimizer step
        self.register_buffer("visited", torch.zeros(E), persistent=False)

    def forward(self, x: Tensor, state: None = None, context: Context | None = None):
        context = context or Context()
        with torch.autocast(x.device.type, enabled=False):  # routing needs full precision
            logits = self.router(x)  # (B, T, E)
            gates, visits, probabilities = self.route(
                logits, self.options.experts_per_token, self.bias, context.starts
            )
        context.record.trace("visits", visits)
        context.record.trace("gates", gates * visits)
        self.account(logits, visits, probabilities, context)
        # with expert choice any number of experts may choose a token
        most = self.options.experts_per_token if self.causal else None
        gates = self.options.routed_scale * gates
        flat = (part.flatten(0, 1) for part in (x, gates, visits))  # (n, D), (n, E), (n, E)
        biases = (self.gate_bias, self.up_bias, self.out_bias) if self.options.expert_bias else None
        y = grouped_mlp(
            *flat, self.gate, self.up, self.out, most, self.impl, biases, self.options.activation
        ).view_as(x)  # (B, T, D)
        if self.shared is not None:
            shared, _ = self.shared(x)
            if self.shared_gate is not None:
                shared = torch.sigmoid(self.shared_gate(x)) * shared
            y = y + shared
        return y, None

    @property
    def waits(self) -> str:
        """Why a step of one token cannot be a CUDA graph (see layers.py); empty if it can."""
        options = self.options
        plain = not options.expert_bias and options.activation == "silu"
        path = path_of(self.impl, self.gate.device, plain)
        return "" if path == "triton" else f"the {path} path of moe counts each expert's tokens"

    def account(
        self, logits: Tensor, visits: Tensor, probabilities: Tensor, context: Context
    ) -> None:
        """Record the z-loss, mean(logsumexp(logits)²) over the real tokens, and the sums that the
        balance loss needs. Count the visits."""
        real = (
            logits.new_ones(logits.shape[:2])
            if context.real is None
            else context.real.to(logits.dtype)
        ).unsqueeze(-1)  # (B, T, 1)
        visited = (visits * real).sum((0, 1))  # (E,)
        if self.training and not context.record.finished:
            self.count(visited)
        count, record = real.sum(), context.record
        z = (logits.logsumexp(-1, keepdim=True).square() * real).sum()
        record.add_mean("z", self.options.z_loss, z, count)
        sums = Sums(self.options, count, visited, (probabilities * real).sum((0, 1)))
        record.pool("balance", balance, sums)

    def count(self, visited: Tensor) -> None:
        """Count the visits (E,) of a training step, which decide how the selection bias moves."""
        if not is_transformed():
            self.visited.add_(visited.to(self.visited.dtype))
        elif self.bias is not None:
            accepted = "eval(), because torch.func and torch.export cannot count visits"
            raise InputError("router", "sigmoid_bias in training mode", accepted)

    def _apply(self, fn, recurse=True):
        """Move or convert the layer as PyTorch does, but keep its buffers in fp32: in bfloat16 a
        step of 0.001 no longer moves a bias of 0.5."""
        buffers = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, before in buffers.items():
            after = getattr(self, name)
            if after.dtype in (torch.bfloat16, torch.float16):
                exact = after if before.is_meta else before.to(after.device)
                setattr(self, name, exact.float())
        return self

    @torch.no_grad()
    def after_step(self, taken: Tensor | float = 1.0):
        """Raise the selection bias of experts with few visits and lower that of the others
        (DeepSeek-V3 §2.1.2), unless the step was skipped (taken: 0). Then reset the visits."""
        if self.bias is not None:
            visited = total(self.visited)
            rise = self.options.bias_step * torch.sign(visited.mean() - visited)
            self.bias += taken * rise
        self.visited.zero_()

    def flops(self, context: int) -> float:
        """Forward FLOPs per token: the router, K experts and the shared ones."""
        return self.flops_of(self.options.experts_per_token, context)

    def unrouted_flops(self, context: int) -> float:
        """Forward FLOPs per token if every token visited every expert."""
        return self.flops_of(self.options.experts, context)

    def flops_of(self, visited: int, context: int) -> float:
        """Forward FLOPs per token that visits `visited` routed experts."""
        one_expert = 3 * self.out[0].numel()
        maps = [part for part in (self.shared, self.shared_gate) if part is not None]
        shared = sum(flops(part, context) for part in maps)
        return 2 * (self.router.weight.numel() + visited * one_expert) + shared

    def inactive_parameters(self) -> float:
        """Parameters of the experts that a token does not visit."""
        biases = (self.gate_bias, self.up_bias, self.out_bias) if self.options.expert_bias else ()
        routed = 3 * self.out.numel() + sum(bias.numel() for bias in biases)
        return (1 - self.options.experts_per_token / self.options.experts) * routed


class Sums(NamedTuple):
    """A layer's sums over its real tokens."""

    options: MoE.Options
    count: Tensor  # () tokens
    visits: Tensor  # (E,)
    probabilities: Tensor  # (E,)


def balance(record: Record, layers: list[Sums]) -> None:
    """Record the balance loss, and each expert's share of the visits."""
    pooled = []
    for options, count, visits, probabilities in layers:
        count = count.clamp(min=1)
        fraction, probability = visits / count, probabilities / count  # (E,) each
        if options.balance == "layer":
            record.add_loss("balance", options.balance_loss * imbalance(fraction, probability))
        else:
            pooled.append((options.balance_loss, fraction, probability))
        load = fraction / fraction.sum().clamp(min=1e-9)
        record.observe("load", load)
        record.observe("overload", load.amax() * load.numel())  # E times the largest share
    if pooled:
        record.add_loss("balance", pooled_imbalance(pooled))


def imbalance(fraction: Tensor, probability: Tensor) -> Tensor:
    """E Σ f_i P_i, which is K if all experts have equal shares; Switch's equation 4 if K = 1.

    f counts visits and has no gradient, so the loss teaches the router through P.
    """
    return fraction.numel() * (fraction * probability).sum()


def pooled_imbalance(layers: list[tuple[float, Tensor, Tensor]]) -> Tensor:
    """The weighted imbalance of the layers' mean f and mean P, as in the library transformers.

    Here one layer's load can make up for another's, which separate losses do not allow.
    """
    weights, fractions, probabilities = zip(*layers, strict=True)
    mean = sum(weights) / len(weights)
    return mean * imbalance(torch.stack(fractions).mean(0), torch.stack(probabilities).mean(0))


# The routers: logits (B, T, E), K, bias (E,), starts (B, T)
# -> gates (B, T, E), visits (B, T, E) bool, probabilities (B, T, E) for the balance loss.


def softmax_topk(logits: Tensor, K: int, bias: Tensor | None, starts: Tensor | None):
    """Mixtral: the softmax over the K best logits, so that the gates sum to one."""
    visits = top(logits, K)
    return logits.masked_fill(~visits, float("-inf")).softmax(-1), visits, logits.softmax(-1)


def softmax(
    logits: Tensor,
    K: int,
    bias: Tensor | None,
    starts: Tensor | None,
    groups: tuple[int, int] = (1, 1),
):
    """Switch (K = 1) and OLMoE: the gates are the probabilities as they are.

    If K = 1, a gate divided by the sum of the gates would have no gradient. A group of experts is
    ranked by its best one (DeepSeek-V2).
    """
    probabilities = logits.softmax(-1)
    visits = top(within_groups(probabilities, *groups, GROUPED["softmax"]), K)
    return probabilities, visits, probabilities


def sigmoid_bias(
    logits: Tensor, K: int, bias: Tensor, starts: Tensor | None, groups: tuple[int, int] = (1, 1)
):  # fmt: skip
    """DeepSeek-V3: a bias without a gradient affects the selection but not the gates.

    A group of experts is ranked by the sum of its two best scores. V3 computes its balance loss for
    each sequence; this router's is for the whole batch.
    """
    scores = logits.sigmoid()
    visits = top(within_groups(scores + bias, *groups, GROUPED["sigmoid_bias"]), K)
    gates = scores / ((scores * visits).sum(-1, keepdim=True) + 1e-20)
    return gates, visits, scores / (scores.sum(-1, keepdim=True) + 1e-20)


def expert_choice(logits: Tensor, K: int, bias: Tensor | None, starts: Tensor | None):
    """Each expert takes the T·K/E tokens of a document that score highest for it.

    The balance is perfect. But a later token can push an earlier one out, so the choice is not
    causal. Padding competes too, so it can change which tokens of its row are chosen.
    """
    probabilities = logits.softmax(-1)
    B, T, E = logits.shape
    if starts is not None:
        scores = probabilities.transpose(1, 2).flatten(0, 1)  # (B · E, T)
        chosen = top_per_document(scores, starts.repeat_interleave(E, 0), K / E)
        return probabilities, chosen.view(B, E, T).transpose(1, 2), probabilities
    capacity = -(-T * K // E)  # tokens of an expert: at most T, because K is at most E
    return probabilities, top(probabilities.mT, capacity).mT, probabilities


# router -> how many of a group's best experts decide the group's rank
GROUPED = {"softmax": 1, "sigmoid_bias": 2}
ROUTERS = {
    router.__name__: router for router in (softmax_topk, softmax, sigmoid_bias, expert_choice)
}


def within_groups(scores: Tensor, groups: int, kept: int, best: int) -> Tensor:
    """Scores (B, T, E), with -inf outside each token's best groups.

    Groups are ranked by the sum of their `best` highest scores.
    """
    if groups == 1:
        return scores
    parts = scores.unflatten(-1, (groups, -1))  # (B, T, groups, E / groups)
    worth = parts.topk(best, dim=-1).values.sum(-1)  # (B, T, groups)
    return parts.masked_fill(~top(worth, kept).unsqueeze(-1), float("-inf")).flatten(-2)


def top(scores: Tensor, count: int) -> Tensor:
    """True at the `count` largest of the last dimension: exactly that many, even with ties."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, scores.topk(count).indices, True)
