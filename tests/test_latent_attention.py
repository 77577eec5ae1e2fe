"""Latent attention: its two forms are equal, and its state is small."""

import pytest
import torch

from minimodels import Config, InputError
from minimodels.architectures.registry import build
from minimodels.context import Context
from minimodels.layers import state_bytes

TEXTS = [
    "latent_attention",
    "latent_attention(q_rank=6, kv_rank=5, head_dim=3, rope_dim=2, value_dim=7, bias=true)",
    "latent_attention(rope_base=0, kv_rank=3, value_dim=2, scale=0.4)",
]


def make(text, seed=0):
    torch.manual_seed(seed)
    layer = build(Config(width=16, layers=text)).double()[0].layer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("chunks", [(13, 1, 1, 1), (5, 7, 4), (1,) * 16])
@torch.no_grad()
def test_each_form_continues_a_text(text, form, chunks, monkeypatch):
    """The result agrees to 1e-12 with that of the text in one piece, in which keys
    and values are expanded."""
    layer, x = make(text), torch.randn(2, 16, 16, dtype=torch.float64)
    monkeypatch.setattr(type(layer), "absorbing_saves", lambda *_: form == "absorbed")
    expected, _ = layer(x)
    state, outputs = None, []
    for chunk in x.split(chunks, dim=1):
        y, state = layer(chunk, state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), expected, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_both_forms_with_documents_and_padding(monkeypatch):
    layer, x = make(TEXTS[1]), torch.randn(2, 12, 16, dtype=torch.float64)
    positions = torch.arange(12).expand(2, -1).clone()
    positions[1, 10:] = -1
    starts = torch.tensor([0] * 4 + [4] * 8).expand(2, -1)
    expected, _ = layer(x, None, Context(positions, starts))
    for form in (True, False):
        monkeypatch.setattr(type(layer), "absorbing_saves", lambda *_, form=form: form)
        before, state = layer(x[:, :7], None, Context(positions[:, :7], starts[:, :7]))
        after, _ = layer(x[:, 7:], state, Context(positions[:, 7:], starts[:, 7:]))
        y = torch.cat((before, after), 1)
        real = positions >= 0
        torch.testing.assert_close(y[real], expected[real], rtol=1e-12, atol=1e-12)


def test_gradients_reach_through_either_form(monkeypatch):
    """They also reach the map that the absorbed form splits."""
    gradients = []
    for form in (True, False):
        layer = make(TEXTS[1])
        monkeypatch.setattr(type(layer), "absorbing_saves", lambda *_, form=form: form)
        x = torch.randn(2, 9, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        before, state = layer(x[:, :4])
        after, _ = layer(x[:, 4:], state)
        (before.square().sum() + after.square().sum()).backward()
        gradients.append({name: p.grad for name, p in layer.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-10, atol=1e-10, msg=name)


@torch.no_grad()
def test_a_token_is_remembered_as_its_latent_and_one_key():
    layer = make("latent_attention(kv_rank=5, rope_dim=2)")
    _, state = layer(torch.randn(3, 11, 16, dtype=torch.float64))
    stored = sum(part.numel() for part in state[:2])
    assert stored == 3 * 11 * (5 + 2)
    assert state_bytes(layer, 11, 8) == stored * 8 / 3


def test_absorption_is_for_few_tokens_that_see_many():
    layer = make("latent_attention(kv_rank=64, head_dim=32, rope_dim=16)")
    assert layer.absorbing_saves(1, 1000) and not layer.absorbing_saves(1000, 1000)


@torch.no_grad()
def test_all_heads_share_the_rotary_key():
    """Exchanging two heads in queries, keys, values and output changes nothing."""
    layer, x = make(TEXTS[1]), torch.randn(2, 9, 16, dtype=torch.float64)
    expected, _ = layer(x)
    order = torch.tensor([2, 1, 0, 3])
    for name in ("q", "kv_up"):
        part = getattr(layer, name)
        part.weight.copy_(part.weight.unflatten(0, (4, -1))[order].flatten(0, 1))
    layer.out.weight.copy_(layer.out.weight.unflatten(1, (4, -1))[:, order].flatten(1, 2))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-12, atol=1e-12)


def test_options_that_do_not_fit():
    for text, message in (("heads=5", "heads: 5"), ("rope_dim=3", "rope_dim: 3 .* even")):
        with pytest.raises(InputError, match=message):
            make(f"latent_attention({text})")
