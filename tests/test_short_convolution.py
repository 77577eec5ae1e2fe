"""The gated short convolution: its reference, the laws in short, and parity with LFM2's."""

import pytest
import torch
from mixers import (
    check_chunking,
    check_packing,
    check_padding,
    check_parity,
    make,
    random,
    randomise,
    same,
    use_torch,
)
from transformers import Lfm2Config
from transformers.models.lfm2 import modeling_lfm2
from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

from minimodels.architectures.short_convolution import recurrence

TEXTS = [
    "short_convolution",
    "short_convolution(conv_width=1)",
    "short_convolution(conv_width=7, bias=true)",
]
laws = pytest.mark.parametrize("text", TEXTS)


@pytest.fixture(autouse=True)
def peers_in_torch(monkeypatch):
    use_torch(monkeypatch, modeling_lfm2)


@laws
def test_chunking(text):
    check_chunking(text)


@laws
def test_padding(text):
    check_padding(text)


@laws
def test_packing(text):
    check_packing(text)


@laws
@pytest.mark.parametrize("length", [1, 2, 19])
def test_layer_equals_reference(text, length):
    layer, x, before = make(text), random(2, length, 16), random(2, 4, 16, seed=2)
    _, state = layer(before)
    for given in (None, state):
        for one, other in zip(layer(x, given), recurrence(x, layer, given), strict=True):
            same(one, other)


def test_without_gates_it_is_a_convolution():
    """If both gates are 1, the layer is linear and sees the last two tokens before."""
    layer = make("short_convolution(bias=true)")
    with torch.no_grad():
        layer.in_proj.weight[:32] = 0
        layer.in_proj.bias[:32] = 1
    x = random(1, 9, 16)
    moved = x.clone()
    moved[:, 3] += 1
    changed = (layer(moved)[0] - layer(x)[0]).abs().amax((0, 2)) > 1e-12
    assert changed.tolist() == [3 <= t <= 5 for t in range(9)]
    same(layer(2 * x - moved)[0], 2 * layer(x)[0] - layer(moved)[0])


@pytest.mark.parametrize("width, bias", [(3, False), (4, True)])
def test_parity_with_lfm2(width, bias):
    config = Lfm2Config(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1,
        conv_L_cache=width, conv_bias=bias, layer_types=["conv"], vocab_size=8,
    )  # fmt: skip
    peer = randomise(Lfm2ShortConv(config, 0)).double()
    ours = make(f"short_convolution(conv_width={width}, bias={str(bias).lower()})")
    check_parity(
        ours,
        peer,
        lambda weights: {name.replace("conv.", "conv1d."): w for name, w in weights.items()},
        1e-10,
    )
