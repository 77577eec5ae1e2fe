"""Presets at sizes for tests."""

from minimodels.grammar import names_in, parse
from minimodels.presets import layers_of

SETTINGS = (
    "attention.heads=2",
    "mamba.state_size=4",
    "mamba2.head_dim=8",
    "mamba2.state_size=8",
    "moe.experts=4",
    "mod.capacity=0.5",
)


def small(model: str) -> list[str]:
    """The settings that apply to a preset."""
    names = names_in(parse(layers_of(model, "tiny")))
    return [each for each in SETTINGS if each.split(".")[0] in names]
