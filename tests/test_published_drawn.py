"""Published models in configurations that nobody chose: every family has a space of entries, from
which hypothesis draws. Three are drawn of each family; MINIMODELS_DRAWN=40 draws 40 others."""

import contextlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, reject, settings
from hypothesis import strategies as st
from mixers import use_torch
from peers import (
    CASES,
    DYNAMIC,
    LINEAR,
    LLAMA3,
    WITH_KERNELS,
    YARN,
    T,
    distance,
    double,
    longrope,
    model_of,
    saved,
    text,
    transformers,
    without_casts_to_single,
)

from minimodels import InputError, from_pretrained, save_pretrained
from minimodels.published.config_json import NEUTRAL, is_idle, read_config
from minimodels.published.families import FAMILIES

from huggingface_hub.errors import StrictDataclassError  # isort: skip
from transformers.models.auto.configuration_auto import CONFIG_MAPPING  # isort: skip

NIGHTLY = "MINIMODELS_DRAWN" in os.environ
DRAWN = int(os.environ.get("MINIMODELS_DRAWN", "3"))  # configurations of each family

Values = (
    list | Callable[[dict], list]
)  # of an entry; a function if they follow from earlier entries


def each_block(*values) -> Callable[[dict], list]:
    """Lists with one of the values for each block, which begin in different ways."""

    def lists(drawn: dict) -> list:
        blocks = drawn["num_hidden_layers"]
        turned = [values[i:] + values[:i] for i in range(len(values))]
        return [None, *([each[i % len(each)] for i in range(blocks)] for each in turned),
                *([value] * blocks for value in values)]  # fmt: skip

    return lists


BOTH = [True, False]
SWA = each_block("sliding_attention", "full_attention")
EPSILON = {"rms_norm_eps": [1e-6, 1e-2]}
TURNED = {"rope_type": "default", "rope_theta": 77.0}


