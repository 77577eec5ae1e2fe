"""Mamba-2: its three forms, its options, the laws in short, and parity
with transformers' layers."""

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
    use_torch,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import BambaConfig, DynamicCache, FalconH1Config, Mamba2Config
from transformers.models.bamba import modeling_bamba
from transformers.models.bamba.modeling_bamba import BambaMixer
from transformers.models.falcon_h1 import modeling_falcon_h1
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer
from transformers.models.mamba2 import modeling_mamba2
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from minimodels.architectures.mamba2 import Mamba2, attention, recurrence
from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.layers import flops, state_bytes
from minimodels.ops.delta_rule import delta_rule

TEXTS = [
    "mamba2(state_size=4)",
    "mamba2(heads=8, state_size=6, groups=2, norm=norm_gate, step_min=0.3, step_max=0.9)",
    "mamba2(heads=3, head_dim=5, state_size=4, groups=3, norm=none, conv_width=1)",
    "mamba2(heads=2, head_dim=4, state_size=4, bias=true, conv_bias=false)",
]
laws = pytest.mark.parametrize("text", TEXTS)


@pytest.fixture(autouse=True)
def peers_in_torch(monkeypatch):
    use_torch(monkeypatch, modeling_mamba2, modeling_bamba, modeling_falcon_h1)


@laws
def test_chunking(text):
    check_chunking(text)


@laws
def test_padding(text):
    check_padding(text)


@laws
def test_packing(text):
    check_packing(text)


def arguments(T: int, groups: int = 2):
    """x, Δ, A, B, C and a state."""
    x, delta = random(2, T, 4, 3, seed=1), F.softplus(random(2, T, 4, seed=2))
    A, h = -random(4, seed=3).exp(), random(2, 4, 5, 3, seed=4)
    B, C = random(2, T, groups, 5, seed=5), random(2, T, groups, 5, seed=6)
    return [part.requires_grad_() for part in (x, delta, A, B, C, h)]


def operation(x, delta, A, B, C, h):
    """Mamba-2 computed with the delta rule."""
    return delta_rule(C, B, delta.unsqueeze(-1) * x, delta * A, None, h)


@pytest.mark.parametrize("length", [1, 2, 31, 67])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_recurrence_equals_chunks(length, groups):
    inputs = arguments(length, groups)
    names = dict(zip(("x", "delta", "A", "B", "C", "h"), inputs, strict=True))
    one, other = recurrence(*inputs), operation(*inputs)
    for a, b in zip(one, other, strict=True):
        same(a, b)
    expected = gradients(list(one), names)
    for name, gradient in gradients(list(other), names).items():
        same(gradient, expected[name], 1e-8, name)


@pytest.mark.parametrize("length", [1, 31, 67])
def test_attention_equals_chunks(length):
    *inputs, h = arguments(length)
    same(attention(*inputs), operation(*inputs, torch.zeros_like(h))[0])


