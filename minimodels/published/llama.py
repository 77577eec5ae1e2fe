"""Llama and the decoders that follow it: attention with rotary positions and SwiGLU.

Each layer comes after a norm. Llama, arXiv:2302.13971; Mistral, arXiv:2310.06825; Qwen2,
arXiv:2407.10671; Qwen3, arXiv:2505.09388; SmolLM3; Granite 3; the Differential Transformer,
arXiv:2410.05258; Phi-3, arXiv:2404.14219.
"""

from __future__ import annotations

from minimodels.errors import InputError
from minimodels.published.entries import Computed, Entries, Entry, Fixed, divides
from minimodels.published.family import Family, Role
from minimodels.published.mappings import Fused
from minimodels.published.places import Always, LayerTypes, SomeUnturned, Windowed
from minimodels.published.rope import Rope, WholeRope

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
        "scale": lambda options, config: (
            (options.head_dim or config.width // options.heads) ** -0.5
        ),
    },
)
QK_NORM = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
WINDOW = Entry("window", "sliding_window", 4096, told=True)
SOME_WINDOW = Entry("window", "sliding_window", told=True)
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
KV_HEADS = Entry("kv_heads", "num_key_value_heads")
QWEN2 = ATTENTION.having(KV_HEADS, Fixed(bias="qkv"))
SMOLLM3 = ATTENTION.having(KV_HEADS, Rope(2_000_000.0))
UNTURNED = SMOLLM3.having(Fixed(rope_base=0.0, rope_scaling=None, rope_fraction=1.0))


class PhiRope(Rope):
    """Rotary positions of a class whose only scaling is longrope. Its factors are for heads of
    width / heads, even if head_dim is another width."""

    def read(self, entries: Entries) -> dict[str, object]:
        found = super().read(entries)
        usual = entries.number("hidden_size") // entries.number("num_attention_heads")
        if found["rope_scaling"] is not None and entries.get("head_dim", usual) != usual:
            accepted = f"{usual}, hidden_size / num_attention_heads, because rope_type is longrope"
            raise InputError("config.json head_dim", entries["head_dim"], accepted)
        return found


PHI_ROPE = PhiRope(partial=True, kinds=("default", "longrope"), context=4096)
PHI3 = ATTENTION.having(Fixed(bias=False), PHI_ROPE).storing(
    {"q k v": Fused("self_attn.qkv_proj"), "out": "self_attn.o_proj"}
)
DIFFERENTIAL = Role(
    "differential_attention",
    settings=(
        Entry("heads", "num_attention_heads"),
        Entry("kv_heads", "num_key_value_heads", None),
        Entry("head_dim", "head_dim", None),
        Entry("bias", "attention_bias", False),
        WholeRope(),
        Fixed(version="v1"),
    ),
    parts={
        **ATTENTION.parts,
        **{f"lambda_{each}": f"self_attn.lambda_{each}" for each in ("q1", "k1", "q2", "k2")},
    },
    residual=ATTENTION.residual,
    none={option: ATTENTION.none[option] for option in ("kv_heads", "head_dim")},
)

GRANITE = (
    *FIELDS,
    Entry("embedding_scale", "embedding_multiplier", 1.0),
    Entry("residual_scale", "residual_multiplier", 1.0),
    Computed("logit_scale", "logits_scaling", 1.0, lambda x: 1 / x, lambda x: 1 / x),
)
GRANITE_ATTENTION = ATTENTION.having(Entry("scale", "attention_multiplier", 1.0))

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        FIELDS,
        {"full": ATTENTION, "dense": MLP.having(Entry("bias", "mlp_bias", False))},
        (Always("full"), Always("dense")),
        # even if there is a head_dim
        checks=(divides("num_attention_heads", "hidden_size"),),
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
    "qwen2": Family(
        "Qwen2ForCausalLM",
        FIELDS,
        {"full": QWEN2, "local": QWEN2.having(WINDOW), "dense": MLP},
        (LayerTypes(), Always("dense")),
        **DECODER,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        (*FIELDS[:-1], Entry("tie_embeddings", "tie_word_embeddings", True)),
        {
            "full": SMOLLM3,
            "nope": UNTURNED,
            "local": SMOLLM3.having(SOME_WINDOW),
            "local_nope": UNTURNED.having(SOME_WINDOW),
            "dense": MLP.having(Entry("bias", "mlp_bias", False)),
        },
        (SomeUnturned(), Always("dense")),
        **DECODER,
    ),
    "diffllama": Family(
        "DiffLlamaForCausalLM",
        FIELDS,
        {"mixer": DIFFERENTIAL, "dense": MLP},
        (Always("mixer"), Always("dense")),
        idle=("lambda_std_dev",),
        **DECODER,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        GRANITE,
        {
            "full": GRANITE_ATTENTION,
            "dense": MLP.having(Entry("bias", "mlp_bias", False)),
        },
        (Always("full"), Always("dense")),
        **DECODER,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        FIELDS,
        {
            "full": PHI3,
            "local": PHI3.having(SOME_WINDOW),
            "dense": MLP.storing({"gate up": Fused("mlp.gate_up_proj"), "out": "mlp.down_proj"}),
        },
        (Windowed(), Always("dense")),
        **DECODER,
    ),
}
