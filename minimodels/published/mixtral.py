"""Decoders with routed experts instead of MLPs.

Mixtral, arXiv:2401.04088; OLMoE, arXiv:2409.02060; Qwen3 MoE, arXiv:2505.09388.
"""

from __future__ import annotations

from minimodels.published.entries import Balance, Entry, Fixed, Flag
from minimodels.published.family import Family, Role
from minimodels.published.llama import (
    ATTENTION,
    DECODER,
    FIELDS,
    MISTRAL,
    MLP,
    QK_NORM,
    QWEN3,
    WINDOW,
)
from minimodels.published.places import Always, Sparse, Windowed
from minimodels.published.rope import Rope

EXPERTS = Role(
    "moe",
    settings=(
        Entry("experts", "num_experts"),
        Entry("experts_per_token", "num_experts_per_tok"),
        Entry("expert_width", "intermediate_size"),
        Flag("router", "norm_topk_prob", False, {True: "softmax_topk", False: "softmax"}),
        Balance(),
    ),
    parts={
        "router": "mlp.gate",
        "gate": "mlp.experts.*.gate_proj.weight",
        "up": "mlp.experts.*.up_proj.weight",
        "out": "mlp.experts.*.down_proj.weight",
    },
    residual={"norm": "post_attention_layernorm"},
    none={
        "expert_width": lambda options, config: (
            -(
                -MLP.none["width"](None, config)
                // (options.experts_per_token + options.shared_experts)
            )
        )
    },
    training=("balance", "balance_loss", "z_loss", "bias_step"),
)
MIXTRAL = MISTRAL.having(Rope(1_000_000.0))
QWEN3_MOE = QWEN3.having(Entry("head_dim", "head_dim", None))
OLMOE = ATTENTION.having(Fixed(head_dim=None, qk_norm="full"), **QK_NORM)

FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM",
        FIELDS,
        {
            "full": MIXTRAL,
            "local": MIXTRAL.having(WINDOW),
            "experts": EXPERTS.having(
                Entry("experts", "num_local_experts"),
                Fixed(router="softmax_topk"),
                router="block_sparse_moe.gate",
                gate="block_sparse_moe.experts.*.w1.weight",
                up="block_sparse_moe.experts.*.w3.weight",
                out="block_sparse_moe.experts.*.w2.weight",
            ),
        },
        (Windowed(), Always("experts")),
        only={"router_jitter_noise": 0.0},
        aliases={"num_experts": "num_local_experts"},
        **DECODER,
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        FIELDS,
        {"full": OLMOE, "experts": EXPERTS},
        (Always("full"), Always("experts")),
        only={"clip_qkv": None},
        aliases={"num_local_experts": "num_experts"},
        **DECODER,
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        FIELDS,
        {
            "full": QWEN3_MOE,
            "local": QWEN3_MOE.having(WINDOW),
            "dense": MLP,
            "experts": EXPERTS.having(Entry("expert_width", "moe_intermediate_size")),
        },
        (Windowed(absent=4096, switched=True), Sparse()),
        idle=("max_window_layers", "intermediate_size", "moe_intermediate_size", "num_experts", "num_experts_per_tok",
              "norm_topk_prob"),
        aliases={"num_local_experts": "num_experts"},
        **DECODER,
    ),
}  # fmt: skip
