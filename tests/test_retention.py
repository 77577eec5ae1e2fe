"""Retention: linear attention, RetNet, Lightning and GLA, each against its equation; the laws in
short; parity with MiniMax."""

import pytest
import torch
import torch.nn.functional as F
from mixers import (
    check_chunking,
    check_packing,
    check_padding,
    check_parity,
    gradients,
    make,
    random,
    randomise,
    same,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from minimodels.architectures.retention import parallel, recurrence
from minimodels.context import Context
from minimodels.errors import InputError
from minimodels.layers import Place, flops, state_bytes
from minimodels.ops.delta_rule import delta_rule
from minimodels.ops.rotary import rotary, rotate

RETNET = "retention(heads=2)"
LINEAR = "retention(feature_map=elu, rope_base=0, decay=none, norm=sum, gate=none)"
LIGHTNING = "retention(heads=2, feature_map=silu, rope_base=0, decay=layers, scale=false, norm=full, gate=sigmoid)"
GLA = "retention(heads=2, rope_base=0, decay=channels, decay_rank=3, decay_divisor=2)"
TEXTS = [
    RETNET,
    LINEAR,
    LIGHTNING,
    GLA,
    "retention(heads=3, head_dim=4, value_dim=5, decay=channels, norm=none, gate=sigmoid)",
    "retention(feature_map=elu, rope_base=100, decay=layers, norm=none, gate=none)",
]
laws = pytest.mark.parametrize("text", TEXTS)


@laws
def test_chunking(text):
    check_chunking(text)


@laws
def test_padding(text):
    check_padding(text)


@laws
def test_packing(text):
    check_packing(text)


def parts(layer, x):
    """q, k, v of a layer after its feature map or rotation, from its weights."""
    H, options = layer.H, layer.options
    q, k, v = (part(x).unflatten(2, (H, -1)) for part in (layer.q, layer.k, layer.v))
    if options.feature_map == "elu":
        q, k = F.elu(q) + 1, F.elu(k) + 1
    if options.feature_map == "silu":
        q, k, v = F.silu(q), F.silu(k), F.silu(v)
    if options.rope_base:
        angles = rotary(torch.arange(x.shape[1]), layer.K, options.rope_base)
        q, k = (rotate(part.transpose(1, 2), *angles).transpose(1, 2) for part in (q, k))
    return q * layer.K**-0.5 if options.scale else q, k, v


def head_norm(y, weight, eps):
    return weight * y / (y.square().mean(-1, keepdim=True) + eps).sqrt()


def test_linear_attention_is_its_equation():
    """y_t = φ(q_t)ᵀ Σ φ(k_s) v_sᵀ / φ(q_t)ᵀ Σ φ(k_s)."""
    layer, x = make(LINEAR), random(2, 21, 16)
    y = parallel(*parts(layer, x), None, divide=True)
    same(layer(x)[0], layer.out(y.flatten(2)), 1e-5)  # 1e-6 is added to the divisor
    weights = parallel(*parts(layer, x), None, divide=False)
    assert not torch.allclose(layer(x)[0], layer.out(weights.flatten(2)), rtol=0.1)


def test_linear_attention_takes_a_mean():
    """If all values are the same, the output is that value, whatever the weights are."""
    layer, x = make(LINEAR), random(2, 21, 16)
    value = random(16, seed=7)
    with torch.no_grad():
        layer.v.weight.zero_()
    layer.v.register_forward_hook(lambda module, given, y: y + value)
    same(layer(x)[0], layer.out(value).expand(2, 21, 16), 1e-5)


def test_retnet_is_its_equation():
    """Equation 5 of the paper: (Q Kᵀ ∘ D) V with D_nm = γ^(n-m), then norm by head and gate."""
    layer, x = make(RETNET), random(2, 21, 16)
    gamma = 1 - 2.0 ** torch.tensor([-5.0, -6.0], dtype=torch.float64)
    y = parallel(*parts(layer, x), gamma)
    y = head_norm(y, layer.norm.weight, layer.norm.eps).flatten(2) * F.silu(layer.gate(x))
    same(layer(x)[0], layer.out(y))


def test_lightning_is_its_equation():
    layer, x = make(LIGHTNING, place=Place(3, 8)), random(2, 21, 16)
    slopes = 2.0 ** torch.tensor([-4.0, -8.0], dtype=torch.float64)
    gamma = torch.exp(-slopes * (1 - 3 / (7 + 1e-5) + 1e-5))
    y = parallel(*parts(layer, x), gamma).flatten(2)
    y = head_norm(y, layer.norm.weight, layer.norm.eps) * torch.sigmoid(layer.gate(x))
    same(layer(x)[0], layer.out(y))


def test_gla_is_its_equation():
    layer, x = make(GLA), random(2, 21, 16)
    q, k, v = parts(layer, x)
    alpha = torch.sigmoid(layer.decay(x)).pow(1 / 2).unflatten(2, (2, -1))
    y, S = recurrence(q, k, v, alpha, x.new_zeros(2, 2, 8, 8))
    y = head_norm(y, layer.norm.weight, layer.norm.eps).flatten(2) * F.silu(layer.gate(x))
    actual, state = layer(x)
    same(actual, layer.out(y))
    same(state.S, S)


@pytest.mark.parametrize("length", [1, 2, 31, 67])
@pytest.mark.parametrize("vector", [False, True])
def test_recurrence_equals_operation(length, vector):
    q, k, v = (random(2, length, 3, width, seed=i) for i, width in enumerate((5, 5, 6)))
    g = -random(2, length, 3, 5 if vector else 1, seed=8).exp()
    names = {"q": q, "k": k, "v": v, "g": g, "S": (S := random(2, 3, 5, 6, seed=9))}
    for part in names.values():
        part.requires_grad_()
    one = recurrence(q, k, v, g.exp().expand(-1, -1, -1, 5), S)
    other = delta_rule(q, k, v, g if vector else g.squeeze(-1), None, S)
    for a, b in zip(one, other, strict=True):
        same(a, b)
    expected = gradients(list(one), names)
    for name, gradient in gradients(list(other), names).items():
        same(gradient, expected[name], 1e-8, name)


def test_retnet_without_decay_is_linear_attention(monkeypatch):
    retnet, linear = make(RETNET), make("retention(heads=2, decay=none)")
    linear.load_state_dict(retnet.state_dict())
    x = random(2, 21, 16)
    assert not torch.allclose(retnet(x)[0], linear(x)[0])
    monkeypatch.setattr(torch, "log1p", torch.zeros_like)  # log γ = log 1
    same(retnet(x)[0], linear(x)[0])
    q, k, v = parts(linear, x)
    same(parallel(q, k, v, torch.ones(2)), parallel(q, k, v, None))


def test_rotation_depends_on_distance_alone():
    layer, x = make(RETNET), random(1, 9, 16)
    positions = torch.arange(9).unsqueeze(0)
    same(layer(x, None, Context(positions + 1000))[0], layer(x)[0], 1e-5)  # angles are in fp32
    assert not torch.allclose(layer(x, None, Context(2 * positions))[0], layer(x)[0], rtol=1e-3)


def test_the_place_of_a_layer_sets_its_decay():
    """It is the layer's place in the model. MiniMax counts blocks, of two layers each."""
    x = random(1, 3, 16)
    for place, options, factor in (
        (Place(0, 8), "", 1 + 1e-5),
        (Place(7, 8), "", 1e-5 + 1e-5 / 7),
        (Place(3, 6), ", block=2", 0.5 + 1.25e-5),
    ):
        layer = make(LIGHTNING[:-1] + options + ")", place=place)
        expected = -factor * 2.0 ** torch.tensor([-4.0, -8.0], dtype=torch.float64)
        torch.testing.assert_close(
            layer.log_decay(x), expected.expand(1, 3, 2), rtol=2e-5, atol=1e-9
        )


@laws
@pytest.mark.parametrize("length", [20, 160])
def test_costs_are_those_of_a_pass(text, length):
    layer, x = make(text).float(), random(2, length, 16).float()
    with FlopCounterMode(display=False) as counter:
        _, state = layer(x)
    assert flops(layer, length) * 2 * length == counter.get_total_flops()
    assert state_bytes(layer, length, 4) * 2 == state.S.nbytes


@pytest.mark.parametrize(
    "text, field",
    [
        ("retention(heads=3)", "heads"),
        ("retention(head_dim=3)", "head_dim"),
        ("retention(norm=sum, rope_base=0)", "norm"),
        ("retention(norm=sum, feature_map=elu)", "norm"),
    ],
)
def test_refuses_options_that_do_not_fit(text, field):
    with pytest.raises(InputError, match=field):
        make(text)


def lightning_layout(weights):
    """MiniMax keeps the rows of q, k and v together, head by head."""
    rows = weights["qkv_proj.weight"].unflatten(0, (2, 3, 8))
    q, k, v = (rows[:, i].reshape(16, -1) for i in range(3))
    return {
        "q.weight": q,
        "k.weight": k,
        "v.weight": v,
        "norm.weight": weights["norm.weight"],
        "gate.weight": weights["output_gate.weight"],
        "out.weight": weights["out_proj.weight"],
    }


@pytest.mark.parametrize("layer", [0, 2])
def test_parity_with_minimax(layer):
    config = MiniMaxConfig(
        hidden_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8, block_size=8, num_hidden_layers=3,
        intermediate_size=8, vocab_size=8, layer_types=["linear_attention"] * 3,
    )  # fmt: skip
    peer = randomise(MiniMaxLightningAttention(config, layer)).double()
    ours = make(f"{LIGHTNING[:-1]}, norm_eps=1e-6)", place=Place(layer, 3))
    check_parity(ours, peer, lightning_layout, 2e-6, lambda x: peer(x, None, None)[0])
