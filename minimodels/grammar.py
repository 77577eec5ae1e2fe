"""The language of layers, their options and the data tasks.

    attention mlp attention mlp                             layers, one after the other
    (mamba mlp)*4                                           a group, repeated
    attention(window=128, rope_scaling=linear(factor=4))    options
    mod(attention mlp, capacity=0.25)                       a wrapper: layers first, then options
    local=attention(window=512) (local mlp)*2               "=" names an item; each use is a new one
    A:=attention mamba A mlp mamba A                        ":=" makes one layer, used twice with
                                                            one set of weights

    text   := definition* item+
    definition := name ("=" | ":=") item
    item   := (name [ "(" [item+] [","] [options] ")" ] | "(" item+ ")") [ "*" count ]
    options := name "=" value ("," name "=" value)*
    value  := number | true | false | word [ "(" options ")" ] | "[" [numbers] "]"
    numbers := number ("," number)*

A parenthesis directly after a name opens its arguments. A parenthesis after a space opens a group.
`parse` reads a text into a Program, `write` writes it as text again, and `expand` lists the layers
that it describes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from minimodels.errors import InputError, nearest

# the most layers in all; the deepest nesting of groups, because each level is a recursive call
MOST_LAYERS, DEEPEST = 10_000, 50
EXAMPLE = '"(attention mlp)*2 mod(mamba mlp, capacity=0.25)"'
TOKEN = re.compile(
    r"(?P<number>[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)|(?P<name>[^\W\d]\w*)|(?P<sign>:=|\S)"
)


@dataclass(frozen=True)
class Option:
    """name=value within the arguments of a call."""

    name: str
    value: object  # int, float, bool, str, Call or a tuple of numbers
    at: int = field(default=0, compare=False)  # where it begins in the text


@dataclass(frozen=True)
class Call:
    """One layer, wrapper or task, with its options."""

    name: str
    layers: tuple[Call | Group, ...] = ()  # the layers inside a wrapper
    options: tuple[Option, ...] = ()
    shared: str = ""  # all calls with the same name here are one layer
    at: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Group:
    """Items that are repeated `count` times."""

    items: tuple[Call | Group, ...]
    count: int = 1


@dataclass(frozen=True)
class Definition:
    """The item that a name stands for."""

    shared: bool  # ":=": one set of weights
    item: Call | Group
    at: int = field(default=0, compare=False)


class Program(NamedTuple):
    """A text as a tree of definitions and items, before they are written out."""

    definitions: dict[str, Definition]
    items: tuple[Call | Group, ...]


# Reading.


class Token(NamedTuple):
    """A word of the text, with its position."""

    kind: str  # number, name, sign or end
    text: str
    at: int
    touching: bool  # no space before it


def parse(text: str, field: str = "layers") -> Program:
    """Read a text. If it is not in the grammar, raises InputError, which names
    `field` and shows the place."""
    reader = Reader(text, field)
    definitions: dict[str, Definition] = {}
    while reader.now.kind == "name" and reader.peek().text in ("=", ":="):
        name = reader.take()
        if name.text in definitions:
            raise reader.error("a name that is not defined yet", name)
        shared = reader.take().text == ":="
        definitions[name.text] = Definition(shared, reader.item(), name.at)
    return Program(definitions, reader.items(""))


def parse_call(text: str, field: str) -> Call:
    """Read a single call, such as "mqar(pairs=8)". Raises InputError as parse does."""
    items = parse(text, field).items
    if len(items) != 1 or not isinstance(items[0], Call) or items[0].layers:
        raise InputError(field, text, 'a name with options, such as "mqar(pairs=8, vocab=256)"')
    return items[0]


class Reader:
    """Reads the tokens of a text one by one, by recursive descent."""

    def __init__(self, text: str, field: str):
        self.text, self.field, self.index, self.depth = text, field, 0, 0
        found = list(TOKEN.finditer(text))
        ends = [0, *(match.end() for match in found)]
        self.tokens = [
            Token(match.lastgroup or "", match.group(), match.start(), match.start() == end)
            for match, end in zip(found, ends, strict=False)
        ]
        self.tokens.append(Token("end", "", len(text), False))

    @property
    def now(self) -> Token:
        """The current token."""
        return self.tokens[self.index]

    def peek(self) -> Token:
        """The token after the current one."""
        return self.tokens[min(self.index + 1, len(self.tokens) - 1)]

    def take(self, text: str | None = None) -> Token:
        """Move past the current token and return it. Raises InputError if it is not `text`."""
        token = self.now
        if text is not None and token.text != text:
            raise self.error(f'"{text}"')
        self.index = min(self.index + 1, len(self.tokens) - 1)
        return token

    def error(self, accepted: str, token: Token | None = None) -> InputError:
        """An error at a token: what it is, and what would be accepted there."""
        token = token or self.now
        value = token.text or "the end of the text"
        return InputError(self.field, value, f"here {accepted}", excerpt(self.text, token.at))

    def items(self, closing: str) -> tuple[Call | Group, ...]:
        """Read items up to a closing parenthesis, the options or the end of the text. `closing` is
        "" for a whole text, "group" inside a group and ")" inside a wrapper."""
        found = []
        while self.now.text not in (")", ",") and self.now.kind != "end":
            if closing == ")" and self.now.kind == "name" and self.peek().text == "=":
                break  # options
            found.append(self.item())
        if not found:
            raise self.error(f"a layer; a text is like {EXAMPLE}")
        if not closing and self.now.kind != "end":
            raise self.error("a layer or the end")
        return tuple(found)

    def item(self) -> Call | Group:
        """Read a group or a call, with its count."""
        if self.now.text == "(":
            self.nest()
            items = self.items("group")
            self.take(")")
            self.depth -= 1
            return Group(items, self.count())
        call = self.call()
        count = self.count()
        return call if count == 1 else Group((call,), count)

    def nest(self) -> None:
        """Enter a parenthesis. Raises InputError if it is nested too deep."""
        self.depth += 1
        if self.depth > DEEPEST:
            raise self.error(f"groups nested at most {DEEPEST} deep")
        self.take("(")

    def call(self) -> Call:
        """Read a name with its layers and options."""
        if self.now.text == "=":
            accepted = "a name; options have no space before them: name(option=1)"
            if self.field == "layers":
                accepted = (
                    "a layer; definitions come first, and options without a space before them"
                )
                accepted += ": a=mlp attention(window=64) a"
            raise self.error(accepted)
        if self.now.kind != "name":
            raise self.error(f"a layer; a text is like {EXAMPLE}")
        name, layers, options = self.take(), (), ()
        if self.now.text == "(" and self.now.touching:
            self.nest()
            if self.now.kind == "number":
                raise self.error("an option as name=value, such as heads=8")
            if self.now.text != ")" and self.peek().text != "=":
                layers = self.items(")")
                if self.now.text == ",":
                    self.take()
            options = self.options()
            if options and self.now.text != ")":
                raise self.error('"," or ")"')
            self.take(")")
            self.depth -= 1
        return Call(name.text, layers, options, at=name.at)

    def options(self) -> tuple[Option, ...]:
        """Read name=value, separated by commas."""
        found: list[Option] = []
        while self.now.kind == "name":
            name = self.take()
            if any(option.name == name.text for option in found):
                raise self.error("each option once", name)
            if found and self.now.text != "=":
                raise self.error('"=", because layers come before options: mod(mlp, capacity=0.5)')
            self.take("=")
            found.append(Option(name.text, self.value(), name.at))
            if self.now.text != ",":
                break
            self.take()
        return tuple(found)

    def value(self) -> object:
        """Read a number, true, false, a word, a word with options, or numbers in brackets."""
        token = self.now
        if token.text == "[":
            return self.numbers()
        if token.kind == "number":
            return self.number()
        if token.kind != "name":
            raise self.error("a number, true, false, a word or numbers in brackets")
        if token.text in ("true", "false"):
            self.take()
            return token.text == "true"
        call = self.call()
        if call.layers:
            raise self.error("options in the parentheses of a value", token)
        return call if call.options else call.name

    def number(self) -> int | float:
        """Read a number."""
        if self.now.kind != "number":
            raise self.error("a number")
        text = self.take().text
        return int(text) if re.fullmatch(r"[+-]?\d{1,18}", text) else float(text)

    def numbers(self) -> tuple[int | float, ...]:
        """Read numbers in brackets, separated by commas."""
        self.take("[")
        found = []
        while self.now.text != "]":
            found.append(self.number())
            if self.now.text != ",":
                break
            self.take()
        self.take("]")
        return tuple(found)

    def count(self) -> int:
        """Read "*" and a number; 1 if there is none."""
        if self.now.text != "*":
            return 1
        self.take()
        if not re.fullmatch(r"0*[1-9]\d{,8}", self.now.text):
            raise self.error("a whole number of 1 or more")
        return int(self.take().text)


def excerpt(text: str, at: int, around: int = 60) -> str:
    """The text around a place, with a caret below it."""
    start = max(0, at - around)
    shown = (
        ("..." if start else "")
        + text[start : at + around]
        + ("..." if at + around < len(text) else "")
    )
    # the length stays the same, so that the caret is at the right place
    one_line = re.sub(r"\s", " ", shown)
    return f"  {one_line}\n  {' ' * (at - start + 3 * bool(start))}^"


# What a program describes.


def expand(program: Program, text: str = "", field: str = "layers") -> tuple[Call, ...]:
    """The calls that a program describes, with repeats and definitions written out.

    Raises InputError if there are more than MOST_LAYERS layers, or if a definition contains itself
    or a defined name is given options.
    """

    def many(items: tuple[Call | Group, ...], open_names: tuple[str, ...]) -> tuple[Call, ...]:
        found: tuple[Call, ...] = ()
        for item in items:
            found += one(item, open_names)
            if count_layers(found) > MOST_LAYERS:
                raise InputError(field, f"{text[:40]}...", f"at most {MOST_LAYERS} layers")
        return found

    def one(item: Call | Group, open_names: tuple[str, ...]) -> tuple[Call, ...]:
        if isinstance(item, Group):
            found = many(item.items, open_names)
            if count_layers(found) * item.count > MOST_LAYERS:
                raise InputError(field, f"{text[:40]}...", f"at most {MOST_LAYERS} layers")
            return found * item.count
        if item.name not in program.definitions:
            return (replace(item, layers=many(item.layers, open_names) if item.layers else ()),)
        if item.layers or item.options:
            raise InputError(
                field, item.name, "a defined name without options", excerpt(text, item.at)
            )
        if item.name in open_names:
            raise InputError(
                field, item.name, "a definition that is not inside itself", excerpt(text, item.at)
            )
        if len(open_names) == DEEPEST:
            accepted = f"definitions nested at most {DEEPEST} deep"
            raise InputError(field, item.name, accepted, excerpt(text, item.at))
        definition = program.definitions[item.name]
        found = one(definition.item, (*open_names, item.name))
        if not definition.shared:
            return found
        names = [item.name] if len(found) == 1 else [f"{item.name}.{i}" for i in range(len(found))]
        return tuple(
            replace(call, shared=call.shared or own) for call, own in zip(found, names, strict=True)
        )

    return many(program.items, ())


def count_layers(calls: tuple[Call, ...]) -> int:
    """The number of layers, including those inside wrappers, but not the wrappers themselves."""
    return sum(count_layers(call.layers) if call.layers else 1 for call in calls)


# Writing.


def write(program: Program) -> str:
    """Write a program as text, which parse reads as the same program."""
    definitions = [
        f"{name}{':=' if each.shared else '='}{write_item(each.item)}"
        for name, each in program.definitions.items()
    ]
    return " ".join([*definitions, *map(write_item, program.items)])


def write_item(item: Call | Group) -> str:
    """One item as text."""
    if isinstance(item, Call):
        return write_call(item)
    inside = " ".join(map(write_item, item.items))
    alone = len(item.items) == 1 and isinstance(item.items[0], Call)
    times = "" if item.count == 1 else f"*{item.count}"
    return inside + times if alone and times else f"({inside}){times}"


def write_call(call: Call) -> str:
    """A call with its options as text."""
    inside = [" ".join(map(write_item, call.layers))] if call.layers else []
    inside += [f"{option.name}={write_value(option.value)}" for option in call.options]
    return f"{call.name}({', '.join(inside)})" if inside else call.name


def write_value(value: object) -> str:
    """The value of an option as text."""
    if isinstance(value, Call):
        return write_call(value)
    if isinstance(value, tuple):
        return f"[{', '.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def set_options(
    text: str, settings: list[str] | tuple[str, ...], field: str = "layers", missing: bool = False
) -> str:
    """The text with an option set: "mamba.state_size=32" sets it in every call and definition named
    mamba, or, with `missing`, only in those that do not set it themselves.
    "attention.rope_scaling.factor=4" sets an option of an option.

    Raises InputError if a setting has another form, or its name is not in the text.
    """
    if not settings:
        return text
    program = parse(text, field)
    for setting in settings:
        found = re.fullmatch(r"\s*(\w+)\.(\w+)(?:\.(\w+))?\s*=(.*)", setting, re.DOTALL)
        if not found:
            raise InputError("set", setting, "LAYER.OPTION=VALUE, such as mamba.state_size=32")
        name, option, inner, value = found.groups()
        if re.search(r"\s\w+\.[\w.]+\s*=", value):
            raise InputError("set", setting, "one LAYER.OPTION=VALUE; repeat --set for another")
        read, *others = parse_call(f"{name}({inner or option}={value})", "set").options
        if others:
            raise InputError("set", setting, "one option; repeat --set for another")
        program, hits = set_option(program, name, read, missing, option if inner else "")
        if not hits and name in program.definitions:
            item = program.definitions[name].item
            inside = sorted(names_in(Program({}, (item,))))
            layers = " or ".join(f"{each}.{option}" for each in inside)
            raise InputError("set", setting, f"{layers}, because {name}={write_item(item)}")
        if not hits:
            raise InputError(
                "set", setting, f"a layer of the model: {nearest(name, sorted(names_in(program)))}"
            )
    return write(program)


def set_option(
    program: Program, name: str, option: Option, missing: bool, inside: str = ""
) -> tuple[Program, int]:
    """Set an option in all calls of a name, or in the value of their option `inside`.

    Returns the program, and the number of these calls.
    """
    hits = 0

    def visit(item: Call | Group, defined: bool = False) -> Call | Group:
        nonlocal hits
        if isinstance(item, Group):
            return replace(item, items=tuple(visit(each, defined) for each in item.items))
        item = replace(item, layers=tuple(map(visit, item.layers)))
        if not (defined or item.name == name) or item.name in program.definitions:
            return item
        hits += 1
        return with_option(item, within(item, inside, option) if inside else option, missing)

    definitions = {
        key: replace(each, item=visit(each.item, key == name))
        for key, each in program.definitions.items()
    }
    return Program(definitions, tuple(map(visit, program.items))), hits


def with_option(call: Call, option: Option, missing: bool = False) -> Call:
    """The call with an option set; with `missing`, only if it was not set."""
    if all(each.name != option.name for each in call.options):
        return replace(call, options=(*call.options, option))
    kept = [option if each.name == option.name else each for each in call.options]
    return call if missing else replace(call, options=tuple(kept))


def within(call: Call, name: str, option: Option) -> Option:
    """The option `name` of a call, with an option set inside its value."""
    value = next((each.value for each in call.options if each.name == name), None)
    if isinstance(value, str):
        value = Call(value)
    if not isinstance(value, Call):
        accepted = f"an option that the text sets in {call.name}"
        raise InputError("set", f"{name}.{option.name}", accepted)
    return Option(name, with_option(value, option))


def names_in(program: Program) -> set[str]:
    """The names of all calls and definitions."""
    every = [each.item for each in program.definitions.values()] + list(program.items)
    return set(program.definitions).union(*map(names_of, every))


def refuse_unused(text: str, field: str = "layers") -> None:
    """Raise InputError if a definition in a text is not used."""
    program = parse(text, field)
    used = used_definitions(program)
    for name, definition in program.definitions.items():
        if name not in used:
            shown = excerpt(text, definition.at)
            raise InputError(field, name, "a definition whose name is used later", shown)


def used_definitions(program: Program) -> set[str]:
    """The names of the definitions that the items use, also by way of others."""
    used: set[str] = set()
    pending = set().union(*map(names_of, program.items))
    while pending:
        name = pending.pop()
        if name in program.definitions and name not in used:
            used.add(name)
            pending |= names_of(program.definitions[name].item)
    return used


def names_of(item: Call | Group) -> set[str]:
    """The names of the calls in an item."""
    inside = item.items if isinstance(item, Group) else item.layers
    own = set() if isinstance(item, Group) else {item.name}
    return own.union(*map(names_of, inside))
