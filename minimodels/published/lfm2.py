"""LFM2, arXiv:2511.23404: gated short convolutions and some attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minimodels.errors import InputError
from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family, Role
from minimodels.published.llama import ATTENTION, DECODER, FIELDS, KV_HEADS, MLP
from minimodels.published.places import Always, Kinds
from minimodels.published.rope import Rope


@dataclass(frozen=True)
class Older:
    """An option whose entry also has an older name, which has priority if both are given."""

    option: str
    name: str
    older: str
    absent: object

    @property
    def options(self) -> tuple[str, ...]:
        return (self.option,)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, self.older)

    def read(self, entries: Entries) -> dict[str, object]:
        newer = entries.get(self.name, self.absent)
        return {self.option: entries.get(self.older, newer)}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {self.name: values[self.option]}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


class Adjusted:
    """The width of the MLP: as given, or two thirds of that times a factor, rounded up."""

    options = ("width",)
    names = (
        "intermediate_size",
        "block_ff_dim",  # an older name, which has priority
        "block_auto_adjust_ff_dim",
        "block_ffn_dim_multiplier",
        "block_multiple_of",
    )

    def read(self, entries: Entries) -> dict[str, object]:
        told = entries.number("intermediate_size", 12288)
        width = entries.number("block_ff_dim", told)
        step = entries.number("block_multiple_of", 256)
        factor = entries.get("block_ffn_dim_multiplier", 1.0)
        if type(factor) not in (int, float) or not 0 < factor < 1e6:
            raise InputError(f"config.json {self.names[3]}", factor, "a number above 0")
        if not entries.get("block_auto_adjust_ff_dim", True):
            return {"width": width}
        return {"width": -(-int(factor * int(2 * width / 3)) // step) * step}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {"intermediate_size": values["width"], "block_auto_adjust_ff_dim": False}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


def attention_by_number(entries: Entries, count: int) -> list[str]:
    """Attention in the blocks that full_attn_idxs lists, by default in all."""
    chosen = entries.get("full_attn_idxs", list(range(count)))
    if type(chosen) is not list or not all(type(i) is int for i in chosen):
        raise InputError("config.json full_attn_idxs", chosen, "a list of whole numbers")
    return ["full" if i in chosen else "conv" for i in range(count)]


FAMILIES = {
    "lfm2": Family(
        "Lfm2ForCausalLM",
        (
            *FIELDS[:2],
            Entry("norm_eps", "norm_eps", 1e-5),
            Older("tie_embeddings", "tie_word_embeddings", "tie_embedding", True),
        ),
        {
            "full": ATTENTION.having(
                KV_HEADS,
                Fixed(bias=False, qk_norm="head"),
                Rope(1_000_000.0),
                out="self_attn.out_proj",
                q_norm="self_attn.q_layernorm",
                k_norm="self_attn.k_layernorm",
            ).norms(norm="operator_norm"),
            "conv": Role(
                "short_convolution",
                settings=(
                    Entry("conv_width", "conv_L_cache", 3),
                    Entry("bias", "conv_bias", False),
                ),
                parts={
                    "in_proj": "conv.in_proj",
                    "conv1d": "conv.conv",
                    "out_proj": "conv.out_proj",
                },
                residual={"norm": "operator_norm"},
            ),
            "dense": MLP.having(
                Adjusted(), gate="feed_forward.w1", up="feed_forward.w3", out="feed_forward.w2"
            ).norms(norm="ffn_norm"),
        },
        (
            Kinds(
                {"full": "full_attention", "conv": "conv"}, attention_by_number, ("full_attn_idxs",)
            ),
            Always("dense"),
        ),
        only={"block_use_swiglu": True, "use_pos_enc": True},
        # the class reads none of these
        idle=(
            "block_dim", "block_norm_eps", "block_mlp_init_scale", "block_out_init_scale", "block_use_xavier_init",
            "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta",
        ),
        **{**DECODER, "whole": {**DECODER["whole"], "norm": "model.embedding_norm"}},
    ),
}  # fmt: skip
