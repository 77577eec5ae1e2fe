"""The layers of the delta rule: their equation, identities between them, the laws in short, parity
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
    leaves,
    make,
    random,
    randomise,
    same,
    use_torch,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, KimiLinearConfig, OlmoHybridConfig, Qwen3_5TextConfig
from transformers.models.bailing_hybrid import modeling_bailing_hybrid
from transformers.models.bailing_hybrid.configuration_bailing_hybrid import BailingHybridConfig
from transformers.models.bailing_hybrid.modeling_bailing_hybrid import BailingHybridDeltaAttention
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.olmo_hybrid import modeling_olmo_hybrid
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from minimodels.architectures import mamba2
from minimodels.architectures.deltanet import DeltaNet, micro_steps, recurrence
from minimodels.config import Config
from minimodels.errors import InputError
from minimodels.layers import flops, state_bytes
from minimodels.ops.delta_rule import delta_rule
from minimodels.ops.normalise import gated_norm, l2norm
from minimodels.parts import RMSNorm

PLAIN = "deltanet(heads=2)"
GATED = "deltanet(heads=4, key_heads=2, value_dim=5, gate=scalar, output_gate=silu)"
KDA = "deltanet(heads=2, gate=vector, output_gate=sigmoid, output_rank=head)"
PRODUCT = "deltanet(heads=2, beta_max=2, steps=3, gate=scalar)"
TEXTS = [
    PLAIN,
    GATED,
    KDA,
    PRODUCT,
    "deltanet(heads=2, key_heads=1, head_dim=3, value_dim=5, gate=vector, gate_rank=full, gate_bound=5, steps=2)",
    "deltanet(heads=3, head_dim=4, gate=scalar, gate_bound=2, beta_max=2, conv_width=1, output_gate=sigmoid)",
]
laws = pytest.mark.parametrize("text", TEXTS)


@pytest.fixture(autouse=True)
def peers_in_torch(monkeypatch):
    use_torch(
        monkeypatch,
        modeling_qwen3_5,
        modeling_olmo_hybrid,
        modeling_kimi_linear,
        modeling_bailing_hybrid,
    )


@laws
def test_chunking(text):
    check_chunking(text)


@laws
def test_padding(text):
    check_padding(text)


@laws
def test_packing(text):
    check_packing(text)


def arguments(length: int, n: int = 1) -> dict[str, torch.Tensor]:
    """q, k, v, α, β and a state of equation (1), for 3 heads, K = 5 and V = 6."""
    found = {
        "q": random(2, length, 3, 5, seed=1),
        "k": F.normalize(random(2, length, n, 3, 5, seed=2), dim=-1),
        "v": random(2, length, n, 3, 6, seed=3),
        "alpha": torch.sigmoid(random(2, length, 3, 5, seed=4)),
        "beta": 2 * torch.sigmoid(random(2, length, n, 3, seed=5)),
        "S": random(2, 3, 5, 6, seed=6),
    }
    return {name: part.requires_grad_() for name, part in found.items()}


def operation(q, k, v, alpha, beta, S):
    """Equation (1), computed with the operation."""
    beta = beta.unsqueeze(-1)
    y, S = delta_rule(*micro_steps(q, k, beta * v, alpha.log(), beta * k), S)
    return y[:, k.shape[2] - 1 :: k.shape[2]], S


@pytest.mark.parametrize("length", [1, 2, 31, 67])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_recurrence_equals_operation(length, n):
    inputs = arguments(length, n)
    one, other = recurrence(**inputs), operation(**inputs)
    for a, b in zip(one, other, strict=True):
        same(a, b)
    expected = gradients(list(one), inputs)
    for name, gradient in gradients(list(other), inputs).items():
        same(gradient, expected[name], 1e-8, name)


@laws
def test_layer_equals_recurrence(text):
    """The whole layer, recomputed from its weights with the recurrence."""
    layer, x = make(text), random(2, 21, 16)
    options, H, G, K, V = layer.options, layer.H, layer.G, layer.K, layer.V
    n, W = options.steps, options.conv_width
    qkv = F.pad(layer.qkv(x).mT, (W - 1, 0))
    qkv = F.silu(F.conv1d(qkv, layer.conv1d.weight, None, groups=qkv.shape[1]).mT)
    q, k, v = qkv.split((G * K, n * G * K, n * H * V), dim=-1)
    q, k = q.unflatten(2, (G, K)), k.unflatten(2, (n, G, K))
    q, k = (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt() for part in (q, k))
    q, k = q.repeat_interleave(H // G, 2) / K**0.5, k.repeat_interleave(H // G, 3)
    beta = options.beta_max * torch.sigmoid(layer.beta(x)).unflatten(2, (n, H))
    alpha = torch.ones(2, 21, H, K, dtype=x.dtype)
    if options.gate != "none":
        channels = 1 if options.gate == "scalar" else K
        step = (layer.decay(x) + layer.dt_bias).unflatten(2, (H, channels))
        rate = layer.A_log.exp().unsqueeze(-1)
        bound = options.gate_bound
        g = -bound * torch.sigmoid(rate * step) if bound else -rate * F.softplus(step)
        alpha = g.exp().expand(-1, -1, -1, K)
    y, S = recurrence(q, k, v.unflatten(2, (n, H, V)), alpha, beta, x.new_zeros(2, H, K, V))
    y = layer.norm.weight * y / (y.square().mean(-1, keepdim=True) + layer.norm.eps).sqrt()
    if layer.z is not None:
        y = y.flatten(2) * getattr(F, options.output_gate)(layer.z(x))
        y = y.unflatten(2, (H, V))
    actual, state = layer(x)
    same(actual, layer.out(y.flatten(2)))
    same(state.S, S)


# Identities between the layers.


def test_kda_with_equal_channels_is_gated_deltanet():
    scalar, vector = make("deltanet(gate=scalar)"), make("deltanet(gate=vector)")
    x = random(2, 21, 16)
    kept = {
        k: v
        for k, v in scalar.state_dict().items()
        if k.split(".")[0] in ("qkv", "conv1d", "beta", "norm", "out")
    }
    vector.load_state_dict(kept, strict=False)
    assert not torch.allclose(vector(x)[0], scalar(x)[0], rtol=1e-2)
    vector.log_decay = lambda x: scalar.log_decay(x).unsqueeze(-1).expand(-1, -1, -1, 4)
    for one, other in zip(vector(x), scalar(x), strict=True):
        same(leaves(one), leaves(other))


@pytest.mark.parametrize("length", [1, 31, 67])
def test_gated_deltanet_without_erasing_is_mamba2(length):
    """With e = 0, and the step Δ instead of β, it becomes the state space duality."""
    q, k, v, _, beta, S = arguments(length).values()
    k, v, A = k.squeeze(2), v.squeeze(2), -random(3, seed=9).exp()
    delta, erase = beta.squeeze(2), torch.zeros_like(k)
    rows = delta_rule(q, k, delta.unsqueeze(-1) * v, delta * A, erase, S)
    for one, other in zip(rows, mamba2.recurrence(v, delta, A, k, q, S), strict=True):
        same(one, other)


def test_one_of_several_steps_is_gated_deltanet():
    """DeltaProduct is Gated DeltaNet if its second step has β = 0. A second step with an
    effect makes another layer."""
    one, two = (
        make("deltanet(heads=2, gate=scalar)"),
        make("deltanet(heads=2, gate=scalar, steps=2)"),
    )
    x, (q, k, v) = random(2, 21, 16), one.split
    rows = torch.cat([torch.arange(q + k), torch.arange(v) + q + 2 * k])
    with torch.no_grad():
        two.qkv.weight[rows], two.conv1d.weight[rows] = one.qkv.weight, one.conv1d.weight
        two.beta.weight[:2] = one.beta.weight
        for name in ("decay.weight", "A_log", "dt_bias", "norm.weight", "out.weight"):
            two.get_parameter(name).copy_(one.get_parameter(name))
    assert not torch.allclose(two(x)[0], one(x)[0], rtol=1e-2)
    no_step = torch.tensor([0.0, 0.0, torch.inf, torch.inf]).double()
    two.beta.register_forward_hook(lambda module, given, y: y - no_step)
    actual, state = two(x)
    expected, after = one(x)
    same(actual, expected)
    same(state.S, after.S)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
def test_a_full_step_stores_the_value_exactly(gate):
    """With β = 1 and a unit key, the key then gives the value, whatever the state was before, even
    if the key comes again."""
    _, k, v, alpha, _, S = (part.detach() for part in arguments(40).values())
    k = k[:, :1].expand(-1, 40, -1, -1, -1)
    alpha = alpha if gate == "vector" else alpha[..., :1].expand_as(alpha)
    y, S = operation(k.squeeze(2), k, v, alpha, torch.ones(2, 40, 1, 3).double(), S)
    same(y, v.squeeze(2), 1e-12)
    same((S * k[:, 0, 0].unsqueeze(-1)).sum(-2), v[:, -1, 0], 1e-12)


def test_a_double_step_without_a_value_reflects():
    """With β = 2 and v = 0, the state keeps its norm, and two steps with one key restore it."""
    _, k, v, _, beta, S = (part.detach() for part in arguments(41).values())
    inputs = (torch.zeros_like(v), torch.ones_like(k.squeeze(2)), torch.full_like(beta, 2))
    for steps, expected in ((1, None), (2, S)):
        key = k[:, :1].expand(-1, steps, -1, -1, -1)
        _, after = operation(key.squeeze(2), key, *(part[:, :steps] for part in inputs), S)
        same(after.square().sum((-2, -1)), S.square().sum((-2, -1)), 1e-12)
        assert not torch.allclose(after, S) if expected is None else torch.allclose(after, S)
    _, after = operation(k.squeeze(2), k, *inputs, S)
    same(after.square().sum((-2, -1)), S.square().sum((-2, -1)), 1e-12)


def test_no_step_changes_nothing():
    q, k, v, alpha, beta, S = (part.detach() for part in arguments(40).values())
    _, after = operation(q, k, v, torch.ones_like(alpha), torch.zeros_like(beta), S)
    assert torch.equal(after, S)


@pytest.mark.parametrize("gate", ["scalar", "vector"])
@pytest.mark.parametrize("everywhere", [False, True], ids=["once", "everywhere"])
def test_a_strong_gate_forgets_without_nan(gate, everywhere):
    """After a token with g = -50, everything before it is forgotten, and no gradient is NaN."""
    q, k, v, alpha, beta, S = (part.detach() for part in arguments(70).values())
    g = alpha.log() if gate == "vector" else alpha[..., 0].log()
    g[:, :: 1 if everywhere else 35] = -50.0
    beta = beta.unsqueeze(-1)
    inputs = [
        part.float().requires_grad_()
        for part in (q, k.squeeze(2), (beta * v).squeeze(2), g, (beta * k).squeeze(2), S)
    ]
    y, after = delta_rule(*inputs)
    for gradient in torch.autograd.grad(y.sum() + after.square().sum(), inputs):
        assert gradient.isfinite().all()
    late = [part[:, 35:] for part in inputs[:5]]
    for one, other in zip((y[:, 35:], after), delta_rule(*late), strict=True):
        same(one, other, 1e-5)


def test_a_bounded_gate_keeps_its_bound():
    for gate in ("scalar", "vector"):
        layer = make(f"deltanet(gate={gate}, gate_bound=5)")
        with torch.no_grad():
            layer.dt_bias.fill_(100.0)
        x = random(2, 30, 16)
        g = layer.log_decay(x)
        assert (g >= -5).all()
        assert (g < -4.9).all()
        assert layer(x)[0].isfinite().all()


def test_negative_eigenvalues():
    """The transition's eigenvalue along the key, 1 - β, is below 0 only with beta_max=2."""
    for beta_max, low in ((1, 0.0), (2, -1.0)):
        layer = make(f"deltanet(heads=1, beta_max={beta_max}, conv_width=1)")
        layer.beta.register_forward_hook(lambda module, given, y: y + 100.0)  # β at its largest
        _, state = layer(random(1, 5, 16))
        x = random(1, 1, 16, seed=4)
        k = l2norm(F.silu(layer.conv1d.weight[16:32, 0, 0] * layer.qkv(x)[0, 0, 16:32]))
        with torch.no_grad():
            layer.qkv.weight[32:] = 0  # v = 0
        _, after = layer(x, state)
        same(k @ after.S[0, 0], low * (k @ state.S[0, 0]), 1e-5)


