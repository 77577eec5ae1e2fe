"""Entries of a config.json and the options that they set. Each kind of setting reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minimodels.errors import InputError

REQUIRED = object()


class Entries(dict):
    """The entries of a config.json. It records every request, so that no entry is overlooked."""

    def __init__(self, entries: dict):
        super().__init__({name: value for name, value in entries.items() if value is not None})
        self.told = set(entries)  # the entries that are present, even if null
        self.asked: set[str] = set()

    def get(self, name: str, absent: Any = None) -> Any:
        """The value of an entry, or `absent`."""
        self.asked.add(name)
        return super().get(name, absent)

    def number(
        self, name: str, absent: int | None = None, least: int = 1, most: int = 2**31 - 1
    ) -> int:
        """A whole number, which config.json must have unless `absent` is given."""
        value = self.get(name, absent)
        if type(value) is not int or not least <= value <= most:
            raise InputError(f"config.json {name}", value, f"a whole number from {least} to {most}")
        return value


@dataclass(frozen=True)
class Entry:
    """An option and the entry with its value."""

    option: str
    name: str
    absent: object = REQUIRED
    """the option's value if there is no such entry"""
    words: dict[str, object] = field(default_factory=dict)
    """values of the entry -> their meaning here"""
    least: int | None = None
    told: bool = False
    """whether the option must be set: a layer without it has another role"""
    null: bool = False
    """whether null means None; otherwise it means the same as an absent entry"""

    @property
    def options(self) -> tuple[str, ...]:
        return (self.option,)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, entries: Entries) -> dict[str, object]:
        none = self.null and self.name in entries.told
        value = entries.get(self.name, None if none else self.absent)
        if value is REQUIRED:
            raise InputError(f"config.json {self.name}", None, "a value")
        if self.least is not None and type(value) is int and value < self.least:
            raise InputError(f"config.json {self.name}", value, f"{self.least} or more")
        return {self.option: self.words.get(value, value) if isinstance(value, str) else value}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {self.name: values[self.option]}

    def fits(self, values: dict[str, Any]) -> bool:
        return not self.told or values[self.option] is not None


@dataclass(frozen=True)
class Flag:
    """An option and the entry that chooses between two of its values."""

    option: str
    name: str
    absent: bool
    values: dict[bool, object]

    @property
    def options(self) -> tuple[str, ...]:
        return (self.option,)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, entries: Entries) -> dict[str, object]:
        value = entries.get(self.name, self.absent)
        if type(value) is not bool:
            raise InputError(f"config.json {self.name}", value, "true or false")
        return {self.option: self.values[value]}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {self.name: values[self.option] == self.values[True]}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


@dataclass(frozen=True)
class Computed:
    """An option that is an invertible function of an entry's number."""

    option: str
    name: str
    absent: object
    read_as: Callable[[float], float]
    written_as: Callable[[float], float]

    @property
    def options(self) -> tuple[str, ...]:
        return (self.option,)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, entries: Entries) -> dict[str, object]:
        value = entries.get(self.name, self.absent)
        if type(value) not in (int, float) or not 0 < value < 1e300:
            raise InputError(f"config.json {self.name}", value, "a number above 0")
        return {self.option: self.read_as(value)}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {self.name: self.written_as(values[self.option])}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


class Fixed:
    """Options that are the same in all models of a family."""

    names: tuple[str, ...] = ()

    def __init__(self, **values: object):
        self.values = values
        self.options = tuple(values)

    def read(self, entries: Entries) -> dict[str, object]:
        return self.values

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {}

    def fits(self, values: dict[str, Any]) -> bool:
        return all(values[option] == value for option, value in self.values.items())


# Experts.


class Balance:
    """The balance loss of experts, in the form of transformers, and only if it uses one."""

    options = ("balance", "balance_loss", "z_loss")
    names: tuple[str, ...] = ()

    def read(self, entries: Entries) -> dict[str, object]:
        weight = entries.get("router_aux_loss_coef", 0.0)
        balanced = entries.get("output_router_logits", False)
        return {"balance": "pooled", "balance_loss": weight if balanced else 0.0, "z_loss": 0.0}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        weight = values["balance_loss"] if values["balance"] == "pooled" else 0
        return {"output_router_logits": bool(weight)} | (
            {"router_aux_loss_coef": weight} if weight else {}
        )

    def fits(self, values: dict[str, Any]) -> bool:
        return True


def divides(part: str, whole: str) -> Callable[[Entries], None]:
    """Make a check that one entry divides another."""

    def check(entries: Entries) -> None:
        if entries.number(whole) % entries.number(part):
            value = entries.number(part)
            raise InputError(f"config.json {part}", value, f"a divisor of {whole} {entries[whole]}")

    return check
