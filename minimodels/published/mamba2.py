"""Models of Mamba-2 layers: Mamba-2 alone, arXiv:2405.21060.

The class computes the limits of the step size, time_step_limit, in whole texts and leaves them out when it decodes
token by token; here they hold in both.
"""

from __future__ import annotations

import math
from typing import Any

from minimodels.errors import InputError
from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family, Role
from minimodels.published.mamba import SHARED


class Limits:
    """The limits of the step size, a pair; the upper one may be infinite, in either way of JSON to say so."""

    options = ("step_min", "step_max")
    names = ("time_step_limit",)

    def read(self, entries: Entries) -> dict[str, object]:
        told = entries.get("time_step_limit", [0.0, math.inf])
        limits = [number_of(each) for each in told] if type(told) in (list, tuple) else []
        if len(limits) != 2 or not all(type(each) in (int, float) for each in limits):
            raise InputError("config.json time_step_limit", told, "two numbers")
        lower, upper = map(float, limits)
        return {"step_min": lower, "step_max": None if upper == math.inf else upper}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        if values["step_min"] == 0 and values["step_max"] is None:
            return {}  # as the class has it
        upper = {"__float__": "Infinity"} if values["step_max"] is None else values["step_max"]
        return {"time_step_limit": [values["step_min"], upper]}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


def number_of(told: object) -> object:
    """A number of a config.json, which may be an object that says "Infinity"."""
    return math.inf if told == {"__float__": "Infinity"} else told


def inner_width(heads: str, head_dim: str, expand: str):
    """The check that heads times head_dim is expand times the width, as the class wants it."""

    def check(entries: Entries) -> None:
        inner = entries.number(expand, 2) * entries.number("hidden_size")
        told = entries.number(heads)
        if told * entries.number(head_dim) != inner:
            accepted = f"{inner} / {head_dim}, because {expand} · hidden_size is {inner}"
            raise InputError(f"config.json {heads}", told, accepted)

    return check


MAMBA2 = Role(
    "mamba2",
    settings=(
        Entry("heads", "num_heads"),
        Entry("head_dim", "head_dim"),
        Entry("state_size", "state_size"),
        Entry("groups", "n_groups"),
        Entry("expand", "expand", 2),
        Entry("conv_width", "conv_kernel"),
        Entry("conv_bias", "use_conv_bias", True),
        Entry("bias", "use_bias", False),
        Limits(),
        Fixed(norm="gate_norm"),
    ),
    parts={
        part: f"mixer.{part}"
        for part in ("in_proj", "conv1d", "A_log", "D", "dt_bias", "norm", "out_proj")
    },
    residual={"norm": "norm"},
    none={
        "head_dim": lambda options, config: options.expand * config.width // options.heads,
        "norm_eps": lambda options, config: config.norm_eps,
    },
)

FAMILIES = {
    "mamba2": Family(
        "Mamba2ForCausalLM",
        roles={"mixer": MAMBA2},
        **SHARED
        | {
            "fields": (
                *SHARED["fields"][:-1],
                Entry("tie_embeddings", "tie_word_embeddings", False),
            ),
            # norm_before_gate is in published files, but the class always norms behind the gate
            "idle": (*SHARED["idle"], "chunk_size", "time_step_rank", "norm_before_gate"),
        },
        checks=(inner_width("num_heads", "head_dim", "expand"),),
    ),
}
