"""Published models: every family against transformers, which no one here wrote, from its files to ours and back."""

import contextlib
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from minimodels import LM, Config, InputError, from_pretrained, preset, save_pretrained
from minimodels.families import FAMILIES
from minimodels.lm import IGNORE
from minimodels.pretrained import explicit
from minimodels.sample import Sampling, generate

transformers = pytest.importorskip(
    "transformers", minversion="5", reason="the proof against transformers needs transformers >= 5"
)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

V, T = 67, 37
SIZE = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 2}
HEADS = {**SIZE, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 40}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 24}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
AUXILIARY = {"output_router_logits": True, "router_aux_loss_coef": 0.3}

CASES = {  # model_type -> options of its configuration class
    "llama": [
        HEADS,
        {**HEADS, "num_key_value_heads": 4, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
        {**HEADS, "num_key_value_heads": 1, "rope_parameters": LLAMA3, "head_dim": 10, "num_hidden_layers": 3},
        {**HEADS, "rope_parameters": LINEAR, "rms_norm_eps": 1e-3},
    ],
    "mistral": [
        {**HEADS, "sliding_window": 7},
        {**HEADS, "sliding_window": None, "tie_word_embeddings": True},
        {**HEADS, "sliding_window": 30, "head_dim": 6},  # less than the text, more than half of it
    ],
    "qwen3": [
        {**HEADS, "head_dim": 12},
        {**HEADS, "head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
        {**HEADS, "head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1, "num_hidden_layers": 3},
    ],
    "mamba": [
        SIZE,
        {**SIZE, "tie_word_embeddings": False, "use_bias": True, "use_conv_bias": False, "state_size": 5, "conv_kernel": 3},
        {**SIZE, "expand": 3, "time_step_rank": 5, "hidden_size": 30, "num_hidden_layers": 3},
    ],
    "falcon_mamba": [
        SIZE,
        {**SIZE, "tie_word_embeddings": False, "use_bias": True, "mixer_rms_eps": 1e-2, "state_size": 5},
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
        {**HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True, "head_dim": 12,
         "num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "attention_bias": True},
        {**HEADS, "num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "use_sliding_window": True,
         "sliding_window": 6, "tie_word_embeddings": True},
    ],
    "jamba": [
        {**HEADS, "num_hidden_layers": 4, "attn_layer_period": 3, "attn_layer_offset": 1, "num_experts": 3, **AUXILIARY},
        {**HEADS, "num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 0, "num_experts": 4,
         "num_experts_per_tok": 1, "expert_layer_period": 3, "expert_layer_offset": 2, "mamba_proj_bias": True,
         "mamba_conv_bias": False, "tie_word_embeddings": True, "mamba_d_state": 6},
        {**HEADS, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1},
    ],
}  # fmt: skip
every = pytest.mark.parametrize(("name", "number"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])


def theirs(name: str, number: int = 0, seed: int = 0):
    """A model of the published class, its weights so large that every part has its say."""
    torch.manual_seed(seed)
    no_special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = transformers.AutoConfig.for_model(name, **CASES[name][number], **no_special)
    config._experts_implementation = "eager"  # the only one that computes in fp64
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def double(model):
    """In fp64, but for the rotary frequencies, which are fp32 here as there."""
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
    """Inside, fp64 stays fp64 in transformers too, which otherwise computes norms, routers and scans in fp32 whatever its dtype."""
    to, single, softmax = torch.Tensor.to, torch.Tensor.float, F.softmax

    def lifted_to(x, *args, **kwargs):
        if x.dtype == torch.float64 and (torch.float32 in args or kwargs.get("dtype") == torch.float32):
            return x
        return to(x, *args, **kwargs)

    def lifted_softmax(x, dim=None, dtype=None, **kwargs):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "to", lifted_to)
        patch.setattr(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else single(x))
        patch.setattr(F, "softmax", lifted_softmax)
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
        assert distance(from_pretrained(tmp_path / "a", dtype=torch.float64)(tokens)[0], reference) < 1e-9


@every
def test_loss_and_gradient_of_every_parameter(name, number, tmp_path):
    """Their gradients are put in the place of their weights, saved, and read by us: so each must land where ours is."""
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
    expected = dict(from_pretrained(saved(model, tmp_path / "gradients")).named_parameters())
    for part, parameter in lm.named_parameters():
        assert distance(parameter.grad, expected[part]) < 1e-7 * max(1, expected[part].abs().max().item()), part


@every
def test_greedy_generation_token_for_token(name, number, tmp_path):
    model, prompt = double(theirs(name, number)), text(1)[:, :11]
    lm = from_pretrained(saved(model, tmp_path / "a"))
    with without_casts_to_single():
        expected = model.generate(prompt, max_new_tokens=24, do_sample=False)[0, 11:]
    assert torch.stack(list(generate(lm, [prompt[0]], 24, Sampling(temperature=0))))[:, 0].tolist() == expected.tolist()


@every
def test_saved_by_us_and_loaded_by_them(name, number, tmp_path):
    lm, tokens = from_pretrained(saved(theirs(name, number), tmp_path / "a")), text()
    save_pretrained(lm, tmp_path / "b")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "b", output_loading_info=True)
    assert not any(info.values()), info
    assert type(model).__name__ == FAMILIES[name].architecture
    with torch.no_grad():
        assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4
    again = from_pretrained(tmp_path / "b")
    assert explicit(again.config) == explicit(lm.config)
    for part, parameter in lm.named_parameters():
        assert torch.equal(parameter, again.get_parameter(part)), part
