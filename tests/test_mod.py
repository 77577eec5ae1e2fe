"""Mixture-of-depths, checked against the paper and for the usual mistakes."""

import pytest
import torch
from models import make, observe, same

from minimodels import LM, Config
from minimodels.context import Context
from minimodels.layers import Stack, inactive_parameters

B, T, D = 2, 20, 16


def text() -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def wrapped(options: str = "capacity=0.3"):
    return make(f"mod(attention mlp, {options})")[0]


def taken(mod, x) -> torch.Tensor:
    """Which tokens the group changed: (B, T) bool."""
    return (mod(x)[0] != x).any(-1)


def test_all_tokens_at_weight_one_are_the_dense_group():
    """The residual is added once, and the router scales both attention and MLP."""
    mod, x = wrapped("capacity=1").train(), text()
    # a constant feature that the router reads
    x = torch.cat((x[..., :-1], torch.ones_like(x[..., :1])), -1)
    mod.router.weight.data = torch.tensor([[0.0] * (D - 1) + [1.0]], dtype=torch.float64)
    same(mod(x)[0], mod.group(x)[0])
    mod.router.weight.data *= 3
    same(mod(x)[0], x + 3 * (mod.group(x)[0] - x))


def test_training_takes_exactly_the_top_k():
    mod, x = wrapped().train(), text()
    scores = mod.router(x).squeeze(-1)
    expected = torch.zeros(B, T, dtype=torch.bool).scatter(1, scores.topk(6).indices, True)
    assert torch.equal(taken(mod, x), expected)
    _, _, record = observe(mod, x)
    assert torch.equal(record.traces["taken"][0], expected)
    mod.router.weight.data.zero_()  # all scores are equal: still k, not none
    zeros, positions = torch.zeros(B, T), torch.arange(T).expand(B, T)
    index, real = mod.select(zeros, zeros, positions, Context())
    assert index.shape == (B, 6)
    assert real.all()


def test_the_group_sees_the_chosen_tokens_in_order_at_their_own_positions():
    class Spy(torch.nn.Module):
        def forward(self, x, state, context):
            self.positions = context.positions
            return x, None

    mod, x = wrapped().train(), text()
    mod.group = Stack([spy := Spy()])
    mod(x)
    scores = mod.router(x).squeeze(-1)
    assert torch.equal(spy.positions, scores.topk(6).indices.sort(1).values)


def test_the_update_is_the_raw_weight_times_the_groups():
    mod, x = wrapped().train(), text()
    scores = mod.router(x).squeeze(-1)
    index = scores.topk(6).indices.sort(1).values
    for row in range(B):
        gathered = x[row : row + 1, index[row]]
        update = mod.group(gathered, None, Context(index[row : row + 1]))[0] - gathered
        same(
            mod(x)[0][row, index[row]],
            x[row, index[row]] + scores[row, index[row], None] * update[0],
        )


@pytest.mark.parametrize("route", ["router", "predictor"])
def test_gradients_reach_the_router_and_stop_before_the_model(route):
    mod, x = wrapped(f"capacity=0.3, route={route}").train(), text().requires_grad_()
    y, _, record = observe(mod, x)
    (through_output,) = torch.autograd.grad(y.square().sum(), mod.router.weight, retain_graph=True)
    assert through_output.abs().sum() > 0
    wanted = [x, mod.router.weight, *([] if mod.predictor is None else mod.predictor.parameters())]
    found = torch.autograd.grad(record.losses["mod"], wanted, allow_unused=True)
    if route == "router":
        assert found[1].abs().sum() > 0
    else:  # the predictor learns, and nothing else is affected
        assert found[0] is None
        assert found[1] is None
        assert all(gradient.abs().sum() > 0 for gradient in found[2:])


@pytest.mark.parametrize("route", ["router", "predictor"])
def test_the_causal_decision_learns_the_top_k(route):
    """Trained with its own loss, the decision learns to recognise the top k, much better than a
    decision never to route."""
    torch.manual_seed(0)
    mod = wrapped(f"capacity=0.3, route={route}, loss=1").train()
    parameters = mod.router.parameters() if route == "router" else mod.predictor.parameters()
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(300):
        _, _, record = observe(mod, torch.randn(16, T, D, dtype=torch.float64))
        optimizer.zero_grad()
        record.losses["mod"].backward()
        optimizer.step()
    assert record.observed["accuracy"][0] > 0.8  # never routing is right for 0.7
    assert record.observed["routed"][0].item() == pytest.approx(0.3, abs=0.2)


@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("route", ["router", "predictor"])
def test_the_decision_is_made_in_full_precision(route, parameters):
    """It does not depend on the dtype of the text or on autocast."""
    mod, x = wrapped(f"capacity=0.3, route={route}").to(parameters), text().bfloat16()
    made = []
    mod.select = lambda scores, decision, positions, context: (
        made.append((scores, decision)) or (positions[:, :0], None)
    )
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            mod(x)
    mod.double()(x.double())
    *low, exact = made
    for found in low:
        for score, expected in zip(found, exact, strict=True):
            assert score.dtype == torch.float32
            same(score.double(), expected, 1e-4)


def test_a_row_that_routes_nobody_leaves_everything():
    mod, x = wrapped("capacity=0.3, route=router"), text()
    mod.router.weight.data = torch.tensor([[0.0] * (D - 1) + [1.0]], dtype=torch.float64)
    x[..., -1] = -1.0
    y, state = mod(x)
    assert torch.equal(y, x)
    assert state.group is None
    assert state.seen.tolist() == [T, T]
    x[0, 3, -1] = 1.0
    assert taken(mod, x).sum() == 1
    _, state = mod(x, state)
    assert state.group[0].positions.tolist() == [[T + 3], [-1]]


