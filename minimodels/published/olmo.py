"""OLMo 2, arXiv:2501.00656, and OLMo 3, arXiv:2512.13961.

Norms come after the layers. QK-norm spans all heads together.
"""

from __future__ import annotations

from minimodels.published.entries import Fixed
from minimodels.published.family import Family
from minimodels.published.llama import ATTENTION, DECODER, FIELDS, MLP, QK_NORM, WINDOW
from minimodels.published.places import Always, LayerTypes
from minimodels.published.rope import Rope

POST_NORM = (*FIELDS, Fixed(residual="post_norm"))
OLMO2 = ATTENTION.having(Fixed(qk_norm="full"), **QK_NORM).norms(norm="post_attention_layernorm")
MLP2 = MLP.norms(norm="post_feedforward_layernorm")
THETA = 500_000.0

FAMILIES = {
    "olmo2": Family(
        "Olmo2ForCausalLM",
        POST_NORM,
        {"full": OLMO2, "dense": MLP2},
        (Always("full"), Always("dense")),
        **DECODER,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        POST_NORM,
        {
            "full": OLMO2.having(Rope(THETA, "full_attention")),
            "local": OLMO2.having(WINDOW, Rope(THETA, "sliding_attention", theta="", scaled=False)),
            "dense": MLP2,
        },
        (LayerTypes(switched=False, full_every=4), Always("dense")),
        **DECODER,
    ),
}
