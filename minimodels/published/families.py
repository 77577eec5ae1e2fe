"""How published models are put together, in the terms of this project.

A family is one `model_type` of the Hugging Face format. Its table says what each entry of its config.json means here and what
each part of our model is called in its files; pretrained.py reads and writes by these tables. A family joins with
one entry in FAMILIES.

In `parts`, the left side names a part of one of our layers and the right side the published name within a block, a `*`
standing for the number of the expert. A block is as many of our residual layers as the family counts as one: a transformer's
holds two, sequence mixing and MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from minimodels.config import Layers
from minimodels.published.layouts import (
    Entries,
    blocks,
    jamba_layers,
    llama_blocks,
    mamba_blocks,
    outline_blocks,
    outline_jamba,
    outline_qwen3,
    outline_qwen3_moe,
    outline_windowed,
    qwen3_layers,
    qwen3_moe_layers,
    windowed_blocks,
)

REQUIRED = object()


@dataclass(frozen=True)
class Family:
    """One model_type: its config.json and the names in its files."""

    architecture: str
    """the class of transformers"""
    entries: dict[str, tuple[str, object]]
    """entry of config.json -> the field of Config that it sets (or several), and the field's value where the entry is absent"""
    fixed: dict[str, object]
    """field of Config -> the value that it has in all models of the family"""
    layers: Callable[[Entries], dict[str, object]]
    """config.json -> the fields that say which layers there are"""
    outline: Callable[[Layers, int], dict]
    """and back: the layers and the window -> entries of config.json, to be checked by reading them"""
    block: str
    """how the names of a block begin, with its number as {}"""
    parts: dict[str, dict[str, str]]
    """layer -> part -> its name within the block"""
    whole: dict[str, str]
    """the parts outside of the blocks"""
    only: dict[str, object] = field(default_factory=dict)
    """entry -> the one value that is implemented, which an absent entry is taken to have"""
    idle: tuple[str, ...] = ()
    """entries that change nothing here: they concern initialisation, or how and not what the original computes"""
    aliases: dict[str, str] = field(default_factory=dict)
    """another name of an entry or of a tensor -> the name used here"""
    rope_base: float | None = 10_000.0
    """rope_theta where it is absent; None: the family has no rotary positions"""


# Entries that several families share.

ONLY = {
    "hidden_act": "silu", "attention_dropout": 0.0, "quantization_config": None, "auto_map": None, "rope_interleaved": False,
    "partial_rotary_factor": 1.0, "is_encoder_decoder": False, "add_cross_attention": False,
}  # fmt: skip
IDLE = (
    "model_type", "architectures", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings", "pretraining_tp", "output_router_logits",
    "router_aux_loss_coef", "is_llama_config", "_attn_implementation_autoset", "unsloth_fixed", "transformers.js_config",
)  # fmt: skip
BASE = {
    "vocab_size": ("vocab", REQUIRED),
    "hidden_size": ("width", REQUIRED),
    "tie_word_embeddings": ("tie_embeddings", False),
}
ATTENTION_ENTRIES = {
    "num_attention_heads": ("heads", REQUIRED),
    "num_key_value_heads": ("kv_heads", 0),
    "head_dim": ("head_dim", 0),
    "rms_norm_eps": ("norm_eps", REQUIRED),
}
DENSE_ENTRIES = {"intermediate_size": ("mlp_width", REQUIRED)}
EXPERT_ENTRIES = {
    "num_experts": ("experts", REQUIRED),
    "num_experts_per_tok": ("experts_per_token", REQUIRED),
}
ATTENTION_BIAS = {"attention_bias": ("attention_bias", False)}
MAMBA_ENTRIES = {
    "layer_norm_epsilon": ("norm_eps", REQUIRED),
    "state_size": ("state_size", REQUIRED),
    "expand": ("expand", REQUIRED),
    "conv_kernel": ("conv_width", REQUIRED),
    "time_step_rank": ("dt_rank", REQUIRED),
    "use_bias": ("mamba_bias", False),
    "use_conv_bias": ("conv_bias", True),
    "tie_word_embeddings": ("tie_embeddings", True),
}
MAMBA_IDLE = (
    "rescale_prenorm_residual", "residual_in_fp32", "time_step_floor", "time_step_init_scheme",
    "time_step_max", "time_step_min", "time_step_scale", "use_associative_scan", "use_mambapy", "use_falcon_mambapy", "d_inner",
    "d_model", "n_layer", "fused_add_norm", "pad_vocab_size_multiple", "ssm_cfg",
)  # fmt: skip
MEANINGS = {  # entry -> its value -> our value, where they differ; of an entry with True and False there are no others
    "norm_topk_prob": {True: "softmax_topk", False: "softmax"},
    "time_step_rank": {"auto": 0},
    "mamba_dt_rank": {"auto": 0},
}

