"""The configuration of a whole model.

The layers and their options are a text, whose grammar is in minimodels/grammar.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from minimodels.errors import Count, Natural, NonNegative, Positive, check_types
from minimodels.grammar import Call, count_layers, expand, parse

Residuals = Literal["pre_norm", "post_norm", "sandwich", "deep_norm"]
IMPLS = ("auto", "reference", "torch", "triton")


@dataclass(frozen=True)
class Config:
    """A model: its layers as text, and the settings that they share."""

    layers: str = "(attention mlp)*4"
    """the layers and their options as text; python -m minimodels.architectures lists what there is,
    and minimodels/grammar.py explains the grammar"""
    vocab: Natural = 0
    """V, number of token ids; 0: as many as the data has, 256 for bytes"""
    width: Count = 128
    """D, width of the residual stream"""
    norm_eps: NonNegative = 1e-5
    """epsilon of every norm"""
    norm: Literal["rms", "plain", "layer"] = "rms"
    """norm of the residual stream: rms (RMSNorm), plain (RMSNorm without weights, nanochat) or
    layer (LayerNorm with biases, GPT-2)"""
    tie_embeddings: bool = True
    """use the embedding matrix as the output head too"""
    impl: Literal["auto", "reference", "torch", "triton"] = "auto"
    """auto (torch, or a kernel that was measured to be faster), reference (the equations),
    torch (fast everywhere) or triton (kernels)"""
    residual: Residuals = "pre_norm"
    """where a layer's norm is: pre_norm (before it), post_norm (after it, OLMo 2), sandwich (both,
    Gemma) or deep_norm (on the stream itself, MiniMax-01)"""
    embedding_scale: Positive = 1.0
    """factor on the embeddings (Gemma: the square root of the width)"""
    embedding_norm: bool = False
    """a norm on the embeddings (nanochat)"""
    residual_scale: Positive = 1.0
    """factor on what each layer adds to the residual stream (Granite)"""
    logit_scale: Positive = 1.0
    """factor on the logits"""
    logit_softcap: Positive | None = None
    """c: logits s become c tanh(s / c) (Gemma 2); by default they stay as they are"""
    objective: Literal["next_token"] = "next_token"
    """what the model learns; see minimodels/objectives.py"""

    def __post_init__(self):
        check_types(self)
        _ = self.calls

    @cached_property
    def calls(self) -> tuple[Call, ...]:
        """The layers that the text describes, in order, with repeats and
        definitions written out."""
        return expand(parse(self.layers), self.layers)

    @cached_property
    def depth(self) -> int:
        """The number of residual layers, including those inside wrappers. Initialisation divides
        each layer's output projection by its square root."""
        return count_layers(self.calls)

    @property
    def init_std(self) -> float:
        """Standard deviation of initial weights: GPT-2's 0.02 at its width of 768. Narrower models
        get a larger one, because their sums have fewer terms."""
        return 0.02 * (768 / self.width) ** 0.5
