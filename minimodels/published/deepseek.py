"""DeepSeek-V2, arXiv:2405.04434, DeepSeek-V3, arXiv:2412.19437, and DeepSeek-V3.2, arXiv:2512.02556.

They have latent attention and many experts, some of them shared; in V3.2 an indexer chooses the
keys that attention reads. The reader leaves out blocks that predict further tokens.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from minimodels.errors import InputError
from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family, Role
from minimodels.published.llama import DECODER, FIELDS, MLP
from minimodels.published.mixtral import EXPERTS
from minimodels.published.places import Always, Kinds, Leading
from minimodels.published.rope import WholeRope


class Heads:
    """The number of heads, which config.json gives twice."""

    options = ("heads",)
    names = ("num_attention_heads", "num_key_value_heads")

    def read(self, entries: Entries) -> dict[str, object]:
        heads = entries.get(self.names[0])
        pairs = entries.get(self.names[1], heads)
        if pairs != heads:
            raise InputError(f"config.json {self.names[1]}", pairs, f"{heads}, the number of heads")
        return {"heads": heads}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return dict.fromkeys(self.names, values["heads"])

    def fits(self, values: dict[str, Any]) -> bool:
        return True


class LatentRope(WholeRope):
    """Rotary positions whose yarn scaling also scales the scores, by mscale_all_dim."""

    options = (*WholeRope.options, "scale")

    def read(self, entries: Entries) -> dict[str, object]:
        found = super().read(entries)
        rope = self.parameters(entries)
        sharper = rope.get("mscale_all_dim")
        usual = (entries.number("qk_nope_head_dim") + entries.number("qk_rope_head_dim")) ** -0.5
        if found["rope_scaling"] is None or not sharper:
            return {**found, "scale": usual}
        for name in ("factor", "mscale_all_dim"):
            if type(rope[name]) not in (int, float):
                raise InputError(f"config.json rope_parameters {name}", rope[name], "a number")
        grown = 0.1 * sharper * math.log(rope["factor"]) + 1.0 if rope["factor"] > 1 else 1.0
        return {**found, "scale": usual * grown * grown}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        written = super().write(values)
        rope = written["rope_parameters"]
        grown = (values["scale"] * (values["head_dim"] + values["rope_dim"]) ** 0.5) ** 0.5 - 1.0
        if abs(grown) > 1e-9 and rope.get("factor", 1) > 1:
            rope["mscale_all_dim"] = grown / (0.1 * math.log(rope["factor"]))
            # mscale_all_dim alone would not give the factor on queries and keys
            rope["attention_factor"] = values["rope_scaling"].attention
        return written


class Groups:
    """Groups of experts, which topk_method enables."""

    options = ("groups", "groups_per_token")
    names = ("n_group", "topk_group", "topk_method")

    def read(self, entries: Entries) -> dict[str, object]:
        method = entries.get("topk_method", "greedy")
        if method not in ("greedy", "group_limited_greedy"):
            accepted = "greedy or group_limited_greedy"
            raise InputError("config.json topk_method", method, accepted)
        told = {
            option: entries.get(name)
            for option, name in zip(self.options, self.names[:2], strict=True)
        }
        return dict.fromkeys(self.options, 1) if method == "greedy" else told

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        method = "greedy" if values["groups"] == 1 else "group_limited_greedy"
        return dict(
            zip(self.names, (values["groups"], values["groups_per_token"], method), strict=True)
        )

    def fits(self, values: dict[str, Any]) -> bool:
        return True


LATENT = Role(
    "latent_attention",
    settings=(
        Heads(),
        Entry("head_dim", "qk_nope_head_dim"),
        Entry("rope_dim", "qk_rope_head_dim"),
        Entry("value_dim", "v_head_dim"),
        Entry("kv_rank", "kv_lora_rank"),
        Entry("q_rank", "q_lora_rank", 1536, null=True),
        Entry("bias", "attention_bias", False),
        LatentRope(),
    ),
    parts={
        "q_down": "self_attn.q_a_proj",
        "q_norm": "self_attn.q_a_layernorm",
        "q": "self_attn.q_b_proj",
        "kv_down": "self_attn.kv_a_proj_with_mqa",
        "kv_norm": "self_attn.kv_a_layernorm",
        "kv_up": "self_attn.kv_b_proj",
        "out": "self_attn.o_proj",
    },
    residual={"norm": "input_layernorm"},
    none={
        "head_dim": lambda options, config: config.width // options.heads,
        "rope_dim": lambda options, config: options.head_dim or config.width // options.heads,
        "value_dim": lambda options, config: options.head_dim or config.width // options.heads,
        "kv_rank": lambda options, config: max(1, config.width // 4),
        "scale": lambda options, config: (
            (
                (plain := options.head_dim or config.width // options.heads)
                + (options.rope_dim or plain)
            )
            ** -0.5
        ),
    },
)
# with and without a latent for the queries
ROLES = {
    "latent": LATENT.having(Entry("q_rank", "q_lora_rank", 1536, told=True, null=True)),
    "direct": LATENT.having(Fixed(q_rank=None), q="self_attn.q_proj"),
}
SPARSE = replace(
    LATENT,
    layer="sparse_attention",
    parts={
        **{f"latent.{part}": name for part, name in LATENT.parts.items()},
        "indexer.q": "self_attn.indexer.wq_b",
        "indexer.k": "self_attn.indexer.wk",
        "indexer.norm": "self_attn.indexer.k_norm",
        "indexer.shares": "self_attn.indexer.weights_proj",
    },
    none={
        **LATENT.none,
        "index_dim": lambda options, config: (
            options.rope_dim or LATENT.none["rope_dim"](options, config)
        ),
    },
    training=("index_loss",),
).having(
    Entry("q_rank", "q_lora_rank", 1536, told=True),
    Entry("keys", "index_topk", 2048),
    Entry("index_heads", "index_n_heads", 64),
    Entry("index_dim", "index_head_dim", 128),
    Fixed(index_loss=0.0),  # the class does not train its indexer
)
ROUTED = EXPERTS.having(
    Entry("experts", "n_routed_experts"),
    Entry("expert_width", "moe_intermediate_size"),
    Entry("routed_scale", "routed_scaling_factor", 1.0),
    Fixed(balance_loss=0.0, z_loss=0.0),
    **{
        f"shared.{part}": name.replace("mlp.", "mlp.shared_experts.")
        for part, name in MLP.parts.items()
    },
)
V3 = ROUTED.having(
    Entry("shared_experts", "n_shared_experts", 1),
    Entry("routed_scale", "routed_scaling_factor", 2.5),
    Entry("groups", "n_group", 8),
    Entry("groups_per_token", "topk_group", 4),
    Fixed(router="sigmoid_bias"),
    bias="mlp.gate.e_score_correction_bias",
)
V2 = ROUTED.having(
    Entry("shared_experts", "n_shared_experts", 2),
    Entry("bias", "mlp_bias", False),
    Groups(),
    Fixed(router="softmax"),
)
V3_ONLY = {
    "norm_topk_prob": True, "rope_interleave": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
}  # fmt: skip
IDLE = (
    "moe_layer_freq", "ep_size", "num_mtp_layers", "num_nextn_predict_layers", "aux_loss_alpha", "seq_aux", "head_dim",
    "qk_head_dim",
)  # fmt: skip


class Queries:
    """Whether queries have a latent: in every block, unless q_lora_rank is null."""

    roles = ("latent", "direct")
    names: tuple[str, ...] = ()

    def read(self, entries: Entries, count: int) -> list[str]:
        none = "q_lora_rank" in entries.told and entries.get("q_lora_rank") is None
        return ["direct" if none else "latent"] * count

    def write(self, roles: list[str]) -> dict[str, object]:
        return {"q_lora_rank": None}  # if there is a rank, the role writes it


FAMILIES = {
    "deepseek_v2": Family(
        "DeepseekV2ForCausalLM",
        FIELDS,
        {**ROLES, "dense": MLP.having(Entry("bias", "mlp_bias", False)), "experts": V2},
        (Queries(), Leading("first_k_dense_replace", "dense", "experts", 0)),
        idle=(*IDLE, "norm_topk_prob", "scoring_func"),
        aliases={"num_experts": "n_routed_experts"},
        **DECODER,
    ),
    "deepseek_v3": Family(
        "DeepseekV3ForCausalLM",
        FIELDS,
        {**ROLES, "dense": MLP, "experts": V3},
        (Queries(), Leading("first_k_dense_replace", "dense", "experts", 3)),
        only=V3_ONLY,
        more_blocks=True,
        idle=IDLE,
        aliases={"num_local_experts": "n_routed_experts"},
        **DECODER,
    ),
    "deepseek_v32": Family(
        "DeepseekV32ForCausalLM",
        FIELDS,
        {"sparse": SPARSE, "dense": MLP, "experts": V3},
        (
            Kinds({"sparse": "indexed_attention"}, Always("sparse").read),
            Kinds(
                {"dense": "dense", "experts": "sparse"},
                Leading("first_k_dense_replace", "dense", "experts", 3).read,
                ("first_k_dense_replace",),
                "mlp_layer_types",
            ),
        ),
        only=V3_ONLY,
        more_blocks=True,
        idle=(*IDLE, "mlp_bias"),
        aliases={"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"},
        **DECODER,
    ),
}