def longropes(drawn: dict) -> list[dict]:
    """longrope for the rotated part of a head."""
    usual = drawn["hidden_size"] // drawn["num_attention_heads"]
    rotated = drawn.get("qk_rope_head_dim") or drawn.get("head_dim") or usual
    fraction = drawn.get("partial_rotary_factor", 1.0)
    return [longrope(int(rotated * fraction) // 2)]


def ropes(drawn: dict) -> list[dict]:
    return [LINEAR, YARN, LLAMA3, TURNED, DYNAMIC, *longropes(drawn)]


STREAM = {
    "hidden_size": [24, 32, 40], "num_hidden_layers": [1, 2, 4], "intermediate_size": [8, 33],
    "tie_word_embeddings": BOTH, **EPSILON,
}  # fmt: skip
GROUPED = {"num_attention_heads": [2, 4], "num_key_value_heads": [1, 2]}
ROPES = {"rope_parameters": ropes}
WHOLE = {**STREAM, **GROUPED, **ROPES}
DECODERS = {"head_dim": [4, 8, 12], **WHOLE}
BIASED = {"attention_bias": BOTH}
BIASED_MLP = {"mlp_bias": BOTH}
WINDOWS = {"sliding_window": [1, 4, 20, 50]}
LISTED = {**WINDOWS, "layer_types": SWA}
SWITCHED = {**LISTED, "use_sliding_window": BOTH, "max_window_layers": [0, 1, 3]}
NESTED = {
    "rope_parameters": [
        {"full_attention": LINEAR, "sliding_attention": {**TURNED, "rope_theta": 9.0}},
        {"full_attention": YARN, "sliding_attention": YARN},
    ]
}
SCALARS = {
    "query_pre_attn_scalar": [5, 256], "attn_logit_softcapping": [None, 3.0], "final_logit_softcapping": [None, 2.0],
    "hidden_size": [16, 36],
}  # fmt: skip
EXPERTS = {"num_experts": [3, 8], "num_experts_per_tok": [2, 3]}
MULTIPLIERS = {
    "embedding_multiplier": [1.0, 7.0], "residual_multiplier": [0.2, 1.0], "logits_scaling": [1.0, 6.0],
    "attention_multiplier": [0.1, 1.0],
}  # fmt: skip
LOCAL_EXPERTS = {"num_local_experts": [3, 8], "num_experts_per_tok": [2, 3]}
SPARSE = {
    "moe_intermediate_size": [8, 20], "decoder_sparse_step": [1, 2, 9], "mlp_only_layers": [[], [1], [0, 2]],
    "norm_topk_prob": BOTH,
}  # fmt: skip
LATENTS = {
    "q_lora_rank": [None, 6], "kv_lora_rank": [4, 10], "qk_nope_head_dim": [2, 8], "qk_rope_head_dim": [2, 6],
    "v_head_dim": [2, 8], "num_attention_heads": [4], "num_key_value_heads": [4], "first_k_dense_replace": [0, 1, 9],
    "moe_intermediate_size": [8, 20],
}  # fmt: skip
DEEPSEEK = {
    **STREAM, **LATENTS, **ROPES, **BIASED, "n_shared_experts": [1, 2], "routed_scaling_factor": [0.5, 2.0],
}  # fmt: skip
MAMBA = {
    "hidden_size": [16, 30], "num_hidden_layers": [1, 3], "state_size": [1, 5], "expand": [1, 2], "conv_kernel": [2, 4],
    "time_step_rank": ["auto", 3], "use_bias": BOTH, "use_conv_bias": BOTH, "tie_word_embeddings": BOTH,
    "layer_norm_epsilon": [1e-6, 1e-2],
}  # fmt: skip
LIMITS = {"time_step_limit": [[0.0, 0.5], [0.1, 2.0], [0.3, float("inf")]]}
SSD = {
    "mamba_n_heads": [2, 8], "mamba_d_state": [3, 8], "mamba_n_groups": [1, 2], "mamba_d_conv": [2, 4],
    "mamba_expand": [1, 3], "mamba_conv_bias": BOTH, "mamba_proj_bias": BOTH, **LIMITS,
    "mamba_d_head": lambda drawn: [drawn.get("mamba_expand", 2) * drawn["hidden_size"] // drawn["mamba_n_heads"], "auto"],
}  # fmt: skip
DELTA = {
    **STREAM, **GROUPED, "num_hidden_layers": [3, 4, 5], "head_dim": [8, 16],
    "layer_types": each_block("linear_attention", "full_attention", "linear_attention"),
    "full_attention_interval": [1, 2, 3], "linear_num_key_heads": [1, 2, 4], "linear_num_value_heads": [4, 8],
    "linear_key_head_dim": [3, 8], "linear_value_head_dim": [4, 7], "linear_conv_kernel_dim": [2, 5],
    "rope_parameters": [LINEAR, {**YARN, "partial_rotary_factor": 0.5}],
}  # fmt: skip
SHARED_EXPERT = {**EXPERTS, "moe_intermediate_size": [8, 20], "shared_expert_intermediate_size": [8, 12]}  # fmt: skip

SPACES: dict[str, dict[str, Values]] = {  # model_type -> entry -> values
    "llama": {**DECODERS, **BIASED, **BIASED_MLP},
    "mistral": {**DECODERS, "sliding_window": [None, 1, 4, 20, 50]},
    "qwen3": {**DECODERS, **BIASED, **SWITCHED},
    "qwen2": {**DECODERS, **SWITCHED},
    "smollm3": {**DECODERS, **BIASED, **BIASED_MLP, **LISTED, "use_sliding_window": BOTH,
                "no_rope_layer_interval": [1, 2, 3], "no_rope_layers": each_block(1, 0, 0)},
    "phi3": {"partial_rotary_factor": [0.5, 1.0], **DECODERS, "head_dim": [8, 16], "sliding_window": [None, 1, 20],
             "rope_parameters": lambda drawn: [TURNED, *longropes(drawn)], "original_max_position_embeddings": [50, 90]},
    "olmo2": {**DECODERS, **BIASED},
    "olmo3": {**DECODERS, **BIASED, **LISTED, **NESTED},
    "granite": {**DECODERS, **BIASED, **BIASED_MLP, **MULTIPLIERS},
    "diffllama": {**DECODERS, **BIASED, "num_key_value_heads": [2]},
    "gemma2": {**DECODERS, **BIASED, **LISTED, **SCALARS},
    "gemma3_text": {**DECODERS, **BIASED, **LISTED, **SCALARS, **NESTED, "sliding_window_pattern": [1, 2, 3]},
    "gpt2": {"n_embd": [16, 24], "n_layer": [1, 3], "n_head": [1, 2, 4], "n_inner": [None, 30], "n_positions": [T, 99],
             "tie_word_embeddings": BOTH, "layer_norm_epsilon": [1e-6, 1e-2]},
    "mixtral": {**DECODERS, **LOCAL_EXPERTS, "sliding_window": [None, 1, 20]},
    "olmoe": {**DECODERS, **BIASED, **EXPERTS, "norm_topk_prob": BOTH},
    "qwen2_moe": {**DECODERS, **EXPERTS, **SWITCHED, **SPARSE, "shared_expert_intermediate_size": [8, 12],
                  "qkv_bias": BOTH},
    "qwen3_moe": {**DECODERS, **BIASED, **EXPERTS, **WINDOWS, **SPARSE, "use_sliding_window": BOTH},
    "gpt_oss": {**DECODERS, **BIASED, **LISTED, **LOCAL_EXPERTS},
    "deepseek_v2": {**DEEPSEEK, **BIASED_MLP, "n_routed_experts": [8], "num_experts_per_tok": [1, 2, 4],
                    "topk_method": ["greedy", "group_limited_greedy"], "n_group": [2, 4], "topk_group": [2]},
    "deepseek_v3": {**DEEPSEEK, "n_routed_experts": [8], "num_experts_per_tok": [2], "n_group": [1, 2, 4],
                    "topk_group": [1]},
    "deepseek_v32": {  # with fewer index_n_heads, scores are equal zeros, of which the class takes any
        **DEEPSEEK, "q_lora_rank": [6], "n_routed_experts": [8], "num_experts_per_tok": [2], "n_group": [1, 2, 4],
        "topk_group": [1], "index_topk": [1, 9, 50], "index_n_heads": [16, 24], "index_head_dim": [6, 8],
        "mlp_layer_types": each_block("dense", "sparse"), "layer_types": each_block("indexed_attention"),
    },
    "mamba": MAMBA,
    "falcon_mamba": {**MAMBA, "mixer_rms_eps": [1e-6, 1e-2]},
    "jamba": {**STREAM, **GROUPED, "hidden_size": [16, 32], "attn_layer_period": [2, 3], "attn_layer_offset": [0, 1],
              "expert_layer_period": [2, 3], "expert_layer_offset": [0, 1], "num_experts": [1, 3],
              "num_experts_per_tok": [1, 2], "mamba_d_state": [3, 8], "mamba_d_conv": [2, 4], "mamba_expand": [1, 2],
              "mamba_dt_rank": ["auto", 2, 5], "mamba_conv_bias": BOTH, "mamba_proj_bias": BOTH},
    "mamba2": {"hidden_size": [16, 32], "num_hidden_layers": [1, 3], "state_size": [1, 5], "n_groups": [1, 2],
               "conv_kernel": [2, 4], "num_heads": [4, 8], "expand": [1, 2], "use_bias": BOTH, "use_conv_bias": BOTH,
               "head_dim": lambda drawn: [drawn.get("expand", 2) * drawn["hidden_size"] // drawn["num_heads"]],
               "chunk_size": [5, 64], "tie_word_embeddings": BOTH, "layer_norm_epsilon": [1e-6, 1e-2], **LIMITS},
    "bamba": {**WHOLE, **BIASED, **BIASED_MLP, **SSD, "hidden_size": [16, 32], "num_hidden_layers": [2, 4],
              "attn_layer_indices": [[0], [1, 2], [1], [0, 1, 2, 3]]},
    "olmo_hybrid": {
        **WHOLE, **BIASED, "layer_types": each_block("linear_attention", "full_attention"),
        "linear_num_key_heads": [1, 2, 4], "linear_key_head_dim": [4, 8], "linear_conv_kernel_dim": [2, 5],
        "linear_num_value_heads": [4], "linear_allow_neg_eigval": BOTH, "num_hidden_layers": [2, 3, 5],
        "linear_value_head_dim": lambda drawn: [drawn["linear_num_key_heads"] * drawn["linear_key_head_dim"] // 4],
    },
    "granitemoehybrid": {
        **WHOLE, **BIASED, **SSD, **LOCAL_EXPERTS, "num_local_experts": [0, 3, 8], "hidden_size": [16, 32],
        "num_hidden_layers": [2, 3], "layer_types": each_block("linear_attention", "full_attention"),
        "position_embedding_type": [None, "rope"], "shared_intermediate_size": [8, 12], **MULTIPLIERS,
    },
    "nanochat": {**DECODERS, **BIASED, "final_logit_softcapping": [None, 2.0]},
    "minimax": {
        **DECODERS, **LOCAL_EXPERTS, "num_hidden_layers": [1, 2, 4], "sliding_window": [None, 4, 50],
        "layer_types": each_block("linear_attention", "full_attention"), "block_size": [5, 64],
        **{f"{kind}_{which}_factor": [0.6, 2] for kind in ("linear_attn", "full_attn", "mlp") for which in ("alpha", "beta")},
    },
    "kimi_linear": {**STREAM, **EPSILON, **BIASED, **LATENTS, "tie_word_embeddings": [False],
                    "linear_num_heads": [1, 4], "linear_head_dim": [3, 8], "linear_conv_kernel_dim": [2, 5],
                    "num_hidden_layers": [2, 5], "layer_types": each_block("linear_attention", "full_attention"),
                    "mlp_layer_types": each_block("dense", "sparse"), "routed_scaling_factor": [0.5, 2.0],
                    "num_experts": [8, 12], "num_experts_per_token": [2, 3], "num_shared_experts": [1, 2],
                    "num_expert_group": [1, 2],
                    "topk_group": lambda drawn: [*range(1, drawn.get("num_expert_group", 1) + 1)]},
    "lfm2": {**{entry: values for entry, values in WHOLE.items() if entry not in EPSILON},
             "num_hidden_layers": [2, 4], "norm_eps": [1e-6, 1e-2], "conv_bias": BOTH,
             "conv_L_cache": [1, 3, 5], "layer_types": each_block("conv", "full_attention"),
             "full_attn_idxs": [[0], [1, 2], [0, 1]], "block_multiple_of": [3, 16], "block_ffn_dim_multiplier": [0.7, 2],
             "block_auto_adjust_ff_dim": BOTH},
    "qwen3_5_text": DELTA,
    "qwen3_5_moe_text": {**DELTA, **SHARED_EXPERT},
    "qwen3_next": {**DELTA, **SHARED_EXPERT, **SPARSE},
}  # fmt: skip


AS_IT_IS = object()


@st.composite
def configurations(draw, name: str) -> dict:
    """A configuration of a family: its first case, with some entries drawn."""
    drawn = dict(CASES[name][0])
    drawn.pop("output_router_logits", None)
    for entry, values in SPACES[name].items():
        values = values(drawn) if callable(values) else values
        chosen = draw(st.sampled_from([*values, AS_IT_IS]))
        if chosen is not AS_IT_IS:
            drawn[entry] = chosen
    return drawn


def test_every_family_has_a_space():
    assert SPACES.keys() == CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", SPACES)
def test_every_entry_of_a_class_is_drawn_or_has_one_value(name):
    """Otherwise some of its models would be tried by nothing."""
    family, shared = FAMILIES[name], {each.name for each in fields(transformers.PretrainedConfig)}
    tried = {family.aliases.get(entry, entry) for entry in (*SPACES[name], *CASES[name][0])}
    passed = {*shared, *family.only, *family.idle, *NEUTRAL, "vocab_size"}
    for each in fields(CONFIG_MAPPING[name]):
        entry = family.aliases.get(each.name, each.name)
        assert entry in tried | passed or is_idle(entry, each.default), entry


# what a class accepts although its parts then disagree, or saves in another form than its publisher:
# OLMo-Hybrid's cuts the weights of a convolution into thirds, even if values are wider than keys;
# Phi-3's computes frequencies for an odd number of dimensions, and then rotates one more;
# it counts the factors of longrope by width / heads, even if there is a head_dim
CONTRADICTIONS = {
    "smollm3": "use_sliding_window",
    "olmo_hybrid": "conv1d.weight",
    "phi3": "an even number of rotated dimensions|because of rope_type longrope",
}
REFUSALS = (  # what classes raise for configurations that they do not accept
    ValueError, RuntimeError, TypeError, KeyError, ZeroDivisionError, AttributeError, StrictDataclassError,
)  # fmt: skip
# about the form of the class's output, not about its numbers
FORM = {
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "use_cache",
}


def another(value: object) -> object:
    """Another value of the same type, or the same if none is known."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value / 2 + 0.1 if isinstance(value, float) else value


@pytest.mark.parametrize("name", SPACES)
def test_an_entry_that_changes_nothing_here_changes_nothing_in_the_class(name, monkeypatch):
    """Every entry is changed in turn. Those at which we read the same model are then changed together."""
    use_torch(monkeypatch, *WITH_KERNELS)
    model, tokens, family = model_of(name, CASES[name][0]), text(), FAMILIES[name]
    entries = model.config.to_dict()
    told, ignored = read_config(entries, family), {}
    del entries["model_type"]
    for entry, value in entries.items():
        changed = {**entries, entry: another(value)}
        with contextlib.suppress(InputError, *REFUSALS):  # by us or by the class
            if changed != entries and read_config(changed, family) == told and entry not in FORM:
                transformers.AutoConfig.for_model(name, **changed)
                ignored[entry] = changed[entry]
    again = model_of(name, {**entries, **ignored})
    again.load_state_dict(dict(model.named_parameters()), strict=False)
    with torch.no_grad():
        assert distance(again(tokens).logits, model(tokens).logits) < 1e-4, ignored


@pytest.mark.parametrize("name", SPACES)
@given(data=st.data())
@settings(
    max_examples=DRAWN,
    derandomize=not NIGHTLY,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
def test_drawn_configurations(name, data):
    """Logits in double precision from their files, and the same model from ours."""
    options, tokens = data.draw(configurations(name)), text()
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        use_torch(patch, *WITH_KERNELS)
        theirs, ours = Path(folder, "a"), Path(folder, "b")
        try:
            model = double(model_of(name, options))
            with torch.no_grad(), without_casts_to_single():
                expected = model(tokens).logits
        except REFUSALS:
            reject()
        try:
            lm = from_pretrained(saved(model, theirs))
        except InputError as error:
            assert name in CONTRADICTIONS, error
            assert re.search(CONTRADICTIONS[name], str(error))
            reject()
        with torch.no_grad():
            logits, _ = lm(tokens)
            assert distance(logits, expected) < 1e-8
            begun, state = lm(tokens[:, :20])
            assert distance(torch.cat((begun, lm(tokens[:, 20:], state)[0]), dim=1), logits) < 1e-8
            save_pretrained(lm, ours)
            again = from_pretrained(ours)
            assert again.config == lm.config
            assert torch.equal(again(tokens)[0], logits)
            back = transformers.AutoModelForCausalLM.from_pretrained(
                ours, dtype=torch.float32, experts_implementation="eager"
            )
            back = double(back)  # the weights are those of single precision
            with without_casts_to_single():
                assert distance(back(tokens).logits, logits) < 1e-8
