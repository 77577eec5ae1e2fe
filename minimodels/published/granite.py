"""Granite 4 (IBM, 2025): Mamba-2, attention without positions in some blocks, MLPs or experts."""

from __future__ import annotations

from minimodels.errors import InputError
from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family
from minimodels.published.llama import DECODER, GRANITE, GRANITE_ATTENTION, KV_HEADS, MLP
from minimodels.published.mamba2 import SSM, SSM_WIDTH
from minimodels.published.mappings import Fused
from minimodels.published.mixtral import EXPERTS
from minimodels.published.places import listed


class Mixers:
    """Mamba-2 or attention, as layer_types lists them. position_embedding_type says whether
    attention has positions: "rope", or null for none."""

    roles = ("ssm", "full", "nope")
    names = ("layer_types", "position_embedding_type")

    def read(self, entries: Entries, count: int) -> list[str]:
        positions = entries.get("position_embedding_type")
        if positions not in (None, "rope", "nope"):
            accepted = "rope, nope or null"
            raise InputError("config.json position_embedding_type", positions, accepted)
        known = {
            "linear_attention": "ssm",
            "full_attention": "full" if positions == "rope" else "nope",
        }
        return listed(entries.get("layer_types", ["linear_attention"] * count), count, known)

    def write(self, roles: list[str]) -> dict[str, object]:
        kinds = ["linear_attention" if role == "ssm" else "full_attention" for role in roles]
        return {
            "layer_types": kinds,
            "position_embedding_type": "rope" if "full" in roles else None,
        }


class Channels:
    """Experts in every block, or an MLP if there are no experts."""

    roles = ("dense", "experts")
    names = ("num_local_experts",)

    def read(self, entries: Entries, count: int) -> list[str]:
        experts = entries.number("num_local_experts", 8, least=0)
        return ["experts" if experts else "dense"] * count

    def write(self, roles: list[str]) -> dict[str, object]:
        return {"num_local_experts": 0}  # if there are experts, the role writes their number


ATTENTION = GRANITE_ATTENTION.having(KV_HEADS)
SHARED_WIDTH = "shared_intermediate_size"
SHARED = {"gate up": Fused("shared_mlp.input_linear"), "out": "shared_mlp.output_linear"}

FAMILIES = {
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        GRANITE,
        {
            "ssm": SSM,
            "full": ATTENTION,
            "nope": ATTENTION.having(Fixed(rope_base=0.0, rope_scaling=None, rope_fraction=1.0)),
            "dense": MLP.having(Entry("width", SHARED_WIDTH, 1024)).storing(SHARED),
            "experts": EXPERTS.having(
                Entry("experts", "num_local_experts", 8),
                Entry("experts_per_token", "num_experts_per_tok", 2),
                Entry("shared_width", SHARED_WIDTH, 1024),
                Fixed(router="softmax_topk", shared_experts=1),
            ).storing(
                {
                    "router": "block_sparse_moe.router.layer",
                    "gate up": Fused("block_sparse_moe.input_linear.weight", dim=1),
                    "out": "block_sparse_moe.output_linear.weight",
                    "shared.gate shared.up": Fused("shared_mlp.input_linear"),
                    "shared.out": "shared_mlp.output_linear",
                }
            ),
        },
        (Mixers(), Channels()),
        idle=("mamba_chunk_size",),
        aliases={
            "num_experts": "num_local_experts",
            "layers_block_type": "layer_types",
            "model.layers.{}.block_sparse_moe.router.weight": "model.layers.{}.block_sparse_moe.router.layer.weight",
            "model.layers.{}.block_sparse_moe.experts.gate_up_proj": "model.layers.{}.block_sparse_moe.input_linear.weight",
            "model.layers.{}.block_sparse_moe.experts.down_proj": "model.layers.{}.block_sparse_moe.output_linear.weight",
        },
        checks=(SSM_WIDTH,),
        **DECODER,
    ),
}
