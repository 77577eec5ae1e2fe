"""Draw a picture of any model: its layers in order, with the parameters and cost of each. Repeated
layers are drawn once.

    python -m minimodels.draw --model hybrid                  hybrid.svg and hybrid.png
    python -m minimodels.draw --layers "(mamba mlp)*3 attention mlp" --out mine
    python -m minimodels.draw --config FOLDER/config.json     a published model

Each row is a layer. It shows the layer's options, the parameters of all its uses together, its
share of the FLOPs of a token, and the size of its state after a text as long as the context. The
numbers of a wrapper, such as mod, include those of the layers that it wraps, which follow below.
"""

from __future__ import annotations

import re
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from minimodels.colours import COLOURS, OTHERS
from minimodels.command import parse_options, run_command
from minimodels.config import Config
from minimodels.errors import Count, InputError, check_types, missing
from minimodels.files import read_json
from minimodels.grammar import Call, Group, parse, write_value
from minimodels.layers import Stack, flops, parts, state_bytes
from minimodels.ledger import Ledger, ledger, size_text
from minimodels.lm import LM
from minimodels.presets import SIZES, fitted, preset
from minimodels.published.config_json import family_of, read_config

# inches: heights of a row with two lines of text, of a further line, of a group's first and last row
ROW, LINE, GROUP, CLOSE = 0.62, 0.15, 0.34, 0.2
INDENT, WIDTH, BOX, GAP = 0.28, 10.0, 4.2, 0.12  # BOX: right end of the boxes; GAP: after a name
NAME, SMALL = 10, 7  # points: of a layer's name, and of its options and shapes


class Cost(NamedTuple):
    """The total cost of a row of the picture, whose layer may be repeated."""

    uses: int  # of a shared layer, in all rows
    parameters: int  # a shared layer counts in its first row
    flops: float  # forward, per token
    state: float  # bytes
    shapes: str  # of its matrices


class Row(NamedTuple):
    """A row of the picture: a layer, or the beginning or end of a group or wrapper."""

    kind: str  # layer, open or close
    depth: int
    call: Call | None = None
    times: int = 1
    name: str = ""  # of a shared layer


def costs(config: Config, context: int, lines: list[Row]) -> dict[int, Cost]:
    """The cost of each layer and wrapper of the picture, by the number of its row."""
    with torch.device("meta"):
        model = LM(config)
    found: dict[int, list] = defaultdict(lambda: [0, 0.0, 0.0])
    blocks: dict[int, nn.Module] = {}
    uses: Counter[nn.Module] = Counter()
    seen: set[nn.Parameter] = set()

    def add(stack: Stack, inside: tuple[int, int], share: float, length: int) -> None:
        for block, (number, group) in zip(stack, run(lines, *inside), strict=True):
            entry, blocks[number] = found[number], block
            entry[0] += sum(p.numel() for p in block.parameters() if p not in seen)
            entry[1] += share * flops(block, length)
            entry[2] += state_bytes(block, length, 4)
            uses[block] += 1
            if group:
                inner = next(part for part in parts(block) if isinstance(part, Stack))
                routed = getattr(block, "routed", lambda tokens: tokens)(length)
                add(inner, group, share * routed / length, routed)
            seen.update(block.parameters())

    add(model.layers, (0, len(lines)), 1.0, context)
    return {
        number: Cost(uses[blocks[number]], *entry, shapes(blocks[number]))
        for number, entry in found.items()
    }


def run(lines: list[Row], start: int, stop: int) -> Iterator[tuple[int, tuple[int, int] | None]]:
    """The layers and wrappers of some rows in the order in which a token passes them. Each is the
    number of its row and, for a wrapper, the range of the rows inside it, otherwise None."""
    number = start
    while number < stop:
        row, last = lines[number], number
        if row.kind == "open":
            depths = (i for i in range(number + 1, stop) if lines[i].depth == row.depth)
            last = next(i for i in depths if lines[i].kind == "close")
        inside = (number + 1, last) if last > number else None
        for _ in range(row.times):
            if row.call is None:
                yield from run(lines, *inside)
            else:
                yield number, inside
        number = last + 1


def shapes(block: nn.Module) -> str:
    """The matrices of a layer, grouped by shape: "q, k, v, out 128×128"."""
    names: dict[str, list[str]] = defaultdict(list)
    for name, parameter in block.named_parameters():
        name = name.removeprefix("layer.").removesuffix(".weight")
        if parameter.ndim > 1 and not name.startswith("group."):
            names["×".join(map(str, parameter.shape))].append(name)
    return "; ".join(f"{', '.join(each)} {shape}" for shape, each in names.items())


