"""MiniMax-01, arXiv:2501.08313: Lightning attention, attention in some blocks, and experts.

Each layer is added to the normalised stream, with the factors of its kind of layer.
"""

from __future__ import annotations

from typing import Any

from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family, Role, Setting
from minimodels.published.llama import ATTENTION, DECODER, FIELDS, KV_HEADS
from minimodels.published.mappings import ByHead
from minimodels.published.mixtral import MIXTRAL_EXPERTS
from minimodels.published.places import Always, has_window, listed
from minimodels.published.rope import Rope


class Mixers:
    """Lightning attention or attention, which has a window if there is a sliding_window."""

    roles = ("linear", "full", "local")
    names = ("layer_types", "sliding_window")

    def read(self, entries: Entries, count: int) -> list[str]:
        attention = "local" if has_window(entries, None, switched=False) else "full"
        usual = ["linear_attention" if i % 2 else "full_attention" for i in range(count)]
        known = {"linear_attention": "linear", "full_attention": attention}
        return listed(entries.get("layer_types", usual), count, known)

    def write(self, roles: list[str]) -> dict[str, object]:
        kinds = ["linear_attention" if role == "linear" else "full_attention" for role in roles]
        return {"layer_types": kinds, "sliding_window": None}


class HeadDim:
    """The width of keys and of values."""

    options = ("head_dim", "value_dim")
    names = ("head_dim",)

    def read(self, entries: Entries) -> dict[str, object]:
        return dict.fromkeys(self.options, entries.get("head_dim"))

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {"head_dim": values["head_dim"]}

    def fits(self, values: dict[str, Any]) -> bool:
        return values["head_dim"] == values["value_dim"]


def added(kind: str) -> tuple[Setting, ...]:
    """How layers of a kind are added to the stream."""
    return (
        Entry("stream_scale", f"{kind}_alpha_factor", 1.0),
        Entry("residual_scale", f"{kind}_beta_factor", 1.0),
    )


LIGHTNING = Role(
    "retention",
    settings=(
        Entry("heads", "num_attention_heads"),
        HeadDim(),
        Fixed(feature_map="silu", rope_base=0.0, decay="layers", block=2, scale=False),
        Fixed(norm="full", norm_eps=1e-6, gate="sigmoid"),
        *added("linear_attn"),
    ),
    parts={
        "q k v": lambda layer: ByHead("self_attn.qkv_proj", layer.H),
        "norm": "self_attn.norm",
        "gate": "self_attn.output_gate",
        "out": "self_attn.out_proj",
    },
    residual=ATTENTION.residual,
    none=dict.fromkeys(HeadDim.options, ATTENTION.none["head_dim"]),
)
FULL = ATTENTION.having(KV_HEADS, Rope(1_000_000.0), Fixed(bias=False), *added("full_attn"))

FAMILIES = {
    "minimax": Family(
        "MiniMaxForCausalLM",
        (*FIELDS, Fixed(residual="deep_norm")),
        {
            "linear": LIGHTNING,
            "full": FULL,
            "local": FULL.having(Entry("window", "sliding_window", told=True)),
            "experts": MIXTRAL_EXPERTS.having(*added("mlp")),
        },
        (Mixers(), Always("experts")),
        only={"router_jitter_noise": 0.0},
        idle=("block_size",),
        aliases={"num_experts": "num_local_experts"},
        **DECODER,
    ),
}
