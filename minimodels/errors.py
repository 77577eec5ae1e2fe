"""The error for bad input, and a check of dataclasses against the types of their fields."""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

LARGEST = 2**31 - 1


class InputError(Exception):
    """Bad input, described in one line: the field, its value and what would be accepted.

    `excerpt` is shown below that line: a piece of the text, with a caret at the place of the error.
    """

    def __init__(self, field: str, value: object, accepted: str, excerpt: str = ""):
        self.field, self.value, self.accepted, self.excerpt = field, value, accepted, excerpt
        line = f"{field}: {value!r} is not accepted; accepted: {accepted}"
        super().__init__(f"{line}\n{excerpt}" if excerpt else line)


def missing(package: str, extra: str) -> InputError:
    """The error for a package that is not installed, with the extra that brings it."""
    command = f'pip install -e ".[{extra}]"'
    error = InputError(package, "not installed", command)
    error.args = (f"{package} is not installed; {command}",)
    return error


def nearest(name: str, known: Iterable[str]) -> str:
    """The known names, after the one that was probably meant: "did you mean moe? attention, mlp,
    moe"."""
    known = list(known)
    return meant(name, known) + ", ".join(known)


def meant(name: str, known: Iterable[str]) -> str:
    """ "did you mean moe? " if one of the known names resembles this one, in capitals or not,
    otherwise ""."""
    lower = {each.lower(): each for each in known}
    close = difflib.get_close_matches(name.lower(), lower, 1)
    return f"did you mean {lower[close[0]]}? " if close else ""


class Range(NamedTuple):
    """The numbers that a field accepts, and how an error describes them."""

    low: float
    high: float
    accepted: str
    above: bool = False  # low itself is not accepted


Count = Annotated[int, Range(1, LARGEST, f"a whole number from 1 to {LARGEST}")]
Natural = Annotated[int, Range(0, LARGEST, f"a whole number from 0 to {LARGEST}")]
Positive = Annotated[float, Range(0, math.inf, "a number above 0", above=True)]
NonNegative = Annotated[float, Range(0, math.inf, "a number of 0 or more")]
Share = Annotated[float, Range(0, 1, "a fraction from 0 to 1")]
Fraction = Annotated[float, Range(0, 1, "a fraction above 0, at most 1", above=True)]

PLAIN = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    Path: "a path",
}


def check_types(given: Any) -> None:
    """Raise InputError unless each field of a dataclass has a value of its type.

    It checks int, float (which accepts an int), str, bool, Literal, None, their unions, tuples of
    them, and the ranges above.
    """
    hints = get_type_hints(type(given), include_extras=True)
    for field in fields(given):
        value = getattr(given, field.name)
        if not fits(value, hints[field.name]):
            raise InputError(field.name, value, describe(hints[field.name]))


def fits(value: object, hint: Any) -> bool:
    """Whether a value has the type of a hint: one of those above, or any other class. Every value
    fits a hint that is no class."""
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        ranges = [note for note in notes if isinstance(note, Range)]
        return fits(value, base) and all(
            each.low <= value < math.inf
            and value <= each.high
            and not (each.above and value == each.low)
            for each in ranges
        )
    if get_origin(hint) is Literal:
        return any(type(value) is type(choice) and value == choice for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return any(fits(value, choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:  # of any length
        return type(value) is tuple and all(fits(each, get_args(hint)[0]) for each in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint in (int, str, bool):
        return type(value) is hint
    return isinstance(value, hint) if isinstance(hint, type) else True


def describe(hint: Any) -> str:
    """The values that a field accepts, as text for an error."""
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        return next((note.accepted for note in notes if hasattr(note, "accepted")), describe(base))
    if get_origin(hint) is Literal:
        return ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join(describe(choice) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"numbers in brackets, each {describe(get_args(hint)[0])}"
    if hint is type(None):
        return "none"
    return PLAIN.get(hint, getattr(hint, "__name__", str(hint)))
