"""OLMo-Hybrid (Ai2, 2026): Gated DeltaNet in most blocks, attention without positions in the others.

Norms come before the layers in the blocks of the delta rule, but after them in the blocks of
attention.
"""

from __future__ import annotations

from dataclasses import replace

from minimodels.published.deltanet import QWEN
from minimodels.published.entries import Entries, Entry, Fixed, Flag
from minimodels.published.family import Family
from minimodels.published.llama import DECODER, FIELDS, MLP
from minimodels.published.mappings import Apart
from minimodels.published.olmo import OLMO2
from minimodels.published.places import listed

BEFORE, AFTER = Fixed(residual="pre_norm"), Fixed(residual="post_norm")


class Mixers:
    """The delta rule or attention; attention has no positions if its rope_theta is null."""

    roles = ("linear", "full", "nope")
    names = ("layer_types", "rope_parameters")

    def read(self, entries: Entries, count: int) -> list[str]:
        rope = entries.get("rope_parameters", {})
        nope = isinstance(rope, dict) and "rope_theta" in rope and rope["rope_theta"] is None
        known = {"linear_attention": "linear", "full_attention": "nope" if nope else "full"}
        usual = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(count)]
        if count < 4:
            usual[-1] = "full_attention"
        return listed(entries.get("layer_types", usual), count, known)

    def write(self, roles: list[str]) -> dict[str, object]:
        kinds = ["linear_attention" if role == "linear" else "full_attention" for role in roles]
        nope = {"rope_parameters": {"rope_type": "default", "rope_theta": None}}
        return {"layer_types": kinds} | ({} if "full" in roles else nope)


class Channels(Mixers):
    """The MLP of a block, with its norm where the mixer has its own."""

    roles = ("before", "after")

    def read(self, entries: Entries, count: int) -> list[str]:
        mixers = super().read(entries, count)
        return ["before" if mixer == "linear" else "after" for mixer in mixers]

    def write(self, roles: list[str]) -> dict[str, object]:
        return {}


DELTA = replace(
    QWEN.having(
        BEFORE,
        Entry("heads", "linear_num_value_heads"),
        Entry("key_heads", "linear_num_key_heads"),
        Entry("head_dim", "linear_key_head_dim"),
        Entry("value_dim", "linear_value_head_dim"),
        Flag("beta_max", "linear_allow_neg_eigval", True, {True: 2, False: 1}),
        Fixed(gate="scalar", output_gate="silu", output_rank="full", norm_eps=1e-5),
    ).storing(
        {
            "qkv": lambda layer: Apart("linear_attn.*_proj", "qkv", layer.split),
            "conv1d": lambda layer: Apart("linear_attn.*_conv1d", "qkv", layer.split),
            "beta": "linear_attn.b_proj",
            "decay": "linear_attn.a_proj",
            "z": "linear_attn.g_proj",
            "norm": "linear_attn.o_norm",
            "out": "linear_attn.o_proj",
            **{part: QWEN.parts[part] for part in ("A_log", "dt_bias")},
        }
    ),
    residual={"norm": "attention_layer_norm"},
)
FULL = OLMO2.having(AFTER).norms(norm="feedforward_layer_norm")

FAMILIES = {
    "olmo_hybrid": Family(
        "OlmoHybridForCausalLM",
        FIELDS,
        {
            "linear": DELTA,
            "full": FULL,
            "nope": FULL.having(Fixed(rope_base=0.0, rope_scaling=None, rope_fraction=1.0)),
            "before": MLP.having(BEFORE).norms(norm="feedforward_layer_norm"),
            "after": MLP.having(AFTER).norms(norm="post_feedforward_layernorm"),
        },
        (Mixers(), Channels()),
        idle=(  # about initialisation
            "linear_a_log_min", "linear_a_log_max", "linear_dt_min", "linear_dt_max", "linear_dt_init_floor",
        ),
        aliases={
            f"model.layers.{{}}.{theirs}.weight": f"model.layers.{{}}.{ours}.weight"
            for theirs, ours in (
                ("input_layernorm", "attention_layer_norm"),
                ("post_attention_layernorm", "feedforward_layer_norm"),
            )
        },
        **DECODER,
    ),
}  # fmt: skip
