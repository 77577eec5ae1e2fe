"""Routing and experts, checked against their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import WIDTH, observe, same

from minimodels import Config
from minimodels.architectures.moe import (
    ROUTERS,
    MoE,
    expert_choice,
    sigmoid_bias,
    softmax,
    softmax_topk,
)
from minimodels.architectures.transformer import SwiGLU, default_width
from minimodels.context import Context
from minimodels.ops.grouped_mlp import grouped_mlp

E, D = 4, WIDTH


def layer(**options) -> MoE:
    torch.manual_seed(0)
    moe = MoE(MoE.Options(experts=E, **options), Config(width=D)).double()
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.4)
    return moe


def text() -> torch.Tensor:
    return torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_identical_experts_are_one_dense_mlp():
    moe = layer()
    for experts in (moe.gate, moe.up, moe.out):
        experts.data[:] = experts.data[0].clone()
    dense = SwiGLU(SwiGLU.Options(width=moe.out.shape[2]), Config(width=D)).double()
    for name in ("gate", "up", "out"):
        getattr(dense, name).weight.data = getattr(moe, name).data[0]
    same(moe(text())[0], dense(text())[0])


@pytest.mark.parametrize("shared", [0, 1, 2, 3])
def test_shared_experts_are_as_many_as_asked_for(shared):
    moe = layer(shared_experts=shared)
    width = moe.gate.shape[1]  # of one expert
    built = 0 if moe.shared is None else moe.shared.up.weight.shape[0] / width
    assert built == shared


@pytest.mark.parametrize("router", ["softmax_topk", "softmax"])
def test_all_experts_are_the_soft_mixture(router):
    moe, x = layer(experts_per_token=E, router=router), text()
    probabilities = F.linear(x, moe.router.weight).softmax(-1)
    experts = []
    for e in range(E):
        experts.append(
            F.linear(F.silu(F.linear(x, moe.gate[e])) * F.linear(x, moe.up[e]), moe.out[e])
        )
    same(moe(x)[0], (torch.stack(experts, -1) * probabilities.unsqueeze(2)).sum(-1))


def test_the_order_of_experts_does_not_matter():
    moe, order = layer(), torch.tensor([2, 0, 3, 1])
    before, _ = moe(text())
    moe.router.weight.data = moe.router.weight.data[order]
    for experts in (moe.gate, moe.up, moe.out):
        experts.data = experts.data[order]
    same(moe(text())[0], before)


def test_routers_are_their_definitions():
    logits = torch.tensor([[[2.0, 0.0, 1.0, -1.0]]])
    gates, visits, _ = softmax_topk(logits, 2, None, None)
    assert visits.tolist() == [[[True, False, True, False]]]
    same(
        gates,
        torch.tensor([[[2.0, 1.0]]]).softmax(-1)[..., [0, 0, 1, 1]] * torch.tensor([1.0, 0, 1, 0]),
        1e-6,
    )
    gates, _, _ = softmax(logits, 1, None, None)
    same(gates, logits.softmax(-1))
    gates, visits, _ = sigmoid_bias(logits, 2, torch.zeros(4), None)
    chosen = logits.sigmoid()[..., [0, 2]]
    same(gates[visits], (chosen / chosen.sum()).flatten())


def test_top_k_is_exactly_k_among_equals():
    for router in ROUTERS.values():
        _, visits, _ = router(torch.zeros(2, 8, E), 2, torch.zeros(E), None)
        assert visits.sum() == 2 * 8 * 2


def test_bias_changes_the_selection_and_never_the_gates():
    logits = torch.randn(1, 50, E, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    plain, chosen, _ = sigmoid_bias(logits, 2, torch.zeros(E), None)
    _, pushed, _ = sigmoid_bias(logits, 2, bias, None)
    assert not chosen[..., 3].all()
    assert pushed[..., 3].all()
    gates, _, _ = sigmoid_bias(logits, E, bias, None)
    same(gates, sigmoid_bias(logits, E, torch.zeros(E), None)[0])
    assert plain.shape == gates.shape


def test_bias_moves_against_the_load():
    moe = layer(router="sigmoid_bias", bias_step=0.5).train()
    moe(text())
    over = moe.visited > moe.visited.mean()
    moe.after_step()
    assert (moe.bias[over] == -0.5).all()
    assert (moe.bias[~over] == 0.5).all()
    assert moe.visited.sum() == 0
    assert not moe.bias.requires_grad


def test_balance_loss_is_least_when_even():
    """E Σ f_i P_i is K if all experts are equally likely and used, and it
    grows with every preference."""
    moe = layer(balance_loss=1.0, z_loss=0.0)
    x = text()
    values = []
    for scale in (0.0, 1.0, 8.0):
        logits = scale * torch.tensor([1.0, 0.5, -0.5, -1.0]).expand(2, 8, E)
        visits = (torch.arange(16).view(2, 8, 1) % 2 * 2 + torch.arange(2)).long()
        even = torch.zeros(2, 8, E, dtype=torch.bool).scatter(-1, visits, True)
        used = even if scale == 0 else softmax_topk(logits, 2, None, None)[1]
        moe.account(logits, used, logits.softmax(-1), context := Context())
        values.append(float(context.record.finish()["balance"]))
    assert values[0] == pytest.approx(2.0)
    assert values == sorted(values)
    assert moe(x)[0].shape == x.shape


def test_balancing_evens_out_the_load():
    """An uneven router learns to use all experts if it is trained only with the balance loss, or
    moved only by the bias."""
    for fields, rate in (
        ({"balance_loss": 1.0, "z_loss": 0.0}, 0.05),
        ({"router": "sigmoid_bias", "bias_step": 0.05}, 0.0),
    ):
        moe = layer(**fields).train()
        moe.router.weight.data[0] += 0.5 * text().mean((0, 1))
        x = text() + 0.5
        optimizer = torch.optim.SGD(moe.router.parameters(), lr=rate)
        overload = []
        for _ in range(100):
            record = observe(moe, x)[2]
            overload.append(float(record.observed["overload"][0]))
            optimizer.zero_grad()
            sum(record.losses.values()).backward()
            optimizer.step()
            moe.after_step()
        assert min(overload[-10:]) < 0.85 * overload[0]


def test_padding_is_not_counted():
    moe, x = layer().train(), text()
    positions = torch.arange(9).expand(2, 9).clone()
    positions[1, 4:] = -1
    padded = observe(moe, x, positions=positions)[2].losses
    assert moe.visited.sum() == 2 * (9 + 4)
    changed = x.clone()
    changed[1, 4:] = 7.0
    losses = observe(moe, changed, positions=positions)[2].losses
    assert losses.keys() == {"balance", "z"}
    for name, value in losses.items():
        same(value, padded[name])


def test_expert_without_tokens_gets_no_gradient_and_does_no_harm():
    x = torch.randn(5, D, requires_grad=True)
    gate, up, out = (
        torch.randn(shape, requires_grad=True) for shape in ((E, 6, D), (E, 6, D), (E, D, 6))
    )
    visits = torch.zeros(5, E, dtype=torch.bool)
    visits[:, 1] = True
    results = []
    for impl in ("reference", "torch"):
        y = grouped_mlp(x, torch.ones(5, E), visits, gate, up, out, impl=impl)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, gate, up, out))))
        assert results[-1][2][[0, 2, 3]].abs().sum() == 0
    for name, reference, fast in zip(("y", "dx", "dgate", "dup", "dout"), *results, strict=True):
        assert torch.allclose(fast, reference, rtol=1e-4, atol=1e-3), name


def test_a_token_that_no_expert_wants_breaks_no_loss():
    logits = torch.full((1, 3, 4), -200.0, requires_grad=True)  # whose sigmoid is 0 in fp32
    gates, _, probabilities = sigmoid_bias(logits, 2, torch.zeros(4), None)
    (gates.sum() + probabilities.sum()).backward()
    assert logits.grad.isfinite().all()


def test_evaluation_moves_no_bias():
    moe = layer(router="sigmoid_bias").eval()
    moe(text())
    moe.after_step()
    assert moe.visited.sum() == 0
    assert moe.bias.abs().sum() == 0


def test_the_scale_is_on_the_routed_experts_alone():
    plain, scaled = (layer(shared_experts=1, routed_scale=scale) for scale in (1.0, 2.5))
    shared = plain.shared(text())[0]
    same(scaled(text())[0] - shared, 2.5 * (plain(text())[0] - shared))


def test_losses_and_loads_are_their_equations():
    """Only tokens that are present count."""
    moe = layer(balance_loss=0.5, z_loss=0.25)
    positions = torch.arange(9).expand(2, 9).clone()
    positions[1, 4:] = -1
    record = observe(moe, text(), positions=positions)[2]
    logits = F.linear(text(), moe.router.weight)[positions >= 0]  # (13, E)
    load = softmax_topk(logits, 2, None, None)[1].double().mean(0)
    same(record.losses["z"], 0.25 * logits.logsumexp(-1).square().mean())
    same(record.losses["balance"], 0.5 * E * (load * logits.softmax(-1).mean(0)).sum())
    same(record.observed["load"][0], load / 2)
    same(record.observed["overload"][0], E * load.amax() / 2)
    record = observe(moe, text(), positions=torch.full((2, 9), -1))[2]  # no token at all
    assert all(value == 0 for value in record.losses.values())
    assert (record.observed["load"][0] == 0).all()


def test_the_pooled_loss_balances_the_mean_of_the_layers():
    """Two layers whose loads compensate for each other lose nothing
    together, and much separately."""
    probability = torch.tensor([0.7, 0.1, 0.1, 0.1]).double()
    values = {}
    for balance in ("layer", "pooled"):
        moe, context = layer(balance=balance, balance_loss=0.5, z_loss=0.0), Context()
        for order in ([0, 1, 2, 3], [1, 0, 3, 2], [2, 3, 0, 1], [3, 2, 1, 0]):
            probabilities = probability[order].expand(1, 1, E)
            visits = torch.zeros(1, 1, E, dtype=torch.bool)
            visits[..., [order[0], order[1]]] = True
            moe.account(probabilities.log(), visits, probabilities, context)
        values[balance] = float(context.record.finish()["balance"])
    assert values["pooled"] == pytest.approx(0.5 * 2)  # K, weighted
    assert values["layer"] == pytest.approx(4 * 0.5 * E * (0.7 + 0.1))


def test_sigmoid_gates_and_probabilities_sum_to_one():
    logits = torch.randn(2, 5, E, dtype=torch.float64, requires_grad=True)
    gates, visits, probabilities = sigmoid_bias(logits, 2, torch.zeros(E), None)
    same(probabilities.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad((gates * visits).sum(), logits)
    same(gradient, torch.zeros_like(logits))


@pytest.mark.parametrize("time", [1, 3, 8])
def test_expert_choice_rounds_up(time):
    _, visits, _ = expert_choice(torch.randn(2, time, E), 2, None, None)
    assert (visits.sum(1) == math.ceil(time * 2 / E)).all()


def test_no_graph_is_kept_beyond_a_step():
    """No graph is kept in the layer or in what it observed. Only its losses keep one."""
    moe = layer().train()
    _, _, record = observe(moe, text())
    kept = [moe.buffers(), *record.traces.values(), *record.observed.values()]
    assert not any(tensor.requires_grad for tensors in kept for tensor in tensors)
    assert all(loss.requires_grad for loss in record.losses.values())


@pytest.mark.parametrize("dtype, autocast", [(torch.bfloat16, False), (torch.float32, True)])
def test_routing_is_decided_in_full_precision(dtype, autocast):
    moe, x = layer().to(dtype), text().bfloat16()
    seen = []
    moe.account = lambda logits, *_: seen.append(logits)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        moe(x)
    (logits,) = seen
    assert logits.dtype == torch.float32
    same(logits.double(), F.linear(x.double(), moe.router.weight.double()), 1e-4)


@pytest.mark.parametrize("shared", [0, 2])
def test_the_experts_of_a_token_are_as_wide_as_the_dense_mlp(shared):
    options = MoE.Options(experts=4, experts_per_token=2, shared_experts=shared)
    assert (2 + shared) * MoE(options, Config(width=96)).out.shape[2] == default_width(96)
