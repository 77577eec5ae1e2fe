"""Published models: every family against transformers, an independent implementation, from its
files to ours and back."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from mixers import use_torch
from peers import (
    CASES,
    DYNAMIC,
    HEADS,
    LLAMA3,
    WITH_KERNELS,
    YARN,
    V,
    distance,
    double,
    longrope,
    model_of,
    saved,
    text,
    theirs,
    transformers,
    without_casts_to_single,
)
from safetensors.torch import load_file, save_file

from minimodels import (
    LM,
    Config,
    InputError,
    from_pretrained,
    load_model,
    preset,
    save_model,
    save_pretrained,
)
from minimodels.generate import Sampling, generate
from minimodels.grammar import Call, parse_call, set_options, write_value
from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.published import __main__ as command
from minimodels.published.config_json import write_config
from minimodels.published.families import FAMILIES
from minimodels.published.mappings import Offset
from minimodels.published.tensors import DERIVED
from minimodels.published.text import write_layers
from minimodels.training import checkpoint
from minimodels.training.optim import adamw

every = pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))]
)


@pytest.fixture(autouse=True)
def peers_in_torch(monkeypatch):
    use_torch(monkeypatch, *WITH_KERNELS)


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
    """Their gradients are saved in place of their weights and loaded into ours, so that each can be
    compared with our gradient."""
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
    info["missing_keys"] = {key for key in info["missing_keys"] if not DERIVED.fullmatch(key)}
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
    """With one head many scores are zero. Which of them `topk` takes depends on their number, and
    transformers does nothing about it."""
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


LIGHTNING = "feature_map=silu, rope_base=0, decay=layers, block=2, scale=false, norm=full, norm_eps=1e-6, gate=sigmoid"
GPT2 = "learned_positions(context=50) (attention(rope_base=0, bias=true) mlp(gated=false, activation=gelu, bias=true))*2"
MADE_WITH = [
    ("(attention(qk_norm=full) mlp)*2", {"residual": "post_norm"}, "olmo2"),
    ("(attention mlp)*2", {"residual_scale": 0.3, "logit_scale": 0.7}, "granite"),
    ("(attention(head_dim=6, softcap=9.0) mlp(activation=gelu))*2",
     {"residual": "sandwich", "embedding_scale": 32**0.5, "logit_softcap": 7.0}, "gemma2"),
    (GPT2, {"norm": "layer"}, "gpt2"),
    ("delta=deltanet(gate=scalar, output_gate=silu, beta_max=2, norm_eps=1e-5, head_dim=4, value_dim=12)"
     " (delta mlp)*2 attention(qk_norm=full, residual=post_norm) mlp(residual=post_norm)", {}, "olmo_hybrid"),
    ("(attention(qk_norm=plain) mlp(gated=false, activation=relu2))*2",
     {"norm": "plain", "embedding_norm": True, "logit_softcap": 9.0}, "nanochat"),
    ("mamba2 mlp attention(rope_base=0, scale=0.3) mlp", {"logit_scale": 0.5}, "granitemoehybrid"),
    (f"retention({LIGHTNING}, stream_scale=3) moe attention moe", {"residual": "deep_norm"}, "minimax"),
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
    "retention.value_dim": 3, "retention.feature_map": "none",
    "retention.rope_base": 50.0, "retention.decay": "heads", "retention.scale": True, "retention.norm": "head",
    "retention.norm_eps": 0.1, "retention.gate": "silu", "retention.block": 1, "retention.residual_scale": 0.5,
    "retention.stream_scale": 2.0, "retention.residual": "sandwich", "moe.residual_scale": 0.5,
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
    f"retention({LIGHTNING}) moe(expert_width=32) attention moe(expert_width=32)",
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
    fields |= {"residual": "deep_norm"} if "retention" in layers else {}
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
        rows = [line.strip().partition(": ")[0].split(", ") for line in str(error).splitlines()[2:]]
        assert any(named.intersection(row) for row in rows), error
    else:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
        assert distance(lm(tokens)[0], model(tokens).logits) < 1e-4


@pytest.mark.parametrize("router", ["sigmoid_bias", "expert_choice"])
@pytest.mark.parametrize("qk_norm", ["full", "head"])
def test_a_router_that_no_family_has_is_refused(router, qk_norm, tmp_path):
    lm = LM(Config(width=16, layers=f"attention(qk_norm={qk_norm}) moe(router={router})"))
    family = "olmoe" if qk_norm == "full" else "qwen3_moe"
    with pytest.raises(InputError, match=f"first\n  moe.router: .*{family}"):
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
        "dynamic(factor=3, context=40)",
        "longrope(short=[1.5, 2], long=[3, 4], context=50, attention=1.2)",
    ],
)
def test_rope_scaling_however_it_is_written(scaling, tmp_path):
    lm, tokens = LM(Config(width=16, layers=f"attention(rope_scaling={scaling}) mlp")), text()
    save_pretrained(lm, tmp_path / "a")
    torch.testing.assert_close(from_pretrained(tmp_path / "a")(tokens)[0], lm(tokens)[0])


LONGER = {
    "dynamic": {"rope_parameters": DYNAMIC, "max_position_embeddings": 20},
    "longrope": {
        "rope_parameters": longrope(4),
        "original_max_position_embeddings": 20,
        "max_position_embeddings": 80,
    },
}


@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "dynamic"), ("llama", "longrope"), ("phi3", "longrope")]
)
def test_the_rotation_of_a_longer_text_is_a_setting(name, kind, tmp_path):
    """The class rotates by the text's own length. Without the setting, ours refuses the text."""
    model, tokens = model_of(name, {**HEADS, **LONGER[kind]}), text()
    folder = saved(model, tmp_path / "a")
    lm = from_pretrained(folder)
    assert distance(lm(tokens[:, :20])[0], model(tokens[:, :20]).logits) < 1e-4
    with pytest.raises(InputError, match="at most 20 tokens"):
        lm(tokens)
    longer = from_pretrained(folder, set=[f"attention.rope_scaling.length={tokens.shape[1]}"])
    assert distance(longer(tokens)[0], model(tokens).logits) < 1e-4
    assert distance(longer(tokens[:, :20])[0], lm(tokens[:, :20])[0]) > 1e-2


