"""Jamba, arXiv:2403.19887: Mamba, MLPs, experts, and a little attention without positions."""

from __future__ import annotations

from dataclasses import replace

from minimodels.published.entries import Entry, Fixed
from minimodels.published.family import Family
from minimodels.published.llama import FIELDS, MISTRAL, MLP
from minimodels.published.mamba import MAMBA
from minimodels.published.mixtral import EXPERTS
from minimodels.published.places import Periodic

FAMILIES = {
    "jamba": Family(
        "JambaForCausalLM",
        FIELDS,
        {
            "full": MISTRAL.having(Fixed(head_dim=None, rope_base=0.0, rope_scaling=None, rope_fraction=1.0)),
            "ssm": replace(
                MAMBA.having(
                    Entry("expand", "mamba_expand"),
                    Entry("state_size", "mamba_d_state"),
                    Entry("conv_width", "mamba_d_conv"),
                    Entry("rank", "mamba_dt_rank", words={"auto": None}),
                    Entry("bias", "mamba_proj_bias", False),
                    Entry("conv_bias", "mamba_conv_bias", True),
                    Fixed(norm="learned"),
                    **{part: name.replace("mixer.", "mamba.") for part, name in MAMBA.parts.items()},
                    dt_norm="mamba.dt_layernorm",
                    B_norm="mamba.b_layernorm",
                    C_norm="mamba.c_layernorm",
                ),
                residual={"norm": "input_layernorm"},
            ),
            "dense": replace(
                MLP.having(
                    gate="feed_forward.gate_proj",
                    up="feed_forward.up_proj",
                    out="feed_forward.down_proj",
                ),
                residual={"norm": "pre_ff_layernorm"},
            ),
            "experts": replace(
                EXPERTS.having(
                    Fixed(router="softmax"),
                    router="feed_forward.router",
                    gate="feed_forward.experts.*.gate_proj.weight",
                    up="feed_forward.experts.*.up_proj.weight",
                    out="feed_forward.experts.*.down_proj.weight",
                ),
                residual={"norm": "pre_ff_layernorm"},
            ),
        },
        (
            Periodic("attn", "full", "ssm"),
            Periodic("expert", "experts", "dense", unless_one="num_experts"),
        ),
        prefix="model.",
        block="layers.{}.",
        whole={
            "embedding": "model.embed_tokens",
            "norm": "model.final_layernorm",
            "head": "lm_head",
        },
        only={"mamba_inner_layernorms": True},
        idle=(
            "use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep", "n_ctx", "num_experts_per_tok",
            "calc_logits_for_entire_prompt",
        ),
        aliases={"num_local_experts": "num_experts"},
    )
}  # fmt: skip
