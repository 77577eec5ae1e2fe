"""Options of attention. Each is compared with its definition, and with transformers
if a class there has it."""

import math

import pytest
import torch
import torch.nn.functional as F

from minimodels import Config, InputError
from minimodels.architectures.registry import build
from minimodels.ops import attention as operation
from minimodels.ops.attention import attention
from minimodels.ops.rotary import rotary, rotate

H, G, D = 4, 2, 6


def same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def qkv(T=13, S=13, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = ((2, H, T, D), (2, G, S, D), (2, G, S, D))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def layer(text, seed=0):
    torch.manual_seed(seed)
    made = build(Config(width=16, layers=text)).double()[0].layer
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


@pytest.mark.parametrize("blocks", [1, 2**25])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(
    "form", ["causal", "remembered", "window", "band", "one", "documents", "padded"]
)
def test_the_paths_agree(form, with_sink, softcap, blocks, monkeypatch):
    """They agree in outputs and the gradients of q, k, v and the sink, for every form of
    mask, in one block or many."""
    monkeypatch.setattr(operation, "MASK", blocks)
    T, S, window, starts, positions = {
        "causal": (13, 13, None, None, None), "remembered": (5, 13, None, None, None), "window": (7, 7, 5, None, None),
        "band": (13, 16, 3, None, None), "one": (1, 13, None, None, None), "documents": (13, 13, 4, [0, 5, 6], None),
        "padded": (13, 13, None, None, [13, 9]),
    }[form]  # fmt: skip
    if starts:
        row = torch.tensor([max(s for s in starts if s <= t) for t in range(T)])
        starts = torch.stack((row, torch.zeros_like(row)))
    if positions:
        at = torch.arange(T)
        positions = torch.stack([torch.where(at < length, at, -1) for length in positions])
    results = []
    for impl in ("reference", "torch"):
        parts = [*qkv(T, S)]
        sink = torch.linspace(-1, 1, H, dtype=torch.float64, requires_grad=True)
        y = attention(
            *parts, positions, positions, window, impl, starts, sink if with_sink else None, softcap
        )
        if positions is not None:
            y = y.masked_fill((positions < 0)[:, None, :, None], 0)
        y.square().sum().backward()
        results.append([y, *(part.grad for part in parts), sink.grad])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            same(one, other)


def test_a_sink_is_a_gate_of_the_sum_of_the_scores():
    """A sink multiplies the output by sigmoid(logsumexp(scores) - logit). A logit far below the
    scores changes nothing."""
    q, k, v = qkv()
    sink = torch.linspace(-1, 2, H, dtype=torch.float64)
    scores = q @ k.repeat_interleave(H // G, 1).mT * D**-0.5
    scores = scores.masked_fill(torch.ones(13, 13).triu(1).bool(), float("-inf"))
    gate = torch.sigmoid(scores.logsumexp(-1) - sink[:, None]).unsqueeze(-1)
    same(attention(q, k, v, sink=sink), attention(q, k, v) * gate)
    same(attention(q, k, v, sink=torch.full_like(sink, -1e4)), attention(q, k, v))


def test_a_softcap_bounds_the_scores():
    q, k, v = qkv()
    same(attention(q, k, v, softcap=1e6), attention(q, k, v), 1e-9)
    mean = v.repeat_interleave(H // G, 1).cumsum(2) / torch.arange(1, 14)[:, None]
    same(attention(q, k, v, softcap=1e-9), mean, 1e-8)  # all scores are nearly 0


@pytest.mark.parametrize("given", [{"sink": torch.zeros(H)}, {"softcap": 5.0}])
def test_the_kernel_refuses_what_it_lacks(given, monkeypatch):
    monkeypatch.setattr(operation, "choose", lambda *_: "triton")
    q, k, v = qkv(dtype=torch.float32)
    with pytest.raises(InputError, match="neither sinks nor a softcap"):
        attention(q, k, v, impl="triton", **given)
    same(attention(q, k, v, impl="auto", **given), attention(q, k, v, impl="auto", **given))


@pytest.mark.parametrize("gate", ["head", "full"])
def test_a_gate_of_zero_halves_the_output(gate):
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    gated = layer(f"attention(gate={gate})")
    plain = layer("attention")
    plain.load_state_dict(gated.state_dict(), strict=False)
    gated.gate.weight.data.zero_()
    same(gated(x)[0], plain(x)[0] / 2)
    gated.gate.weight.data.normal_()
    assert (gated(x)[0] - plain(x)[0] / 2).abs().max() > 1e-3


def test_biases_on_queries_keys_and_values_alone():
    parts = layer("attention(bias=qkv)")
    assert [part.bias is None for part in (parts.q, parts.k, parts.v, parts.out)] == [False] * 3 + [
        True
    ]


@torch.no_grad()
def test_values_are_mixed_with_those_of_the_first_layer():
    x = torch.randn(2, 9, 16, dtype=torch.float64)

    def stack(option):
        torch.manual_seed(0)
        return build(Config(width=16, layers=f"(attention{option} mlp)*3")).double()

    mixed, plain = stack("(value_residual=true)"), stack("")
    plain.load_state_dict(mixed.state_dict(), strict=False)
    for layer in list(mixed)[::2]:
        layer.layer.mix.copy_(torch.tensor([1.0, 0.0]))
    same(mixed(x)[0], plain(x)[0])
    mixed[2].layer.mix.copy_(torch.tensor([0.25, 0.75]))
    seen = []
    hooks = [
        each[i].layer.v.register_forward_hook(lambda *a: seen.append(a[2]))
        for each in (mixed,)
        for i in (0, 2)
    ]
    expected, _ = mixed(x)
    for hook in hooks:
        hook.remove()
    values = 0.25 * seen[1] + 0.75 * seen[0]
    plain[2].layer.v.register_forward_hook(lambda *_: values)
    same(plain(x)[0], expected)


def test_a_scale_is_that_of_the_scores():
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    scaled, plain = layer("attention(scale=0.25)"), layer("attention")
    same(plain.q.weight, scaled.q.weight)
    plain.q.weight.data *= 0.25 * 2  # 1 / sqrt(4) is the usual one
    same(scaled(x)[0], plain(x)[0])


def test_a_part_of_a_head_is_rotated():
    x = torch.randn(1, 2, 5, 12, dtype=torch.float64)
    cos, sin = rotary(torch.arange(5), 4, 100.0)
    same(rotate(x, cos, sin)[..., 4:], x[..., 4:])
    same(rotate(x, cos, sin)[..., :4], rotate(x[..., :4], cos, sin))
    assert layer("attention(head_dim=8, rope_fraction=0.25)").rotated == 2
    for text in (
        "attention(head_dim=8, rope_fraction=0.1)",
        "attention(head_dim=6, rope_fraction=0.5)",
    ):
        with pytest.raises(InputError, match="rope_fraction: .* even"):
            layer(text)


@pytest.mark.parametrize("pairs", [3, 16])
@pytest.mark.parametrize(
    "given",
    [
        {"factor": 4.0},
        {"factor": 32.0, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0},
        {"factor": 8.0, "attention_factor": 1.3, "beta_fast": 16.0, "beta_slow": 2.0},
        {"factor": 0.5},
    ],
)
def test_yarn_is_that_of_transformers(given, pairs):
    """The frequencies are equal bit for bit, and so is the factor on queries and keys."""
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    transformers = pytest.importorskip("transformers")
    rope = {
        "rope_type": "yarn",
        "rope_theta": 500.0,
        "original_max_position_embeddings": 64,
        **given,
    }
    config = transformers.LlamaConfig(
        head_dim=2 * pairs, rope_parameters=rope, max_position_embeddings=256
    )
    frequencies, factor = utils.ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")
    ours = {
        "factor": "factor", "truncate": "whole", "beta_fast": "fast", "beta_slow": "slow",
        "attention_factor": "attention_factor",
    }  # fmt: skip
    options = ", ".join(f"{ours[name]}={str(value).lower()}" for name, value in given.items())
    cos, sin = rotary(torch.arange(50), 2 * pairs, 500.0, f"yarn(context=64, {options})")
    angles = torch.arange(50.0)[:, None] * frequencies
    assert torch.equal(cos[:, :pairs], angles.cos() * factor)
    assert torch.equal(sin[:, pairs:], angles.sin() * factor)
    assert given["factor"] <= 1 or factor > 1


def test_yarn_sharpens_the_scores_by_the_square_of_its_factor():
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    yarn = layer("attention(rope_scaling=yarn(factor=4, context=8, attention_factor=1.5))")
    plain = layer(
        "attention(rope_scaling=yarn(factor=4, context=8, attention_factor=1), scale=1.125)"
    )
    assert math.isclose(1.125, 1.5**2 / 2)
    same(yarn(x)[0], plain(x)[0], 1e-6)


def test_a_sink_is_served_by_the_fused_operation(monkeypatch):
    """PyTorch's operation is called for every form of mask, so the scores are never in memory."""
    calls = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k)
    )
    q, k, v = qkv()
    attention(q, k, v, sink=torch.zeros(H, dtype=torch.float64))
    attention(q, k, v, window=3, sink=torch.zeros(H, dtype=torch.float64))
    assert len(calls) == 2