def rows(text: str) -> list[Row]:
    """The rows of the picture, from the text. Groups and repeats stay folded."""
    program = parse(text)

    def visit(item: Call | Group, depth: int, times: int = 1, name: str = "") -> list[Row]:
        if isinstance(item, Group) and len(item.items) == 1:
            return visit(item.items[0], depth, times * item.count, name)
        if isinstance(item, Group) and times * item.count == 1:
            return [row for each in item.items for row in visit(each, depth, 1, name)]
        if isinstance(item, Group):
            inside = [row for each in item.items for row in visit(each, depth + 1)]
            return [
                Row("open", depth, None, times * item.count, name),
                *inside,
                Row("close", depth),
            ]
        if item.name in program.definitions:
            definition = program.definitions[item.name]
            return visit(definition.item, depth, times, item.name if definition.shared else name)
        if item.layers:
            inside = [row for each in item.layers for row in visit(each, depth + 1)]
            return [Row("open", depth, item, times, name), *inside, Row("close", depth, item)]
        return [Row("layer", depth, item, times, name)]

    return [row for item in program.items for row in visit(item, 0)]


def draw(config: Config, context: int, title: str, files: list[Path]) -> None:
    """Write the picture of a model into files. Their suffixes give the formats.

    Raises InputError if matplotlib is not installed or a file cannot be written.
    """
    try:
        import matplotlib
    except ImportError:
        raise missing("matplotlib", "plot") from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "minimodels"  # the same model gives the same file
    from matplotlib import pyplot

    lines = rows(config.layers)
    found = costs(config, context, lines)
    total, head = ledger(config, context), config.width * (config.vocab or 256)
    height = sum(height_of(row, found.get(number)) for number, row in enumerate(lines))
    height += 2 * ROW + 1.4
    figure = pyplot.figure(figsize=(WIDTH, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, height))
    axes.axis("off")
    axes.text(0.2, height - 0.3, title, fontsize=13, weight="bold", va="center")
    axes.text(0.2, height - 0.62, str(total), fontsize=9, color="#444444", va="center")
    top = height - 1.05
    for x, name in ((5.3, "parameters"), (7.4, "share of the FLOPs"), (9.8, "state")):
        axes.text(
            x,
            top,
            name,
            fontsize=8,
            color="#666666",
            ha="right" if name != "share of the FLOPs" else "center",
        )
    y = top - 0.15
    embedding = f"{config.vocab or 256} × {config.width}"
    y = draw_plain(axes, y, f"embedding  {embedding}", head, None)
    opened = []
    for number, row in enumerate(lines):
        cost = found.get(number)
        below = y - height_of(row, cost)
        if row.kind == "close":
            draw_bracket(axes, row, opened.pop(), y)
        elif row.call is None:
            draw_group(axes, y, row)
        else:
            draw_layer(axes, y, below, row, cost, total)
        if row.kind == "open":
            opened.append(below)
        y = below
    tied = "the embedding's matrix" if config.tie_embeddings else embedding
    draw_plain(
        axes,
        y,
        f"norm, head  {tied}",
        0 if config.tie_embeddings else head,
        2 * head / total.forward_flops,
    )
    try:
        for file in files:
            file.parent.mkdir(parents=True, exist_ok=True)
            stamp = {"Date": None} if file.suffix == ".svg" else None
            figure.savefig(file, dpi=130, metadata=stamp)
    except OSError as error:
        raise InputError(
            "out", str(files[0]), f"a file that can be written ({error.strerror})"
        ) from None
    finally:
        pyplot.close(figure)


def draw_plain(axes, y: float, text: str, parameters: int, share: float | None) -> float:
    """Draw a row that is not a layer. Returns the height at which the next row begins."""
    middle = y - ROW / 2
    axes.text(0.2, middle, text, fontsize=9, va="center", color="#444444")
    number = short(parameters) if parameters else ""
    axes.text(5.3, middle, number, fontsize=9, va="center", ha="right")
    if share is not None:
        draw_share(axes, middle, share, "#9ca3af")
    return y - ROW


def draw_group(axes, y: float, row: Row) -> None:
    """Draw the first row of a group."""
    shared = f"{row.name}, one set of weights, " if row.name else ""
    text = f"{shared}{row.times} times"
    style = {"fontsize": 9, "weight": "bold", "color": colour_of(row), "va": "center"}
    axes.text(left_of(row), y - 0.16, text, **style)


def draw_layer(axes, top: float, bottom: float, row: Row, cost: Cost, total: Ledger) -> None:
    """Draw the row of a layer or wrapper."""
    from matplotlib.patches import FancyBboxPatch

    left, middle, colour = left_of(row), (top + bottom) / 2, colour_of(row)
    style = (0, (3, 2)) if row.name else "-"
    box = FancyBboxPatch(
        (left, bottom + 0.06), BOX - left, top - bottom - 0.12, boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=f"{colour}22", edgecolor=colour, linestyle=style, linewidth=1.4,
    )  # fmt: skip
    axes.add_patch(box)
    name, first = name_of(row, cost), top - ROW / 2 + 0.1
    axes.text(left + 0.1, first, name, fontsize=NAME, weight="bold", va="center")
    beside, *under = small_lines(row, cost)
    small = {"fontsize": SMALL, "color": "#444444", "va": "center"}
    axes.text(left + 0.1 + width_of(name, NAME, "bold") + GAP, first, beside, **small)
    for number, text in enumerate(under):
        axes.text(left + 0.1, first - 0.22 - number * LINE, text, **small)
    parameters = short(cost.parameters) if cost.parameters or cost.uses == 1 else "shared"
    axes.text(5.3, middle, parameters, fontsize=9, va="center", ha="right")
    draw_share(axes, middle, cost.flops / total.forward_flops, colour)
    state = size_text(cost.state) if cost.state else "none"
    axes.text(9.8, middle, state, fontsize=9, va="center", ha="right")