def test_a_loaded_model_trains_like_one_made_here(tmp_path):
    """The layer, not the tensor, knows what does not decay, because loading and
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
        with pytest.raises(InputError, match="model: ") as error:
            save_pretrained(LM(preset(model)), tmp_path / model)
        _, header, *_, last = str(error.value).splitlines()
        assert header == "  what differs: from which families, the closest first"
        assert last.startswith("  which layers, in which order: llama, mistral, qwen3, qwen2 and ")
        assert not any(tmp_path.iterdir())


def test_the_family_from_which_the_fewest_options_differ_is_named_first():
    layers = "(attention(qk_norm=head, softcap=20.0) mlp)*2"
    with pytest.raises(InputError) as error:
        write_config(Config(layers=layers, width=32), {})
    _, _, closest, *others = str(error.value).splitlines()
    assert closest == "  attention.softcap: qwen3, qwen3_moe, lfm2"
    assert any("attention.qk_norm, attention.softcap: llama" in row for row in others)
    assert len(others) <= 3


def test_a_folder_without_a_model_is_named_with_the_runs_in_it(tmp_path):
    for name in ("b", "a"):
        save_model(LM(Config(width=16, layers="mlp")), tmp_path / name)
    for folder, reason in ((tmp_path, "neither"), (tmp_path / "a/checkpoints", "neither")):
        with pytest.raises(
            InputError, match=f"model: '{folder}' .*options.json.*{reason}"
        ) as error:
            from_pretrained(folder)
        assert f"did you mean {tmp_path / 'a'} " in str(error.value).replace("?", " ")
    with pytest.raises(InputError, match="load_model .*this is a run"):
        from_pretrained(tmp_path / "a")
    with pytest.raises(InputError, match=f"did you mean {tmp_path / 'a'} or {tmp_path / 'b'}\\?"):
        load_model(tmp_path)


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
        ("llama", {"rope_parameters": {"rope_type": "proportional"}}, "rope_type: 'proportional' .* default, linear"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
         "rope_parameters: '1 and 1 factors' .* 4 in each list"),
        ("llama", {"rope_parameters": {"rope_type": "longrope", "short_factor": ["1"], "long_factor": [2.0]}},
         "rope_parameters short"),
        ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type: 'yarn' .* default, longrope"),
        ("smollm3", {"layer_types": ["sliding_attention"] * 5, "sliding_window": 3}, "use_sliding_window"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "beta": 1}}, "beta"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "rope_parameters factor: '2'"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": -2}}, "rope_parameters factor: -2"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters"),
        ("llama", {"rope_parameters": {"rope_theta": None}}, "rope_theta: None .* a positive number"),
        ("llama", {"rope_parameters": {}, "partial_rotary_factor": []}, "partial_rotary_factor: None"),
        ("llama", {"rope_parameters": {**YARN, "factor": -2}}, "rope_parameters factor: -2"),
        ("deepseek_v3", {"rope_parameters": {**YARN, "factor": ""}}, "rope_parameters factor: ''"),
        ("gemma3_text", {"rope_parameters": {"full_attention": 3}}, "a JSON object for full_attention"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope_scaling: .* what rope_parameters says"),
        ("llama", {"rope_parameters": None, "rope_theta": "many"}, "rope_theta: 'many'"),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("llama", {"use_magic": True}, "use_magic"),
        ("llama", {"hidden_size": None}, "hidden_size"),
        ("llama", {"hidden_size": "wide"}, "hidden_size: 'wide'"),
        ("llama", {"vocab_size": 0}, "vocab_size: 0"),
        ("llama", {"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ("llama", {"num_attention_heads": 5, "head_dim": None}, "num_attention_heads: 5"),
        ("llama", {"hidden_size": 2, "head_dim": None}, "num_attention_heads: 4"),
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
        ("llama", {"model_type": "glm_moe_dsa"}, "'glm_moe_dsa' .* their own keys"),
        ("minimax", {"layer_types": ["linear_attention"]}, "layer_types"),
        ("minimax", {"mlp_alpha_factor": 0}, "mlp_alpha_factor: 0"),
        ("minimax", {"router_jitter_noise": 0.1}, "router_jitter_noise"),
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
        f"{wrong}: \\[2, 3\\] instead of \\[40, 32\\]",
        "extra: surplus",
        "lm_head.weight: missing",
        "model.norm.weight: I8 instead of",
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
    with pytest.raises(InputError, match="model: "):
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
    """The delta rule is described by an object of its own, which numbers the blocks from 1."""
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


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_text_continued_without_positions_goes_on_where_it_ended(number, tmp_path):
    """Bamba's class begins at position 0 again unless it is given positions."""
    model, tokens = double(theirs("bamba", number)), text()
    lm, later = from_pretrained(saved(model, tmp_path / "a")), torch.arange(20, 21).unsqueeze(0)
    with torch.no_grad(), without_casts_to_single():
        cache = model(tokens[:, :20], use_cache=True).cache
        expected = model(tokens[:, 20:21], cache=cache, position_ids=later).logits
    _, state = lm(tokens[:, :20])
    assert distance(lm(tokens[:, 20:21], state)[0], expected) < 1e-9


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