@torch.no_grad()
def test_initialisation():
    torch.manual_seed(0)
    config = Config(width=256, layers="deltanet*4")
    for gate, bound in (("scalar", None), ("vector", None), ("vector", 5.0)):
        layer = DeltaNet(DeltaNet.Options(heads=128, gate=gate, gate_bound=bound), config)
        step = F.softplus(layer.dt_bias)
        assert 0.00099 < step.min() < 0.0013 < 0.08 < step.max() < 0.101
        if bound is None:
            assert 1 <= layer.A_log.exp().min() < 1.5 < 15 < layer.A_log.exp().max() <= 16
        else:
            assert (layer.A_log == 0).all()
        assert layer.qkv.weight.std() == pytest.approx(config.init_std, rel=0.05)
        assert layer.out.weight.std() == pytest.approx(config.init_std / 2, rel=0.05)


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
        ("deltanet(heads=3)", "heads"),
        ("deltanet(heads=4, key_heads=3)", "key_heads"),
        ("deltanet(gate_bound=5)", "gate_bound"),
        ("deltanet(beta_max=3)", "beta_max"),
    ],
)
def test_refuses_options_that_do_not_fit(text, field):
    with pytest.raises(InputError, match=field):
        make(text)


def test_gated_norms_in_both_orders():
    x, gate, weight = random(3, 10), random(3, 10, seed=2), random(10, seed=3)
    norm = RMSNorm(10, 0.1, groups=2).double()
    norm.weight.data.copy_(weight)

    def expected(x):
        groups = x.unflatten(-1, (2, 5))
        return weight * (groups / (groups.square().mean(-1, keepdim=True) + 0.1).sqrt()).flatten(-2)

    same(gated_norm(norm, x), expected(x))
    same(gated_norm(norm, x, gate, "silu"), expected(x) * F.silu(gate))
    same(gated_norm(norm, x, gate, "sigmoid", "gate_norm"), expected(x * gate.sigmoid()))
    with pytest.raises(ValueError, match="does not fit"):
        gated_norm(norm, x, gate[:1])


