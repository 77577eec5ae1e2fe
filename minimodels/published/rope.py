"""Rotary positions in a config.json, in the older and the newer form.

A family with several types of layers has rotary positions for each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from minimodels.errors import InputError
from minimodels.grammar import Call, Option
from minimodels.published.entries import Entries

SHARED = {"factor": "factor", "original_max_position_embeddings": "context"}
TYPES = {  # rope_type -> its parameters -> our options of rope_scaling
    "default": {},
    "linear": {"factor": "factor"},
    "llama3": {**SHARED, "low_freq_factor": "low", "high_freq_factor": "high"},
    "dynamic": {"factor": "factor"},
    "longrope": {
        "short_factor": "short",
        "long_factor": "long",
        "original_max_position_embeddings": "context",
        "attention_factor": "attention",
    },
    "yarn": {
        **SHARED,
        "beta_fast": "fast",
        "beta_slow": "slow",
        "truncate": "whole",
        "attention_factor": "attention_factor",
    },
}
CONTEXT = "original_max_position_embeddings"
OPTIONAL = ("beta_fast", "beta_slow", "truncate", "attention_factor")


@dataclass(frozen=True)
class Rope:
    """The base and the scaling of rotary positions, and the rotated part of a head."""

    base: float = 10_000.0
    """the base if there is no entry"""
    layer_type: str = ""
    """the key in rope_parameters, if the family has several types of layers"""
    theta: str = "rope_theta"
    """the older entry for the base"""
    scaled: bool = True
    """whether the older entry rope_scaling applies to these layers"""
    partial: bool = False
    """whether the class can rotate only a part of a head"""
    fraction: float = 1.0
    """the rotated part of a head, if no entry gives it"""
    untold: dict[str, Any] = field(default_factory=dict)
    """the parameters if there is neither rope_parameters nor rope_scaling"""
    kinds: tuple[str, ...] = tuple(TYPES)
    """the rope_types of the class"""
    context: int | None = None
    """the class's default for original_max_position_embeddings outside rope_parameters"""
    options = ("rope_base", "rope_scaling", "rope_fraction")
    names = (
        "rope_parameters",
        "rope_theta",
        "rope_scaling",
        "partial_rotary_factor",
        "rope_local_base_freq",
        CONTEXT,
    )

    def read(self, entries: Entries) -> dict[str, object]:
        rope = self.parameters(entries)
        kind, theta = rope.pop("type", "default"), rope.pop("rope_theta", None)
        kind, fraction = rope.pop("rope_type", kind), rope.pop("partial_rotary_factor", None)
        kind = "longrope" if kind == "su" else kind  # its older name
        if not isinstance(kind, str) or kind not in self.kinds:
            raise InputError("config.json rope_type", kind, ", ".join(self.kinds))
        if type(theta) not in (int, float) or not 0 < theta <= 1e300:
            raise InputError("config.json rope_theta", theta, "a positive number up to 1e300")
        if fraction != 1 and not self.partial:
            raise InputError("config.json partial_rotary_factor", fraction, "1.0, or no such entry")
        trained = entries.get("max_position_embeddings")
        if CONTEXT in TYPES[kind]:
            outside = None if self.layer_type else entries.get(CONTEXT, self.context)
            rope[CONTEXT] = outside or rope.get(CONTEXT, trained)
        if kind == "yarn":
            sharpen(rope)
        if kind == "longrope":
            soften(rope, trained)
        needed = set(TYPES[kind]).difference(OPTIONAL)
        if not needed <= rope.keys() <= set(TYPES[kind]):
            accepted = ", ".join(TYPES[kind]) or "none"
            raise InputError(f"config.json parameters of rope_type {kind}", sorted(rope), accepted)
        given = [
            Option(ours, option_of(rope[theirs]))
            for theirs, ours in TYPES[kind].items()
            if theirs in rope
        ]
        if kind == "dynamic":
            given.append(Option("context", trained))
        scaling = Call(kind, options=tuple(given)) if given else None
        return {"rope_base": float(theta), "rope_scaling": scaling, "rope_fraction": fraction}

    def parameters(self, entries: Entries) -> dict[str, Any]:
        """The parameters of both forms; the newer one has priority."""
        newer, older = entries.get("rope_parameters", {}), entries.get("rope_scaling", {})
        if not isinstance(newer, dict) or not isinstance(older, dict):
            raise InputError("config.json rope_parameters", newer or older, "a JSON object")
        if newer and older and newer != older:
            accepted = "what rope_parameters says, or no such entry"
            raise InputError("config.json rope_scaling", older, accepted)
        if not newer and not older:
            newer = self.untold
        if self.layer_type:
            top, newer = newer, newer.get(self.layer_type) or {}
            if not isinstance(newer, dict):
                accepted = f"a JSON object for {self.layer_type}"
                raise InputError("config.json rope_parameters", top, accepted)
            if newer.get("rope_type") == "yarn":
                # as the class reads it
                newer = {**newer, "truncate": top.get("truncate", True)}
        rope = {
            "rope_theta": entries.get(self.theta, self.base) if self.theta else self.base,
            "partial_rotary_factor": entries.get("partial_rotary_factor", self.fraction),
            **(older if self.scaled else {}),
            **newer,
        }
        return {name: value for name, value in rope.items() if value not in (None, [], ())}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        scaling = values["rope_scaling"]
        kind = "default" if scaling is None else type(scaling).__name__.lower()
        rope = {"rope_type": kind, "rope_theta": float(values["rope_base"])}
        for theirs, ours in TYPES[kind].items():
            if getattr(scaling, ours) is not None:
                rope[theirs] = getattr(scaling, ours)
        if self.partial:
            rope["partial_rotary_factor"] = values["rope_fraction"]
        more = {"max_position_embeddings": scaling.context} if kind == "dynamic" else {}
        if self.context and CONTEXT in rope:
            more[CONTEXT] = rope[CONTEXT]
        return {"rope_parameters": {self.layer_type: rope} if self.layer_type else rope, **more}

    def fits(self, values: dict[str, Any]) -> bool:
        return values["rope_base"] != 0


class WholeRope(Rope):
    """The same for layers that have no option rope_fraction."""

    options = Rope.options[:2]

    def read(self, entries: Entries) -> dict[str, object]:
        found = super().read(entries)
        del found["rope_fraction"]
        return found


def option_of(value: object) -> object:
    """A value of JSON as the value of an option."""
    return tuple(value) if isinstance(value, list) else value


def soften(rope: dict[str, Any], longest: object) -> None:
    """Replace longrope's factor, by default the ratio of the two lengths, with attention_factor."""
    factor, context = rope.pop("factor", None), rope.get(CONTEXT)
    if "attention_factor" in rope or type(context) is not int or context < 2:
        return
    factor = factor or (longest if type(longest) is int else context) / context
    if type(factor) in (int, float):
        grown = math.log(factor) / math.log(context) if factor > 1 else 0.0
        rope["attention_factor"] = math.sqrt(1 + grown)


def sharpen(rope: dict[str, Any]) -> None:
    """Replace DeepSeek's mscale and mscale_all_dim with attention_factor, their factors' ratio."""
    scales = [rope.pop(name, None) for name in ("mscale", "mscale_all_dim")]
    numbers = [*scales, rope.get("factor")]
    if "attention_factor" in rope or not all(
        type(number) in (int, float) and number for number in numbers
    ):
        return
    grown = math.log(rope["factor"]) if rope["factor"] > 1 else 0.0
    above, below = (0.1 * scale * grown + 1.0 for scale in scales)
    rope["attention_factor"] = above / below
