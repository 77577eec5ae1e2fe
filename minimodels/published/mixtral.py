"""Decoders with routed experts instead of MLPs.

Mixtral, arXiv:2401.04088; OLMoE, arXiv:2409.02060; Qwen2 MoE, arXiv:2407.10671; Qwen3 MoE,
arXiv:2505.09388; gpt-oss, arXiv:2508.10925.
"""

from __future__ import annotations

from minimodels.published.entries import Balance, Entry, Fixed, Flag
from minimodels.published.family import Family, Role
from minimodels.published.llama import (
    ATTENTION,
    DECODER,
    FIELDS,
    KV_HEADS,
    MISTRAL,
    MLP,
    QK_NORM,
    QWEN3,
    WINDOW,
)
from minimodels.published.mappings import Interleaved, Transposed
from minimodels.published.places import Always, LayerTypes, Sparse, Windowed
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
SHARED_EXPERT = EXPERTS.having(
    Entry("expert_width", "moe_intermediate_size"),
    Entry("shared_width", "shared_expert_intermediate_size"),
    Fixed(shared_experts=1, shared_gate=True),
    **{
        f"shared.{part}": name.replace("mlp.", "mlp.shared_expert.")
        for part, name in MLP.parts.items()
    },
    shared_gate="mlp.shared_expert_gate",
)
MIXTRAL_EXPERTS = EXPERTS.having(
    Entry("experts", "num_local_experts"),
    Fixed(router="softmax_topk"),
    router="block_sparse_moe.gate",
    gate="block_sparse_moe.experts.*.w1.weight",
    up="block_sparse_moe.experts.*.w3.weight",
    out="block_sparse_moe.experts.*.w2.weight",
)
MIXTRAL = MISTRAL.having(Rope(1_000_000.0))
QWEN3_MOE = QWEN3.having(Entry("head_dim", "head_dim", None))
OLMOE = ATTENTION.having(Fixed(head_dim=None, qk_norm="full"), **QK_NORM)
QWEN2_MOE = ATTENTION.having(KV_HEADS, Flag("bias", "qkv_bias", True, {True: "qkv", False: False}))
GPT_OSS = ATTENTION.having(
    KV_HEADS,
    Entry("head_dim", "head_dim", 64),
    Entry("bias", "attention_bias", True),
    Rope(150_000.0, untold={
        "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
        "original_max_position_embeddings": 4096,
    }),
    Fixed(sink=True),
    sink="self_attn.sinks",
)  # fmt: skip
CLAMPED = EXPERTS.having(
    Entry("experts", "num_local_experts"),
    Entry("experts_per_token", "num_experts_per_tok", 4),
    Fixed(router="softmax_topk", expert_bias=True, activation="clamped"),
).storing(
    {
        "router": "mlp.router",
        "gate up": Transposed(Interleaved("mlp.experts.gate_up_proj", dim=1)),
        "gate_bias up_bias": Interleaved("mlp.experts.gate_up_proj_bias", dim=1),
        "out": Transposed("mlp.experts.down_proj"),
        "out_bias": "mlp.experts.down_proj_bias",
    }
)

FAMILIES = {
    "mixtral": Family(
        "MixtralForCausalLM",
        FIELDS,
        {
            "full": MIXTRAL,
            "local": MIXTRAL.having(WINDOW),
            "experts": MIXTRAL_EXPERTS,
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
    "qwen2_moe": Family(
        "Qwen2MoeForCausalLM",
        FIELDS,
        {
            "full": QWEN2_MOE,
            "local": QWEN2_MOE.having(WINDOW),
            "dense": MLP,
            "experts": SHARED_EXPERT,
        },
        (LayerTypes(alternating=True), Sparse()),
        aliases={"num_local_experts": "num_experts"},
        **DECODER,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        FIELDS,
        {
            "full": GPT_OSS,
            "local": GPT_OSS.having(Entry("window", "sliding_window", 128, told=True)),
            "experts": CLAMPED,
        },
        (LayerTypes(absent=128, switched=False, full_every=2), Always("experts")),
        only={"swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        aliases={"num_experts": "num_local_experts"},
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
        idle=("max_window_layers",),
        aliases={"num_local_experts": "num_experts"},
        **DECODER,
    ),
}  # fmt: skip
