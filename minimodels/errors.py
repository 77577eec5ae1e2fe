"""The one error that bad input raises, and the checks of a dataclass by its types."""

from __future__ import annotations

from dataclasses import fields


class InputError(Exception):
    """Bad input, told in one line: the field, its value and what would be accepted."""

    def __init__(self, field: str, value: object, accepted: str):
        self.field, self.value, self.accepted = field, value, accepted
        super().__init__(f"{field}: {value!r} is not accepted; accepted: {accepted}")


LARGEST = 2**31 - 1


KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}


def check_types(given: object) -> None:
    """Raise InputError unless the plain fields of a dataclass hold what they are declared to."""
    for field in fields(given):
        value, (kind, *others) = getattr(given, field.name), field.type.split(" | ")
        accepted = (kind, *["int"] * (kind == "float"), *["NoneType"] * ("None" in others))
        if kind in KINDS and type(value).__name__ not in accepted:
            raise InputError(field.name, value, KINDS[kind])