# Parity.

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "vocab_size": 8,
    "layer_types": ["linear_attention"],
}


def layout(renamed: dict[str, str], joined: tuple[str, ...] = ()):
    """Convert a peer's weights to ours: change the names, and join q, k and v if the
    peer keeps them separate."""

    def turn(weights):
        ours = {new: weights[old] for old, new in renamed.items()}
        if joined:
            ours["qkv.weight"] = torch.cat([weights[f"{name}.weight"] for name in joined])
        return ours

    return turn


COMMON = {"A_log": "A_log", "dt_bias": "dt_bias", "conv1d.weight": "conv1d.weight"}
QWEN = COMMON | {
    "in_proj_qkv.weight": "qkv.weight",
    "in_proj_b.weight": "beta.weight",
    "in_proj_a.weight": "decay.weight",
    "in_proj_z.weight": "z.weight",
    "norm.weight": "norm.weight",
    "out_proj.weight": "out.weight",
}
OLMO = COMMON | {
    "b_proj.weight": "beta.weight",
    "a_proj.weight": "decay.weight",
    "g_proj.weight": "z.weight",
    "o_norm.weight": "norm.weight",
    "o_proj.weight": "out.weight",
}
LING = {
    "forget_gate.A_log": "A_log",
    "forget_gate.dt_bias": "dt_bias",
    "forget_gate.f_proj.weight": "decay.weight",
    "conv1d.weight": "conv1d.weight",
    "b_proj.weight": "beta.weight",
    "g_proj.weight": "z.weight",
    "o_norm.weight": "norm.weight",
    "o_proj.weight": "out.weight",
}
KIMI = {old: new for old, new in LING.items() if new not in ("decay.weight", "z.weight")} | {
    "forget_gate.f_a_proj.weight": "decay.0.weight",
    "forget_gate.f_b_proj.weight": "decay.1.weight",
    "g_a_proj.weight": "z.0.weight",
    "g_b_proj.weight": "z.1.weight",
}
APART = ("q_proj", "k_proj", "v_proj")


