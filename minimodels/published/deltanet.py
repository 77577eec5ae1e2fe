"""Qwen3-Next and Qwen3.5: Gated DeltaNet in most blocks, attention with a gate in the others."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from minimodels.published.entries import Entries, Entry, Fixed, Flag
from minimodels.published.family import Family, Role
from minimodels.published.llama import ATTENTION, DECODER, FIELDS, KV_HEADS, MLP, QK_NORM
from minimodels.published.mappings import ByHead, Offset
from minimodels.published.mixtral import SHARED_EXPERT
from minimodels.published.places import Always, Kinds, Sparse, every
from minimodels.published.rope import Rope

DELTA = Role(
    "deltanet",
    settings=(Fixed(steps=1, gate_bound=None),),
    parts={},
    residual={"norm": "input_layernorm"},
    none={
        "key_heads": lambda options, config: options.heads,
        "head_dim": lambda options, config: config.width // options.heads,
        "value_dim": lambda options, config: options.head_dim or config.width // options.heads,
        "norm_eps": lambda options, config: config.norm_eps,
    },
)

# Qwen3.5.


class TextRope(Rope):
    """Rotary positions of a model that could see pictures too. In a text the three coordinates of a token are equal,
    so mrope_section, which says which angles belong to which coordinate, changes nothing."""

    def parameters(self, entries: Entries) -> dict[str, Any]:
        found = super().parameters(entries)
        return {name: value for name, value in found.items() if not name.startswith("mrope_")}


def query_and_gate(layer: nn.Module) -> ByHead:
    """The rows of each head's query, then those of its gate."""
    return ByHead("self_attn.q_proj", layer.heads)


def by_interval(entries: Entries, count: int) -> list[str]:
    """Attention in the last of every full_attention_interval blocks."""
    return every(entries.number("full_attention_interval", 4), "full", "linear")(entries, count)


NORMS = {
    "mixer": {"norm": Offset("input_layernorm")},
    "mlp": {"norm": Offset("post_attention_layernorm")},
}
QWEN = replace(
    DELTA.having(
        Entry("heads", "linear_num_value_heads", 32),
        Entry("key_heads", "linear_num_key_heads", 16),
        Entry("head_dim", "linear_key_head_dim", 128),
        Entry("value_dim", "linear_value_head_dim", 128),
        Entry("conv_width", "linear_conv_kernel_dim", 4),
        Fixed(gate="scalar", beta_max=1, output_gate="silu", output_rank="full"),
        qkv="linear_attn.in_proj_qkv",
        conv1d="linear_attn.conv1d",
        beta="linear_attn.in_proj_b",
        decay="linear_attn.in_proj_a",
        A_log="linear_attn.A_log",
        dt_bias="linear_attn.dt_bias",
        norm="linear_attn.norm",
        z="linear_attn.in_proj_z",
        out="linear_attn.out_proj",
    ),
    residual=NORMS["mixer"],
)
GATED = replace(
    ATTENTION.having(
        KV_HEADS,
        Entry("head_dim", "head_dim", 256),
        TextRope(partial=True, fraction=0.25),
        Fixed(bias=False, qk_norm="head", gate="full"),
    ).storing(
        {
            "q gate": query_and_gate,
            **{part: ATTENTION.parts[part] for part in ("k", "v", "out")},
            **{part: Offset(name) for part, name in QK_NORM.items()},
        }
    ),
    residual=NORMS["mixer"],
)

# Qwen3-Next stores the rows of all maps together for each key head.
NEXT = QWEN.storing(
    {
        "qkv z": lambda layer: ByHead("linear_attn.in_proj_qkvz", layer.G, layer.split),
        "beta decay": lambda layer: ByHead("linear_attn.in_proj_ba", layer.G),
        **{part: QWEN.parts[part] for part in ("conv1d", "A_log", "dt_bias", "norm", "out")},
    }
)
EXPERTS = SHARED_EXPERT.having(
    Entry("experts_per_token", "num_experts_per_tok", 10),
    Flag("router", "norm_topk_prob", True, {True: "softmax_topk", False: "softmax"}),
).norms(**NORMS["mlp"])
MIXERS = Kinds(
    {"linear": "linear_attention", "full": "full_attention"},
    by_interval,
    ("full_attention_interval",),
)
DENSE = MLP.norms(**NORMS["mlp"])
SHARED = {
    **DECODER,
    "whole": {**DECODER["whole"], "norm": Offset("model.norm")},
    "only": {"attention_bias": False},  # otherwise the gate would have a bias too
    # the block that predicts a further token, which the classes leave out as well
    "idle": ("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"),
}

FAMILIES = {
    "qwen3_5_text": Family(
        "Qwen3_5ForCausalLM",
        FIELDS,
        {"linear": QWEN, "full": GATED, "dense": DENSE},
        (MIXERS, Always("dense")),
        **SHARED,
    ),
    "qwen3_5_moe_text": Family(
        "Qwen3_5MoeForCausalLM",
        FIELDS,
        {
            "linear": QWEN,
            "full": GATED,
            "experts": EXPERTS.having(
                Entry("experts_per_token", "num_experts_per_tok", 8), Fixed(router="softmax_topk")
            ),
        },
        (MIXERS, Always("experts")),
        aliases={"num_local_experts": "num_experts"},
        **SHARED | {"idle": (*SHARED["idle"], "intermediate_size")},  # there are no MLPs
    ),
    "qwen3_next": Family(
        "Qwen3NextForCausalLM",
        FIELDS,
        {"linear": NEXT, "full": GATED, "dense": DENSE, "experts": EXPERTS},
        (MIXERS, Sparse()),
        aliases={"num_local_experts": "num_experts"},
        **SHARED,
    ),
}