def test_a_batch_skips_what_no_row_routes():
    """With one token per row, the group does not run if no row routes. This makes sampling fast."""
    mod = wrapped("capacity=0.3, route=router")
    mod.group.forward = None  # calling it would fail
    mod.router.weight.data.zero_()
    x = text()[:, :1]
    assert torch.equal(mod(x)[0], x)


@pytest.mark.parametrize("balance", ["layer", "pooled"])
def test_a_group_that_is_passed_by_records_nothing(balance):
    """It keeps no losses of an earlier pass, and gives no error if there was no such pass."""
    torch.manual_seed(0)
    layers = f"mod(moe(experts=4, balance={balance}), route=router)"
    model = LM(Config(vocab=7, width=16, layers=layers))
    model.after_step()  # before any forward pass
    tokens = torch.randint(7, (2, 6))
    losses = model.loss(tokens, tokens)[1]
    assert {"mod", "balance", "z"} <= losses.keys()
    model.layers[0].router.weight.data.zero_()
    model.eval()
    total, parts = model.loss(tokens, tokens)
    assert all(parts.get(name, 0) == 0 for name in ("mod", "balance", "z"))
    assert "load" not in model.observations()
    total.backward()  # without the graph of the pass before


def test_capacity_is_rounded_up_to_a_token():
    mod = wrapped("capacity=0.001").train()
    assert taken(mod, text()).sum(1).tolist() == [1, 1]


def test_top_k_in_evaluation_is_an_oracle_to_compare_with():
    mod, x = wrapped(), text()
    mod.topk = True
    same(mod(x)[0], mod.train()(x)[0])
    assert not mod.eval().causal


def test_scoring_leaves_the_router_alone():
    """This is so in half precision too, because another thread may be scoring."""
    lm = LM(Config(width=8, layers="mod(mlp, route=predictor)")).bfloat16().eval()
    (block,) = lm.layers
    seen = []
    block.predictor[1].register_forward_pre_hook(
        lambda *_: seen.append(block.predictor[0].weight.dtype)
    )
    lm(torch.zeros(1, 5, dtype=torch.int64))
    assert seen == [torch.bfloat16]


def test_padding_is_not_routed_and_teaches_nothing():
    mod, x = wrapped("capacity=0.3, loss=1").train(), text()
    positions = torch.arange(T).expand(B, T).clone()
    positions[1, 4:] = -1  # fewer than k = 6 are left
    seen = []
    for fill in (0.0, 100.0):
        x[1, 4:] = fill * mod.router.weight[0].detach()  # so that it scores highest
        y, _, record = observe(mod, x, positions=positions)
        observed = [value for (value,) in record.observed.values()]
        taken = record.traces["taken"][0]
        seen.append((y[0], y[1, :4], record.losses["mod"], *observed, taken))
    for one, other in zip(*seen, strict=True):
        same(one, other)
    assert not taken[1, 4:].any()
    _, _, record = observe(mod, x, positions=torch.full((B, T), -1))
    assert record.losses["mod"] == 0


@pytest.mark.parametrize("route", ["router", "predictor"])
def test_the_loss_of_the_decision_has_its_weight(route):
    one, quarter = (
        observe(wrapped(f"capacity=0.3, route={route}, loss={weight}").train(), text())[2]
        for weight in (1.0, 0.25)
    )
    same(quarter.losses["mod"], one.losses["mod"] / 4)
    assert not any(value.requires_grad for values in one.observed.values() for value in values)


def test_the_number_of_routed_tokens_is_rounded_up():
    assert wrapped("capacity=0.07").routed(100) == 7
    assert wrapped("capacity=0.3").routed(21) == 7


def test_inactive_are_the_experts_too_that_a_routed_token_does_not_visit():
    layers = make("mod(moe(experts=4, experts_per_token=1, router=softmax), capacity=0.25)")
    group = layers[0].group
    total, experts = sum(p.numel() for p in group.parameters()), 3 * group[0].layer.out.numel()
    assert inactive_parameters(layers) == total - 0.25 * (total - 0.75 * experts)


def test_a_wrapper_within_a_group_that_nobody_takes_records_nothing():
    stack = make("mod(mod(mlp), route=router)").train()
    _, _, record = observe(stack, text())
    assert [len(record.observed[name]) for name in ("routed", "accuracy")] == [2, 2]
    stack[0].router.weight.data.zero_()
    _, _, record = observe(stack.eval(), text())
    assert record.observed == {"routed": [0]}
    assert not record.losses


def test_each_document_routes_its_own_top_k():
    """Documents in a row do not compete, and the trace shows which tokens were taken."""
    mod, x = wrapped("capacity=0.25").train(), text()
    starts = torch.tensor([[0] * 8 + [8] * 12, [0] * 5 + [5] * 15])
    _, _, record = observe(mod, x, starts=starts)
    (found,) = record.traces["taken"]
    for row, cut in enumerate((8, 5)):
        for piece in (slice(0, cut), slice(cut, T)):
            scores = mod.router(x[row, piece]).squeeze(-1)
            expected = torch.zeros(len(scores), dtype=torch.bool)
            expected[scores.topk(-(-len(scores) // 4)).indices] = True
            assert torch.equal(found[row, piece], expected)