@pytest.mark.parametrize("text", TEXTS)
def test_layer_equals_recurrence(text):
    """The whole layer, recomputed from its weights with the recurrence, including decoding."""
    layer, x = make(text), random(2, 21, 16)
    options, E, H = layer.options, layer.E, layer.H
    G, N = options.groups, options.state_size
    z, xBC, dt = layer.in_proj(x).split((E, E + 2 * G * N, H), dim=-1)
    W = options.conv_width
    xBC = F.conv1d(
        F.pad(xBC.mT, (W - 1, 0)), layer.conv1d.weight, layer.conv1d.bias, groups=E + 2 * G * N
    ).mT
    v, B, C = F.silu(xBC).split((E, G * N, G * N), dim=-1)
    v, B, C = v.unflatten(2, (H, -1)), B.unflatten(2, (G, N)), C.unflatten(2, (G, N))
    delta = F.softplus(dt + layer.dt_bias).clamp(options.step_min, options.step_max)
    h = x.new_zeros(2, H, N, layer.P)
    y, h = recurrence(v, delta, -layer.A_log.exp(), B, C, h)
    y, gate = (y + layer.D[:, None] * v).flatten(2), F.silu(z)

    def norm(y):
        y = y.unflatten(2, (G, -1))
        y = y / (y.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
        return layer.norm.weight * y.flatten(2)

    if options.norm == "gate_norm":
        y = norm(y * gate)
    elif options.norm == "norm_gate":
        y = norm(y) * gate
    else:
        y = y * gate
    actual, state = layer(x)
    same(actual, layer.out_proj(y))
    same(state.h, h)


def test_limits_hold_in_decoding_too():
    """With a lower limit above all steps, the decay is that of the limit, token
    by token as in one piece."""
    layer = make("mamba2(state_size=4, step_min=50, step_max=60)")
    before, x = random(2, 9, 16), random(2, 1, 16, seed=2)
    _, state = layer(before)
    with torch.no_grad():
        layer.A_log.fill_(-torch.inf)  # no decay
    _, kept = layer(x, state)
    written = kept.h - state.h
    with torch.no_grad():
        layer.A_log.fill_(0.0)
    _, decayed = layer(x, state)
    same(decayed.h, torch.exp(torch.tensor(-50.0, dtype=torch.float64)) * state.h + written)


@torch.no_grad()
def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    layer = Mamba2(Mamba2.Options(heads=256), Config(width=256, layers="mamba2*4"))
    assert 1 <= layer.A_log.exp().min() < 1.3 < 15.7 < layer.A_log.exp().max() <= 16
    step = F.softplus(layer.dt_bias)
    assert 0.00099 < step.min() < 0.0013 < 0.08 < step.max() < 0.101
    assert (layer.D == 1).all()
    assert (layer.norm.weight == 1).all()
    assert layer.out_proj.weight.abs().max() == pytest.approx(512**-0.5 / 4**0.5, rel=0.02)


@laws
@pytest.mark.parametrize("length", [20, 160])
def test_costs_are_those_of_a_pass(text, length):
    layer, x = make(text).float(), random(2, length, 16).float()
    with FlopCounterMode(display=False) as counter:
        _, state = layer(x)
    assert flops(layer, length) * 2 * length == counter.get_total_flops()
    assert state_bytes(layer, length, 4) * 2 == sum(part.nbytes for part in state)


@pytest.mark.parametrize(
    "text, field",
    [
        ("mamba2(heads=5)", "heads"),
        ("mamba2(groups=3)", "groups"),
        ("mamba2(heads=3, head_dim=5, step_min=2, step_max=1)", "step_max"),
    ],
)
def test_refuses_options_that_do_not_fit(text, field):
    with pytest.raises(InputError, match=field):
        make(text)


def published(groups: int = 1, **fields) -> Mamba2Mixer:
    config = Mamba2Config(
        hidden_size=16, num_heads=4, head_dim=8, state_size=6, n_groups=groups, expand=2,
        chunk_size=8, num_hidden_layers=1, vocab_size=8, **fields,
    )  # fmt: skip
    return randomise(Mamba2Mixer(config, 0)).eval()


@pytest.mark.parametrize(
    "groups, fields, options",
    [
        (1, {}, ""),
        (2, {}, ""),
        (2, {"time_step_limit": (0.6, 0.9)}, ", step_min=0.6, step_max=0.9"),
        (4, {"use_bias": True, "use_conv_bias": False}, ", bias=true, conv_bias=false"),
    ],
)
def test_parity_with_transformers(groups, fields, options):
    peer = published(groups, **fields)
    ours = make(f"mamba2(state_size=6, groups={groups}{options})").float()
    check_parity(ours, peer, dict, 2e-5)


@pytest.mark.parametrize("groups", [1, 2])
def test_parity_with_bamba(groups):
    config = BambaConfig(
        hidden_size=16, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=6, mamba_n_groups=groups, mamba_expand=2,
        mamba_chunk_size=8, num_hidden_layers=1, vocab_size=8, attn_layer_indices=[],
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    peer = randomise(BambaMixer(config, 0)).eval()
    ours = make(f"mamba2(state_size=6, groups={groups}, norm_eps={config.rms_norm_eps})").float()
    check_parity(ours, peer, dict, 2e-5)


@pytest.mark.parametrize(
    "fields, norm",
    [
        ({"mamba_rms_norm": False}, "none"),
        ({"mamba_rms_norm": True, "mamba_norm_before_gate": True}, "norm_gate"),
        ({"mamba_rms_norm": True, "mamba_norm_before_gate": False}, "gate_norm"),
    ],
)
def test_parity_with_falcon_h1(fields, norm):
    """It has no norm, or a norm before or after the gate."""
    config = FalconH1Config(
        hidden_size=16, mamba_n_heads=4, mamba_d_head=5, mamba_d_ssm=20, mamba_d_state=6, mamba_n_groups=2,
        mamba_chunk_size=8, num_hidden_layers=1, vocab_size=8, num_attention_heads=2, num_key_value_heads=2, **fields,
    )  # fmt: skip
    peer = randomise(FalconH1Mixer(config, 0)).eval()
    peer.mup_vector = 1.0  # the model around it sets its multipliers
    eps = config.rms_norm_eps
    text = f"mamba2(heads=4, head_dim=5, state_size=6, groups=2, norm={norm}, norm_eps={eps})"
    check_parity(make(text).float(), peer, dict, 2e-5)


@torch.no_grad()
def test_decoding_is_the_prefill_that_transformers_computes():
    """Their one-token path ignores time_step_limit, and so differs from their own
    prefill. Ours does not."""
    peer = published(2, time_step_limit=(0.6, 0.9))
    ours = make("mamba2(state_size=6, groups=2, step_min=0.6, step_max=0.9)").float()
    ours.load_state_dict(peer.state_dict())
    x = random(2, 12, 16).float()
    prefill = peer(x)
    state, decoded = None, []
    for token in x.split(1, dim=1):
        y, state = ours(token, state)
        decoded.append(y)
    same(torch.cat(decoded, dim=1), prefill, 2e-5)
    cache = DynamicCache(config=Mamba2Config(num_hidden_layers=1))
    theirs = [peer(piece, cache) for piece in x.split((8, 1, 1, 1, 1), dim=1)]
    assert (torch.cat(theirs, dim=1) - prefill)[:, 8:].abs().max() > 1e-2
