"""Differential attention against its definition. v1 is also compared with transformers,
as the family diffllama."""

import math

import pytest
import torch

from minimodels import Config, InputError
from minimodels.architectures.registry import build
from minimodels.layers import Place


def make(text, seed=0, **fields):
    torch.manual_seed(seed)
    stack = build(Config(**{"width": 16, "layers": text, **fields})).double()
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return stack[0].layer.eval()


def same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_v2_is_a_difference_of_two_attentions():
    """Each of the two attentions has one of a head's two queries."""
    layer = make("differential_attention(kv_heads=2)")
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    plain = make("attention(kv_heads=2)")
    plain.out.weight.copy_(torch.eye(16))
    plain.k.weight.copy_(layer.k.weight), plain.v.weight.copy_(layer.v.weight)
    outputs = []
    for query in range(2):
        plain.q.weight.copy_(layer.q.weight.unflatten(0, (4, 2, 4))[:, query].flatten(0, 1))
        outputs.append(plain(x)[0].unflatten(-1, (4, 4)))
    factor = torch.sigmoid(layer.factor(x)).unsqueeze(-1)
    same(layer(x)[0], layer.out((outputs[0] - factor * outputs[1]).flatten(2)))
    layer.factor.weight.zero_()
    same(layer(x)[0], layer.out((outputs[0] - outputs[1] / 2).flatten(2)))


def test_v1_starts_by_its_depth():
    """λ₀ of block i is 0.8 - 0.6 exp(-0.3 i)."""
    stack = build(Config(width=16, layers="(differential_attention(version=v1) mlp)*3"))
    starts = [block.layer.start for block in list(stack)[::2]]
    assert starts == [0.8 - 0.6 * math.exp(-0.3 * i) for i in range(3)]
    assert Place().index == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("heads=5", "heads: 5"),
        ("version=v1, kv_heads=1", "kv_heads: 1 .* even"),
        ("kv_heads=3", "kv_heads: 3 .* divisor"),
        ("head_dim=3", "head_dim: 3 .* even"),
    ],
)
def test_options_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make(f"differential_attention({options})")