# Names that several families share.

ATTENTION = {
    "norm": "input_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "out": "self_attn.o_proj",
    "q_norm": "self_attn.q_norm",
    "k_norm": "self_attn.k_norm",
}
MLP = {
    "norm": "post_attention_layernorm",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "out": "mlp.down_proj",
}
EXPERTS = {
    "norm": "post_attention_layernorm",
    "router": "mlp.gate",
    "gate": "mlp.experts.*.gate_proj.weight",
    "up": "mlp.experts.*.up_proj.weight",
    "out": "mlp.experts.*.down_proj.weight",
}
MAMBA = {
    "norm": "norm",
    "in_proj": "mixer.in_proj",
    "conv1d": "mixer.conv1d",
    "x_proj": "mixer.x_proj",
    "dt_proj": "mixer.dt_proj",
    "A_log": "mixer.A_log",
    "D": "mixer.D",
    "out_proj": "mixer.out_proj",
}
DECODER = {
    "block": "model.layers.{}.",
    "whole": {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}
BACKBONE = {
    "block": "backbone.layers.{}.",
    "whole": {"embedding": "backbone.embeddings", "norm": "backbone.norm_f", "head": "lm_head"},
    "aliases": {"backbone.embedding.weight": "backbone.embeddings.weight"},
}
NO_BIAS = {"attention_bias": False, "mlp_bias": False}
PLAIN_EXPERTS = {"shared_experts": 0, "routed_scale": 1.0}

FAMILIES = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        entries={**BASE, **ATTENTION_ENTRIES, **DENSE_ENTRIES, **ATTENTION_BIAS, "mlp_bias": ("mlp_bias", False)},
        fixed={"qk_norm": "none"},
        layers=llama_blocks,
        outline=outline_blocks(2),
        parts={"attention": ATTENTION, "mlp": MLP},
        **DECODER,
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        entries={**BASE, **ATTENTION_ENTRIES, **DENSE_ENTRIES, "num_key_value_heads": ("kv_heads", REQUIRED)},
        fixed={"qk_norm": "none", **NO_BIAS},
        layers=windowed_blocks("mlp", absent=4096),
        outline=outline_windowed,
        parts={"attention": ATTENTION, "window": ATTENTION, "mlp": MLP},
        **DECODER,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        entries={**BASE, **ATTENTION_ENTRIES, **DENSE_ENTRIES, **ATTENTION_BIAS, "head_dim": ("head_dim", REQUIRED),
                 "num_key_value_heads": ("kv_heads", REQUIRED)},
        fixed={"qk_norm": "head", "mlp_bias": False},
        layers=qwen3_layers,
        outline=outline_qwen3,
        parts={"attention": ATTENTION, "window": ATTENTION, "mlp": MLP},
        **DECODER,
    ),
    "mamba": Family(
        architecture="MambaForCausalLM",
        entries={**BASE, **MAMBA_ENTRIES},
        fixed={"mamba_norm": "none"},
        layers=mamba_blocks,
        outline=outline_blocks(1),
        parts={"mamba": MAMBA},
        only={"rms_norm": True},
        idle=MAMBA_IDLE,
        rope_base=None,
        **BACKBONE,
    ),
    "falcon_mamba": Family(
        architecture="FalconMambaForCausalLM",
        entries={**BASE, **MAMBA_ENTRIES, "mixer_rms_eps": ("mamba_norm_eps", 1e-6)},
        fixed={"mamba_norm": "plain"},
        layers=mamba_blocks,
        outline=outline_blocks(1),
        parts={"mamba": MAMBA},
        only={"rms_norm": True},
        idle=MAMBA_IDLE,
        rope_base=None,
        **BACKBONE,
    ),
    "mixtral": Family(
        architecture="MixtralForCausalLM",
        entries={**BASE, **ATTENTION_ENTRIES, "intermediate_size": ("expert_width", REQUIRED),
                 "num_key_value_heads": ("kv_heads", REQUIRED), "num_local_experts": ("experts", REQUIRED),
                 "num_experts_per_tok": ("experts_per_token", REQUIRED)},
        fixed={"qk_norm": "none", "router": "softmax_topk", **PLAIN_EXPERTS, **NO_BIAS},
        layers=windowed_blocks("moe"),
        outline=outline_windowed,
        parts={
            "attention": ATTENTION,
            "window": ATTENTION,
            "moe": {
                "norm": "post_attention_layernorm",
                "router": "block_sparse_moe.gate",
                "gate": "block_sparse_moe.experts.*.w1.weight",
                "up": "block_sparse_moe.experts.*.w3.weight",
                "out": "block_sparse_moe.experts.*.w2.weight",
            },
        },
        only={"router_jitter_noise": 0.0},
        aliases={"num_experts": "num_local_experts"},
        rope_base=1_000_000.0,
        **DECODER,
    ),
    "olmoe": Family(
        architecture="OlmoeForCausalLM",
        entries={**BASE, "num_attention_heads": ("heads", REQUIRED), "num_key_value_heads": ("kv_heads", 0),
                 "rms_norm_eps": ("norm_eps", REQUIRED), **EXPERT_ENTRIES, **ATTENTION_BIAS,
                 "intermediate_size": ("expert_width", REQUIRED), "norm_topk_prob": ("router", "softmax")},
        fixed={"qk_norm": "full", "head_dim": 0, **PLAIN_EXPERTS},
        layers=blocks("attention", "moe"),
        outline=outline_blocks(2),
        parts={"attention": ATTENTION, "moe": EXPERTS},
        only={"clip_qkv": None},
        aliases={"num_local_experts": "num_experts"},
        **DECODER,
    ),
    "qwen3_moe": Family(
        architecture="Qwen3MoeForCausalLM",
        entries={**BASE, **ATTENTION_ENTRIES, **DENSE_ENTRIES, **EXPERT_ENTRIES, **ATTENTION_BIAS,
                 "num_key_value_heads": ("kv_heads", REQUIRED), "moe_intermediate_size": ("expert_width", REQUIRED),
                 "norm_topk_prob": ("router", "softmax")},
        fixed={"qk_norm": "head", "mlp_bias": False, **PLAIN_EXPERTS},
        layers=qwen3_moe_layers,
        outline=outline_qwen3_moe,
        parts={"attention": ATTENTION, "window": ATTENTION, "mlp": MLP, "moe": EXPERTS},
        idle=("max_window_layers",),
        aliases={"num_local_experts": "num_experts"},
        **DECODER,
    ),
    "jamba": Family(
        architecture="JambaForCausalLM",
        entries={**BASE, **EXPERT_ENTRIES, "num_attention_heads": ("heads", REQUIRED),
                 "num_key_value_heads": ("kv_heads", REQUIRED), "rms_norm_eps": ("norm_eps mamba_norm_eps", REQUIRED),
                 "intermediate_size": ("mlp_width expert_width", REQUIRED), "mamba_d_state": ("state_size", REQUIRED),
                 "mamba_d_conv": ("conv_width", REQUIRED), "mamba_expand": ("expand", REQUIRED),
                 "mamba_dt_rank": ("dt_rank", REQUIRED), "mamba_conv_bias": ("conv_bias", True),
                 "mamba_proj_bias": ("mamba_bias", False)},
        fixed={"qk_norm": "none", "router": "softmax", "mamba_norm": "learned", "head_dim": 0, "rope_base": 0.0,
               **PLAIN_EXPERTS, **NO_BIAS},
        layers=jamba_layers,
        outline=outline_jamba,
        block="model.layers.{}.",
        parts={
            "attention": ATTENTION,
            "mamba": {
                **{part: name.replace("mixer.", "mamba.") for part, name in MAMBA.items()},
                "norm": "input_layernorm",
                "dt_norm": "mamba.dt_layernorm",
                "B_norm": "mamba.b_layernorm",
                "C_norm": "mamba.c_layernorm",
            },
            "mlp": {
                "norm": "pre_ff_layernorm",
                "gate": "feed_forward.gate_proj",
                "up": "feed_forward.up_proj",
                "out": "feed_forward.down_proj",
            },
            "moe": {
                "norm": "pre_ff_layernorm",
                "router": "feed_forward.router",
                "gate": "feed_forward.experts.*.gate_proj.weight",
                "up": "feed_forward.experts.*.up_proj.weight",
                "out": "feed_forward.experts.*.down_proj.weight",
            },
        },
        whole={"embedding": "model.embed_tokens", "norm": "model.final_layernorm", "head": "lm_head"},
        only={"mamba_inner_layernorms": True},
        idle=("use_mamba_kernels", "use_mambapy", "use_associative_scan", "num_logits_to_keep", "calc_logits_for_entire_prompt",
              "n_ctx"),
        aliases={"num_local_experts": "num_experts"},
        rope_base=None,
    ),
}  # fmt: skip
