"""Kimi Linear, arXiv:2510.26692: the delta rule with a decay for each channel, and latent attention without positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minimodels.errors import InputError
from minimodels.published.deepseek import LATENT, V3
from minimodels.published.deltanet import DELTA
from minimodels.published.entries import Entries, Entry, Fixed
from minimodels.published.family import Family
from minimodels.published.llama import DECODER, FIELDS, MLP
from minimodels.published.mappings import Apart, Shaped
from minimodels.published.places import Kinds, Leading, listed

NESTED = "linear_attn_config"


def nested(entries: Entries) -> dict[str, Any]:
    """The object in which published files describe the delta rule, or {}."""
    told = entries.get(NESTED, {})
    if type(told) is not dict:
        raise InputError(f"config.json {NESTED}", told, "a JSON object")
    return told


@dataclass(frozen=True)
class Nested:
    """An option whose entry may be in that object instead, which has priority."""

    option: str
    name: str
    key: str
    absent: int

    @property
    def options(self) -> tuple[str, ...]:
        return (self.option,)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, NESTED)

    def read(self, entries: Entries) -> dict[str, object]:
        return {self.option: nested(entries).get(self.key, entries.get(self.name, self.absent))}

    def write(self, values: dict[str, Any]) -> dict[str, object]:
        return {self.name: values[self.option]}

    def fits(self, values: dict[str, Any]) -> bool:
        return True


class Mixers:
    """The delta rule or attention, whose queries have a latent unless q_lora_rank is null. The object numbers the blocks
    from 1. If nothing is listed, every fourth block has attention, from the fifth on."""

    roles = ("linear", "latent", "direct")
    names = ("layer_types", NESTED)

    def read(self, entries: Entries, count: int) -> list[str]:
        full = "direct" if entries.get("q_lora_rank") is None else "latent"
        kinds, told = entries.get("layer_types"), nested(entries)
        if kinds is not None:
            known = {"linear_attention": "linear", "full_attention": full}
            return listed(kinds, count, known)
        numbers = told.get("kda_layers"), told.get("full_attn_layers")
        if None in numbers:
            return [full if i and i % 4 == 0 else "linear" for i in range(count)]
        accepted = f"lists kda_layers and full_attn_layers with each number from 1 to {count} once"
        if any(type(each) is not list for each in numbers):
            raise InputError(f"config.json {NESTED}", told, accepted)
        linear, attention = numbers
        if sorted(map(str, linear + attention)) != sorted(map(str, range(1, count + 1))):
            raise InputError(f"config.json {NESTED}", told, accepted)
        return [full if i + 1 in attention else "linear" for i in range(count)]

    def write(self, roles: list[str]) -> dict[str, object]:
        kinds = ["linear_attention" if role == "linear" else "full_attention" for role in roles]
        return {"layer_types": kinds, "q_lora_rank": None}  # if there is a rank, the role writes it


KDA = DELTA.having(
    Nested("heads", "linear_num_heads", "num_heads", 32),
    Nested("head_dim", "linear_head_dim", "head_dim", 128),
    Nested("conv_width", "linear_conv_kernel_dim", "short_conv_kernel_size", 4),
    Fixed(
        key_heads=None, value_dim=None, gate="vector", gate_rank="head", beta_max=1,
        output_gate="sigmoid", output_rank="head",
    ),
    **{
        "qkv": Apart("self_attn.*_proj", "qkv"),
        "conv1d": Apart("self_attn.*_conv1d", "qkv"),
        "beta": "self_attn.b_proj",
        "decay.0": "self_attn.f_a_proj",
        "decay.1": "self_attn.f_b_proj",
        "A_log": Shaped("self_attn.A_log", (1, 1, -1, 1)),
        "dt_bias": "self_attn.dt_bias",
        "norm": "self_attn.o_norm",
        "z.0": "self_attn.g_a_proj",
        "z.1": "self_attn.g_b_proj",
        "out": "self_attn.o_proj",
    },
)  # fmt: skip
UNTURNED = LATENT.having(Fixed(rope_base=0.0, rope_scaling=None))
MOE = "block_sparse_moe."
ROUTED = V3.having(
    Entry("experts", "num_experts", 256),
    Entry("experts_per_token", "num_experts_per_token", 8),
    Entry("expert_width", "moe_intermediate_size", 1024),
    Entry("shared_experts", "num_shared_experts", 1),
    Entry("routed_scale", "routed_scaling_factor", 2.446),
    Entry("groups", "num_expert_group", 1),
    Entry("groups_per_token", "topk_group", 1),
    router=MOE + "gate",
    gate=MOE + "experts.*.w1.weight",
    up=MOE + "experts.*.w3.weight",
    out=MOE + "experts.*.w2.weight",
    bias=MOE + "gate.e_score_correction_bias",
    **{
        f"shared.{part}": name.replace("mlp.", MOE + "shared_experts.")
        for part, name in MLP.parts.items()
    },
)

FAMILIES = {
    "kimi_linear": Family(
        "KimiLinearForCausalLM",
        (*FIELDS[:-1], Fixed(tie_embeddings=False)),
        {
            "linear": KDA,
            "latent": UNTURNED.having(Entry("q_rank", "q_lora_rank", None, told=True)),
            "direct": UNTURNED.having(Fixed(q_rank=None), q="self_attn.q_proj"),
            "dense": MLP,
            "experts": ROUTED,
        },
        (
            Mixers(),
            Kinds(
                {"dense": "dense", "experts": "sparse"},
                Leading("first_k_dense_replace", "dense", "experts", 1).read,
                ("first_k_dense_replace",),
                "mlp_layer_types",
            ),
        ),
        only={
            "tie_word_embeddings": False, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
            "use_grouped_topk": True, "mla_use_nope": True,
        },
        more_blocks=True,
        # nothing is rotated
        idle=(
            "rope_theta", "rope_scaling", "rope_parameters", "head_dim", "qk_head_dim", "model_max_length", "moe_layer_freq",
            "num_nextn_predict_layers",
        ),
        aliases={
            "num_local_experts": "num_experts",
            "num_experts_per_tok": "num_experts_per_token",
            "n_shared_experts": "num_shared_experts",
            "n_group": "num_expert_group",
            "norm_topk_prob": "moe_renormalize",
            # the class saves MLPs as if they were experts
            **{
                f"model.layers.{{}}.{name.replace('mlp.', MOE)}.weight": f"model.layers.{{}}.{name}.weight"
                for name in MLP.parts.values()
            },
        },
        **DECODER,
    ),
}  # fmt: skip
