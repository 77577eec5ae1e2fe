"""Published models: every family against transformers, an independent implementation, from its
files to ours and back."""

import contextlib
import copy
import json
import os
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from random import Random

import pytest
import torch
from mixers import use_torch
from safetensors.torch import load_file, save_file

from minimodels import LM, Config, InputError, from_pretrained, preset, save_pretrained
from minimodels.grammar import Call, parse_call, set_options, write_value
from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.published import __main__ as command
from minimodels.published.families import FAMILIES
from minimodels.published.mappings import Offset
from minimodels.published.text import write_layers
from minimodels.sample import Sampling, generate
from minimodels.training import checkpoint
from minimodels.training.optim import adamw

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="the proof against transformers needs transformers >= 5"
)
from huggingface_hub.errors import StrictDataclassError  # noqa: E402
from transformers.models.kimi_linear import modeling_kimi_linear  # noqa: E402
from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: E402
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, T = 67, 37


@pytest.fixture(autouse=True)
def peers_in_torch(monkeypatch):
    """The package of kernels, if it is installed, wants a GPU."""
    use_torch(
        monkeypatch,
        modeling_qwen3_5,
        modeling_qwen3_5_moe,
        modeling_qwen3_next,
        modeling_kimi_linear,
    )


SIZE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
SQUARE = {**HEADS, "hidden_size": 36, "head_dim": 8}  # its square root is exact in single precision
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 4.0,
        "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
