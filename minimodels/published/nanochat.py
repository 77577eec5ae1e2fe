"""nanochat (Karpathy, 2025): norms without weights, also on the embeddings, and an MLP with relu².

Its rotary positions rotate in the other direction.
"""

from __future__ import annotations

from dataclasses import replace

from minimodels.published.entries import Entry, Fixed
from minimodels.published.family import Family
from minimodels.published.llama import ATTENTION, DECODER, FIELDS, MLP
from minimodels.published.mappings import Swapped
from minimodels.published.places import Always

FAMILIES = {
    "nanochat": Family(
        "NanoChatForCausalLM",
        (
            *FIELDS[:2],
            Entry("norm_eps", "rms_norm_eps", 1e-6),
            Entry("tie_embeddings", "tie_word_embeddings", False),
            Entry("logit_softcap", "final_logit_softcapping", 15.0, null=True),
            Fixed(norm="plain", embedding_norm=True),
        ),
        {
            "full": ATTENTION.having(
                Fixed(qk_norm="plain"),
                q=lambda layer: Swapped("self_attn.q_proj", layer.heads),
                k=lambda layer: Swapped("self_attn.k_proj", layer.kv_heads),
            ).norms(),
            "dense": replace(
                MLP.having(Fixed(gated=False, activation="relu2")),
                parts={"up": "mlp.fc1", "out": "mlp.fc2"},
                residual={},
                none={"width": lambda options, config: 4 * config.width},
            ),
        },
        (Always("full"), Always("dense")),
        only={"hidden_act": "relu2"},
        **{**DECODER, "whole": {part: DECODER["whole"][part] for part in ("embedding", "head")}},
    ),
}
