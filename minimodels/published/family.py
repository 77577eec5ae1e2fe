"""What the table of a family says.

A published model is a row of blocks. A block is as many of our layers as the family counts as one: a
transformer's has two, a sequence mixer and an MLP. Which layers may be at one place of a block is a matter
of roles: "full" and "local" attention, "dense" and "experts". All layers of one role have the same options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from minimodels.config import Config
from minimodels.published.entries import Entries


class Setting(Protocol):
    """Some options of a layer, or fields of Config, and how config.json says them."""

    options: tuple[str, ...]
    names: tuple[str, ...]  # the entries that it writes, the first of which errors name

    def read(self, entries: Entries) -> dict[str, object]:
        """The values of the options."""

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        """The entries that say them."""

    def fits(self, values: dict[str, Any]) -> bool:
        """Whether a layer with these options may have the role."""


class Place(Protocol):
    """A place in every block, and how config.json says which role it has."""

    roles: tuple[str, ...]
    names: tuple[str, ...]

    def read(self, entries: Entries, count: int) -> list[str]:
        """The role in each of `count` blocks."""

    def write(self, roles: list[str]) -> dict[str, object]:
        """The entries that say so."""


class Mapping(Protocol):
    """How some parts of ours are stored. `name` is complete, the block and the leaf (weight, bias) included."""

    name: str

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Published tensors by name."""

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        """Copy what is stored into our tensors."""


@dataclass(frozen=True)
class Role:
    """A layer of a family's blocks."""

    layer: str
    """its name in the text"""
    settings: tuple[Setting, ...]
    """its options; those of which no setting speaks have their defaults"""
    parts: dict[str, Mapping | str | Callable[[nn.Module], Mapping]]
    """part of the layer -> its name within the block; several parts, if they are stored as one tensor; a function, if
    how they are stored depends on the layer"""
    residual: dict[str, Mapping | str]
    """the same of what joins the layer to the residual stream"""
    none: dict[str, Callable[[Any, Config], object]] = field(default_factory=dict)
    """option -> what it is if it is None, from the options and the Config"""
    training: tuple[str, ...] = ()
    """options that concern training only: two models that differ in these are the same"""

    def having(self, *settings: Setting, **parts: Mapping | str) -> Role:
        """The role with other settings of some options, and other names of some parts."""
        said = {option for setting in settings for option in setting.options}
        kept = tuple(each for each in self.settings if not said.intersection(each.options))
        return replace(self, settings=(*kept, *settings), parts={**self.parts, **parts})

    def storing(self, parts: dict[str, Mapping | str]) -> Role:
        """The role with other names of all parts."""
        return replace(self, parts=parts)

    def norms(self, **residual: Mapping | str) -> Role:
        """The role with other norms on the residual stream."""
        return replace(self, residual=residual)

    def entry_of(self, option: str) -> str:
        """The entry of config.json that sets an option."""
        return entry_of(self.settings, option)


def entry_of(settings: tuple[Setting, ...], option: str) -> str:
    """The entry of config.json that sets an option, or the option's own name."""
    return next(
        (each.names[0] for each in settings if option in each.options if each.names), option
    )


@dataclass(frozen=True)
class Family:
    """One model_type: its config.json and the names in its files."""

    architecture: str
    """the class of transformers"""
    fields: tuple[Setting, ...]
    """the fields of Config, besides its layers"""
    roles: dict[str, Role]
    """the layers; the keys name them in texts that define them"""
    places: tuple[Place, ...]
    """which of them is where in a block"""
    prefix: str
    """how the names of all tensors but the head's begin; files of a model without a head may lack it"""
    block: str
    """how the names of a block begin after the prefix, with its number as {}"""
    whole: dict[str, Mapping | str]
    """the parts outside of the blocks, by their complete names"""
    leading: tuple[str, ...] = ()
    """roles of layers before the blocks"""
    count: str = "num_hidden_layers"
    """the entry that says how many blocks there are"""
    only: dict[str, object] = field(default_factory=dict)
    """entry -> the one value that is implemented, which an absent entry is taken to have"""
    idle: tuple[str, ...] = ()
    """entries that change nothing here: they concern initialisation, or how and not what is computed"""
    aliases: dict[str, str] = field(default_factory=dict)
    """another name of an entry or of a tensor, with {} for the number of its block -> the name used here"""
    more_blocks: bool = False
    """whether files may have blocks behind the last one, which are left out: those that predict further tokens"""
    checks: tuple[Callable[[Entries], None], ...] = ()
    """what the class refuses, besides what our layers refuse"""