def qwen(key_heads: int) -> tuple:
    config = Qwen3_5TextConfig(
        linear_num_key_heads=key_heads, linear_num_value_heads=4, linear_key_head_dim=6, linear_value_head_dim=5,
        linear_conv_kernel_dim=3, **SIZES,
    )  # fmt: skip
    text = (
        f"deltanet(heads=4, key_heads={key_heads}, head_dim=6, value_dim=5, conv_width=3, gate=scalar, "
        f"output_gate=silu, norm_eps=1e-6)"
    )
    return Qwen3_5GatedDeltaNet(config, 0), text, layout(QWEN), config


def olmo(negative: bool) -> tuple:
    mixed = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    config = OlmoHybridConfig(
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=6, linear_value_head_dim=12,
        linear_allow_neg_eigval=negative, **SIZES | mixed,
    )  # fmt: skip
    text = f"deltanet(heads=2, head_dim=6, value_dim=12, gate=scalar, output_gate=silu, beta_max={1 + negative})"
    return OlmoHybridGatedDeltaNet(config, 0), text, layout(OLMO, APART), config


def kimi() -> tuple:
    config = KimiLinearConfig(
        linear_num_heads=2,
        linear_head_dim=6,
        linear_conv_kernel_dim=4,
        mlp_layer_types=["dense"],
        **SIZES,
    )
    text = "deltanet(heads=2, head_dim=6, gate=vector, output_gate=sigmoid, output_rank=head)"
    return KimiLinearDeltaAttention(config, 0), text, layout(KIMI, APART), config


