"""A short text for many layers: repeats are folded, and frequent calls get a name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from minimodels.grammar import Call, Definition, Group, Option, Program, write
from minimodels.options import write_options


def write_layers(layers: Sequence[tuple[str, Call]]) -> str:
    """Write a list of layers as text; a definition of a layer may take the name beside it."""
    items = fold([call for _, call in layers])
    names = {call: name for name, call in layers}
    often = Counter(calls_in(items))
    variants = Counter(call.name for call in names)  # such as two kinds of attention
    definitions = {}
    for call, name in names.items():
        named = variants[call.name] > 1 or (call.options and often[call] > 1)
        if named and name not in definitions and all(name != each.name for each in names):
            definitions[name] = call
    known = {call: Call(name) for name, call in definitions.items()}
    program = Program(
        {name: Definition(False, call) for name, call in definitions.items()},
        tuple(rename(item, known) for item in items),
    )
    return write(program)


def fold(calls: list[Call]) -> list[Call | Group]:
    """The calls with repeats as groups. From left to right, the repeat that saves most is taken."""
    items: list[Call | Group] = []
    start = 0
    while start < len(calls):
        length, count = longest_repeat(calls[start:])
        if count == 1:
            items.append(calls[start])
        else:
            items.append(Group(tuple(fold(calls[start : start + length])), count))
        start += length * count
    return items


def longest_repeat(calls: list[Call]) -> tuple[int, int]:
    """How many calls at the front form the repeat that saves most, and how often they occur.

    (1, 1) if there is no repeat.
    """
    best = (1, 1)
    for length in range(1, len(calls) // 2 + 1):
        if len(calls) - length <= best[0] * (best[1] - 1):
            break
        count, first = 1, calls[:length]
        while calls[count * length : (count + 1) * length] == first:
            count += 1
        if length * (count - 1) > best[0] * (best[1] - 1):
            best = (length, count)
    return best


def calls_in(items: Sequence[Call | Group]) -> list[Call]:
    """The calls that are written out in a folded text."""
    found = []
    for item in items:
        found += [item] if isinstance(item, Call) else calls_in(item.items)
    return found


def rename(item: Call | Group, names: dict[Call, Call]) -> Call | Group:
    """The item with names in place of the calls that are defined."""
    if isinstance(item, Call):
        return names.get(item, item)
    return Group(tuple(rename(each, names) for each in item.items), item.count)


def call_of(name: str, options: Any, defaults: dict[str, object]) -> Call:
    """A layer with the options that are neither the class's defaults nor in `defaults`."""
    found = []
    for each in fields(options):
        value = getattr(options, each.name)
        if value == each.default or (value is None and each.name in defaults):
            continue
        if each.default is None and value == defaults.get(each.name):
            continue
        if is_dataclass(value):
            value = Call(type(value).__name__.lower(), options=write_options(value))
            value = value if value.options else value.name
        found.append(Option(each.name, "none" if value is None else value))
    return Call(name, options=tuple(found))
