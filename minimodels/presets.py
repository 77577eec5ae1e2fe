"""The presets: models by name, at the sizes that every comparison here uses."""

from __future__ import annotations

from dataclasses import fields

from minimodels.config import Config
from minimodels.errors import InputError

PRESETS = {  # preset -> layers at n transformer blocks
    "transformer": lambda n: f"(attention mlp)*{n}",
    "mamba": lambda n: f"(mamba)*{2 * n}",
    "moe": lambda n: f"(attention moe)*{n}",
    "mod": lambda n: f"(attention mlp mod(attention mlp))*{n // 2}",
    "hybrid": lambda n: f"(mamba mlp mamba moe mamba mlp attention moe)*{n // 4}",
}


SIZES = {  # size -> blocks, and the fields of Config that differ from its defaults
    "tiny": (4, {"width": 128, "heads": 4}),
    "small": (12, {"width": 768, "heads": 12, "window": 1024}),
}


def preset(model: str, size: str = "tiny", **overrides) -> Config:
    """The named preset as a Config: model one of PRESETS, size one of SIZES, any field overridden."""
    if model not in PRESETS:
        raise InputError("model", model, ", ".join(PRESETS))
    if size not in SIZES:
        raise InputError("size", size, ", ".join(SIZES))
    unknown = set(overrides) - {field.name for field in fields(Config)}
    if unknown:
        raise InputError(
            "config", sorted(unknown), ", ".join(field.name for field in fields(Config))
        )
    blocks, shape = SIZES[size]
    return Config(**{"layers": PRESETS[model](blocks), **shape, **overrides})