def ling(bounded: bool) -> tuple:
    config = BailingHybridConfig(
        num_attention_heads=2,
        head_dim=6,
        kda_safe_gate=bounded,
        kda_lower_bound=-5.0,
        mlp_layer_types=["dense"],
        **SIZES,
    )
    bound = 5 if bounded else "none"
    text = (
        f"deltanet(heads=2, head_dim=6, conv_width={config.short_conv_kernel_size}, gate=vector, gate_rank=full, "
        f"gate_bound={bound}, output_gate=sigmoid, norm_eps=1e-6)"
    )
    return BailingHybridDeltaAttention(config, 0), text, layout(LING, APART), config


PEERS = {
    "Qwen3.5": lambda: qwen(4),
    "Qwen3.5, grouped": lambda: qwen(2),
    "OLMo-Hybrid": lambda: olmo(True),
    "OLMo-Hybrid, positive eigenvalues": lambda: olmo(False),
    "Kimi Linear": kimi,
    "Ling": lambda: ling(False),
    "Ling, bounded gate": lambda: ling(True),
}


@pytest.mark.parametrize("name", PEERS)
def test_parity_with_transformers(name):
    peer, text, turn, _ = PEERS[name]()
    check_parity(make(text).float(), randomise(peer).eval(), turn, 3e-5)


@pytest.mark.parametrize("name", PEERS)
@torch.no_grad()
def test_decoding_is_the_prefill_that_transformers_computes(name):
    """Ours, token by token or in pieces, gives what theirs gives in one piece. Their own
    one-token path agrees here."""
    peer, text, turn, config = PEERS[name]()
    peer, ours, x = randomise(peer).eval(), make(text).float(), random(2, 12, 16).float()
    for key, parameter in ours.named_parameters():
        parameter.copy_(turn(dict(peer.named_parameters()))[key].view(parameter.shape))
    prefill = peer(x)
    for cuts in (list(range(1, 12)), [5, 6]):
        state, cache, decoded, theirs = None, DynamicCache(config=config), [], []
        for piece in x.tensor_split(cuts, dim=1):
            y, state = ours(piece, state)
            decoded.append(y)
            theirs.append(peer(piece, cache))
        same(torch.cat(decoded, dim=1), prefill, 3e-5)
        same(torch.cat(theirs, dim=1), prefill, 3e-5)
