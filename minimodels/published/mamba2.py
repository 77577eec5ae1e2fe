"""Models of Mamba-2 layers: Mamba-2 alone, arXiv:2405.21060, and Bamba.

Bamba also has MLPs, and attention in some blocks. The class applies the limits of the step size,
time_step_limit, to whole texts but not when it decodes token by token. Here they apply to both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from minimodels.errors import InputError
from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family, Role
from minimodels.published.llama import ATTENTION, DECODER, FIELDS, KV_HEADS, MLP
from minimodels.published.mamba import SHARED
from minimodels.published.places import Always
from minimodels.published.rope import Rope


class Limits:
    """The limits of the step size, a pair; the upper one may be infinite, in JSON's two forms."""

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
            return {}  # the class's default
        upper = {"__float__": "Infinity"} if values["step_max"] is None else values["step_max"]
        return {"time_step_limit": [values["step_min"], upper]}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


def number_of(told: object) -> object:
    """A number of a config.json, which may be an object that says "Infinity"."""
    return math.inf if told == {"__float__": "Infinity"} else told


def inner_width(heads: str, head_dim: str, expand: str):
    """The check that heads times head_dim is expand times the width, which the class requires."""

    def check(entries: Entries) -> None:
        inner = entries.number(expand, 2) * entries.number("hidden_size")
        if entries.get(head_dim) == "auto":
            return
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


SSM = replace(  # in a model with other layers
    MAMBA2.having(
        Entry("heads", "mamba_n_heads", 128),
        Entry("head_dim", "mamba_d_head", None, words={"auto": None}),
        Entry("state_size", "mamba_d_state", 256),
        Entry("groups", "mamba_n_groups", 1),
        Entry("expand", "mamba_expand", 2),
        Entry("conv_width", "mamba_d_conv", 4),
        Entry("conv_bias", "mamba_conv_bias", True),
        Entry("bias", "mamba_proj_bias", False),
        **{part: name.replace("mixer.", "mamba.") for part, name in MAMBA2.parts.items()},
    ),
    residual={"norm": "input_layernorm"},
)
SSM_WIDTH = inner_width("mamba_n_heads", "mamba_d_head", "mamba_expand")


@dataclass(frozen=True)
class Numbered:
    """One role in the blocks whose numbers are listed, another elsewhere."""

    name: str
    chosen: str
    other: str

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.chosen, self.other)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    def read(self, entries: Entries, count: int) -> list[str]:
        listed = entries.get(self.name, [])
        if type(listed) is not list or not all(type(i) is int for i in listed):
            raise InputError(f"config.json {self.name}", listed, "a list of whole numbers")
        return [self.chosen if i in listed else self.other for i in range(count)]

    def write(self, roles: list[str]) -> dict[str, object]:
        return {self.name: [i for i, role in enumerate(roles) if role == self.chosen]}


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
            # norm_before_gate is in published files, but in the class the gate always comes first
            "idle": (*SHARED["idle"], "chunk_size", "time_step_rank", "norm_before_gate"),
        },
        checks=(inner_width("num_heads", "head_dim", "expand"),),
    ),
    "bamba": Family(
        "BambaForCausalLM",
        FIELDS,
        {
            "full": ATTENTION.having(KV_HEADS, Rope(partial=True, fraction=0.5)),
            "ssm": SSM,
            "dense": MLP.having(
                Entry("bias", "mlp_bias", False),
                gate="feed_forward.gate_proj",
                up="feed_forward.up_proj",
                out="feed_forward.down_proj",
            ).norms(norm="pre_ff_layernorm"),
        },
        (Numbered("attn_layer_indices", "full", "ssm"), Always("dense")),
        only={"z_loss_coefficient": 0.0},
        idle=("mamba_chunk_size", "num_logits_to_keep"),
        checks=(SSM_WIDTH,),
        **{**DECODER, "whole": {**DECODER["whole"], "norm": "model.final_layernorm"}},
    ),
}