LATENT = {
    **HEADS, "num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
}  # fmt: skip
INDEXED = {"index_topk": 9, "index_n_heads": 16, "index_head_dim": 6, "n_group": 1, "topk_group": 1}
SSD = {**SIZE, "head_dim": 8, "state_size": 6, "chunk_size": 8}
DELTA = {
    **HEADS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
}  # fmt: skip
HYBRID = {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_chunk_size": 8}
KIMI = {
    **LATENT, "q_lora_rank": None, "linear_num_heads": 3, "linear_head_dim": 6, "num_experts": 6, "num_experts_per_token": 2,
}  # fmt: skip
KIMI.pop("n_routed_experts"), KIMI.pop("num_experts_per_tok")
ROUTED = {
    "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "shared_expert_intermediate_size": 10,
}  # fmt: skip
AUXILIARY = {"output_router_logits": True, "router_aux_loss_coef": 0.3}

CASES = {  # model_type -> options of its configuration class
    "llama": [
        HEADS,
        {**HEADS, "num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {**HEADS, "num_key_value_heads": 1, "rope_parameters": LLAMA3, "head_dim": 10, "num_hidden_layers": 3},
        {**HEADS, "rope_parameters": LINEAR, "rms_norm_eps": 1e-3},
        {**HEADS, "rope_parameters": YARN, "head_dim": 12},
    ],
    "mistral": [
        {**HEADS, "sliding_window": 7},
        {**HEADS, "sliding_window": None, "tie_word_embeddings": True},
        # shorter than the text, and longer than half of it
        {**HEADS, "sliding_window": 30, "head_dim": 6},
    ],
    "qwen3": [
        {**HEADS, "head_dim": 12},
        {**HEADS, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        {**HEADS, "head_dim": 8, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 5,
         "max_window_layers": 1},
    ],
    "qwen2": [
        HEADS,
        {**HEADS, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "tie_word_embeddings": True},
        {**HEADS, "num_key_value_heads": 1, "head_dim": 6, "rope_parameters": YARN},
    ],
    "smollm3": [
        {**HEADS, "num_hidden_layers": 5},
        {**HEADS, "no_rope_layers": [0, 1], "tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        {**HEADS, "no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 5, "num_hidden_layers": 3},
        {**HEADS, "no_rope_layers": [0, 1, 1], "use_sliding_window": True, "sliding_window": 30, "num_hidden_layers": 3,
         "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ],
    "phi3": [
        HEADS,
        {**HEADS, "num_key_value_heads": 4, "sliding_window": 7, "partial_rotary_factor": 0.5, "tie_word_embeddings": True},
        {**HEADS, "num_key_value_heads": 1, "head_dim": 12, "num_hidden_layers": 3},
    ],
    "olmo2": [
        HEADS,
        {**HEADS, "num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True},
        {**HEADS, "rms_norm_eps": 1e-3, "num_hidden_layers": 3, "head_dim": 6, "rope_parameters": LINEAR},
    ],
    "olmo3": [
        {**HEADS, "num_hidden_layers": 5, "sliding_window": 6},
        {**HEADS, "layer_types": ["full_attention", "sliding_attention"], "sliding_window": 30, "attention_bias": True,
         "rope_parameters": {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
        {**HEADS, "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True},
    ],
    "gemma2": [
        {**SQUARE, "sliding_window": 6, "num_hidden_layers": 3},
        {**SQUARE, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7,
         "sliding_window": 5, "attention_bias": True},
        {**SQUARE, "attn_logit_softcapping": 2.0, "final_logit_softcapping": None, "tie_word_embeddings": False,
         "layer_types": ["full_attention"] * 2, "num_key_value_heads": 1},
    ],
    "gemma3_text": [
        {**SQUARE, "sliding_window": 6, "num_hidden_layers": 7},
        {**SQUARE, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 7, "attention_bias": True, "sliding_window": 5,
         "layer_types": ["full_attention", "sliding_attention"], "attn_logit_softcapping": 2.0,
         "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 50.0}}},
    ],
    "granite": [
        {**HEADS, "embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 4.0},
        {**HEADS, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "attention_multiplier": 0.5},
    ],
    "mamba": [
        SIZE,
        {**SIZE, "tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False, "state_size": 5, "conv_kernel": 3},
        {**SIZE, "expand": 3, "time_step_rank": 5, "hidden_size": 30, "num_hidden_layers": 3},
    ],
    "falcon_mamba": [
        SIZE,
        {**SIZE, "tie_word_embeddings": False, "use_bias": True, "mixer_rms_eps": 1e-2, "state_size": 5},
        # as in the published 7B: the second is the one that counts
        {**SIZE, "expand": 16, "intermediate_size": 64},
    ],
    "mixtral": [
        {**HEADS, "num_local_experts": 3, **AUXILIARY},
        {**HEADS, "num_local_experts": 8, "num_experts_per_tok": 3, "sliding_window": 7, "tie_word_embeddings": True},
        {**HEADS, "num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 6, **AUXILIARY},
    ],
    "olmoe": [
        {**HEADS, "num_experts": 6, "num_experts_per_tok": 3, **AUXILIARY},
        {**HEADS, "num_key_value_heads": 4, "num_experts": 4, "num_experts_per_tok": 1, "attention_bias": True},
        {**HEADS, "num_experts": 5, "num_experts_per_tok": 2, "norm_topk_prob": True, "tie_word_embeddings": True},
    ],
    "qwen3_moe": [
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, **AUXILIARY},
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True,
         "head_dim": 12, "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
        {**HEADS, "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "use_sliding_window": True,
         "sliding_window": 6, "tie_word_embeddings": True},
    ],
    "qwen2_moe": [
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
         "shared_expert_intermediate_size": 16, **AUXILIARY},
        {**HEADS, "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "qkv_bias": False,
         "shared_expert_intermediate_size": 20, "num_hidden_layers": 4, "decoder_sparse_step": 2, "tie_word_embeddings": True},
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 3, "moe_intermediate_size": 8, "norm_topk_prob": True,
         "shared_expert_intermediate_size": 8, "num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 6,
         "max_window_layers": 3, "mlp_only_layers": [0]},
    ],
    "gpt_oss": [
        {**HEADS, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6, **AUXILIARY},
        {**HEADS, "head_dim": 12, "num_local_experts": 5, "num_experts_per_tok": 3, "attention_bias": False,
         "tie_word_embeddings": True, "rope_parameters": {"rope_type": "default", "rope_theta": 100.0},
         "layer_types": ["full_attention", "sliding_attention", "full_attention"], "num_hidden_layers": 3},
    ],
    "gpt2": [
        {"vocab_size": V, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 61},
        {"vocab_size": V, "n_embd": 24, "n_layer": 3, "n_head": 2, "n_positions": 40, "n_inner": 40,
         "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ],
    "diffllama": [
        {**HEADS, "num_hidden_layers": 3},
        {**HEADS, "num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "head_dim": 6,
         "rope_parameters": YARN},
    ],
    "deepseek_v2": [
        {**LATENT, "first_k_dense_replace": 1, "num_hidden_layers": 3},
        {**LATENT, "q_lora_rank": None, "attention_bias": True, "mlp_bias": True, "n_shared_experts": 1,
         "routed_scaling_factor": 1.7, "rope_parameters": YARN, "first_k_dense_replace": 1},
        {**LATENT, "tie_word_embeddings": True, "v_head_dim": 14, "num_experts_per_tok": 1, "rope_parameters": LINEAR},
        {**LATENT, "n_routed_experts": 6, "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
         "num_experts_per_tok": 3},
    ],
    "deepseek_v3": [
        {**LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_hidden_layers": 3},
        {**LATENT, "n_group": 1, "topk_group": 1, "q_lora_rank": None, "attention_bias": True, "first_k_dense_replace": 0,
         "n_shared_experts": 2, "rope_parameters": {**YARN, "attention_factor": 1.2}, "tie_word_embeddings": True},
        {**LATENT, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 5, "v_head_dim": 14, "rope_parameters": YARN},
        {**LATENT, "n_group": 4, "topk_group": 2, "n_routed_experts": 12, "num_experts_per_tok": 4,
         "first_k_dense_replace": 1},
    ],
    "deepseek_v32": [
        {**LATENT, **INDEXED, "first_k_dense_replace": 1, "num_hidden_layers": 3},
        {**LATENT, **INDEXED, "index_head_dim": 4, "attention_bias": True, "n_shared_experts": 2, "rope_parameters": YARN,
         "mlp_layer_types": ["sparse", "dense"], "tie_word_embeddings": True},
        {**LATENT, **INDEXED, "index_topk": 50, "n_routed_experts": 12, "n_group": 4, "topk_group": 2, "v_head_dim": 14},
    ],
    "jamba": [
        {**HEADS, "num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 3, **AUXILIARY},
        {**HEADS, "num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 4,
         "num_experts_per_tok": 1, "expert_layer_period": 3, "expert_layer_offset": 2, "mamba_proj_bias": True,
         "mamba_conv_bias": False, "tie_word_embeddings": True, "mamba_d_state": 6},
        {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1},
    ],
    "mamba2": [
        {**SSD, "num_heads": 8, "n_groups": 2},
        {**SSD, "num_heads": 4, "head_dim": 16, "n_groups": 4, "use_bias": True, "use_conv_bias": False,
         "num_hidden_layers": 3},
        {**SSD, "num_heads": 3, "head_dim": 30, "hidden_size": 30, "expand": 3, "n_groups": 1, "conv_kernel": 3,
         "tie_word_embeddings": True, "layer_norm_epsilon": 1e-2},
        {**SSD, "num_heads": 8, "n_groups": 2, "time_step_limit": [0.6, 0.9], "use_cache": False},
        {**SSD, "num_heads": 8, "n_groups": 2, "time_step_limit": [0.6, float("inf")], "use_cache": False},
    ],
    "qwen3_5_moe_text": [
        {**DELTA, **ROUTED, "layer_types": ["linear_attention"] * 2, "num_experts_per_tok": 3, "use_cache": False},
        {**DELTA, **ROUTED, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, **AUXILIARY},
    ],
    "qwen3_next": [
        {**DELTA, **ROUTED, "layer_types": ["linear_attention"] * 2, "num_experts_per_tok": 3, "norm_topk_prob": False,
         "use_cache": False},
        {**DELTA, **ROUTED, "layer_types": ["linear_attention", "full_attention"], "head_dim": 16, **AUXILIARY},
        {**DELTA, **ROUTED, "num_hidden_layers": 5, "head_dim": 8, "norm_topk_prob": False, "decoder_sparse_step": 2,
         "mlp_only_layers": [3], "tie_word_embeddings": True, "linear_num_key_heads": 1, "linear_conv_kernel_dim": 2},
        {**DELTA, **ROUTED, "full_attention_interval": 2, "head_dim": 12, "linear_num_key_heads": 4, "rms_norm_eps": 1e-3,
         "linear_num_value_heads": 8, "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}},
    ],
    "bamba": [
        {**HEADS, **HYBRID, "attn_layer_indices": [1]},
        {**HEADS, **HYBRID, "num_hidden_layers": 3, "attn_layer_indices": [0, 2], "mamba_proj_bias": True, "mamba_n_groups": 2,
         "mamba_conv_bias": False, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
        {**HEADS, **HYBRID, "use_cache": False, "mamba_d_conv": 3, "time_step_limit": [0.6, 0.9]},
        {**HEADS, **HYBRID, "attn_layer_indices": [0], "rms_norm_eps": 1e-3, "rope_parameters": LINEAR, "mamba_n_heads": 8},
    ],
    "kimi_linear": [
        {**KIMI, "layer_types": ["linear_attention"] * 2, "mlp_layer_types": ["dense"] * 2, "use_cache": False},
        {**KIMI, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "mlp_layer_types": ["dense", "sparse", "sparse"]},
        {**KIMI, "num_hidden_layers": 6, "first_k_dense_replace": 5, "q_lora_rank": 10, "attention_bias": True,
         "rms_norm_eps": 1e-3, "num_shared_experts": 2, "num_expert_group": 2, "linear_conv_kernel_dim": 3},
    ],
    "lfm2": [
        {**HEADS, "layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_multiple_of": 4},
        {**HEADS, "full_attn_idxs": [0], "conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False,
         "block_auto_adjust_ff_dim": False, "rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {**HEADS, "layer_types": ["conv"] * 2, "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.3, "norm_eps": 1e-2,
         "use_cache": False},
        {**HEADS, "num_key_value_heads": 4, "block_multiple_of": 1},
    ],
    "qwen3_5_text": [
        {**DELTA, "linear_num_key_heads": 4, "layer_types": ["linear_attention"] * 2, "linear_conv_kernel_dim": 3,
         "tie_word_embeddings": True, "use_cache": False},
        {**DELTA, "head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "num_hidden_layers": 3},
        {**DELTA, "full_attention_interval": 2, "num_hidden_layers": 4, "head_dim": 12, "rms_norm_eps": 1e-3,
         "rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}, "num_key_value_heads": 4},
    ],
}  # fmt: skip
every = pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
)


def theirs(name: str, number: int = 0):
    """One of the models of CASES."""
    return model_of(name, CASES[name][number])


def model_of(name: str, options: dict):
    """A model of the published class, its weights so large that every part has its say."""
    torch.manual_seed(0)
    no_special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options = copy.deepcopy(options)  # some classes write into rope_parameters
    config = transformers.AutoConfig.for_model(name, **options, **no_special)
    config._experts_implementation = "eager"  # the only one that computes in fp64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def double(model):
    """In fp64, except for the rotary frequencies, which are fp32 both here and there."""
    model.double()
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq"):
            buffer.data = buffer.data.float()
    return model


def saved(model, folder):
    model.save_pretrained(folder)
    return folder


def text(batch: int = 2, seed: int = 1) -> torch.Tensor:
    return torch.randint(V, (batch, T), generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def without_casts_to_single():
    """Inside, fp64 stays fp64 in transformers too. Otherwise it computes norms, routers and
    scans in fp32 at any dtype."""
    to, single, softmax, type_of = (
        torch.Tensor.to,
        torch.Tensor.float,
        torch.Tensor.softmax,
        torch.Tensor.type,
    )

    def lifted_to(x, *args, **kwargs):
        if x.dtype == torch.float64 and (
            torch.float32 in args or kwargs.get("dtype") == torch.float32
        ):
            return x
        return to(x, *args, **kwargs)

    def lifted_softmax(x, dim=None, dtype=None):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    def lifted_type(x, dtype=None):
        return x if x.dtype == torch.float64 and dtype == torch.float32 else type_of(x, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lifted_to)
        patch.setattr(torch.Tensor, "type", lifted_type)
        patch.setattr(torch, "sum", lambda x, dim=None, dtype=None: x.sum(dim))
        # it rounds its cosines differently from cos
        patch.setattr(torch, "polar", lambda one, angles: torch.complex(angles.cos(), angles.sin()))
        patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
        patch.setattr(torch.Tensor, "softmax", lifted_softmax)
        yield


def distance(ours, reference) -> float:
    return (ours.double() - reference.double()).abs().max().item()


@every
def test_logits_in_single_and_double_precision(name, number, tmp_path):
    model, tokens = theirs(name, number), text()
    lm = from_pretrained(saved(model, tmp_path / "a"))
    assert lm.embedding.weight.dtype == torch.float32
    with torch.no_grad():
        assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4
        double(model)
        with without_casts_to_single():
            reference = model(tokens).logits
        assert (
            distance(from_pretrained(tmp_path / "a", dtype=torch.float64)(tokens)[0], reference)
            < 1e-9
        )


@every
def test_loss_and_gradient_of_every_parameter(name, number, tmp_path):
    """Their gradients are saved in place of their weights and read by us, so each
    must arrive where ours is."""
    model, tokens = double(theirs(name, number)), text()
    lm = from_pretrained(saved(model, tmp_path / "weights"))
    with without_casts_to_single():
        output = model(tokens, labels=tokens)
        output.loss.backward()
    targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)), dim=1)
    loss, parts = lm.loss(tokens, targets)
    loss.backward()
    balanced = 0.0
    if "output_router_logits" in CASES[name][number]:
        balanced = 0.3 * output.aux_loss.item()
        assert abs(parts["balance"].item() - balanced) < 1e-6  # they count visits in fp32
    assert abs(parts["cross_entropy"].item() - (output.loss.item() - balanced)) < 1e-9
    assert abs(loss.item() - output.loss.item()) < 1e-6
    for parameter in model.parameters():
        parameter.data = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    with pytest.MonkeyPatch.context() as patch:  # the gradient of 1 + w is that of w
        patch.setattr(Offset, "from_file", lambda self, tensor: tensor)
        read = from_pretrained(saved(model, tmp_path / "gradients"))
    expected = dict(read.named_parameters())
    for part, parameter in lm.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert distance(gradient, expected[part]) < 1e-7 * max(
            1, expected[part].abs().max().item()
        ), part


@every
def test_greedy_generation_token_for_token(name, number, tmp_path):
    model, prompt = double(theirs(name, number)), text(1)[:, :11]
    lm = from_pretrained(saved(model, tmp_path / "a"))
    # The one-token path of Mamba-2's class leaves out time_step_limit; ours agrees with its path for whole texts. And a
    # model without attention has no cache in some classes. So theirs computes the whole text again for each token then.
    cached = CASES[name][number].get("use_cache", True)
    with without_casts_to_single():
        expected = model.generate(prompt, max_new_tokens=24, do_sample=False, use_cache=cached)
    expected = expected[0, 11:]
    assert (
        torch.stack(list(generate(lm, [prompt[0]], 24, Sampling(temperature=0))))[:, 0].tolist()
        == expected.tolist()
    )


@every
def test_saved_by_us_and_loaded_by_them(name, number, tmp_path):
    lm, tokens = from_pretrained(saved(theirs(name, number), tmp_path / "a")), text()
    save_pretrained(lm, tmp_path / "b")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(model).__name__ == FAMILIES[name].architecture
    with torch.no_grad():
        assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4
    again = from_pretrained(tmp_path / "b")
    assert again.config == lm.config
    for part, parameter in lm.named_parameters():
        assert torch.equal(parameter, again.get_parameter(part)), part


@torch.no_grad()
def test_decoding_equals_prefill_in_ours_alone_if_index_scores_are_equal(tmp_path):
    """With one head many scores are zero. Which of them `topk` takes depends on how many there are,
    and transformers leaves it at that."""
    options = {**CASES["deepseek_v32"][0], "index_n_heads": 1, "index_topk": 4}
    model, tokens = double(model_of("deepseek_v32", options)), text()
    lm, state, cache = from_pretrained(saved(model, tmp_path / "a")), None, None
    decoded, theirs_decoded = [], []
    for token in tokens.split(1, dim=1):
        logits, state = lm(token, state)
        decoded.append(logits)
        output = model(token, cache=cache, use_cache=True)
        cache = output.cache
        theirs_decoded.append(output.logits)
    assert distance(torch.cat(decoded, 1), lm(tokens)[0]) < 1e-9
    assert distance(torch.cat(theirs_decoded, 1), model(tokens).logits) > 0.1


# Variants of the files.


def test_dtype_and_overrides_are_arguments(tmp_path):
    folder = saved(theirs("mixtral").bfloat16(), tmp_path / "a")
    assert {p.dtype for p in from_pretrained(folder).parameters()} == {torch.bfloat16}
    lm = from_pretrained(
        folder, dtype=torch.float64, set=["moe.balance_loss=0.02"], impl="reference"
    )
    assert {p.dtype for p in lm.parameters()} == {torch.float64}
    assert (lm.layers[1].layer.options.balance_loss, lm.config.impl) == (0.02, "reference")
    assert not any(buffer.any() for buffer in lm.buffers())


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("torch.float16", torch.float16), ("auto", torch.bfloat16)],
)
def test_dtype_as_text(dtype, expected, tmp_path):
    folder = saved(theirs("llama").bfloat16(), tmp_path / "a")
    assert from_pretrained(folder, dtype).embedding.weight.dtype == expected


@pytest.mark.parametrize(
    "wrong", [{"dtype": "int8"}, {"dtype": torch.int8}, {"device": "cuda:99"}, {"device": "abacus"}]
)
def test_a_dtype_or_a_device_that_is_not_there(wrong, tmp_path):
    folder = saved(theirs("llama"), tmp_path / "a")
    with pytest.raises(InputError, match=next(iter(wrong))):
        from_pretrained(folder, **wrong)


@pytest.mark.parametrize("name", ["llama", "mamba", "mixtral"])
def test_a_model_saved_without_its_head(name, tmp_path):
    """Its tensors lack the prefix. With a tied head, nothing else is missing."""
    model, tokens = theirs(name), text()
    base = saved(model.base_model, tmp_path / "a")
    reconfigure(base, tie_word_embeddings=True)
    model.lm_head.weight.data = model.get_input_embeddings().weight.data
    assert distance(from_pretrained(base)(tokens)[0], model(tokens).logits) < 1e-4
    reconfigure(base, tie_word_embeddings=False)
    with pytest.raises(InputError, match="wrong: lm_head.weight: missing"):
        from_pretrained(base)


def test_a_tied_matrix_stored_as_the_head_alone(tmp_path):
    folder = saved(theirs("llama", 1), tmp_path / "a")
    expected, _ = from_pretrained(folder)(text())
    rewrite(
        folder,
        lambda tensors: tensors | {"lm_head.weight": tensors.pop("model.embed_tokens.weight")},
    )
    assert torch.equal(from_pretrained(folder)(text())[0], expected)


IDLE = {
    "unsloth_version": "2025.1", "unsloth_fixed": True, "_attn_implementation": "sdpa", "_name_or_path": "x",
    "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}, "temperature": 0.6, "top_p": 0.9, "do_sample": True,
    "max_length": 20, "repetition_penalty": 1.0, "partial_rotary_factor": 1.0, "transformers_version": "4.1",
    "torch_dtype": "float32", "output_hidden_states": False, "resid_pdrop": 0.0, "chunk_size_feed_forward": 0,
    "layer_types": ["full_attention"] * 2,
}  # fmt: skip


def test_blocks_that_predict_further_tokens_are_left_out(tmp_path):
    folder = saved(theirs("deepseek_v3"), tmp_path / "a")
    expected, _ = from_pretrained(folder)(text())
    rewrite(folder, lambda tensors: tensors | {"model.layers.3.eh_proj.weight": torch.ones(2, 2)})
    assert torch.equal(from_pretrained(folder)(text())[0], expected)
    rewrite(folder, lambda tensors: tensors | {"model.layers.2.eh_proj.weight": torch.ones(2, 2)})
    with pytest.raises(InputError, match="model.layers.2.eh_proj.weight: surplus"):
        from_pretrained(folder)


def test_entries_that_change_nothing_pass(tmp_path):
    folder = saved(theirs("llama"), tmp_path / "a")
    expected, _ = from_pretrained(folder)(text())
    reconfigure(folder, **IDLE)
    assert torch.equal(from_pretrained(folder)(text())[0], expected)


def test_blocks_from_max_window_layers_on_have_the_window(tmp_path):
    """This applies to a file that does not list layer_types."""
    folder = saved(theirs("qwen3", 2), tmp_path / "a")
    entries = json.loads((folder / "config.json").read_text())
    del entries["layer_types"]
    (folder / "config.json").write_text(json.dumps(entries))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert distance(from_pretrained(folder)(text())[0], model(text()).logits) < 1e-4


def test_a_model_of_bytes_has_a_tokenizer(tmp_path):
    save_pretrained(LM(Config(width=16, layers="attention mlp")), tmp_path / "a")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    written = "é日 x\n"
    assert tokenizer(written)["input_ids"] == list(written.encode())
    assert tokenizer.decode(list(written.encode())) == written


def test_experts_of_four_bits_are_unpacked(tmp_path):
    """They are unpacked as in transformers. Saved again, they have 16 bits."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    folder = saved(theirs("gpt_oss").bfloat16(), tmp_path / "a")
    reconfigure(folder, intermediate_size=64, quantization_config={"quant_method": "mxfp4"})
    wanted = {}

    def pack(tensors):
        for name in [name for name in tensors if name.endswith(("up_proj", "down_proj"))]:
            del tensors[name]
            outputs, inputs = (128, 32) if "gate_up" in name else (32, 64)
            blocks = torch.randint(256, (4, outputs, inputs // 32, 16), dtype=torch.uint8)
            scales = torch.randint(120, 130, (4, outputs, inputs // 32), dtype=torch.uint8)
            tensors |= {name + "_blocks": blocks, name + "_scales": scales}
            wanted[name] = convert_moe_packed_tensors(blocks, scales)
        for name in [name for name in tensors if name.endswith("gate_up_proj_bias")]:
            tensors[name] = torch.zeros(4, 128, dtype=torch.bfloat16)
        return tensors

    rewrite(folder, pack)
    lm = from_pretrained(folder)
    assert lm.layers[1].layer.gate.dtype == torch.bfloat16
    save_pretrained(lm, tmp_path / "b")
    stored = load_file(tmp_path / "b" / "model.safetensors")
    assert wanted and all(torch.equal(stored[name], tensor) for name, tensor in wanted.items())
    assert "quantization_config" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_shards_and_their_index(tmp_path):
    model, tokens = theirs("qwen3_moe"), text()
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 2
    lm = from_pretrained(tmp_path / "a")
    assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4
    save_pretrained(lm, tmp_path / "b", shard_bytes=20_000)
    assert len(list((tmp_path / "b").glob("*.safetensors"))) > 2
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b")
    assert distance(lm(tokens)[0], back(tokens).logits) < 1e-4


def test_older_files(tmp_path):
    """The reader understands names that published files once had, and tensors that
    follow from config.json."""
    folder, tokens = saved(theirs("mamba"), tmp_path / "mamba"), text()
    expected, _ = from_pretrained(folder)(tokens)
    rewrite(
        folder,
        lambda tensors: (
            tensors | {"backbone.embedding.weight": tensors.pop("backbone.embeddings.weight")}
        ),
    )
    rewrite(
        folder,
        lambda tensors: tensors | {"lm_head.weight": tensors["backbone.embedding.weight"].clone()},
    )
    assert torch.equal(from_pretrained(folder)(tokens)[0], expected)

    folder = saved(theirs("llama", 2), tmp_path / "llama")
    expected, _ = from_pretrained(folder)(tokens)
    rewrite(
        folder,
        lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)},
    )
    reconfigure(
        folder,
        rope_parameters=None,
        rope_theta=500.0,
        rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"},
    )
    assert torch.equal(from_pretrained(folder)(tokens)[0], expected)


def rewrite(folder, change):
    save_file(
        change(load_file(folder / "model.safetensors")),
        folder / "model.safetensors",
        {"format": "pt"},
    )


def reconfigure(folder, **entries):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def test_what_was_read_is_written_again(tmp_path):
    folder = saved(theirs("llama"), tmp_path / "a")
    reconfigure(folder, eos_token_id=5, max_position_embeddings=99)
    names = (
        "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json", "chat_template.jinja",
        "tokenizer.model", "added_tokens.json",
    )  # fmt: skip
    for name in names:
        (folder / name).write_text(json.dumps({"of": name}))
    save_pretrained(from_pretrained(folder), tmp_path / "new" / "b")
    for name in names:
        assert json.loads((tmp_path / "new" / "b" / name).read_text()) == {"of": name}
    config = json.loads((tmp_path / "new" / "b" / "config.json").read_text())
    assert (config["eos_token_id"], config["max_position_embeddings"]) == (5, 99)
    with pytest.raises(InputError, match="new or empty"):
        save_pretrained(from_pretrained(folder), tmp_path / "a")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["b"]


MADE = [  # layers, other fields -> the family that expresses them
    ("(attention mlp)*2", "llama"),
    ("(attention(window=5) mlp)*2", "mistral"),
    # because Llama's class needs a divisor of 32
    ("(attention(heads=3, head_dim=8) mlp)*2", "mistral"),
    ("(mamba(norm=learned) mlp(width=48) attention(rope_base=0) mlp(width=48))*2", "jamba"),
    ("attention(qk_norm=head) mlp attention(qk_norm=head, window=5) mlp", "qwen3"),
    ("attention(bias=qkv) mlp attention(bias=qkv, window=5) mlp", "qwen2"),
    ("attention mlp attention(rope_base=0) mlp attention(rope_base=0, window=3) mlp", "smollm3"),
    ("(attention(rope_fraction=0.5) mlp)*2", "phi3"),
    ("(differential_attention(version=v1) mlp)*2", "diffllama"),
    ("latent_attention mlp(width=40) latent_attention moe(router=softmax, shared_experts=2)", "deepseek_v2"),
    ("a=sparse_attention(q_rank=8, keys=9, index_heads=16) a mlp(width=40) a"
     " moe(router=sigmoid_bias, shared_experts=1)", "deepseek_v32"),
    ("mamba*3", "mamba"),
    ("mamba(norm=plain)*3", "falcon_mamba"),
    ("mamba2(groups=2)*3", "mamba2"),
    ("mamba2(heads=8, head_dim=8, state_size=4, step_min=0.1)*2", "mamba2"),
    ("mamba2 mlp attention(rope_fraction=0.5) mlp", "bamba"),
    ("delta=deltanet(gate=scalar, output_gate=silu) delta mlp attention(qk_norm=head, gate=full, rope_fraction=0.5)"
     " moe(shared_experts=1, shared_width=24, shared_gate=true)", "qwen3_next"),
    ("short_convolution mlp(width=40) attention(qk_norm=head) mlp(width=40)", "lfm2"),
    ("delta=deltanet(gate=scalar, output_gate=silu, key_heads=2) (delta mlp)*2"
     " attention(qk_norm=head, gate=full, rope_fraction=0.5) mlp", "qwen3_5_text"),
    ("(attention moe)*2", "mixtral"),
    ("(attention(qk_norm=full) moe(router=softmax))*2", "olmoe"),
    ("(attention(bias=qkv) moe(router=softmax, shared_experts=1, shared_width=24, shared_gate=true))*2", "qwen2_moe"),
    ("a=moe(expert_bias=true, activation=clamped) attention(sink=true) a attention(sink=true, window=3) a",
     "gpt_oss"),
    ("attention(qk_norm=head) mlp attention(qk_norm=head) moe", "qwen3_moe"),
    ("(attention(qk_norm=head, window=5) moe)*2", "qwen3_moe"),
    ("ssm=mamba(norm=learned) dense=mlp(width=48) routed=moe(router=softmax, expert_width=48)"
     " (ssm dense ssm routed attention(rope_base=0) dense)*2", "jamba"),
]  # fmt: skip


GPT2 = "learned_positions(context=50) (attention(rope_base=0, bias=true) mlp(gated=false, activation=gelu, bias=true))*2"
MADE_WITH = [
    ("(attention(qk_norm=full) mlp)*2", {"residual": "post_norm"}, "olmo2"),
    ("(attention mlp)*2", {"residual_scale": 0.3, "logit_scale": 0.7}, "granite"),
    ("(attention(head_dim=6, softcap=9.0) mlp(activation=gelu))*2",
     {"residual": "sandwich", "embedding_scale": 32**0.5, "logit_softcap": 7.0}, "gemma2"),
    (GPT2, {"norm": "layer"}, "gpt2"),
    ("a=deltanet(gate=vector, output_gate=sigmoid, output_rank=head) b=latent_attention(rope_base=0) c=mlp(width=40)"
     " (a c)*2 b moe(router=sigmoid_bias, shared_experts=1)", {"tie_embeddings": False}, "kimi_linear"),
]  # fmt: skip


@pytest.mark.parametrize(("layers", "fields", "family"), MADE_WITH)
def test_fields_of_a_model_made_here_are_saved(layers, fields, family, tmp_path):
    torch.manual_seed(0)
    lm, tokens = LM(Config(width=32, vocab=V, layers=layers, **fields)).eval(), text()
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    save_pretrained(lm, tmp_path / "a")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.model_type == family
    assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4


def test_a_text_beyond_the_learned_positions_is_refused():
    lm = LM(Config(width=32, vocab=V, layers=GPT2, norm="layer")).eval()
    tokens = torch.zeros(2, 51, dtype=torch.int64)
    with pytest.raises(InputError, match="at most 50 tokens"):
        lm(tokens)
    _, state = lm(tokens[:, :50])
    with pytest.raises(InputError, match="at most 50 tokens"):
        lm(tokens[:, :1], state)
    with pytest.raises(InputError, match="at most 50 tokens"):
        lm(tokens, positions=torch.arange(51).expand(2, -1))


@pytest.mark.parametrize(("layers", "family"), MADE)
def test_a_model_made_here_is_saved_as_the_family_that_it_is(layers, family, tmp_path):
    torch.manual_seed(0)
    lm, tokens = LM(Config(width=32, vocab=V, layers=layers)).eval(), text()
    save_pretrained(lm, tmp_path / "a")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.model_type == family
    assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4
    assert (model.generation_config.eos_token_id, model.config.bos_token_id) == (None, None)


# what changes a model of some family -> another value; LAYER.OPTION or a field of Config
OTHERWISE = {
    "norm_eps": 0.1, "tie_embeddings": False, "attention.heads": 2, "attention.kv_heads": 2, "attention.head_dim": 4,
    "attention.rope_base": 50.0, "attention.rope_scaling": "linear(factor=2)", "attention.qk_norm": "full",
    "attention.bias": True, "attention.window": 3, "mlp.width": 24, "mlp.bias": True, "mamba.expand": 3,
    "mamba.state_size": 4, "mamba.conv_width": 3, "mamba.rank": 3, "mamba.conv_bias": False, "mamba.bias": True,
    "mamba.norm": "plain", "mamba.norm_eps": 0.1, "moe.experts": 5, "moe.experts_per_token": 3, "moe.expert_width": 24,
    "moe.shared_experts": 1, "moe.router": "sigmoid_bias", "moe.routed_scale": 2.0, "moe.expert_bias": True,
    "moe.activation": "gelu", "attention.rope_fraction": 0.5, "attention.scale": 0.3, "attention.softcap": 5.0,
    "attention.sink": True, "attention.gate": "head", "mlp.activation": "gelu", "residual": "sandwich", "norm": "layer",
    "mlp.gated": False,
    "mamba2.heads": 8, "mamba2.state_size": 4, "mamba2.groups": 4, "mamba2.expand": 3, "mamba2.conv_width": 3,
    "mamba2.conv_bias": False, "mamba2.bias": True, "mamba2.norm": "norm_gate", "mamba2.norm_eps": 0.1, "mamba2.step_min": 0.5,
    "mamba2.step_max": 0.3, "short_convolution.conv_width": 4, "short_convolution.bias": True, "deltanet.heads": 2,
    "deltanet.key_heads": 4, "deltanet.head_dim": 3, "deltanet.value_dim": 5, "deltanet.gate": "vector",
    "deltanet.gate_bound": 5.0, "deltanet.beta_max": 2, "deltanet.steps": 2, "deltanet.output_gate": "sigmoid",
    "deltanet.output_rank": "head", "deltanet.conv_width": 3, "deltanet.norm_eps": 0.1,
    "embedding_scale": 3.0, "residual_scale": 0.3, "logit_scale": 0.4, "logit_softcap": 2.0,
}  # fmt: skip
BASES = [
    "attention mlp",
    "attention(window=5) moe(expert_width=32)",
    "mamba",
    "mamba(norm=learned) moe(router=softmax, expert_width=32) attention(rope_base=0) mlp(width=32)",
    "mamba2(groups=2, state_size=6)",
    "mamba2(state_size=6) mlp attention(rope_fraction=0.5) mlp",
    "short_convolution mlp(width=40) attention(qk_norm=head) mlp(width=40)",
    "deltanet(gate=scalar, output_gate=silu, key_heads=2) mlp attention(qk_norm=head, gate=full) mlp",
]


@pytest.mark.parametrize(
    ("what", "layers"),
    [
        (what, layers)
        for what in OTHERWISE
        for layers in BASES
        if "." not in what or re.search(rf"\b{what.split('.')[0]}\b", layers)
    ],
)
def test_no_option_is_lost(what, layers, tmp_path):
    """Whatever is set, the saved folder either gives the model's logits or is rejected."""
    torch.manual_seed(0)
    fields = {"width": 16, "vocab": V, "layers": layers}
    if "." in what:
        fields["layers"] = set_options(layers, [f"{what}={write_value(OTHERWISE[what])}"])
    else:
        fields[what] = OTHERWISE[what]
    lm, tokens = LM(Config(**fields)).eval(), text()
    for parameter in lm.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    try:
        save_pretrained(lm, tmp_path / "a")
    except InputError as error:
        widths = {"mlp.width", "moe.expert_width"}  # which are equal in Jamba
        named = widths if what in widths else {what}
        assert any(f"differs in {name}" in str(error) for name in named), error
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4


@pytest.mark.parametrize("router", ["sigmoid_bias", "expert_choice"])
@pytest.mark.parametrize("qk_norm", ["full", "head"])
def test_a_router_that_no_family_has_is_refused(router, qk_norm, tmp_path):
    lm = LM(Config(width=16, layers=f"attention(qk_norm={qk_norm}) moe(router={router})"))
    family = "olmoe" if qk_norm == "full" else "qwen3_moe"
    with pytest.raises(InputError, match=f"{family} differs in moe.router"):
        save_pretrained(lm, tmp_path / "a")


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        ("qwen3", {"sliding_window": 4, "max_window_layers": 0}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 0}),
        ("qwen3_moe", {"sliding_window": 4}),
        ("qwen3_moe", {"use_sliding_window": True}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mixtral", {}),
    ],
)
def test_a_window_that_is_not_told_is_what_the_class_has(name, entries, tmp_path):
    folder = saved(theirs(name), tmp_path / "a")
    config = json.loads((folder / "config.json").read_text())
    for entry in ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"):
        config.pop(entry, None)
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    class_has = transformers.AutoConfig.from_pretrained(folder)
    windowed = class_has.sliding_window if getattr(class_has, "use_sliding_window", True) else None
    windows = {layer.layer.window for layer in list(from_pretrained(folder).layers)[::2]}
    assert windows == {windowed}


@pytest.mark.parametrize(
    "scaling",
    [
        "linear(factor=4)",
        "llama3(factor=8, high=4, low=1, context=8192)",
        "yarn(factor=3)",
        "yarn(factor=4, context=20, fast=8, slow=2, whole=false, attention_factor=1.1)",
    ],
)
def test_rope_scaling_however_it_is_written(scaling, tmp_path):
    lm, tokens = LM(Config(width=16, layers=f"attention(rope_scaling={scaling}) mlp")), text()
    save_pretrained(lm, tmp_path / "a")
    torch.testing.assert_close(from_pretrained(tmp_path / "a")(tokens)[0], lm(tokens)[0])


def test_a_loaded_model_trains_like_one_made_here(tmp_path):
    """The layer knows what does not decay, not the tensor, because loading and
    copying replace tensors."""
    lm = from_pretrained(saved(theirs("mamba"), tmp_path / "a"))
    for model in (lm, copy.deepcopy(lm)):
        decayed = {id(parameter) for parameter in adamw(model, 1e-3, 0.1).param_groups[0]["params"]}
        names = {
            name.rpartition(".")[2]
            for name, parameter in model.named_parameters()
            if id(parameter) in decayed
        }
        assert names == {"weight"}


@pytest.mark.parametrize("path", ["file/model", "link"])
def test_a_folder_that_cannot_be_written_is_refused(path, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with pytest.raises(InputError, match="path: "):
        save_pretrained(LM(Config(width=16, layers="attention mlp")), tmp_path / path)


def test_what_no_family_expresses_says_why(tmp_path):
    for model in ("mod", "hybrid"):
        with pytest.raises(InputError, match="llama differs in layers.*jamba differs in"):
            save_pretrained(LM(preset(model)), tmp_path / model)
        assert not any(tmp_path.iterdir())


# Bad input.


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("llama", {"model_type": "bert"}, "model_type: 'bert' .* llama, mistral, qwen3, qwen2"),
        ("llama", {"model_type": ["llama"]}, "model_type"),
        ("mamba", {"model_type": None, "d_model": 32, "n_layer": 2}, "mamba-130m-hf"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act: 'gelu' .* 'silu'"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"auto_map": {"AutoModel": "code.Model"}}, "auto_map"),
        ("llama", {"attention_dropout": 0.1}, "attention_dropout: 0.1"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' .* default, linear"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_parameters factor: '2'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -2}}, "rope_parameters factor: -2"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling: .* what rope_parameters says"),
        ("llama", {"rope_parameters": None, "rope_theta": "many"}, "rope_theta: 'many'"),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"use_magic": True}, "use_magic"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"hidden_size": "wide"}, "hidden_size: 'wide'"),
        ("llama", {"vocab_size": 0}, "vocab_size: 0"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, "num_attention_heads: 5"),
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads: 3"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention"]}, "layer_types"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_window"),
        ("mistral", {"sliding_window": "8"}, "sliding_window"),
        # the class knows none of these
        ("mistral", {"use_sliding_window": False}, "use_sliding_window"),
        ("mixtral", {"use_sliding_window": False}, "use_sliding_window"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv: 8.0"),
        ("mixtral", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
        ("mixtral", {"num_experts_per_tok": 9}, "num_experts_per_tok: 9"),
        ("qwen3_moe", {"mlp_only_layers": [0.5]}, "mlp_only_layers"),
        ("jamba", {"attn_layer_offset": 7}, "attn_layer_offset: 7"),
        ("mamba", {"hidden_act": "relu"}, "hidden_act"),
        ("mamba", {"intermediate_size": 65}, "intermediate_size: 65 .* multiple of hidden_size 32"),
        ("mamba", {"intermediate_size": 0}, "intermediate_size: 0"),
        ("olmoe", {"norm_topk_prob": "sigmoid_bias"}, "norm_topk_prob: 'sigmoid_bias' .* true or false"),
        ("llama", {"rope_parameters": {"rope_type": ["default"]}}, "rope_type"),
        ("llama", {"vocab_size": 10**30}, "vocab_size"),
        ("llama", {"model_type": "glm_moe_dsa"}, "'glm_moe_dsa' .* keys of their own"),
        ("llama", {"model_type": "minimax"}, "'minimax' .* MiniMax adds to what the norm gives"),
        ("llama", {"model_type": "olmo_hybrid"}, "'olmo_hybrid' .* before the delta rule but behind attention"),
        ("mamba2", {"time_step_limit": [0.1]}, "time_step_limit"),
        ("mamba2", {"time_step_limit": [0.1, "many"]}, "time_step_limit"),
        ("mamba2", {"time_step_limit": [0.5, 0.1]}, "time_step_limit: 0.1 .* at least step_min"),
        ("mamba2", {"head_dim": 9}, "num_heads: 8 .* hidden_size is 64"),
        ("mamba2", {"n_groups": 3}, "n_groups: 3"),
        ("bamba", {"attn_layer_indices": ["1"]}, "attn_layer_indices"),
        ("bamba", {"z_loss_coefficient": 0.1}, "z_loss_coefficient"),
        ("lfm2", {"layer_types": ["conv", "conv", "convolution"]}, "layer_types"),
        ("lfm2", {"layer_types": None, "full_attn_idxs": "all"}, "full_attn_idxs"),
        ("lfm2", {"block_ffn_dim_multiplier": -1}, "block_ffn_dim_multiplier: -1"),
        ("lfm2", {"block_use_swiglu": False}, "block_use_swiglu"),
        ("qwen3_5_text", {"attention_bias": True}, "attention_bias"),
        ("qwen3_5_text", {"linear_num_key_heads": 3}, "linear_num_key_heads: 3"),
        ("kimi_linear", {"tie_word_embeddings": True}, "tie_word_embeddings"),
        ("kimi_linear", {"moe_renormalize": False}, "moe_renormalize"),
        ("kimi_linear", {"mlp_layer_types": ["dense", "routed"]}, "mlp_layer_types"),
        ("kimi_linear", {"linear_attn_config": [1]}, "linear_attn_config"),
    ],
)  # fmt: skip
def test_config_that_is_not_implemented_is_refused_by_name(name, entries, message, tmp_path):
    folder = saved(theirs(name), tmp_path / "a")
    reconfigure(folder, **entries)
    with pytest.raises(InputError, match=message):
        from_pretrained(folder)


def test_unknown_entries_can_be_ignored_by_name(tmp_path):
    folder = saved(theirs("llama"), tmp_path / "a")
    reconfigure(folder, use_magic=True, more_magic=3)
    with pytest.raises(InputError, match="use_magic.*more_magic"):
        from_pretrained(folder)
    lm = from_pretrained(folder, ignore=("use_magic", "more_magic"))
    save_pretrained(lm, tmp_path / "b")
    assert "use_magic" not in (tmp_path / "b" / "config.json").read_text()
    with pytest.raises(InputError, match="overrides: 'colour'"):
        from_pretrained(folder, ignore=("use_magic", "more_magic"), colour=1)


def test_wrong_tensors_are_listed_all_at_once(tmp_path):
    folder = saved(theirs("mixtral"), tmp_path / "a")
    wrong = "model.layers.1.block_sparse_moe.experts.2.w3.weight"

    def spoil(tensors):
        tensors["extra"] = torch.ones(1)
        tensors[wrong] = torch.ones(2, 3)
        tensors["model.norm.weight"] = torch.ones(32, dtype=torch.int8)
        del tensors["lm_head.weight"]
        return tensors

    rewrite(folder, spoil)
    with pytest.raises(InputError) as caught:
        from_pretrained(folder)
    listed = (
        f"{wrong}: \\[2, 3\\] for \\[40, 32\\]",
        "extra: surplus",
        "lm_head.weight: missing",
        "model.norm.weight: I8 for",
    )
    for problem in listed:
        caught.match(problem)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    folder = saved(theirs("llama"), tmp_path / "a")
    reconfigure(folder, tie_word_embeddings=True)
    with pytest.raises(InputError, match="lm_head.weight is not model.embed_tokens.weight"):
        from_pretrained(folder)


def test_damaged_and_missing_files(tmp_path):
    folder = saved(theirs("llama"), tmp_path / "a")
    weights, config = folder / "model.safetensors", folder / "config.json"
    whole, described = weights.read_bytes(), config.read_text()
    for damaged in (whole[: len(whole) // 2], whole[:5], b"", b"\xff" * 100, b"\x80\x04pickle"):
        weights.write_bytes(damaged)
        with pytest.raises(InputError, match="safetensors"):
            from_pretrained(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="pickled weights are not read"):
        from_pretrained(folder)
    for index in ({"weight_map": {"a": "../a/model.safetensors"}}, {"weight_map": {"a": 1}}, {}):
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InputError, match="weight_map"):
            from_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "gone.safetensors"}})
    )
    with pytest.raises(InputError, match="gone.safetensors"):
        from_pretrained(folder)
    for damaged in (described[:50], "[]", "[" * 100_000, ""):
        config.write_text(damaged)
        with pytest.raises(InputError, match="config.json"):
            from_pretrained(folder)
    config.unlink()
    with pytest.raises(InputError, match="config.json"):
        from_pretrained(folder)


@pytest.mark.parametrize("name", ["no/such/folder", "./nothing", "", "a b", "../x"])
def test_neither_folder_nor_id(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(InputError, match="path_or_id"):
        from_pretrained(name)


def test_an_id_is_fetched_from_the_hub(tmp_path, monkeypatch):
    """If the hub answers with an error, one line reports it."""
    huggingface_hub = pytest.importorskip(
        "huggingface_hub", reason="ids of the hub need the extra `hub`"
    )
    folder = saved(theirs("llama"), tmp_path / "a")
    asked = {}

    def download(name, revision, allow_patterns, ignore_patterns):
        asked.update(name=name, revision=revision, patterns=allow_patterns)
        asked.update(ignored=ignore_patterns)
        if name != "someone/llama":
            raise OSError("no such model\nat all")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    from_pretrained("someone/llama", revision="v1")
    assert (asked["name"], asked["revision"]) == ("someone/llama", "v1")
    wanted = [
        "config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "tokenizer.model",
    ]
    others = ["consolidated.safetensors", "adapter_model.safetensors", "onnx/config.json", "pytorch_model.bin", "code.py",
              "original/model.safetensors"]  # fmt: skip
    fetched = huggingface_hub.utils.filter_repo_objects(
        wanted + others, allow_patterns=asked["patterns"], ignore_patterns=asked["ignored"]
    )
    assert list(fetched) == wanted
    with pytest.raises(InputError, match=r"someone/other.*\(no such model\)"):
        from_pretrained("someone/other")


MEMORY = """
import sys, threading, time, torch
from pathlib import Path
from minimodels import LM, Config, from_pretrained

def anonymous():
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

with torch.device("meta"):
    LM(Config())  # what PyTorch imports for this stays
before, peak, done = anonymous(), 0, False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.001)
watcher = threading.Thread(target=watch); watcher.start()
model = from_pretrained(sys.argv[1]); done = True; watcher.join()
print((peak - before) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_loading_never_holds_two_copies(tmp_path):
    save_pretrained(
        LM(Config(width=512, layers="(attention mlp)*12", vocab=20_000)), tmp_path / "a"
    )
    run = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "a")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(run.stdout) < 1.3


def test_a_rotation_told_the_older_way(tmp_path):
    """ "type" instead of "rope_type", and llama3's original length from
    max_position_embeddings, as in transformers."""
    folder, tokens = saved(theirs("llama", 3), tmp_path / "a"), text()
    expected, _ = from_pretrained(folder)(tokens)
    reconfigure(
        folder,
        rope_parameters=None,
        rope_theta=10000.0,
        rope_scaling={"type": "linear", "factor": 4.0},
    )
    assert torch.equal(from_pretrained(folder)(tokens)[0], expected)
    folder = saved(theirs("llama", 2), tmp_path / "b")
    expected, _ = from_pretrained(folder)(tokens)
    told = {
        name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"
    }
    reconfigure(
        folder,
        rope_parameters={**told, "rope_theta": 500.0},
        rope_theta=7.0,
        max_position_embeddings=24,
    )
    assert torch.equal(from_pretrained(folder)(tokens)[0], expected)


def test_a_run_is_published_with_its_weights(tmp_path):
    torch.manual_seed(0)
    lm, tokens = LM(Config(width=16, layers="attention(heads=2) mlp", vocab=V)), text()
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", lm, adamw(lm, 1e-3, 0.1), {"step": 1})
    checkpoint.save_options(tmp_path / "run", {"config": asdict(lm.config)})
    command.main(command.Options(tmp_path / "run", tmp_path / "a"))
    read = from_pretrained(tmp_path / "a")
    assert torch.equal(read(tokens)[0], lm(tokens)[0])
    assert not read.training


def test_kimi_linear_as_it_is_published(tmp_path):
    """The delta rule described by an object of its own, whose numbers of blocks begin with 1."""
    folder, tokens = saved(theirs("kimi_linear", 1), tmp_path / "a"), text()
    expected, _ = from_pretrained(folder)(tokens)
    entries = json.loads((folder / "config.json").read_text())
    for entry in ("layer_types", "mlp_layer_types"):
        del entries[entry]
    told = {name: entries.pop(f"linear_{name}") for name in ("num_heads", "head_dim")}
    told |= {"short_conv_kernel_size": entries.pop("linear_conv_kernel_dim")}
    told |= {"kda_layers": [1, 3], "full_attn_layers": [2]}
    published = {**entries, "first_k_dense_replace": 1, "linear_attn_config": told}
    (folder / "config.json").write_text(json.dumps(published))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    lm = from_pretrained(folder)
    assert torch.equal(lm(tokens)[0], expected)
    assert distance(expected, model(tokens).logits) < 1e-4
    save_pretrained(lm, tmp_path / "b")
    assert "linear_attn_config" not in (tmp_path / "b" / "config.json").read_text()
    assert torch.equal(from_pretrained(tmp_path / "b")(tokens)[0], expected)
    for wrong in (
        {"kda_layers": [1], "full_attn_layers": [2]},
        {"kda_layers": 3, "full_attn_layers": [2]},
    ):
        reconfigure(folder, linear_attn_config={**told, **wrong})
        with pytest.raises(InputError, match="linear_attn_config.*from 1 to 3"):
            from_pretrained(folder)


def test_sections_of_angles_change_nothing_in_a_text(tmp_path):
    folder, tokens = saved(theirs("qwen3_5_text", 1), tmp_path / "a"), text()
    expected, _ = from_pretrained(folder)(tokens)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    reconfigure(
        folder, rope_parameters={**rope, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
    )
    assert torch.equal(from_pretrained(folder)(tokens)[0], expected)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert distance(expected, model(tokens).logits) < 1e-4


def test_the_index_tells_the_bytes(tmp_path):
    save_pretrained(
        LM(Config(width=16, layers="attention(heads=2) mlp")), tmp_path / "a", shard_bytes=20_000
    )
    told = json.loads((tmp_path / "a/model.safetensors.index.json").read_text())["metadata"][
        "total_size"
    ]
    files = list((tmp_path / "a").glob("*.safetensors"))
    sizes = [sum(tensor.nbytes for tensor in load_file(file).values()) for file in files]
    assert told == sum(sizes) and max(sizes) <= 20_000 and len(sizes) > 1


def test_the_weight_of_the_balance_is_written(tmp_path):
    save_pretrained(
        LM(Config(width=16, layers="attention moe(balance=pooled, balance_loss=0.3)")),
        tmp_path / "a",
    )
    read = from_pretrained(tmp_path / "a").layers[1].layer.options
    assert (read.balance, read.balance_loss) == ("pooled", 0.3)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("g" * 7, "(attention mlp(width=96))*7"),
        ("l", "attention(window=512) mlp(width=96)"),
        (
            ("l" * 5 + "g") * 2 + "ll",
            "local=attention(window=512) dense=mlp(width=96) full=attention "
            "((local dense)*5 full dense)*2 (local dense)*2",
        ),
    ],
)
def test_many_layers_are_a_short_text(pattern, expected):
    """The text describes the same layers."""
    kinds = {
        "l": ("local", parse_call("attention(window=512)", "")),
        "g": ("full", Call("attention")),
    }
    mlp = ("dense", parse_call("mlp(width=96)", ""))
    layers = [layer for letter in pattern for layer in (kinds[letter], mlp)]
    assert write_layers(layers) == expected
    assert Config(layers=expected).calls == tuple(call for _, call in layers)


# Configurations that nobody chose: for each family a space of entries, from which some are drawn.

DECODERS = {
    "hidden_size": [24, 32, 40], "num_hidden_layers": [1, 2, 4], "num_attention_heads": [2, 4], "num_key_value_heads": [1, 2],
    "head_dim": [4, 8, 12], "intermediate_size": [8, 33], "tie_word_embeddings": [True, False], "rms_norm_eps": [1e-6, 1e-2],
    "rope_parameters": [LINEAR, YARN, LLAMA3, {"rope_type": "default", "rope_theta": 77.0}],
}  # fmt: skip
WHOLE = {entry: values for entry, values in DECODERS.items() if entry != "head_dim"}
BIASED = {"attention_bias": [True, False]}
WINDOWS = {"sliding_window": [1, 4, 20, 50]}
SWITCHED = {**WINDOWS, "use_sliding_window": [True, False], "max_window_layers": [0, 1, 3]}
CHOICE = {"num_experts_per_tok": [1, 2, 3]}
ROTATED = {
    "rope_parameters": [
        {
            "full_attention": LINEAR,
            "sliding_attention": {"rope_type": "default", "rope_theta": 9.0},
        },
        {"full_attention": YARN, "sliding_attention": YARN},
    ]
}
SCALARS = {
    "query_pre_attn_scalar": [5, 256], "attn_logit_softcapping": [None, 3.0], "final_logit_softcapping": [None, 2.0],
    "hidden_size": [16, 36],
}  # fmt: skip
RANKS = {
    "q_lora_rank": [None, 6], "kv_lora_rank": [4, 10], "qk_nope_head_dim": [2, 8], "qk_rope_head_dim": [2, 6],
    "v_head_dim": [2, 8], "num_attention_heads": [4], "num_key_value_heads": [4],
    "first_k_dense_replace": [0, 1, 9], "moe_intermediate_size": [8, 20], "n_shared_experts": [1, 2],
    "routed_scaling_factor": [0.5, 2.0], "n_routed_experts": [8], "num_experts_per_tok": [1, 2, 4],
}  # fmt: skip
SPACES = {  # model_type -> entry -> values
    "llama": {**DECODERS, **BIASED, "mlp_bias": [True, False]},
    "mistral": {**DECODERS, **WINDOWS},
    "qwen3": {**DECODERS, **BIASED, **SWITCHED},
    "qwen2": {**DECODERS, **SWITCHED},
    "smollm3": {**DECODERS, **BIASED, **WINDOWS, "use_sliding_window": [True, False],
                "no_rope_layer_interval": [1, 2, 3], "mlp_bias": [True, False]},
    "phi3": {**DECODERS, **WINDOWS, "rope_parameters": [None], "partial_rotary_factor": [0.5, 1.0], "head_dim": [8, 16]},
    "olmo2": {**DECODERS, **BIASED},
    "olmo3": {**DECODERS, **BIASED, **WINDOWS, **ROTATED},
    "granite": {**DECODERS, **BIASED, "embedding_multiplier": [1.0, 7.0], "residual_multiplier": [0.2, 1.0],
                "logits_scaling": [1.0, 6.0], "attention_multiplier": [0.1, 1.0], "mlp_bias": [True, False]},
    "diffllama": {**DECODERS, **BIASED, "num_key_value_heads": [2]},
    "gemma2": {**DECODERS, **BIASED, **WINDOWS, **SCALARS},
    "gemma3_text": {**DECODERS, **BIASED, **WINDOWS, **SCALARS, **ROTATED},
    "gpt2": {"n_embd": [16, 24], "n_layer": [1, 3], "n_head": [1, 2, 4], "n_inner": [None, 30], "n_positions": [T, 99],
             "tie_word_embeddings": [True, False], "layer_norm_epsilon": [1e-6, 1e-2]},
    "mixtral": {**DECODERS, **CHOICE, **WINDOWS, "num_local_experts": [3, 8], "num_experts_per_tok": [2, 3]},
    "olmoe": {**DECODERS, **BIASED, **CHOICE, "num_experts": [3, 8], "norm_topk_prob": [True, False], "head_dim": [None],
              "num_experts_per_tok": [2, 3]},
    "qwen2_moe": {**DECODERS, **CHOICE, **SWITCHED, "num_experts": [3, 8], "moe_intermediate_size": [8, 20],
                  "decoder_sparse_step": [1, 2, 9], "shared_expert_intermediate_size": [8, 12], "qkv_bias": [True, False]},
    "qwen3_moe": {**DECODERS, **BIASED, **CHOICE, **WINDOWS, "num_experts": [3, 8], "moe_intermediate_size": [8, 20],
                  "decoder_sparse_step": [1, 2, 9], "use_sliding_window": [True, False]},
    "gpt_oss": {**DECODERS, **BIASED, **WINDOWS, "num_local_experts": [3, 8], "num_experts_per_tok": [2, 3]},
    "deepseek_v2": {**WHOLE, **BIASED, **RANKS, "mlp_bias": [True, False], "n_group": [2, 4], "topk_group": [2],
                    "topk_method": ["greedy", "group_limited_greedy"]},
    "deepseek_v3": {**WHOLE, **BIASED, **RANKS, "n_group": [1, 2, 4], "topk_group": [1], "num_experts_per_tok": [2]},
    "mamba": {"hidden_size": [16, 30], "num_hidden_layers": [1, 3], "state_size": [1, 5], "expand": [1, 2],
              "conv_kernel": [2, 4], "time_step_rank": ["auto", 3], "use_bias": [True, False], "use_conv_bias": [True, False]},
}  # fmt: skip
SPACES["falcon_mamba"] = {**SPACES["mamba"], "mixer_rms_eps": [1e-6, 1e-2]}
SPACES["jamba"] = {
    "hidden_size": [16, 32], "num_hidden_layers": [1, 4], "attn_layer_period": [2, 3], "attn_layer_offset": [0, 1],
    "expert_layer_period": [2, 3], "expert_layer_offset": [0, 1], "num_experts": [1, 3], "mamba_d_state": [3, 8],
    "mamba_conv_bias": [True, False], "mamba_proj_bias": [True, False], "tie_word_embeddings": [True, False],
    "num_experts_per_tok": [1, 2], "mamba_expand": [1, 2], "mamba_dt_rank": [2, 5],
}  # fmt: skip
SPACES["mamba2"] = {
    "hidden_size": [16, 32], "num_hidden_layers": [1, 3], "state_size": [1, 5], "n_groups": [1, 2], "conv_kernel": [2, 4],
    "num_heads": [4, 8], "head_dim": [4, 8], "expand": [1, 2], "use_bias": [True, False], "use_conv_bias": [True, False],
    "time_step_limit": [[0.0, 0.5], [0.1, 2.0]], "chunk_size": [5, 64], "tie_word_embeddings": [True, False],
}  # fmt: skip
SPACES["bamba"] = {
    **WHOLE, **BIASED, "hidden_size": [16, 32], "num_hidden_layers": [2, 4], "mlp_bias": [True, False],
    "attn_layer_indices": [[0], [1, 2], [1]],
    "mamba_n_heads": [2, 8], "mamba_d_state": [3, 8], "mamba_n_groups": [1, 2], "mamba_d_conv": [2, 4], "mamba_expand": [1, 3],
    "mamba_conv_bias": [True, False], "mamba_proj_bias": [True, False], "time_step_limit": [[0.0, 0.5], [0.1, 2.0]],
}  # fmt: skip
SPACES["kimi_linear"] = {
    **{entry: values for entry, values in {**WHOLE, **BIASED, **RANKS}.items() if entry not in (
        "rope_parameters", "tie_word_embeddings", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")},
    "linear_num_heads": [1, 4], "linear_head_dim": [3, 8], "linear_conv_kernel_dim": [2, 5], "num_hidden_layers": [5, 6],
    "layer_types": [None], "mlp_layer_types": [None], "num_experts": [8, 12], "num_experts_per_token": [2, 3],
    "num_shared_experts": [1, 2], "num_expert_group": [1, 2],
}  # fmt: skip
SPACES["qwen3_5_text"] = {
    **DECODERS, "head_dim": [8, 16], "layer_types": [None], "full_attention_interval": [1, 2, 3],
    "linear_num_key_heads": [1, 2, 4], "linear_key_head_dim": [3, 8], "linear_value_head_dim": [4, 7],
    "linear_conv_kernel_dim": [2, 5], "num_hidden_layers": [3, 4],
    "rope_parameters": [LINEAR, {**YARN, "partial_rotary_factor": 0.5}],
}  # fmt: skip
MORE = {
    "num_experts": [3, 8],
    "moe_intermediate_size": [8, 20],
    "shared_expert_intermediate_size": [8, 12],
    "num_experts_per_tok": [2, 3],
}
SPACES["qwen3_5_moe_text"] = {**SPACES["qwen3_5_text"], **MORE, "num_hidden_layers": [4, 5]}
SPACES["qwen3_next"] = {
    **SPACES["qwen3_5_moe_text"], "norm_topk_prob": [True, False], "decoder_sparse_step": [1, 2, 9],
    "mlp_only_layers": [[], [1]],
}  # fmt: skip
SPACES["lfm2"] = {
    **{entry: values for entry, values in WHOLE.items() if entry != "rms_norm_eps"},
    "conv_bias": [True, False], "conv_L_cache": [1, 3, 5], "full_attn_idxs": [[0], [1, 2], [0, 1]],
    "block_multiple_of": [3, 16], "block_ffn_dim_multiplier": [0.7, 2], "block_auto_adjust_ff_dim": [True, False],
    "norm_eps": [1e-6, 1e-2], "num_hidden_layers": [2, 4], "layer_types": [None],
}  # fmt: skip
DRAWN = int(os.environ.get("MINIMODELS_DRAWN", "2"))  # configurations of each family


def draw(name: str, seed: int) -> dict:
    """A configuration of a family; what the class itself refuses is drawn again."""
    random = Random(f"{name} {seed}")
    while True:
        drawn = {
            entry: random.choice(values)
            for entry, values in SPACES[name].items()
            if random.random() < 0.7 or "group" in entry or entry == "n_routed_experts"
        }
        try:
            options = {**CASES[name][0], **drawn}
            options.pop("output_router_logits", None)
            model_of(name, options)
        except (
            ValueError,
            RuntimeError,
            TypeError,
            KeyError,
            ZeroDivisionError,
            AttributeError,
            StrictDataclassError,
        ):
            continue
        return options


def test_every_family_has_a_space():
    assert SPACES.keys() == CASES.keys() == FAMILIES.keys()


@pytest.mark.parametrize("seed", range(DRAWN))
@pytest.mark.parametrize("name", SPACES)
def test_drawn_configurations(name, seed, tmp_path):
    """Logits in double precision from their files, and the same model from ours."""
    options, tokens = draw(name, seed), text()
    model = double(model_of(name, options))
    with torch.no_grad(), without_casts_to_single():
        expected = model(tokens).logits
    lm = from_pretrained(saved(model, tmp_path / "a"))
    assert distance(lm(tokens)[0], expected) < 1e-8, options
    save_pretrained(lm, tmp_path / "b")
    again = from_pretrained(tmp_path / "b")
    assert again.config == lm.config, options
    assert torch.equal(again(tokens)[0], lm(tokens)[0]), options
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "b", dtype=torch.float32, experts_implementation="eager"
    )
    assert distance(lm(tokens)[0], back(tokens).logits) < 1e-3, options
