"""Llama and the decoders that follow it: attention with rotary positions and SwiGLU, each after a norm.

Llama, arXiv:2302.13971; Mistral, arXiv:2310.06825; Qwen3, arXiv:2505.09388.
"""

from __future__ import annotations

from minimodels.published.entries import Entry, Fixed, Rope, divides
from minimodels.published.family import Family, Role
from minimodels.published.places import Always, LayerTypes, Windowed

FIELDS = (
    Entry("vocab", "vocab_size", least=1),
    Entry("width", "hidden_size"),
    Entry("norm_eps", "rms_norm_eps"),
    Entry("tie_embeddings", "tie_word_embeddings", False),
)
ATTENTION = Role(
    "attention",
    settings=(
        Entry("heads", "num_attention_heads"),
        Entry("kv_heads", "num_key_value_heads", None),
        Entry("head_dim", "head_dim", None),
        Entry("bias", "attention_bias", False),
        Rope(),
        Fixed(window=None),
    ),
    parts={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "out": "self_attn.o_proj",
    },
    residual={"norm": "input_layernorm"},
    none={
        "kv_heads": lambda options, config: options.heads,
        "head_dim": lambda options, config: config.width // options.heads,
    },
)
QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
WINDOW = Entry("window", "sliding_window", 4096, told=True)
MLP = Role(
    "mlp",
    settings=(Entry("width", "intermediate_size"),),
    parts={"gate": "mlp.gate_proj", "up": "mlp.up_proj", "out": "mlp.down_proj"},
    residual={"norm": "post_attention_layernorm"},
    none={"width": lambda options, config: -(-8 * config.width // 96) * 32},
)
DECODER = {
    "prefix": "model.",
    "block": "layers.{}.",
    "whole": {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"},
}

MISTRAL = ATTENTION.having(Entry("kv_heads", "num_key_value_heads"), Fixed(bias=False))
QWEN3 = ATTENTION.having(
    Entry("kv_heads", "num_key_value_heads"),
    Entry("head_dim", "head_dim"),
    Fixed(qk_norm="head"),
    **QK_NORM,
)

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        FIELDS,
        {"full": ATTENTION, "dense": MLP.having(Entry("bias", "mlp_bias", False))},
        (Always("full"), Always("dense")),
        checks=(divides("num_attention_heads", "hidden_size"),),  # even if head_dim is told
        **DECODER,
    ),
    "mistral": Family(
        "MistralForCausalLM",
        FIELDS,
        {"full": MISTRAL, "local": MISTRAL.having(WINDOW), "dense": MLP},
        (Windowed(absent=4096), Always("dense")),
        **DECODER,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        FIELDS,
        {"full": QWEN3, "local": QWEN3.having(WINDOW), "dense": MLP},
        (LayerTypes(), Always("dense")),
        **DECODER,
    ),
}
