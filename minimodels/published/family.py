"""The form of a family's table.

A published model is a sequence of blocks. A block is a group of our layers that the family counts
as one layer: a transformer's block has two, a sequence mixer and an MLP. Roles say which layers may
be at one place of a block: "full" and "local" attention, or "dense" and "experts". All layers with
the same role have the same options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from torch import Tensor, nn

from minimodels.config import Config
from minimodels.published.entries import Entries


class Setting(Protocol):
    """Some options of a layer, or fields of Config, and their entries in config.json."""

    options: tuple[str, ...]
    names: tuple[str, ...]  # the entries that it writes; errors name the first one

    def read(self, entries: Entries) -> dict[str, object]:
        """The values of the options."""

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        """The entries for these values."""

    def fits(self, values: dict[str, Any]) -> bool:
        """Whether a layer with these options can have the role."""


class Place(Protocol):
    """A place in every block, and the entries that say which role it has."""

    roles: tuple[str, ...]
    names: tuple[str, ...]

    def read(self, entries: Entries, count: int) -> list[str]:
        """The role in each of `count` blocks."""

    def write(self, roles: list[str]) -> dict[str, object]:
        """The entries for these roles."""


class Mapping(Protocol):
    """The stored form of some of our parts.

    The argument `name` is the complete one, with the block and the leaf (weight, bias).
    """

    name: str

    def write(self, name: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Published tensors by name."""

    def read(self, name: str, stored: Callable[[str], Tensor], tensors: list[Tensor]) -> None:
        """Copy the stored tensors into ours."""


@dataclass(frozen=True)
class Role:
    """A layer of a family's blocks."""

    layer: str
    """its name in the text"""
    settings: tuple[Setting, ...]
    """its options; an option without a setting has its default"""
    parts: dict[str, Mapping | str | Callable[[nn.Module], Mapping]]
    """part of the layer -> its name in the block; the key has several parts if they are stored as
    one tensor, and the value is a function if the form depends on the layer"""
    residual: dict[str, Mapping | str]
    """the same for the norms on the residual stream"""
    none: dict[str, Callable[[Any, Config], object]] = field(default_factory=dict)
    """option -> its meaning if it is None, from the options and the Config"""
    training: tuple[str, ...] = ()
    """options for training only: they do not make two models different"""

    def having(self, *settings: Setting, **parts: Mapping | str) -> Role:
        """The role with other settings for some options and other names for some parts."""
        said = {option for setting in settings for option in setting.options}
        kept = tuple(each for each in self.settings if not said.intersection(each.options))
        return replace(self, settings=(*kept, *settings), parts={**self.parts, **parts})

    def storing(self, parts: dict[str, Mapping | str]) -> Role:
        """The role with other names for all parts."""
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
    """the fields of Config, except its layers"""
    roles: dict[str, Role]
    """the layers; a text that defines them uses the keys as their names"""
    places: tuple[Place, ...]
    """which role is where in a block"""
    prefix: str
    """the start of every tensor's name except the head's; a file without a head may lack it"""
    block: str
    """the start of a block's names after the prefix, with {} for its number"""
    whole: dict[str, Mapping | str]
    """the parts outside the blocks, by their complete names"""
    leading: tuple[str, ...] = ()
    """roles of layers before the blocks"""
    count: str = "num_hidden_layers"
    """the entry with the number of blocks"""
    only: dict[str, object] = field(default_factory=dict)
    """entry -> the only value that is implemented; an absent entry counts as this value"""
    idle: tuple[str, ...] = ()
    """entries that change nothing here, such as those about initialisation or speed"""
    aliases: dict[str, str] = field(default_factory=dict)
    """another name of an entry or of a tensor, with {} for the number of its block -> the name used here"""
    more_blocks: bool = False
    """whether files may have more blocks, which predict further tokens and are left out"""
    checks: tuple[Callable[[Entries], None], ...] = ()
    """the checks of the class, besides those of our layers"""
