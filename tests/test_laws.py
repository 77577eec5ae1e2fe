"""The laws that every layer and every model obeys. Cases stand in tests/models.py."""

import copy
import random

import pytest
import torch
from models import CASES, NOT_CAUSAL, SHAPE, TOKENWISE, make, same, tensors
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from minimodels import LM, Config, InputError
from minimodels.layers import flops, idle_parameters, state_bytes
from minimodels.ledger import ledger

B, T, D = 3, 23, SHAPE["width"]
CPU_ATTENTION = (
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
)  # which PyTorch's counter does not know
law = pytest.mark.parametrize("case", CASES)


def text(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention_flops(q, k, v, *args, out_shape=None, **kwargs):
    return sdpa_flop_count(
        q, *((*q[:2], *shape[2:]) for shape in (k, v))
    )  # every query head meets keys and values


def gradients(stack, x, y, state):
    """Of a loss that weighs every output and every number of the final state differently."""
    outputs = [y, *(leaf for leaf in tensors(state) if leaf.is_floating_point())]
    weights = [
        torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view_as(leaf) for leaf in outputs
    ]
    loss = sum((leaf * weight).sum() for leaf, weight in zip(outputs, weights, strict=True))
    names = ["x", *(name for name, _ in stack.named_parameters())]
    values = torch.autograd.grad(loss, [x, *stack.parameters()], allow_unused=True)
    return dict(zip(names, values, strict=True))


@law
def test_chunking(case):
    """Any split of a sequence gives the outputs, final state and gradients of the whole."""
    stack, x = make(CASES[case]), text().requires_grad_()
    whole, state = stack(x)
    expected = gradients(stack, x, whole, state)
    for seed, pieces in enumerate((2, 4, T)):
        cuts = sorted(random.Random(seed).sample(range(1, T), pieces - 1))
        outputs, carried = [], None
        for chunk in x.tensor_split(cuts, dim=1):
            y, carried = stack(chunk, carried)
            outputs.append(y)
        parts = torch.cat(outputs, dim=1)
        same(parts, whole)
        assert len(tensors(carried)) == len(tensors(state))
        for after, before in zip(tensors(carried), tensors(state), strict=True):
            same(after, before)
        for name, gradient in gradients(stack, x, parts, carried).items():
            same(gradient, expected[name], 1e-7)


@law
def test_causality(case):
    """A changed token changes nothing before it, and something from it on."""
    stack, x = make(CASES[case]), text()
    before, _ = stack(x)
    for t in (0, T // 3, T - 1):
        changed = x.clone()
        changed[:, t] += 1
        after, _ = stack(changed)
        same(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("case", NOT_CAUSAL)
def test_what_is_not_causal_is_so_and_says_so(case):
    """Routing over the whole sequence lets a later token change what earlier ones get, and is refused for generation."""
    fields, training = NOT_CAUSAL[case]
    stack, x = make(fields).train(training), text()
    before, _ = stack(x)
    changed = x.clone()
    changed[:, -1] *= -5
    after, _ = stack(changed)
    assert not torch.allclose(after[:, :-1], before[:, :-1])
    model = LM(Config(**{**SHAPE, **fields})).train(training)
    assert not model.causal
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    _, state = model(tokens)
    with pytest.raises(InputError, match="whole sequence"):
        model(tokens, state)


@law
def test_batch_independence(case):
    """A row of a batch, padded or not, gives what it gives alone, and goes on as it would alone."""
    stack, x = make(CASES[case]), text()
    together, _ = stack(x)
    for row in range(B):
        same(stack(x[row : row + 1])[0], together[row : row + 1])

    lengths = torch.tensor([T, 1, T // 2])
    positions = torch.arange(T).expand(B, T)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    outputs, carried = stack(x, None, positions)
    more = text(2)[:, :6]
    first, carried = stack(more[:, :1], carried)  # positions inferred from the state
    second, _ = stack(more[:, 1:], carried)
    for row, length in enumerate(lengths.tolist()):
        alone, state = stack(x[row : row + 1, :length])
        same(outputs[row : row + 1, :length], alone)
        following, _ = stack(more[row : row + 1], state)
        same(torch.cat((first, second), dim=1)[row : row + 1], following)


@law
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_states_stay_good(case, ragged, monkeypatch):
    """In generation, where states may share memory, tokens one by one give what the whole gives, and one can go on from any
    state a second time, in another way."""
    monkeypatch.setattr("minimodels.ops.cache.SPARE", 3)  # so that memory is outgrown
    stack, x, other = make(CASES[case]), text(), text(2)
    positions = None
    if ragged:
        positions = torch.arange(5).expand(B, 5)
        positions = positions.masked_fill(positions >= torch.tensor([5, 1, 3])[:, None], -1)
    with torch.inference_mode():
        _, start = stack(x[:, :5], None, positions)
        expected, _ = stack(x[:, 5:], start)
        state, states = start, []
        for t in range(5, T):
            y, after = stack(x[:, t : t + 1], state)
            same(y, expected[:, t - 5 : t - 4])
            states.append(state)
            state = after
        for t, earlier in reversed(list(enumerate(states))):
            text_of_its_own = torch.cat((x[:, 5 : 5 + t], other[:, :2]), dim=1)
            same(stack(other[:, :2], earlier)[0], stack(text_of_its_own, start)[0][:, t:])


@law
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_reference_equals_torch(case, training):
    """Every path of an operation gives the same outputs, states and gradients."""
    x, state = text().requires_grad_(), None
    results = {}
    for impl in ("reference", "torch"):
        stack = make({**CASES[case], "impl": impl}).train(training)
        if not training:
            with torch.no_grad():
                _, state = stack(x[:, :5])
        y, after = stack(x[:, 5:], state)
        results[impl] = [y, *tensors(after), *gradients(stack, x, y, after).values()]
    for reference, fast in zip(results["reference"], results["torch"], strict=True):
        same(fast, reference, 1e-8)


@law
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_runs_in_bfloat16(case, autocast):
    """A model in bfloat16, or autocast to it, trains and carries its state, near what it computes in full precision."""
    stack, x = make(CASES[case]).train(), 0.5 * text()
    exact, _ = stack(x)
    dtype = torch.float32 if autocast else torch.bfloat16
    half, x = make(CASES[case]).to(dtype).train(), x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y, _ = half(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype
    assert all(
        parameter.grad.isfinite().all()
        for parameter in half.parameters()
        if parameter.grad is not None
    )
    assert (y - exact).abs().median() < 0.1 * exact.abs().median()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        _, state = half.eval()(x)
        y, _ = half(x[:, :1], state)
    assert y.isfinite().all()


@law
def test_compiles_to_one_graph(case):
    """In training, torch.compile finds no reason to fall back to Python, and computes the same."""
    stack, x = make(CASES[case]).train(), text()
    expected, _ = stack(x)
    torch.compiler.reset()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        y, _ = torch.compile(stack, fullgraph=True, backend="aot_eager")(x)
    same(y, expected)


@law
@pytest.mark.parametrize(
    "context", [20, 160]
)  # at which C · T is whole, and which are longer than the windows
def test_ledger_equals_measurement(case, context):
    """Parameters, FLOPs and bytes of state are those of a real model in a real forward pass."""
    stack = make(CASES[case], dtype=torch.float32).train()
    config = Config(**{**SHAPE, **CASES[case]})
    x = torch.randn(2, context, D)
    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flops}) as counter:
        _, state = stack(x)
    assert flops(stack, context) * 2 * context == pytest.approx(counter.get_total_flops())
    assert state_bytes(stack, context, 4) * 2 == sum(
        leaf.nbytes for leaf in tensors(state) if leaf.is_floating_point()
    )
    cost = ledger(config, context)
    assert cost.parameters == sum(p.numel() for p in LM(config).parameters())
    assert cost.active == cost.parameters - idle_parameters(stack)


@pytest.mark.parametrize("case", ["mlp", "moe", "mamba"])
def test_a_backward_pass_costs_two_forward_passes(case):
    """As the ledger counts a training step. Not the convolution, whose derivative PyTorch counts otherwise."""
    stack, x = (
        make(CASES[case], dtype=torch.float32).train(),
        torch.randn(2, 20, D, requires_grad=True),
    )
    totals = []
    for call in (lambda: stack(x)[0].sum(), lambda: stack(x)[0].sum().backward()):
        with FlopCounterMode(display=False) as counter:
            call()
        counts = counter.get_flop_counts()["Global"]
        totals.append(
            sum(
                count
                for operation, count in counts.items()
                if operation != torch.ops.aten.convolution
            )
        )
    assert totals[1] == 3 * totals[0]


@pytest.mark.parametrize(
    "case", [case for case in CASES if " " not in case or case.endswith("preset")]
)
def test_overfits_one_batch(case):
    """Training reaches every part: a small model learns one batch by heart."""
    torch.manual_seed(0)
    if case in TOKENWISE or "mod(" in CASES[case]["layers"]:
        tokens = torch.randperm(16).expand(2, 16)  # each token alone tells what follows
    else:
        tokens = torch.randint(16, (2, 16))  # what came before is needed
    lm = LM(Config(**{**SHAPE, **CASES[case], "width": 32, "vocab": 16})).train()
    optimizer = torch.optim.Adam(lm.parameters(), lr=3e-3)
    for _ in range(300):
        loss, parts = lm.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lm.after_step()
    assert parts["cross_entropy"] < 0.2
    lm.loss(tokens[:, :-1], tokens[:, 1:])
    copied = copy.deepcopy(lm)  # which a graph kept from the last forward would forbid
    same(copied.eval()(tokens)[0], lm.eval()(tokens)[0])


def test_a_model_refuses_no_tokens():
    with pytest.raises(
        ValueError, match=r"tokens are \(2, 0\); accepted: \(B, T\), both 1 or more"
    ):
        LM(Config(vocab=7, width=8, heads=2, layers="mamba"))(torch.zeros(2, 0, dtype=torch.int64))


@pytest.mark.parametrize("layers", ["mamba", "window", "attention"])
def test_states_hold_no_memory_but_their_own(layers):
    stack, positions = make({"layers": layers}), torch.arange(T).expand(B, T).clone()
    positions[0, 10:] = -1
    for given in (None, positions):
        with torch.no_grad():
            _, state = stack(text(), None, given)
        for part in tensors(state):
            assert part.untyped_storage().nbytes() == part.nbytes


def test_a_stack_adds_up():
    stack, x = (
        make({"layers": "attention mlp mod(mlp) mamba mod(mlp) mlp", "capacity": 0.5}),
        text(),
    )
    expected = x
    for layer in stack:
        expected = (
            layer(expected)[0]
            if hasattr(layer, "group")
            else expected + layer.layer(layer.norm(expected))[0]
        )
    same(stack(x)[0], expected)


def test_initial_weights():
    """N(0, init_std²), in what is added to the stream less by the root of the depth; biases are zero."""
    torch.manual_seed(0)
    config = Config(
        layers="(attention mlp moe)*3",
        width=256,
        tie_embeddings=False,
        attention_bias=True,
        mlp_bias=True,
    )
    for name, parameter in LM(config).named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float("norm" in name)).all(), name
        else:
            std = config.init_std / (config.depth**0.5 if ".out" in name else 1)
            assert parameter.detach().std() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("balance", ["layer", "pooled"])
def test_the_parts_of_the_loss_add_up(balance):
    torch.manual_seed(0)
    lm = LM(
        Config(
            **{
                **SHAPE,
                "vocab": 7,
                "layers": "moe moe mod(moe)",
                "balance": balance,
                "capacity": 0.5,
            }
        )
    )
    total, parts = lm.loss(tokens := torch.randint(7, (2, 6)), tokens)
    assert not any(part.requires_grad for part in parts.values())
    same(sum(parts.values()), total.detach(), 1e-6)
    assert parts["balance"] < 0.1  # it is weighted


def test_a_step_reaches_every_layer():
    torch.manual_seed(0)
    lm = LM(
        Config(
            **{
                **SHAPE,
                "vocab": 7,
                "layers": "moe mod(moe)",
                "router": "sigmoid_bias",
                "capacity": 0.5,
            }
        )
    ).train()
    lm.loss(*torch.randint(7, (2, 2, 6)))
    lm.after_step()
    biases = [buffer for name, buffer in lm.named_buffers() if name.endswith("bias")]
    assert len(biases) == 2
    assert all(bias.abs().sum() > 0 for bias in biases)


def test_a_model_counts_its_head():
    lm = LM(Config(vocab=7, width=16, heads=2, layers="mlp"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(torch.zeros(1, 5, dtype=torch.int64))
    assert lm.flops(5) * 5 == counter.get_total_flops()


def test_a_model_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match="targets are"):
        LM(Config(vocab=7, width=8, heads=2, layers="mlp")).loss(
            *(torch.zeros(s, dtype=torch.int64) for s in ((2, 6), (6, 2)))
        )