def height_of(row: Row, cost: Cost | None) -> float:
    """The height of a row; a layer's row is as high as its text needs."""
    if row.kind == "close":
        return CLOSE
    if row.call is None:
        return GROUP
    return ROW + LINE * max(0, len(small_lines(row, cost)) - 2)


def name_of(row: Row, cost: Cost) -> str:
    """What the row of a layer shows in bold."""
    times = f" × {row.times}" if row.times > 1 else ""
    shared = f"   {row.name}: one set of weights, {cost.uses} uses" if row.name else ""
    return f"{row.call.name}{times}{shared}"


def small_lines(row: Row, cost: Cost) -> list[str]:
    """The small text of a layer: its options, the first line of which is beside its name, and then
    the shapes of its matrices."""
    options = ", ".join(f"{each.name}={write_value(each.value)}" for each in row.call.options)
    if row.kind == "open":
        options = f"{options} (numbers include the layers below)".strip()
    room = BOX - 0.1 - (left_of(row) + 0.1)
    beside = room - width_of(name_of(row, cost), NAME, "bold") - GAP
    return wrap(options, beside, room) + (wrap(cost.shapes, room, room) if cost.shapes else [])


def wrap(text: str, first: float, room: float) -> list[str]:
    """Small text in lines that end between words: the first has room for `first` inches, the others
    for `room`."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if width_of(longer, SMALL) <= (room if len(lines) > 1 else first):
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def width_of(text: str, size: float, weight: str = "normal") -> float:
    """The width of a text in inches."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    return text_to_path.get_text_width_height_descent(text, font, ismath=False)[0] / 72


def left_of(row: Row) -> float:
    """Where a row begins: layers inside others are indented."""
    return 0.2 + INDENT * row.depth


def draw_bracket(axes, row: Row, top: float, bottom: float) -> None:
    """Draw a line beside the rows of a group or wrapper."""
    left = left_of(row) + 0.05
    axes.plot(
        [left, left, left + 0.15], [top, bottom - 0.06, bottom - 0.06], color=colour_of(row), lw=1.4
    )


def colour_of(row: Row) -> str:
    """The colour of a layer's architecture; grey for a group."""
    return COLOURS.get(row.call.name, OTHERS[0]) if row.call else "#6b7280"


def draw_share(axes, middle: float, share: float, colour: str) -> None:
    """Draw a bar and its percentage."""
    axes.barh(middle, 2.2 * share, height=0.22, left=6.0, color=colour, alpha=0.85)
    axes.text(6.05 + 2.2 * share, middle, f" {share:.0%}", fontsize=8.5, va="center")


def short(count: float) -> str:
    """A number of parameters, rounded to three digits: 384, 66.0K, 1.31M, 7.62B."""
    for unit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.3g}{suffix}"
    return f"{count:.0f}"


@dataclass(frozen=True)
class Options:
    """Draw a model."""

    model: str = ""
    """a preset; by default transformer, if neither layers nor a config is given"""
    layers: str = ""
    """layers as text, with the width of `size` and its options, such as heads"""
    config: Path | None = None
    """config.json of a published model"""
    size: str = "tiny"
    """tiny or small"""
    context: Count = 1024
    """context in tokens at which FLOPs and state are counted"""
    out: str = ""
    """name of the pictures without a suffix; by default the model's"""

    def __post_init__(self):
        check_types(self)
        given = [name for name in ("model", "layers", "config") if getattr(self, name)]
        if len(given) > 1:
            raise InputError(
                given[1],
                getattr(self, given[1]),
                f"one of model, layers and config; {given[0]} is given too",
            )
        if self.size not in SIZES:
            raise InputError("size", self.size, ", ".join(SIZES))


def main(options: Options) -> None:
    """Write the SVG and the PNG."""
    if options.config:
        entries = read_json(options.config, "config")
        config, title = (
            read_config(entries, family_of(entries)),
            options.config.resolve().parent.name,
        )
    elif options.layers:
        config = preset("transformer", options.size, layers=fitted(options.layers, options.size))
        title = options.layers
    else:
        title = options.model or "transformer"
        config = preset(title, options.size)
    name = options.out or re.sub(r"\W+", "-", title).strip("-")[:60]
    files = [Path(f"{name}.{suffix}") for suffix in ("svg", "png")]
    draw(config, options.context, textwrap.shorten(title, 70), files)
    print(f"drawn in {' and '.join(map(str, files))}")


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
