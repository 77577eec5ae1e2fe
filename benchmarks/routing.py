"""Which tokens did each mixture-of-depths group process, and which experts did each token visit?

    python -m benchmarks.routing runs/mod "def f(x):"             coloured in the terminal
    python -m benchmarks.routing runs/hybrid "import os" --html routing.html

The line of a group colours the tokens that went through it, and gives their number. The line of an
expert layer colours each token by the expert with the largest weight. A legend gives the colour of
each expert.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import tyro

from minimodels import LM, InputError
from minimodels.architectures.mod import MixtureOfDepths
from minimodels.architectures.moe import MoE
from minimodels.command import parse_options, run_command
from minimodels.context import Record
from minimodels.data.tokenizer import Bytes
from minimodels.layers import Stack
from minimodels.training.checkpoint import load_model

TAKEN = -1  # replaces an expert's number: a group took the token
TAKEN_COLOUR = "#d1d5db"
COLOURS = (
    "#fca5a5",
    "#fdba74",
    "#fde047",
    "#bef264",
    "#6ee7b7",
    "#67e8f9",
    "#93c5fd",
    "#c4b5fd",
    "#f9a8d4",
    "#d6b48c",
)
# for each token: the expert with the largest weight, or TAKEN; None: not processed
Choices = list[int | None]


@dataclass(frozen=True)
class Options:
    """Show how a trained model routes a text."""

    run: tyro.conf.Positional[Path]
    """folder of a training run"""
    text: tyro.conf.Positional[str]
    """text that the model reads"""
    html: Path | None = None
    """file for an HTML page with the same picture"""
    route: str = ""
    """topk: show the choice that training makes, instead of the causal one"""


def main(options: Options) -> None:
    """Read the text once and show what each router decided."""
    if options.route not in ("", "topk"):
        raise InputError("route", options.route, "topk, or nothing for the causal decision")
    model, tokens = load_model(options.run).eval(), Bytes().encode(options.text)
    if not len(tokens):
        raise InputError("text", options.text, "at least one character")
    if model.config.vocab <= int(tokens.max()):
        raise InputError("run", str(options.run), "one that was trained on text")
    layers = trace(model, tokens, options.route)
    if not layers:
        raise InputError("run", str(options.run), "a model with moe layers or mod(...) groups")
    characters = [chr(token) if 32 <= token < 127 else "·" for token in tokens.tolist()]
    names = {name: f"{name}, {said(choices)}" for name, choices in layers.items()}
    width = max(map(len, names.values()))
    for name, choices in layers.items():
        painted = (paint(c, colour(at)) for c, at in zip(characters, choices, strict=True))
        print(f"{names[name]:{width}} {''.join(painted)}")
    key = " ".join(paint(f" {text} ", mark) for text, mark in legend(layers).items())
    print(f"{'':{width}} {key}")
    if options.html:
        options.html.write_text(page(options.text, characters, layers), encoding="utf-8")
        print(f"written to {options.html}")


@torch.no_grad()
def trace(model: LM, tokens: torch.Tensor, route: str = "") -> dict[str, Choices]:
    """What each router chose for each token. Tokens (T,)."""
    record = Record(traces={})
    with ExitStack() as stack:
        for part in model.modules():
            if isinstance(part, MixtureOfDepths) and route == "topk":
                stack.enter_context(patch.object(part, "topk", True))
        model(tokens[None], record=record)
    taken = (chosen[0].tolist() for chosen in record.traces.get("taken", []))
    best = (gates[0].argmax(-1).tolist() for gates in record.traces.get("gates", []))
    T = len(tokens)
    found = place_choices(model.layers, "layers", range(T), taken, best)
    return {name: [choices.get(place) for place in range(T)] for name, choices in found.items()}


def place_choices(
    layers: Stack,
    name: str,
    places: Sequence[int],
    taken: Iterator[list[bool]],
    best: Iterator[list[int]],
) -> dict[str, dict[int, int]]:
    """The choice of each router: place in the text -> choice.

    places: the tokens that the layers see. taken, best: the choices of groups and of experts, in
    the order in which the layers ran. A layer that sees no token does not run.
    """
    found: dict[str, dict[int, int]] = {}
    for i, block in enumerate(layers):
        if isinstance(block, MixtureOfDepths):
            marks = next(taken) if places else []
            inner = [place for place, mark in zip(places, marks, strict=True) if mark]
            found[f"mod {name}.{i}"] = dict.fromkeys(inner, TAKEN)
            found |= place_choices(block.group, f"{name}.{i}.group", inner, taken, best)
        elif isinstance(getattr(block, "layer", None), MoE):
            experts = next(best) if places else []
            found[f"moe {name}.{i}.layer"] = dict(zip(places, experts, strict=True))
    return found


def colour(choice: int | None) -> str | None:
    """The background colour of a token. Ten experts have different colours, and the next
    ten have the same again."""
    if choice is None:
        return None
    return TAKEN_COLOUR if choice == TAKEN else COLOURS[choice % len(COLOURS)]


def said(choices: Choices) -> str:
    """How many tokens a router chose."""
    return f"{sum(choice is not None for choice in choices)} of {len(choices)} tokens"


def legend(layers: dict[str, Choices]) -> dict[str, str]:
    """The meaning of each colour that is shown; empty if there is none."""
    shown = {choice for choices in layers.values() for choice in choices if choice is not None}
    experts = defaultdict(list)
    for choice in sorted(shown - {TAKEN}):
        experts[colour(choice)].append(choice)
    marks = {f"expert {', '.join(map(str, numbers))}": mark for mark, numbers in experts.items()}
    return ({"took the group": TAKEN_COLOUR} if TAKEN in shown else {}) | marks


def paint(text: str, ground: str | None) -> str:
    """Text on a coloured background, for a terminal with 24-bit colours."""
    if ground is None:
        return text
    red, green, blue = (int(ground[i : i + 2], 16) for i in (1, 3, 5))
    return f"\033[30;48;2;{red};{green};{blue}m{text}\033[0m"


def page(text: str, characters: list[str], layers: dict[str, Choices]) -> str:
    """The same picture as HTML."""
    rows = []
    for name, choices in layers.items():
        pairs = zip(characters, choices, strict=True)
        cells = "".join(ground(character, colour(choice)) for character, choice in pairs)
        head = html.escape(f"{name}, {said(choices)}")
        rows.append(f"<tr><th>{head}</th><td><pre>{cells}</pre></td></tr>")
    style = (
        "body{font-family:sans-serif} th{text-align:left;padding-right:1em;font-weight:normal} "
        "pre{margin:2px} p span{padding:2px 6px}"
    )
    key = " ".join(ground(name, mark) for name, mark in legend(layers).items())
    return (
        f'<!doctype html><meta charset="utf-8"><title>Routing</title><style>{style}</style>'
        f"<p>Where each layer sent the tokens of: {html.escape(text)}</p>"
        f"<p>{key}</p><table>{''.join(rows)}</table>\n"
    )


def ground(text: str, background: str | None) -> str:
    """Text on a coloured background, as HTML."""
    escaped = html.escape(text)
    return f'<span style="background:{background}">{escaped}</span>' if background else escaped


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
