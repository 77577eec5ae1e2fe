"""Print what every layer is, where it was published, and which options it has.

    python -m minimodels.architectures                  all layers and wrappers, one line each
    python -m minimodels.architectures attention        one of them with its options

The options are those of a model's text, such as attention(heads=8).
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, fields
from typing import get_type_hints

import tyro

from minimodels.architectures.registry import LAYERS, WRAPPERS, on_stream
from minimodels.command import parse_options, run_command
from minimodels.errors import InputError, describe, nearest
from minimodels.grammar import write_value
from minimodels.residual import Joint

BLOCKS = """\
{n} is the number of transformer blocks: 4 at size tiny, 12 at size small. {twice}, {half} and
{quarter} are that many times n. So a preset costs about what n blocks of attention and MLP cost."""


@dataclass(frozen=True)
class Options:
    """List the layers, or describe one."""

    name: tyro.conf.Positional[str] = ""
    """a layer or wrapper; by default all of them, a line each"""


def main(options: Options) -> None:
    """Print the list or the description."""
    known = {**LAYERS, **WRAPPERS}
    if options.name and options.name not in known:
        accepted = f"{nearest(options.name, known)} (python -m minimodels.ledger lists the presets)"
        raise InputError("name", options.name, accepted)
    print(describe_layer(options.name) if options.name else list_layers())


def list_layers() -> str:
    """A line for each layer and wrapper: its name, what it is, its paper."""
    rows = [(name, first_line(kind), kind.paper) for name, kind in LAYERS.items()]
    rows += [(f"{name}(...)", first_line(kind), kind.paper) for name, kind in WRAPPERS.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(
        f"{name:{widths[0]}}  {what:{widths[1]}}  {paper}" for name, what, paper in rows
    )


def describe_layer(name: str) -> str:
    """A layer's docstring, its options with their defaults, and its presets."""
    kind = {**LAYERS, **WRAPPERS}[name]
    shared = () if name in WRAPPERS or on_stream(kind) else (Joint,)
    lines = [
        f"{name}: {inspect.getdoc(kind)}",
        "",
        f"paper: {kind.paper}",
        f"file:  {file_of(kind)}",
        f"text:  {name}({'attention mlp, ' if name in WRAPPERS else ''}option=value, ...)",
        "",
    ]
    for options in (kind.Options, *shared):
        hints = get_type_hints(options, include_extras=True)
        for field in fields(options):
            default = "none" if field.default is None else write_value(field.default)
            lines += [f"  {field.name}={default}", f"      {field.metadata['help']}"]
            lines += [f"      accepted: {describe(hints[field.name])}"]
    for preset, layers in getattr(kind, "presets", {}).items():
        lines += ["", f"preset {preset}: {layers}"]
    if hasattr(kind, "presets"):
        lines += ["", BLOCKS]
    return "\n".join(lines)


def first_line(kind: type) -> str:
    """The first line of a class's docstring."""
    return (inspect.getdoc(kind) or "").splitlines()[0]


def file_of(kind: type) -> str:
    """The file of a class, such as minimodels/architectures/mamba.py."""
    return kind.__module__.replace(".", "/") + ".py"


def parse() -> Options:
    """Read the command line."""
    return parse_options(Options, __doc__)


if __name__ == "__main__":
    run_command(main, parse)
