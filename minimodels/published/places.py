"""The entries of config.json that say which role each block has at one of its places.

What is written is read again and compared. So a place need not detect layers that it cannot
express.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minimodels.errors import InputError
from minimodels.published.entries import Entries


@dataclass(frozen=True)
class Always:
    """The same role in every block."""

    role: str
    names: tuple[str, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def read(self, entries: Entries, count: int) -> list[str]:
        return [self.role] * count

    def write(self, roles: list[str]) -> dict[str, object]:
        return {}


@dataclass(frozen=True)
class Windowed:
    """A window in every block.

    There is none if sliding_window is null, or if the class has use_sliding_window and it is false.
    """

    absent: int | None = None
    """the class's default for sliding_window"""
    switched: bool = False
    """whether the class has use_sliding_window, whose default is false"""
    roles = ("full", "local")

    @property
    def names(self) -> tuple[str, ...]:
        return ("sliding_window", *("use_sliding_window",) * self.switched)

    def read(self, entries: Entries, count: int) -> list[str]:
        return ["local" if has_window(entries, self.absent, self.switched) else "full"] * count

    def write(self, roles: list[str]) -> dict[str, object]:
        switch = {"use_sliding_window": "local" in roles} if self.switched else {}
        # if there is a window, the role writes it
        return {"sliding_window": None, **switch}


@dataclass(frozen=True)
class LayerTypes:
    """The kind of each block from a list, or else from a period or from max_window_layers."""

    absent: int | None = 4096
    """the class's default for sliding_window"""
    switched: bool = True
    """whether the class has use_sliding_window and max_window_layers, the first windowed block"""
    alternating: bool = False
    """whether instead every second block before max_window_layers has the window"""
    full_every: int = 0
    """if not `switched`: the last of every so many blocks has no window"""
    period: str = ""
    """an older entry for this number"""
    roles = ("full", "local")

    @property
    def names(self) -> tuple[str, ...]:
        switches = ("use_sliding_window", "max_window_layers")
        more = switches if self.switched else (self.period,) if self.period else ()
        return ("layer_types", "sliding_window", *more)

    def read(self, entries: Entries, count: int) -> list[str]:
        window = has_window(entries, self.absent, self.switched)
        kinds = entries.get("layer_types")
        roles = self.unlisted(entries, count, window)
        if kinds is not None:
            known = {"full_attention": "full", "sliding_attention": "local"}
            roles = listed(kinds, count, known)
        if "local" in roles and not window:
            accepted = "a whole number, because layer_types has sliding_attention"
            raise InputError("config.json sliding_window", None, accepted)
        return roles

    def unlisted(self, entries: Entries, count: int, window: bool) -> list[str]:
        """The roles if there are no layer_types."""
        if not self.switched:
            every = self.full_every
            every = entries.number(self.period, every) if self.period else every
            return ["local" if (i + 1) % every else "full" for i in range(count)]
        first = entries.number("max_window_layers", 28, least=0)
        local = [
            (i < first and i % 2 == 0) if self.alternating else i >= first for i in range(count)
        ]
        return ["local" if window and near else "full" for near in local]

    def write(self, roles: list[str]) -> dict[str, object]:
        kinds = {"full": "full_attention", "local": "sliding_attention"}
        switches = {
            "sliding_window": None,
            "use_sliding_window": "local" in roles,
            "max_window_layers": len(roles),
        }
        listed = {"layer_types": [kinds[role] for role in roles]}
        return listed | (switches if self.switched else {})


@dataclass(frozen=True)
class SomeUnturned:
    """Rotary positions in the blocks for which no_rope_layers has a 1.

    A block has a window if layer_types says so; by default, if it has no rotary positions.
    """

    roles = ("full", "nope", "local", "local_nope")
    names = (
        "no_rope_layers",
        "layer_types",
        "use_sliding_window",
        "sliding_window",
        "no_rope_layer_interval",
    )

    def read(self, entries: Entries, count: int) -> list[str]:
        step = entries.number("no_rope_layer_interval", 4)
        turned = entries.get("no_rope_layers", [int((i + 1) % step != 0) for i in range(count)])
        if type(turned) is not list or len(turned) != count or any(i not in (0, 1) for i in turned):
            raise InputError("config.json no_rope_layers", turned, f"{count} times 0 or 1")
        window = has_window(entries, None, switched=True)
        known = {"full_attention": False, "sliding_attention": True}
        kinds = entries.get("layer_types")
        local = [window and not i for i in turned] if kinds is None else listed(kinds, count, known)
        if any(local) and not window:  # the class's mask has a window, but its kernels do not
            accepted = "true, and a sliding_window, because layer_types has sliding_attention"
            raise InputError("config.json use_sliding_window", False, accepted)
        names = {
            (1, False): "full",
            (0, False): "nope",
            (1, True): "local",
            (0, True): "local_nope",
        }
        return [names[turn, bool(near)] for turn, near in zip(turned, local, strict=True)]

    def write(self, roles: list[str]) -> dict[str, object]:
        local = [role.startswith("local") for role in roles]
        return {
            "no_rope_layers": [int(not role.endswith("nope")) for role in roles],
            "layer_types": ["sliding_attention" if near else "full_attention" for near in local],
            "use_sliding_window": any(local),
            "sliding_window": None,
        }


