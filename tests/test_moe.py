"""Routing and experts, checked against what defines them."""

import pytest
import torch
import torch.nn.functional as F
from models import SHAPE, same

from minimodels import Config
from minimodels.moe import ROUTERS, MoE, Routing, grouped_mlp, sigmoid_bias, softmax, softmax_topk
from minimodels.transformer import SwiGLU

E, D = SHAPE["experts"], SHAPE["width"]


def layer(**fields) -> MoE:
    torch.manual_seed(0)
    moe = MoE(Config(**{**SHAPE, **fields})).double()
    for parameter in moe.parameters():
        parameter.data.normal_(std=0.4)
    return moe


def text() -> torch.Tensor:
    return torch.randn(2, 9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def test_identical_experts_are_one_dense_mlp():
    moe = layer()
    for experts in (moe.gate, moe.up, moe.out):
        experts.data[:] = experts.data[0].clone()
    dense = SwiGLU(Config(**SHAPE), moe.out.shape[2]).double()
    for name in ("gate", "up", "out"):
        getattr(dense, name).weight.data = getattr(moe, name).data[0]
    same(moe(text())[0], dense(text())[0])


@pytest.mark.parametrize("router", ["softmax_topk", "softmax"])
def test_all_experts_are_the_soft_mixture(router):
    moe, x = layer(experts_per_token=E, router=router), text()
    probabilities = F.linear(x, moe.router.weight).softmax(-1)
    experts = []
    for e in range(E):
        experts.append(F.linear(F.silu(F.linear(x, moe.gate[e])) * F.linear(x, moe.up[e]), moe.out[e]))
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
    gates, visits, _ = softmax_topk(logits, 2, torch.zeros(4))
    assert visits.tolist() == [[[True, False, True, False]]]
    same(gates, torch.tensor([[[2.0, 1.0]]]).softmax(-1)[..., [0, 0, 1, 1]] * torch.tensor([1.0, 0, 1, 0]), 1e-6)
    gates, _, _ = softmax(logits, 1, torch.zeros(4))
    same(gates, logits.softmax(-1))
    gates, visits, _ = sigmoid_bias(logits, 2, torch.zeros(4))
    chosen = logits.sigmoid()[..., [0, 2]]
    same(gates[visits], (chosen / chosen.sum()).flatten())


def test_top_k_is_exactly_k_among_equals():
    for router in ROUTERS.values():
        _, visits, _ = router(torch.zeros(2, 8, E), 2, torch.zeros(E))
        assert visits.sum() == 2 * 8 * 2


def test_bias_changes_the_selection_and_never_the_gates():
    logits = torch.randn(1, 50, E, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor([0.0, 0.0, 0.0, 5.0])
    plain, chosen, _ = sigmoid_bias(logits, 2, torch.zeros(E))
    _, pushed, _ = sigmoid_bias(logits, 2, bias)
    assert not chosen[..., 3].all()
    assert pushed[..., 3].all()
    gates, _, _ = sigmoid_bias(logits, E, bias)
    same(gates, sigmoid_bias(logits, E, torch.zeros(E))[0])
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
    """E Σ f_i P_i is K where all experts are equally likely and used, and grows with every preference."""
    moe = layer(balance_loss=1.0, z_loss=0.0)
    x = text()
    values = []
    for scale in (0.0, 1.0, 8.0):
        logits = scale * torch.tensor([1.0, 0.5, -0.5, -1.0]).expand(2, 8, E)
        visits = (torch.arange(16).view(2, 8, 1) % 2 * 2 + torch.arange(2)).long()
        even = torch.zeros(2, 8, E, dtype=torch.bool).scatter(-1, visits, True)
        used = even if scale == 0 else softmax_topk(logits, 2, None)[1]
        moe.routing = Routing(logits, used, logits.softmax(-1), None)
        values.append(float(moe.auxiliary_losses["balance"]))
    assert values[0] == pytest.approx(2.0)
    assert values == sorted(values)
    assert moe(x)[0].shape == x.shape


def test_balancing_evens_out_the_load():
    """Trained on the balance loss alone, or moved by the bias alone, a lopsided router comes to use all experts."""
    for fields, rate in (({"balance_loss": 1.0, "z_loss": 0.0}, 0.05), ({"router": "sigmoid_bias", "bias_step": 0.05}, 0.0)):
        moe = layer(**fields).train()
        moe.router.weight.data[0] += 0.5 * text().mean((0, 1))
        x = text() + 0.5
        optimizer = torch.optim.SGD(moe.router.parameters(), lr=rate)
        overload = []
        for _ in range(100):
            moe(x)
            overload.append(float(moe.observed["overload"]))
            optimizer.zero_grad()
            sum(moe.auxiliary_losses.values()).backward()
            optimizer.step()
            moe.after_step()
        assert min(overload[-10:]) < 0.85 * overload[0]


def test_padding_is_not_counted():
    moe, x = layer().train(), text()
    positions = torch.arange(9).expand(2, 9).clone()
    positions[1, 4:] = -1
    moe(x, None, positions)
    assert moe.visited.sum() == 2 * (9 + 4)
    padded = {name: value.clone() for name, value in moe.auxiliary_losses.items()}
    changed = x.clone()
    changed[1, 4:] = 7.0
    moe(changed, None, positions)
    for name, value in moe.auxiliary_losses.items():
        same(value, padded[name])


def test_expert_without_tokens_gets_no_gradient_and_does_no_harm():
    x = torch.randn(5, D, requires_grad=True)
    gate, up, out = (torch.randn(shape, requires_grad=True) for shape in ((E, 6, D), (E, 6, D), (E, D, 6)))
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
    gates, _, probabilities = sigmoid_bias(logits, 2, torch.zeros(4))
    (gates.sum() + probabilities.sum()).backward()
    assert logits.grad.isfinite().all()
