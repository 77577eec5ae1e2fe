"""Options of experts against their definitions: groups, biases, activations, shared
experts with their own width."""

import pytest
import torch
import torch.nn.functional as F

from minimodels import Config, InputError
from minimodels.architectures.moe import sigmoid_bias, softmax
from minimodels.architectures.registry import build
from minimodels.ops import grouped_mlp as operation
from minimodels.ops.grouped_mlp import grouped_mlp


def same(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def make(text):
    torch.manual_seed(0)
    layer = build(Config(width=8, layers=text)).double()[0].layer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


@pytest.mark.parametrize(("router", "best"), [(softmax, 1), (sigmoid_bias, 2)])
def test_a_token_visits_experts_of_its_best_groups(router, best):
    """There are 12 experts in 4 groups. Two groups are chosen by the scores of their best experts,
    and then 3 experts from these groups."""
    torch.manual_seed(0)
    logits, bias = torch.randn(2, 5, 12, dtype=torch.float64), 0.3 * torch.randn(12).double()
    _, visits, _ = router(logits, 3, bias, None, groups=(4, 2))
    scores = logits.softmax(-1) if router is softmax else logits.sigmoid() + bias
    for token, visited in zip(
        scores.view(-1, 12).tolist(), visits.view(-1, 12).tolist(), strict=True
    ):
        parts = [token[i : i + 3] for i in range(0, 12, 3)]
        worth = [sum(sorted(part)[-best:]) for part in parts]
        kept = sorted(range(4), key=lambda g: worth[g])[-2:]
        allowed = [e for e in range(12) if e // 3 in kept]
        chosen = sorted(allowed, key=lambda e: token[e])[-3:]
        assert [e for e in range(12) if visited[e]] == sorted(chosen)
    plain, every = router(logits, 3, bias, None), router(logits, 3, bias, None, groups=(4, 4))
    assert torch.equal(plain[1], every[1]) and not torch.equal(plain[1], visits)


@pytest.mark.parametrize("activation", ["silu", "gelu", "clamped"])
@pytest.mark.parametrize("biased", [False, True])
def test_the_paths_agree(biased, activation):
    """They agree in outputs and all gradients, also if a token visits no expert or an expert
    is visited by no token."""
    results = []
    for impl in ("reference", "torch"):
        torch.manual_seed(0)
        shapes = ((9, 4), (9, 5), (5, 6, 4), (5, 6, 4), (5, 4, 6), (5, 6), (5, 6), (5, 4))
        parts = [(3 * torch.randn(s, dtype=torch.float64)).requires_grad_() for s in shapes]
        visits = torch.rand(9, 5) < 0.4
        visits[3], visits[:, 2] = False, False
        x, gates, gate, up, out, *biases = parts
        y = grouped_mlp(
            x,
            gates,
            visits,
            gate,
            up,
            out,
            None,
            impl,
            tuple(biases) if biased else None,
            activation,
        )
        y.square().sum().backward()
        results.append([y, *(part.grad for part in parts)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            same(one, other)


def test_a_clamped_gate_is_that_of_gpt_oss():
    gate, up = torch.tensor([-9.0, 0.5, 9.0]), torch.tensor([-9.0, 0.5, 9.0])
    low, high = gate.clamp(max=7), up.clamp(-7, 7)
    same(operation.GATED["clamped"](gate, up), low * torch.sigmoid(1.702 * low) * (high + 1))


def test_the_kernel_refuses_what_it_lacks(monkeypatch):
    monkeypatch.setattr(operation, "choose", lambda *_: "triton")
    x, weight = torch.randn(3, 4), torch.randn(2, 4, 4)
    arguments = (x, torch.ones(3, 2), torch.ones(3, 2).bool(), weight, weight, weight)
    with pytest.raises(InputError, match="no biases and only silu"):
        grouped_mlp(*arguments, impl="triton", activation="gelu")
    assert grouped_mlp(*arguments, impl="auto", activation="gelu").shape == x.shape


def test_shared_experts_have_a_width_and_a_gate():
    layer = make("moe(experts=3, shared_experts=2, shared_width=5, shared_gate=true)")
    x = torch.randn(2, 4, 8, dtype=torch.float64)
    assert layer.shared.up.weight.shape == (5, 8)
    whole, _ = layer(x)
    shared, _ = layer.shared(x)
    gated = torch.sigmoid(F.linear(x, layer.shared_gate.weight)) * shared
    layer.shared_gate.weight.data.zero_()
    same(whole - layer(x)[0], gated - shared / 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("groups=2", "groups: 2 .* softmax, sigmoid_bias"),
        ("router=softmax, groups=3", "groups: 3 .* divisor of experts 8"),
        ("router=sigmoid_bias, groups=8, groups_per_token=2", "groups: 8 .* 2 or more"),
        ("router=softmax, groups=4, groups_per_token=5", "groups_per_token: 5 .* 1 to 4"),
        ("router=softmax, groups=4, experts_per_token=3", "groups_per_token: 1 .* 2 to 4"),
    ],
)
def test_groups_that_do_not_fit(options, message):
    with pytest.raises(InputError, match=message):
        make(f"moe({options})")