@dataclass(frozen=True)
class Sparse:
    """Experts in every decoder_sparse_step-th block, except for those in mlp_only_layers."""

    roles = ("dense", "experts")
    names = ("decoder_sparse_step", "mlp_only_layers")

    def read(self, entries: Entries, count: int) -> list[str]:
        step = entries.number("decoder_sparse_step", 1)
        dense = entries.get("mlp_only_layers", [])
        if type(dense) is not list or not all(type(i) is int for i in dense):
            raise InputError("config.json mlp_only_layers", dense, "a list of whole numbers")
        routed = [(i + 1) % step == 0 and i not in dense for i in range(count)]
        return ["experts" if each else "dense" for each in routed]

    def write(self, roles: list[str]) -> dict[str, object]:
        dense = [i for i, role in enumerate(roles) if role == "dense"]
        return {"decoder_sparse_step": 1, "mlp_only_layers": dense}


@dataclass(frozen=True)
class Leading:
    """One role in the first blocks (an entry says how many), another in the rest."""

    name: str
    first: str
    other: str
    absent: int

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.first, self.other)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, entries: Entries, count: int) -> list[str]:
        first = min(count, entries.number(self.name, self.absent, least=0))
        return [self.first] * first + [self.other] * (count - first)

    def write(self, roles: list[str]) -> dict[str, object]:
        return {self.name: roles.index(self.other) if self.other in roles else len(roles)}


@dataclass(frozen=True)
class Periodic:
    """One role in the blocks at `offset` in each `period`, another elsewhere."""

    name: str
    chosen: str
    other: str
    unless_one: str = ""
    """an entry with a number that is 1 if no block has the chosen role"""

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.chosen, self.other)

    @property
    def names(self) -> tuple[str, ...]:
        return (f"{self.name}_layer_period", f"{self.name}_layer_offset")

    def read(self, entries: Entries, count: int) -> list[str]:
        period = entries.number(self.names[0])
        offset = entries.number(self.names[1], least=0, most=period - 1)
        none = self.unless_one and entries.number(self.unless_one) == 1
        return [
            self.chosen if i % period == offset and not none else self.other for i in range(count)
        ]

    def write(self, roles: list[str]) -> dict[str, object]:
        at = [i for i, role in enumerate(roles) if role == self.chosen]
        offset = at[0] if at else len(roles)
        period = at[1] - offset if len(at) > 1 else len(roles) + 1
        none = {self.unless_one: 1} if self.unless_one and not at else {}
        return {self.names[0]: period, self.names[1]: offset, **none}


@dataclass(frozen=True)
class Kinds:
    """Each block's kind is listed; if not, it follows from the family's rule."""

    kinds: dict[str, str]
    """role -> its name in the list"""
    rule: Callable[[Entries, int], list[str]]
    """the roles if there is no list"""
    more: tuple[str, ...] = ()
    """the entries that the rule reads"""
    name: str = "layer_types"

    @property
    def roles(self) -> tuple[str, ...]:
        return tuple(self.kinds)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.more)

    def read(self, entries: Entries, count: int) -> list[str]:
        kinds = entries.get(self.name)
        if kinds is None:
            return self.rule(entries, count)
        entries.asked.update(self.more)  # the list overrides them
        return listed(kinds, count, {kind: role for role, kind in self.kinds.items()}, self.name)

    def write(self, roles: list[str]) -> dict[str, object]:
        return {self.name: [self.kinds[role] for role in roles]}


def every(period: int, last: str, other: str) -> Callable[[Entries, int], list[str]]:
    """The rule that the last of every `period` blocks has one role, the others another."""
    return lambda entries, count: [other if (i + 1) % period else last for i in range(count)]


def has_window(entries: Entries, absent: int | None, switched: bool) -> bool:
    """Whether there is a window that is used.

    If sliding_window is null, there is none. If it is missing, it is `absent`, the class's default.
    """
    told = "sliding_window" in entries.told
    window = entries.get("sliding_window", None if told else absent)
    used = entries.get("use_sliding_window", False) if switched else True
    return bool(used) and window is not None


# older names of kinds of blocks
OLDER = {
    "mamba": "linear_attention", "attention": "full_attention", "deepseek_sparse_attention": "indexed_attention",
}  # fmt: skip


def listed(
    kinds: object, count: int, roles: dict[str, Any], name: str = "layer_types"
) -> list[Any]:
    """The roles that an entry lists."""
    if type(kinds) is list:
        kinds = [OLDER.get(kind, kind) if type(kind) is str else kind for kind in kinds]
    if (
        type(kinds) is not list
        or len(kinds) != count
        or not all(type(kind) is str and kind in roles for kind in kinds)
    ):
        accepted = f"{count} times one of {', '.join(roles)}"
        raise InputError(f"config.json {name}", kinds, accepted)
    return [roles[kind] for kind in kinds]
