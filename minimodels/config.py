"""What a model is, as data: one dataclass, one small grammar for its layers, the presets.

A model is a list of pre-norm residual layers, written as text:

    "attention mlp attention mlp"                  a transformer of two blocks
    "(mamba)*8"                                    a parenthesised group, repeated
    "mamba mlp window mlp mod(attention mlp)"      any mixture; mod(...) wraps a group in mixture-of-depths

The names are those of `minimodels.lm.LAYERS` and `minimodels.lm.WRAPPERS`.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from minimodels.errors import LARGEST, InputError, check_types
from minimodels.grammar import parse_scaling


@dataclass(frozen=True)
class Config:
    """The shape of a model. A field whose text says "0: ..." stands for that when it is 0."""

    layers: str = "(attention mlp)*4"
    """the layers, in the grammar of minimodels/config.py"""
    vocab: int = 0
    """V, number of token ids; 0: as many as the data has, 256 for bytes"""
    width: int = 128
    """D, the width of the residual stream"""
    norm_eps: float = 1e-5
    """epsilon of every RMSNorm"""
    tie_embeddings: bool = True
    """use the embedding matrix as the output head too"""
    impl: str = "auto"
    """auto (torch, or a kernel measured to be faster), reference (the equations), torch (fast everywhere), triton (kernels)"""

    heads: int = 4
    """H, query heads of attention"""
    kv_heads: int = 0
    """G, key and value heads; 0: as many as heads"""
    head_dim: int = 0
    """d, width of a head; 0: width / heads"""
    rope_base: float = 10_000.0
    """base of the rotary angles; 0 leaves positions out"""
    rope_scaling: str = ""
    """slower rotary angles for longer texts: linear:factor=4 or llama3:factor=8,low=1,high=4,context=8192; empty: none"""
    qk_norm: str = "none"
    """RMSNorm on queries and keys before the rotation: none, head (each head apart, Qwen3) or full (all together, OLMoE)"""
    attention_bias: bool = False
    """biases in attention's four projections"""
    window: int = 128
    """tokens that a `window` layer sees, itself included"""
    mlp_width: int = 0
    """hidden width of SwiGLU; 0: 8/3 of width, rounded up to a multiple of 32"""
    mlp_bias: bool = False
    """biases in SwiGLU's three projections"""

    expand: int = 2
    """width of Mamba's inner channels over width"""
    state_size: int = 16
    """N, Mamba's state per channel"""
    conv_width: int = 4
    """taps of Mamba's causal convolution"""
    dt_rank: int = 0
    """R, rank of Mamba's step size projection; 0: width / 16, rounded up"""
    conv_bias: bool = True
    """a bias in Mamba's convolution"""
    mamba_bias: bool = False
    """biases in Mamba's input and output projection"""
    mamba_norm: str = "none"
    """RMSNorm on Mamba's step size, B and C: none, plain (without weights, Falcon-Mamba) or learned (Jamba)"""
    mamba_norm_eps: float = 0.0
    """epsilon of these; 0: norm_eps"""

    experts: int = 8
    """E, experts of a `moe` layer"""
    experts_per_token: int = 2
    """K, experts that a token visits"""
    expert_width: int = 0
    """hidden width of one expert; 0: such that a token's experts, shared ones included, cost what the dense mlp does"""
    shared_experts: int = 0
    """experts that every token visits besides its K"""
    router: str = "softmax_topk"
    """softmax_topk (Mixtral), softmax (Switch, OLMoE), sigmoid_bias (DeepSeek-V3) or expert_choice (not causal)"""
    routed_scale: float = 1.0
    """factor on the routed experts' weights (DeepSeek-V3: 2.5)"""
    balance_loss: float = 0.01
    """weight of the load balance loss, which is K at an even load (DeepSeek-V3: 0.0001, of one that is 1 there)"""
    balance: str = "layer"
    """layer (each layer's loads are balanced) or pooled (their mean over the layers is, as in transformers)"""
    z_loss: float = 0.001
    """weight of the router z-loss (DeepSeek-V3 has none)"""
    bias_step: float = 0.001
    """step of sigmoid_bias's selection bias after each optimizer step"""

    capacity: float = 0.125
    """C, fraction of the tokens that a mod(...) group processes"""
    mod_route: str = "predictor"
    """how mod(...) decides causally: router (auxiliary loss on the router) or predictor (a stop-gradient MLP)"""
    mod_loss: float = 0.01
    """weight of the loss that trains the causal decision"""

    def __post_init__(self):
        check_types(self)
        for name, minimum in MINIMUM.items():
            value = getattr(self, name)
            if not minimum <= value < float("inf"):
                raise InputError(name, value, f"{minimum} or more")
            if type(value) is int and value > LARGEST:
                raise InputError(name, value, f"{minimum} to {LARGEST}")
        for name, accepted in CHOICES.items():
            if getattr(self, name) not in accepted:
                raise InputError(name, getattr(self, name), ", ".join(accepted))
        parse_scaling(self.rope_scaling)
        if not 0 < self.capacity <= 1:
            raise InputError("capacity", self.capacity, "a fraction in (0, 1]")
        used = layer_names(parse_layers(self.layers))  # what no layer uses cannot be wrong
        if used & {"attention", "window"}:
            self.check_attention()
        if "moe" in used:
            self.check_experts()

    def check_attention(self):
        if not self.head_dim and self.width % self.heads:
            raise InputError(
                "heads", self.heads, f"a divisor of width {self.width}, or an explicit head_dim"
            )
        if self.rope_base and (self.head_dim or self.width // self.heads) % 2:
            raise InputError(
                "head_dim",
                self.head_dim or self.width // self.heads,
                "an even number, for rotary pairs",
            )
        if self.kv_heads and self.heads % self.kv_heads:
            raise InputError("kv_heads", self.kv_heads, f"a divisor of heads {self.heads}")

    def check_experts(self):
        if self.experts_per_token > self.experts:
            raise InputError(
                "experts_per_token", self.experts_per_token, f"1 to experts {self.experts}"
            )
        if self.experts_per_token == 1 and self.router in ("softmax_topk", "sigmoid_bias"):
            accepted = "2 or more, or router softmax: a single gate that is made to be one teaches the router nothing"
            raise InputError("experts_per_token", self.experts_per_token, accepted)

    @property
    def depth(self) -> int:
        """Residual layers in all, those inside wrappers included: what initialisation scales outputs by."""
        return count_layers(parse_layers(self.layers))

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights: GPT-2's 0.02 at its width of 768, and larger in narrower models, whose sums
        have fewer terms."""
        return 0.02 * (768 / self.width) ** 0.5


MINIMUM = {
    "vocab": 0, "width": 1, "norm_eps": 0, "heads": 1, "kv_heads": 0, "head_dim": 0, "rope_base": 0, "window": 1,
    "mlp_width": 0, "expand": 1, "state_size": 1, "conv_width": 1, "dt_rank": 0, "mamba_norm_eps": 0, "experts": 1,
    "experts_per_token": 1,
    "expert_width": 0, "shared_experts": 0, "routed_scale": 0, "balance_loss": 0, "z_loss": 0, "bias_step": 0, "mod_loss": 0,
}  # fmt: skip
MOST_LAYERS, DEEPEST = 10_000, 50  # groups within groups, each of which is a call within a call
CHOICES = {
    "impl": ("auto", "reference", "torch", "triton"),
    "qk_norm": ("none", "head", "full"),
    "mamba_norm": ("none", "plain", "learned"),
    "balance": ("layer", "pooled"),
    "router": ("softmax_topk", "softmax", "sigmoid_bias", "expert_choice"),
    "mod_route": ("router", "predictor"),
}


Layers = tuple  # of names and of (wrapper name, Layers)


def parse_layers(text: str) -> Layers:
    """Read the layer grammar.

    items := item+ ;  item := (name | "(" items ")" | wrapper "(" items ")") ["*" count]

    >>> parse_layers("(attention mlp)*2 mod(mamba)")
    ('attention', 'mlp', 'attention', 'mlp', ('mod', ('mamba',)))

    Raises InputError where the text is not in the grammar.
    """
    tokens = re.findall(r"\w+|\S", text)
    accepted = 'layer names, groups and repeats such as "(attention mlp)*2 mod(mamba mlp)"'

    def items(closing: str) -> Layers:
        found: Layers = ()
        while tokens and tokens[0] != ")":
            found += item()
        if not found or (tokens.pop(0) if tokens else "") != closing:
            raise InputError("layers", text, accepted)
        return found

    def item() -> Layers:
        name = tokens.pop(0)
        if name == "(":
            found = items(")")
        elif not name.isidentifier():
            raise InputError("layers", text, accepted)
        elif tokens[:1] == ["("]:
            tokens.pop(0)
            found = ((name, items(")")),)
        else:
            found = (name,)
        if tokens[:1] == ["*"]:
            count = tokens[1] if len(tokens) > 1 else ""
            if not re.fullmatch(r"0*[1-9]\d{,8}", count):
                raise InputError("layers", text, accepted)
            del tokens[:2]
            if len(found) * int(count) > MOST_LAYERS:
                raise InputError("layers", text, f"at most {MOST_LAYERS} layers")
            found *= int(count)
        return found

    if (
        max(itertools.accumulate((token == "(") - (token == ")") for token in tokens), default=0)
        > DEEPEST
    ):
        raise InputError("layers", f"{text[:20]}...", f"groups nested at most {DEEPEST} deep")
    return items("")


def count_layers(layers: Layers) -> int:
    """Layers in all, those inside wrappers included."""
    return sum(1 if isinstance(layer, str) else count_layers(layer[1]) for layer in layers)


def layer_names(layers: Layers) -> set[str]:
    """The names of all layers, wrappers' own left out."""
    return set().union(
        *({layer} if isinstance(layer, str) else layer_names(layer[1]) for layer in layers)
    )
