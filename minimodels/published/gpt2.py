"""GPT-2 (Radford et al., 2019): LayerNorm, learned positions, an MLP without a gate.

All projections have biases. Matrices are stored with inputs before outputs, and q, k and v fused.
"""

from __future__ import annotations

from minimodels.published.entries import Entry, Fixed
from minimodels.published.family import Family, Role
from minimodels.published.mappings import Fused, Transposed
from minimodels.published.places import Always

FAMILIES = {
    "gpt2": Family(
        "GPT2LMHeadModel",
        (
            Entry("vocab", "vocab_size", least=1),
            Entry("width", "n_embd"),
            Entry("norm_eps", "layer_norm_epsilon", 1e-5),
            Entry("tie_embeddings", "tie_word_embeddings", True),
            Fixed(norm="layer"),
        ),
        {
            "positions": Role(
                "learned_positions",
                settings=(Entry("context", "n_positions", 1024),),
                parts={"weight": "wpe.weight"},
                residual={},
            ),
            "full": Role(
                "attention",
                settings=(Entry("heads", "n_head"), Fixed(rope_base=0.0, bias=True)),
                parts={
                    "q k v": Transposed(Fused("attn.c_attn")),
                    "out": Transposed("attn.c_proj"),
                },
                residual={"norm": "ln_1"},
                none={
                    "kv_heads": lambda options, config: options.heads,
                    "head_dim": lambda options, config: config.width // options.heads,
                    "scale": lambda options, config: (config.width // options.heads) ** -0.5,
                },
            ),
            "dense": Role(
                "mlp",
                settings=(
                    Entry("width", "n_inner", None),
                    Fixed(bias=True, activation="gelu", gated=False),
                ),
                parts={"up": Transposed("mlp.c_fc"), "out": Transposed("mlp.c_proj")},
                residual={"norm": "ln_2"},
                none={"width": lambda options, config: 4 * config.width},
            ),
        },
        (Always("full"), Always("dense")),
        prefix="transformer.",
        block="h.{}.",
        whole={
            "embedding": "transformer.wte",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        leading=("positions",),
        count="n_layer",
        only={
            "activation_function": "gelu_new", "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
        },
        idle=(  # there is no dropout here
            "resid_pdrop", "embd_pdrop", "attn_pdrop", "n_ctx", "reorder_and_upcast_attn", "summary_type", "summary_use_proj",
            "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
        ),
        aliases={
            "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
            "num_hidden_layers": "n_layer",
        },
    )
}  # fmt: skip
