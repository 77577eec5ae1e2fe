"""Every layer and wrapper by its name in a model's text.

A new architecture needs one import and one line in LAYERS or WRAPPERS.
"""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from torch import nn

from minimodels.architectures.deltanet import DeltaNet
from minimodels.architectures.differential_attention import DifferentialAttention
from minimodels.architectures.latent_attention import LatentAttention
from minimodels.architectures.learned_positions import LearnedPositions
from minimodels.architectures.mamba import Mamba
from minimodels.architectures.mamba2 import Mamba2
from minimodels.architectures.mod import MixtureOfDepths
from minimodels.architectures.moe import MoE
from minimodels.architectures.retention import Retention
from minimodels.architectures.short_convolution import ShortConvolution
from minimodels.architectures.sparse_attention import SparseAttention
from minimodels.architectures.transformer import Attention, SwiGLU
from minimodels.config import Config
from minimodels.errors import InputError, nearest
from minimodels.grammar import Call, count_layers, excerpt, parse, refuse_unused
from minimodels.layers import Place, Stack
from minimodels.options import read_options
from minimodels.residual import RESIDUALS, Joint

LAYERS = {
    "attention": Attention,
    "mlp": SwiGLU,
    "mamba": Mamba,
    "moe": MoE,
    "mamba2": Mamba2,
    "retention": Retention,
    "deltanet": DeltaNet,
    "short_convolution": ShortConvolution,
    "latent_attention": LatentAttention,
    "sparse_attention": SparseAttention,
    "differential_attention": DifferentialAttention,
    "learned_positions": LearnedPositions,
}
WRAPPERS = {"mod": MixtureOfDepths}  # layers that contain other layers


def build(config: Config) -> Stack:
    """Build the layers that a configuration describes.

    Raises InputError for a name or an option that no layer has, and for options that do not fit
    each other or the model's width. The error shows the place in the text.
    """
    stack = build_stack(config, config.calls, 0, {})
    refuse_unused(config.layers)
    return stack


def build_stack(
    config: Config, calls: tuple[Call, ...], index: int, shared: dict[str, nn.Module]
) -> Stack:
    """Build a stack from calls; `index` is the first call's place among the model's layers."""
    blocks = []
    for call in calls:
        block = shared.get(call.shared) or build_block(config, call, index, shared)
        if call.shared:
            shared[call.shared] = block
        blocks.append(block)
        index += count_layers((call,))
    return Stack(blocks)


def build_block(config: Config, call: Call, index: int, shared: dict[str, nn.Module]) -> nn.Module:
    """Build one layer with its residual connection, or one wrapper."""
    kind = find(call, config.layers)
    options, joint = read_call(call, config.layers)
    place = Place(index, config.depth)
    try:
        if call.name in WRAPPERS:
            return kind(options, config, place, build_stack(config, call.layers, index, shared))
        layer = kind(options, config, place)
        residual = joint.residual or config.residual
        return layer if on_stream(kind) else RESIDUALS[residual](config, layer, joint)
    except InputError as error:
        if error.excerpt:  # raised for a layer inside; it already shows its place
            raise
        field, shown = f"layers: {call.name}.{error.field}", excerpt(config.layers, call.at)
        raise InputError(field, error.value, error.accepted, shown) from None


def read_call(call: Call, text: str) -> tuple[Any, Joint]:
    """The options of a call: the layer's own, and those that every layer has."""
    kind, shared = find(call, text), {each.name for each in fields(Joint)}
    if call.name in WRAPPERS or on_stream(kind):
        shared = set()
    own = tuple(each for each in call.options if each.name not in shared)
    others = tuple(each for each in call.options if each.name in shared)
    options = read_options(kind.Options, replace(call, options=own), text, others=shared)
    return options, read_options(Joint, replace(call, options=others), text)


def check(config: Config) -> None:
    """Raise InputError if a layer of a configuration does not exist or has an unknown option, as
    `build` does, but without building anything."""

    def visit(calls: tuple[Call, ...]) -> None:
        for call in calls:
            read_call(call, config.layers)
            visit(call.layers)

    visit(config.calls)
    refuse_unused(config.layers)


def on_stream(kind: type[nn.Module]) -> bool:
    """Whether a layer works on the residual stream itself, without a norm and a sum around it."""
    return getattr(kind, "on_stream", False)


def find(call: Call, text: str) -> type[nn.Module]:
    """The class of a call.

    Raises InputError for an unknown name, for layers inside a layer that is no wrapper, and for a
    wrapper without layers.
    """
    known = {**LAYERS, **WRAPPERS}
    if call.name not in known:
        names = [*parse(text).definitions, *known]
        raise InputError("layers", call.name, nearest(call.name, names), excerpt(text, call.at))
    if bool(call.layers) != (call.name in WRAPPERS):
        accepted = "no layers in its parentheses"
        if call.name in WRAPPERS:
            accepted = f"layers in its parentheses, such as {call.name}(mlp)"
        raise InputError(f"layers: {call.name}", call.name, accepted, excerpt(text, call.at))
    return known[call.name]
