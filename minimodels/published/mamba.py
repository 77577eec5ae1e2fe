"""Models with only Mamba layers: Mamba, arXiv:2312.00752, and Falcon Mamba, arXiv:2410.05355."""

from __future__ import annotations

from typing import Any

from minimodels.errors import InputError
from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family, Role
from minimodels.published.places import Always


class Expand:
    """The option expand: a factor, or the inner width intermediate_size, which has priority."""

    options = ("expand",)
    names = ("expand", "intermediate_size")

    def read(self, entries: Entries) -> dict[str, object]:
        expand = Entry("expand", "expand").read(entries)
        if "intermediate_size" not in entries:
            return expand
        width, inner = entries.number("hidden_size"), entries.get("intermediate_size")
        if type(inner) is not int or inner < 1 or inner % width:
            accepted = f"a multiple of hidden_size {width}"
            raise InputError("config.json intermediate_size", inner, accepted)
        return {"expand": inner // width}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {"expand": values["expand"]}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


MAMBA = Role(
    "mamba",
    settings=(
        Expand(),
        Entry("state_size", "state_size"),
        Entry("conv_width", "conv_kernel"),
        Entry("rank", "time_step_rank", words={"auto": None}),
        Entry("bias", "use_bias", False),
        Entry("conv_bias", "use_conv_bias", True),
        Fixed(norm="none"),
    ),
    parts={
        "in_proj": "mixer.in_proj",
        "conv1d": "mixer.conv1d",
        "x_proj": "mixer.x_proj",
        "dt_proj": "mixer.dt_proj",
        "dt_bias": "mixer.dt_proj.bias",
        "A_log": "mixer.A_log",
        "D": "mixer.D",
        "out_proj": "mixer.out_proj",
    },
    residual={"norm": "norm"},
    none={
        "rank": lambda options, config: -(-config.width // 16),
        "norm_eps": lambda options, config: config.norm_eps if options.norm != "none" else None,
    },
)
SHARED = {
    "fields": (
        Entry("vocab", "vocab_size", least=1),
        Entry("width", "hidden_size"),
        Entry("norm_eps", "layer_norm_epsilon"),
        Entry("tie_embeddings", "tie_word_embeddings", True),
    ),
    "places": (Always("mixer"),),
    "prefix": "backbone.",
    "block": "layers.{}.",
    "whole": {"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"},
    "only": {"rms_norm": True},
    "aliases": {"backbone.embedding.weight": "backbone.embeddings.weight"},
    "idle": (
        "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme", "time_step_max",
        "time_step_min", "time_step_scale", "use_associative_scan", "use_mambapy", "use_falcon_mambapy", "d_inner", "d_model",
        "n_layer", "fused_add_norm", "pad_vocab_size_multiple", "ssm_cfg",
    ),
}  # fmt: skip

FAMILIES = {
    "mamba": Family("MambaForCausalLM", roles={"mixer": MAMBA}, **SHARED),
    "falcon_mamba": Family(
        "FalconMambaForCausalLM",
        roles={
            "mixer": MAMBA.having(Fixed(norm="plain"), Entry("norm_eps", "mixer_rms_eps", 1e-6))
        },
        **SHARED,
    ),
}


def original_format(entries: dict) -> str:
    """Advice for a file of the package mamba_ssm."""
    if entries.get("model_type") or not {"d_model", "n_layer"} <= entries.keys():
        return ""
    return "a converted model: state-spaces publishes each under its name with -hf, such as mamba-130m-hf"
