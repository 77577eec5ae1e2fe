"""The presets: named models, at the sizes that every comparison here uses.

Each architecture defines its own presets. Those that mix architectures are defined here.
"""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from minimodels.architectures.registry import LAYERS, WRAPPERS, check
from minimodels.config import Config
from minimodels.errors import InputError, nearest
from minimodels.grammar import names_in, parse, set_options


class Size(NamedTuple):
    """The number of transformer blocks at a size, their width, and the options that go with it."""

    blocks: int
    width: int
    settings: tuple[str, ...] = ()


SIZES = {
    "tiny": Size(4, 128, ("mamba2.state_size=64",)),
    "small": Size(
        12,
        768,
        (
            "attention.heads=12",
            "mamba2.heads=24",
            "retention.heads=6",
            "deltanet.heads=6",
            "sparse_attention.heads=12",
        ),
    ),
}
# hybrid is our own mixture. The others mix layers in the ratios of the published models Qwen3-Next,
# OLMo-Hybrid, Kimi Linear and Nemotron-H, except that Nemotron-H itself has one attention layer
# to six of Mamba-2.
MIXED = {
    "hybrid": "(mamba mlp mamba moe mamba mlp attention moe)*{quarter}",
    "qwen_next": "((deltanet(gate=scalar, output_gate=silu) moe)*3"
    " attention(qk_norm=head, gate=full, rope_fraction=0.25) moe)*{quarter}",
    "olmo_hybrid": "((deltanet(gate=scalar, beta_max=2, output_gate=silu) mlp)*3"
    " attention(qk_norm=full) mlp)*{quarter}",
    "kimi_linear": "((deltanet(gate=vector, output_gate=sigmoid, output_rank=head) moe)*3"
    " attention(rope_base=0) moe)*{quarter}",
    "nemotron_h": "(mamba2 mlp mamba2 mlp mamba2 attention(rope_base=0) mlp)*{quarter}",
}
PRESETS = {  # preset -> its layers, for n transformer blocks
    name: layers
    for kind in (*LAYERS.values(), *WRAPPERS.values())
    for name, layers in getattr(kind, "presets", {}).items()
} | MIXED


MAIN = ("transformer", "mamba", "moe", "mod", "hybrid")  # which every comparison shows by default


def layers_of(model: str, size: str) -> str:
    """The layers of a preset as text. Raises InputError if the model or size is unknown."""
    if model not in PRESETS:
        raise InputError("model", model, nearest(model, PRESETS))
    if size not in SIZES:
        raise InputError("size", size, nearest(size, SIZES))
    n = SIZES[size].blocks
    return fitted(PRESETS[model].format(n=n, twice=2 * n, half=n // 2, quarter=n // 4), size)


def fitted(text: str, size: str) -> str:
    """Layers with the options of a size, except those that the text sets itself. Raises InputError
    if one of its layers is the name of a preset."""
    program = parse(text)
    names = names_in(program)
    for name in sorted(names.intersection(PRESETS) - {*LAYERS, *WRAPPERS, *program.definitions}):
        accepted = f"a layer; the layers of the preset {name} are {layers_of(name, size)}"
        raise InputError("layers", name, accepted)
    settings = [each for each in SIZES[size].settings if each.split(".")[0] in names]
    return set_options(text, settings, missing=True)


def preset(model: str, size: str = "tiny", *settings: str, **overrides) -> Config:
    """The named preset as a Config: model is one of PRESETS, size one of SIZES.

    `settings` set options of its layers, such as "mamba.state_size=32". `overrides` are fields of
    Config. Raises InputError for an unknown name or option.
    """
    known = [field.name for field in fields(Config)]
    for name in overrides:
        if name not in known:
            raise InputError("config", name, nearest(name, known))
    text = set_options(overrides.pop("layers", layers_of(model, size)), settings)
    config = Config(**{"layers": text, "width": SIZES[size].width, **overrides})
    check(config)
    return config
