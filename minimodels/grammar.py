"""The small language of layers and options."""

from __future__ import annotations

from minimodels.errors import InputError

SCALINGS = {"": (), "linear": ("factor",), "llama3": ("factor", "low", "high", "context")}


def parse_scaling(text: str) -> tuple[str, dict[str, float]]:
    """ "linear:factor=4" -> ("linear", {"factor": 4.0}). Raises InputError on what Config.rope_scaling does not offer."""
    kind, _, options = text.partition(":")
    given = (
        [option.partition("=")[::2] for option in options.split(",")] if text else []
    )  # (name, number) each
    try:
        values = {name: float(number) for name, number in given}
    except ValueError:
        values = {}
    named = kind in SCALINGS and sorted(name for name, _ in given) == sorted(SCALINGS[kind])
    if (
        not named
        or len(values) < len(given)
        or not all(0 < value < float("inf") for value in values.values())
    ):
        forms = [
            kind + ":" + ",".join(f"{name}=NUMBER" for name in names)
            for kind, names in SCALINGS.items()
            if names
        ]
        raise InputError("rope_scaling", text, " or ".join(forms))
    if kind == "llama3" and not values["low"] < values["high"]:
        raise InputError("rope_scaling", text, "low less than high")
    return kind, values
