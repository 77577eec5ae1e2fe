"""Models of transformers, an independent implementation: configurations of every published family,
and how to compute with them in double precision."""

import contextlib
import copy

import pytest
import torch

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="the proof against transformers needs transformers >= 5"
)
from transformers.models.kimi_linear import modeling_kimi_linear  # noqa: E402
from transformers.models.olmo_hybrid import modeling_olmo_hybrid  # noqa: E402
from transformers.models.qwen3_5 import modeling_qwen3_5  # noqa: E402
from transformers.models.qwen3_5_moe import modeling_qwen3_5_moe  # noqa: E402
from transformers.models.qwen3_next import modeling_qwen3_next  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

# the kernels of these, if they are installed, need a GPU
WITH_KERNELS = (
    modeling_olmo_hybrid,
    modeling_qwen3_5,
    modeling_qwen3_5_moe,
    modeling_qwen3_next,
    modeling_kimi_linear,
)

V, T = 67, 37


SIZE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
SQUARE = {**HEADS, "hidden_size": 36, "head_dim": 8}  # its square root is exact in single precision
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 24, "beta_fast": 4.0,
        "mscale": 1.0, "mscale_all_dim": 0.7}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}


def longrope(pairs: int) -> dict:
    """Factors for so many pairs."""
    short, long = ([at + 0.2 * pair for pair in range(pairs)] for at in (1.0, 3.0))
    return {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": short, "long_factor": long,
            "original_max_position_embeddings": 60}  # fmt: skip


LATENT = {
    **HEADS, "num_key_value_heads": 4, "q_lora_rank": 10, "kv_lora_rank": 8, "qk_nope_head_dim": 6, "qk_rope_head_dim": 4,
    "v_head_dim": 5, "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
}  # fmt: skip
INDEXED = {"index_topk": 9, "index_n_heads": 16, "index_head_dim": 6, "n_group": 1, "topk_group": 1}
SSD = {**SIZE, "head_dim": 8, "state_size": 6, "chunk_size": 8}
DELTA = {
    **HEADS, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 6, "linear_value_head_dim": 5,
}  # fmt: skip
EVEN_DELTA = {
    **DELTA,
    "linear_num_key_heads": 4,
    "linear_value_head_dim": 6,
}  # the class cuts its weights into thirds
HYBRID = {"mamba_n_heads": 4, "mamba_d_state": 6, "mamba_chunk_size": 8}
KIMI = {
    **LATENT, "q_lora_rank": None, "linear_num_heads": 3, "linear_head_dim": 6, "num_experts": 6, "num_experts_per_token": 2,
}  # fmt: skip
KIMI.pop("n_routed_experts"), KIMI.pop("num_experts_per_tok")
MINIMAX = {"num_local_experts": 3, "block_size": 8}
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
        {**HEADS, "rope_parameters": longrope(2), "partial_rotary_factor": 0.5, "max_position_embeddings": 300,
         "original_max_position_embeddings": 70},
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
        # as in the published 7B: intermediate_size has priority over expand
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
    "olmo_hybrid": [
        {**EVEN_DELTA, "layer_types": ["linear_attention", "full_attention"]},
        {**EVEN_DELTA, "num_hidden_layers": 3, "layer_types": ["full_attention", "linear_attention", "full_attention"],
         "rope_parameters": {"rope_type": "default", "rope_theta": None}, "linear_allow_neg_eigval": False,
         "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-3},
        {**EVEN_DELTA, "num_hidden_layers": 5, "linear_conv_kernel_dim": 3, "rope_parameters": LLAMA3},
    ],
    "granitemoehybrid": [
        {**HEADS, **HYBRID, "num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "num_local_experts": 4, "shared_intermediate_size": 20, **AUXILIARY},
        {**HEADS, **HYBRID, "layer_types": ["full_attention", "linear_attention"], "position_embedding_type": "rope",
         "num_local_experts": 0, "shared_intermediate_size": 24, "attention_bias": True, "embedding_multiplier": 3.0,
         "residual_multiplier": 0.4, "attention_multiplier": 0.2, "logits_scaling": 4.0, "tie_word_embeddings": True},
        {**HEADS, **HYBRID, "use_cache": False, "num_local_experts": 5, "num_experts_per_tok": 3,
         "shared_intermediate_size": 12, "time_step_limit": [0.6, 0.9], "mamba_n_groups": 2, "rms_norm_eps": 1e-3},
    ],
    "nanochat": [
        HEADS,
        {**HEADS, "num_key_value_heads": 4, "attention_bias": True, "tie_word_embeddings": True, "rms_norm_eps": 1e-2,
         "final_logit_softcapping": None},
        {**HEADS, "num_key_value_heads": 1, "final_logit_softcapping": 3.0, "rope_parameters": LLAMA3, "head_dim": 10,
         "num_hidden_layers": 3},
    ],
    "minimax": [
        {**HEADS, **MINIMAX, "layer_types": ["linear_attention", "full_attention"], "use_cache": False},
        {**HEADS, **MINIMAX, "num_hidden_layers": 5, "head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 3,
         "sliding_window": 7, "linear_attn_alpha_factor": 3.5565588200778455, "linear_attn_beta_factor": 0.7,
         "full_attn_alpha_factor": 2, "full_attn_beta_factor": 0.8, "mlp_alpha_factor": 0.5, "mlp_beta_factor": 1.5},
        {**HEADS, **MINIMAX, "num_hidden_layers": 3, "layer_types": ["linear_attention"] * 3, "rms_norm_eps": 1e-3,
         "tie_word_embeddings": True, **AUXILIARY},
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


def theirs(name: str, number: int = 0):
    """One of the models of CASES."""
    return model_of(name, CASES[name][number])


def model_of(name: str, options: dict):
    """A model of the published class, with weights so large that every part matters."""
    torch.manual_seed(0)
    no_special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options = copy.deepcopy(options)  # some classes write into rope_parameters
    config = transformers.AutoConfig.for_model(name, **{**options, **no_special})
    config._experts_implementation = "eager"  # the only one that computes in fp64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def double(model):
    """The model in fp64, except for its rotary frequencies, which are fp32 in ours too."""
    model.double()
    torch.set_default_dtype(torch.float64)
    for module in model.modules():  # MiniMax's decays, which it computes once, in fp32
        if hasattr(module, "decay_factors"):
            module.slope_rate.data = module.get_slope_rate()
            decays = module.decay_factors(module.slope_rate)
            module.query_decay.data, module.key_decay.data, module.diagonal_decay.data = decays
    torch.set_default_dtype(torch.float32)
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
    """Keep fp64 in transformers, which otherwise computes norms, routers and scans in fp32 at any
    dtype."""
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
        # torch.polar rounds its cosines differently from cos
        patch.setattr(torch, "polar", lambda one, angles: torch.complex(angles.cos(), angles.sin()))
        patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
        patch.setattr(torch.Tensor, "softmax", lifted_softmax)
        yield


def distance(ours, reference) -> float:
    return (ours.double() - reference.double()).abs().max().item()
