"""The options of a layer: a dataclass in the layer's own file, and the text that sets its fields.

    @dataclass(frozen=True)
    class Options:
        heads: Count = option(4, "H, query heads")

`read_options` checks the types of the options of a call, such as attention(heads=8), and makes the
dataclass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import MISSING, field, fields
from typing import Annotated, Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from minimodels.errors import InputError, describe, fits, nearest
from minimodels.grammar import Call, Option, excerpt, write_call, write_value

Options = TypeVar("Options")


def option(default: Any, help: str) -> Any:
    """A field of an option dataclass: its default, and one line of help."""
    return field(default=default, metadata={"help": help})


class OneOf(NamedTuple):
    """The type of an option whose value is a call, such as rope_scaling=linear(factor=4).
    `choices`: name -> its dataclass."""

    choices: dict[str, type]

    @property
    def accepted(self) -> str:
        """The accepted values, as text for an error."""
        return "none or " + ", ".join(
            f"{name}({', '.join(f'{f.name}=...' for f in fields(choice))})"
            for name, choice in self.choices.items()
        )


def read_options(
    kind: Callable[..., Options],
    call: Call,
    text: str,
    field: str = "layers",
    others: Collection[str] = (),
) -> Options:
    """The options of a call as the dataclass `kind`. `others`: names that the call accepts besides
    these; they are listed in errors.

    Raises InputError, which names the layer, the option, the value and what is accepted, and shows
    the place in the text.
    """
    known = {each.name: each for each in fields(kind)}  # type: ignore[arg-type]
    hints = get_type_hints(kind, include_extras=True)
    values = {}
    for given in call.options:
        if given.name not in known:
            accepted = nearest(given.name, [*known, *others]) or "no options"
            raise InputError(f"{field}: {call.name}", given.name, accepted, excerpt(text, given.at))
        value, hint = read_value(given.value, hints[given.name], text), hints[given.name]
        if not fits(value, hint):
            place = f"{field}: {call.name}.{given.name}"
            shown = write_value(value) if isinstance(value, tuple) else value
            raise InputError(place, shown, describe(hint), excerpt(text, given.at))
        values[given.name] = value
    missing = [
        name for name, each in known.items() if each.default is MISSING and name not in values
    ]
    if missing:
        raise InputError(
            f"{field}: {call.name}", call.name, f"with {', '.join(missing)}", excerpt(text, call.at)
        )
    try:
        return kind(**values)
    except InputError as error:
        at = next((given.at for given in call.options if given.name == error.field), call.at)
        raise InputError(
            f"{field}: {call.name}.{error.field}", error.value, error.accepted, excerpt(text, at)
        ) from None


def read_value(value: object, hint: Any, text: str) -> object:
    """The value of an option in Python: a dataclass for a call, and None for the word none if the
    type accepts None."""
    choices = next((note for note in get_args(hint) if isinstance(note, OneOf)), None)
    if choices is not None:
        name = value.name if isinstance(value, Call) else value
        if isinstance(name, str) and name in choices.choices:
            call = value if isinstance(value, Call) else Call(name)
            return read_options(choices.choices[name], call, text)
    if value == "none" and type(None) in alternatives(hint):
        return None
    return write_call(value) if isinstance(value, Call) else value


def alternatives(hint: Any) -> tuple:
    """The members of a union, or the type itself."""
    if get_origin(hint) is Annotated:
        return alternatives(get_args(hint)[0])
    return get_args(hint) if type(None) in get_args(hint) else (hint,)


def write_options(options: Any) -> tuple[Option, ...]:
    """The options that differ from their defaults, in the form of the grammar."""
    hints = get_type_hints(type(options), include_extras=True)
    found = []
    for each in fields(options):
        value = getattr(options, each.name)
        if value != each.default:
            found.append(Option(each.name, value_to_write(value, hints[each.name])))
    return tuple(found)


def value_to_write(value: object, hint: Any) -> object:
    """The value in the form that read_value reads."""
    for note in get_args(hint):
        for name, choice in note.choices.items() if isinstance(note, OneOf) else ():
            if isinstance(value, choice):
                return Call(name, options=write_options(value))
    return "none" if value is None else value
