"""Gemma 2, arXiv:2408.00118, and the text models of Gemma 3, arXiv:2503.19786.

There are norms on both sides of a layer, and their weights are stored minus 1. Embeddings are
scaled, and most blocks have a window.
"""

from __future__ import annotations

from typing import Any

from minimodels.published.entries import Computed, Entries, Entry, Fixed
from minimodels.published.family import Family
from minimodels.published.llama import ATTENTION, FIELDS, KV_HEADS, MLP, QK_NORM, WINDOW
from minimodels.published.mappings import Offset
from minimodels.published.places import Always, LayerTypes
from minimodels.published.rope import Rope


class RootOfWidth:
    """The scale of the embeddings, which has no entry."""

    options = ("embedding_scale",)
    names: tuple[str, ...] = ()

    def read(self, entries: Entries) -> dict[str, object]:
        return {"embedding_scale": entries.number("hidden_size") ** 0.5}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


def scalar_of(scale: float) -> float:
    """The scalar whose root divides the scores: a whole number if that gives the same scale."""
    whole = round(scale**-2)
    return whole if whole > 0 and whole**-0.5 == scale else scale**-2


SCALE = Computed("scale", "query_pre_attn_scalar", 256, lambda scalar: scalar**-0.5, scalar_of)
GEMMA2 = ATTENTION.having(
    KV_HEADS,
    Entry("head_dim", "head_dim", 256),
    Entry("softcap", "attn_logit_softcapping", 50.0, null=True),
    SCALE,
).norms(norm=Offset("input_layernorm"), after=Offset("post_attention_layernorm"))
GEMMA3 = GEMMA2.having(
    Fixed(qk_norm="head", softcap=None), **{part: Offset(name) for part, name in QK_NORM.items()}
)
GEGLU = MLP.having(Fixed(activation="gelu")).norms(
    norm=Offset("pre_feedforward_layernorm"), after=Offset("post_feedforward_layernorm")
)
SHARED = {
    "prefix": "model.",
    "block": "layers.{}.",
    "whole": {
        "embedding": "model.embed_tokens",
        "norm": Offset("model.norm"),
        "head": "lm_head",
    },
    "only": {
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_act": "gelu_pytorch_tanh",
        "use_bidirectional_attention": False,
    },
}


def fields(softcap: float | None) -> tuple:
    """The fields of Config, with the class's default for the softcap of the logits."""
    return (
        *FIELDS[:-1],
        Entry("tie_embeddings", "tie_word_embeddings", True),
        Entry("logit_softcap", "final_logit_softcapping", softcap, null=True),
        Fixed(residual="sandwich"),
        RootOfWidth(),
    )


FAMILIES = {
    "gemma2": Family(
        "Gemma2ForCausalLM",
        fields(30.0),
        {"full": GEMMA2, "local": GEMMA2.having(WINDOW), "dense": GEGLU},
        (LayerTypes(switched=False, full_every=2), Always("dense")),
        **SHARED,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        fields(None),
        {
            "full": GEMMA3.having(Rope(1_000_000.0, "full_attention")),
            "local": GEMMA3.having(
                WINDOW, Rope(10_000.0, "sliding_attention", "rope_local_base_freq", scaled=False)
            ),
            "dense": GEGLU,
        },
        (
            LayerTypes(switched=False, full_every=6, period="sliding_window_pattern"),
            Always("dense"),
        ),
        idle=("attn_logit_softcapping",),  # the class does not apply it
        **SHARED,
    ),
}
