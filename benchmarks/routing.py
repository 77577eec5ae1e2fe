"""Which tokens did each mixture-of-depths group process, and which experts did each token visit?

    python -m benchmarks.routing runs/mod "def f(x):"             coloured in the terminal
    python -m benchmarks.routing runs/hybrid "import os" --html routing.html

A group's line colours the tokens that took the group, and says how many did; an expert layer's line
colours each token by the expert whose output weighed most. A legend says which colour is which
expert's.
"""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from minimodels import LM, InputError
from minimodels.architectures.mod import MixtureOfDepths
from minimodels.architectures.moe import MoE
from minimodels.command import run_command
from minimodels.data.tokenizer import Bytes
from minimodels.training.checkpoint import load_model

TAKEN = -1  # in the place of an expert's number: a group took the token
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
Choices = list[int | None]  # of each token: the expert that weighs most, or TAKEN; None: passed by


@dataclass(frozen=True)
class Options:
    """Show how a trained model routes a text."""

    run: tyro.conf.Positional[Path]
    """folder of a training run"""
    text: tyro.conf.Positional[str]
    """what the model reads"""
    html: Path | None = None
    """file for a page with the same picture"""
    route: str = ""
    """topk shows the choice of training instead of the causal one"""


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
    found: dict[str, Choices] = {}
    restore: list[Callable[[], None]] = []
    for name, module in model.named_modules():
        if isinstance(module, MixtureOfDepths):
            watch_depth(module, f"mod {name}", len(tokens), found, restore)
            module.route = route or module.route
        elif isinstance(module, MoE):
            watch_experts(module, f"moe {name}", len(tokens), found, restore)
    try:
        model(tokens[None])
    finally:
        for undo in restore:
            undo()
    return dict(
        sorted(
            found.items(),
            key=lambda item: [int(part) if part.isdigit() else 0 for part in item[0].split(".")],
        )
    )


def watch_depth(module: MixtureOfDepths, name: str, T: int, found: dict, restore: list) -> None:
    """Record which tokens take the group."""
    found[name] = [None] * T
    select = module.select

    def recording(x, decision, positions):
        index, real = select(x, decision, positions)
        taken = {
            place
            for place, is_real in zip(
                positions[0][index[0]].tolist(), real[0].tolist(), strict=True
            )
            if is_real
        }
        found[name] = [TAKEN if place in taken else None for place in range(T)]
        return index, real

    module.select = recording
    restore.append(lambda: module.__dict__.pop("select"))


def watch_experts(module: MoE, name: str, T: int, found: dict, restore: list) -> None:
    """Record the expert that weighs most for each token. Within a group only some tokens come, at
    their positions."""
    route, places = module.route, list(range(T))
    found[name] = [None] * T  # which it stays where a group around the layer takes no token

    def arriving(module, arguments):
        if arguments[2] is not None:
            places[:] = arguments[2][0].tolist()

    def recording(logits, K, bias):
        gates, visits, probabilities = route(logits, K, bias)
        best = dict(zip(places, (gates * visits).argmax(-1)[0].tolist(), strict=True))
        found[name] = [best.get(place) for place in range(T)]
        return gates, visits, probabilities

    hook = module.register_forward_pre_hook(arriving)
    module.route = recording
    restore += [hook.remove, lambda: setattr(module, "route", route)]


def colour(choice: int | None) -> str | None:
    """Of the ground on which a token is shown; ten experts have one each, the next ten the same
    again."""
    if choice is None:
        return None
    return TAKEN_COLOUR if choice == TAKEN else COLOURS[choice % len(COLOURS)]


def said(choices: Choices) -> str:
    """How many tokens a router chose."""
    return f"{sum(choice is not None for choice in choices)} of {len(choices)} tokens"


def legend(layers: dict[str, Choices]) -> dict[str, str]:
    """What each colour says, of those that are shown; empty if none is."""
    shown = {choice for choices in layers.values() for choice in choices if choice is not None}
    experts = defaultdict(list)
    for choice in sorted(shown - {TAKEN}):
        experts[colour(choice)].append(choice)
    marks = {f"expert {', '.join(map(str, numbers))}": mark for mark, numbers in experts.items()}
    return ({"took the group": TAKEN_COLOUR} if TAKEN in shown else {}) | marks


def paint(text: str, ground: str | None) -> str:
    """Text on a coloured ground, for a terminal with 24-bit colours."""
    if ground is None:
        return text
    red, green, blue = (int(ground[i : i + 2], 16) for i in (1, 3, 5))
    return f"\033[30;48;2;{red};{green};{blue}m{text}\033[0m"


def page(text: str, characters: list[str], layers: dict[str, Choices]) -> str:
    """The same as HTML."""
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
    """Text on a coloured ground, as HTML."""
    escaped = html.escape(text)
    return f'<span style="background:{background}">{escaped}</span>' if background else escaped


if __name__ == "__main__":
    run_command(main, lambda: tyro.cli(Options, description=__doc__))
