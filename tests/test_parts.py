"""Every part of a model is called as a module, so hooks, adapters and quantisation reach it."""

import copy
import os

import pytest
import torch
from models import ALL, WIDTH, same
from small import small
from torch import nn

from minimodels import (
    LM,
    Config,
    from_pretrained,
    load_model,
    preset,
    save_model,
    save_pretrained,
)
from minimodels.generate import Sampling, generate
from minimodels.presets import PRESETS
from minimodels.published.families import FAMILIES

V, T = 29, 11
GREEDY = Sampling(temperature=0)
# all families and quantised models take half a minute, so they are tried only with this variable
NIGHTLY = "MINIMODELS_DRAWN" in os.environ
UNLIKE = ["gpt2", "phi3", "gemma2", "mixtral", "jamba", "deepseek_v2", "qwen3_next"]
EVERY = [*PRESETS, *ALL]
MODELS = [*PRESETS, *(text for text in ALL if text.startswith(("latent", "differ", "learned")))]
QUANTISED = MODELS if NIGHTLY else ["mod", "hybrid", "kimi_linear", "mamba2"]


def model(name: str, dtype=torch.float64, noise: float = 0.2, width: int = WIDTH, **fields) -> LM:
    """A preset or layers as a small model in training mode, in which every wrapped layer is used."""
    torch.manual_seed(0)
    if name in PRESETS:
        config = preset(name, "tiny", *small(name), width=width, vocab=V, **fields)
    else:
        config = Config(layers=name, width=width, vocab=V, **fields)
    lm = LM(config).to(dtype)
    for parameter in lm.parameters():
        parameter.data.add_(noise * torch.randn_like(parameter))
    return lm


def text(batch: int = 2, length: int = T) -> torch.Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(1))


def leaves(lm: LM) -> dict[str, nn.Module]:
    """The parts without parts of their own, by name, except the objective, which has no output."""
    named = lm.named_modules()
    return {n: part for n, part in named if not list(part.children()) and n != "objective"}


@pytest.mark.parametrize(("layers", "tied"), [("moe", True), *((name, False) for name in EVERY)])
def test_every_part_is_called(layers, tied):
    lm, called = model(layers, tie_embeddings=tied), set()
    for name, part in leaves(lm).items():
        part.register_forward_hook(lambda *_, name=name: called.add(name))
    lm(text())
    assert called == set(leaves(lm))
    called.clear()
    lm.loss(text(), text())
    assert called == set(leaves(lm))


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_every_part_is_called_on_other_paths(impl):
    lm, called = model("attention mamba(state_size=4)", torch.float32, impl=impl), set()
    plain = lm(text())[0]
    for name, part in leaves(lm).items():
        part.register_forward_hook(lambda *_, name=name: called.add(name))
    same(lm(text())[0], plain, 1e-4)
    assert called == set(leaves(lm))


def test_a_hook_sees_every_call_in_decoding():
    """Without it, latent attention decodes with the matrix of its map."""
    lm, calls = model("latent_attention(kv_rank=2)").eval(), []
    expected = list(generate(lm, [[1, 2, 3]], 4, GREEDY))
    lm.layers[0].layer.kv_up.register_forward_hook(lambda *_: calls.append(1))
    same(list(generate(lm, [[1, 2, 3]], 4, GREEDY)), expected)
    assert len(calls) == 4


def adapted(lm: LM, kinds: tuple[type[nn.Module], ...] = (nn.Linear,)):
    """A copy with adapters that are not zero on all parts of these kinds."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    names = [name for name, part in lm.named_modules() if isinstance(part, kinds)]
    torch.manual_seed(1)
    settings = peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    return peft.get_peft_model(copy.deepcopy(lm), settings).to(lm.embedding.weight.dtype)


@pytest.mark.parametrize(
    ("name", "tied"), [("transformer", True), *((name, False) for name in MODELS)]
)
def test_merged_adapters_give_what_adapters_give(name, tied, tmp_path):
    lm = model(name, tie_embeddings=tied)
    other = adapted(lm, (nn.Linear, nn.Embedding))
    logits, (loss, _) = other(text())[0], other.loss(text(), text())
    assert (logits - lm(text())[0]).abs().max() > 1e-3
    loss.backward()
    learning = {n: p for n, p in other.named_parameters() if "lora" in n}
    assert len(learning) == 2 * sum(isinstance(p, nn.Linear | nn.Embedding) for p in lm.modules())
    still = [name for name, p in learning.items() if p.grad is None or not p.grad.abs().sum()]
    assert not still
    other.eval()
    tokens = list(generate(other.base_model.model, [[1, 2, 3]], 4, GREEDY))
    merged = other.train().merge_and_unload()
    assert type(merged) is LM
    same(merged(text())[0], logits, 1e-10)
    same(merged.loss(text(), text())[0], loss, 1e-10)
    same(list(generate(merged.eval(), [[1, 2, 3]], 4, GREEDY)), tokens)
    save_model(merged.float(), tmp_path / "merged")
    assert torch.equal(
        load_model(tmp_path / "merged").train()(text())[0], merged.train()(text())[0]
    )


def test_experts_take_adapters_on_their_parameters():
    peft = pytest.importorskip("peft", reason="adapters need peft")
    lm = model("moe(experts=4)")
    names = ["layer.gate", "layer.up", "layer.out"]
    given = {"target_modules": [], "target_parameters": names, "init_lora_weights": False}
    settings = peft.LoraConfig(r=2, **given)
    other = peft.get_peft_model(copy.deepcopy(lm), settings).double()
    logits = other(text())[0]
    assert (logits - lm(text())[0]).abs().max() > 1e-3
    same(other.merge_and_unload()(text())[0], logits, 1e-10)


@pytest.mark.parametrize("family", FAMILIES if NIGHTLY else UNLIKE)
def test_an_adapted_published_model_is_published_again(family, tmp_path):
    pytest.importorskip("transformers", reason="published models are made by transformers")
    import test_published as published

    lm = from_pretrained(published.saved(published.theirs(family), tmp_path / "base")).double()
    other = adapted(lm)
    logits = other(text())[0]
    assert (logits - lm(text())[0]).abs().max() > 1e-3
    merged = other.merge_and_unload()
    same(merged(text())[0], logits, 1e-10)
    save_pretrained(merged, tmp_path / "merged")
    same(from_pretrained(tmp_path / "merged")(text())[0], logits, 1e-10)


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_linear_maps_are_near(name):
    lm = model(name, torch.float32, 0.0, 32).eval()
    ao = pytest.importorskip(
        "torchao.quantization", reason="quantised weights need the extra `quantise`"
    )
    exact, other = lm(text())[0], copy.deepcopy(lm)
    ao.quantize_(other, ao.Int8WeightOnlyConfig(version=2))
    maps = [part for part in other.modules() if isinstance(part, nn.Linear)]
    assert all(type(part.weight) is not nn.Parameter for part in maps)
    logits = other(text())[0]
    assert 0 < (logits - exact).norm() < 0.3 * exact.norm()
    assert other.loss(text(), text())[0].isfinite()
    assert len(list(generate(other, [[1, 2, 3]], 3, GREEDY))) == 3


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUANTISED)
def test_dynamically_quantised_linear_maps_are_near(name):
    lm = model(name, torch.float32, 0.0, 32).eval()
    other = torch.ao.quantization.quantize_dynamic(lm, {nn.Linear}, torch.qint8)
    exact, logits = lm(text())[0], other(text())[0]
    assert 0 < (logits - exact).norm() < 0.3 * exact.norm()
    assert len(list(generate(other, [[1, 2, 3]], 3, GREEDY))) == 3
