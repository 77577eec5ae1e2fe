"""The laws that every layer and every model obeys. The layers are listed in tests/models.py."""

import copy
import random

import pytest
import torch
from models import (
    ALL,
    CASES,
    MODELS,
    NAMES,
    NOT_CAUSAL,
    SHARED,
    TOKENWISE,
    WIDTH,
    make,
    same,
    tensors,
)
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from minimodels import LM, Config, InputError
from minimodels.architectures.registry import LAYERS, WRAPPERS
from minimodels.context import Context
from minimodels.layers import flops, inactive_parameters, state_bytes
from minimodels.ledger import ledger

B, T, D = 3, 23, WIDTH
# PyTorch's counter does not know it
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
law = pytest.mark.parametrize("layers", ALL)
once = pytest.mark.parametrize("layers", NAMES)


@pytest.fixture(autouse=True)
def short_chunks_of_the_delta_rule(monkeypatch):
    """Chunks of 8 tokens, so that a text of 23 has several."""
    monkeypatch.setattr("minimodels.ops.delta_rule.CHUNK", 8)


def test_every_layer_obeys_the_laws():
    assert list(CASES) == [*LAYERS, *WRAPPERS]
    for name, texts in CASES.items():
        assert all(text.startswith(name) for text in texts)


def text(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def attention_flops(q, k, v, *args, out_shape=None, **kwargs):
    # every query head meets keys and values
    return sdpa_flop_count(q, *((*q[:2], *shape[2:]) for shape in (k, v)))


def gradients(stack, x, y, state):
    """Gradients of a loss that gives every output and every number of the final
    state a different weight."""
    outputs = [y, *(leaf for leaf in tensors(state) if leaf.is_floating_point())]
    weights = [
        torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view_as(leaf) for leaf in outputs
    ]
    loss = sum((leaf * weight).sum() for leaf, weight in zip(outputs, weights, strict=True))
    names = ["x", *(name for name, _ in stack.named_parameters())]
    values = torch.autograd.grad(loss, [x, *stack.parameters()], allow_unused=True)
    return dict(zip(names, values, strict=True))


@law
def test_chunking(layers):
    """Any split of a sequence gives the outputs, final state and gradients of the whole."""
    stack, x = make(layers), text().requires_grad_()
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
def test_causality(layers):
    """A changed token changes nothing before it, and something from its place on."""
    stack, x = make(layers), text()
    before, _ = stack(x)
    for t in (0, T // 3, T - 1):
        changed = x.clone()
        changed[:, t] += 1
        after, _ = stack(changed)
        same(after[:, :t], before[:, :t])
        assert not torch.allclose(after[:, t], before[:, t])


@pytest.mark.parametrize("layers", NOT_CAUSAL)
def test_what_is_not_causal_is_so_and_says_so(layers):
    """With routing over the whole sequence, a later token changes the result of earlier ones.
    Generation rejects such a model."""
    training = NOT_CAUSAL[layers]
    stack, x = make(layers).train(training), text()
    before, _ = stack(x)
    changed = x.clone()
    changed[:, -1] *= -5
    after, _ = stack(changed)
    assert not torch.allclose(after[:, :-1], before[:, :-1])
    model = LM(Config(layers=layers, width=D)).train(training)
    assert not model.causal
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    _, state = model(tokens)
    with pytest.raises(InputError, match="whole sequence"):
        model(tokens, state)


@law
def test_batch_independence(layers):
    """A row of a batch, padded or not, gives what it gives alone, and
    continues as it would alone."""
    stack, x = make(layers), text()
    together, _ = stack(x)
    for row in range(B):
        same(stack(x[row : row + 1])[0], together[row : row + 1])

    lengths = torch.tensor([T, 1, T // 2])
    positions = torch.arange(T).expand(B, T)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    outputs, carried = stack(x, None, Context(positions))
    more = text(2)[:, :6]
    first, carried = stack(more[:, :1], carried)  # positions inferred from the state
    second, _ = stack(more[:, 1:], carried)
    for row, length in enumerate(lengths.tolist()):
        alone, state = stack(x[row : row + 1, :length])
        same(outputs[row : row + 1, :length], alone)
        following, _ = stack(more[row : row + 1], state)
        same(torch.cat((first, second), dim=1)[row : row + 1], following)


DOCUMENTS = ((1, 7, 15), (9, 13, 1), (2, 3, 4))  # lengths in each row; the last row ends in padding


def packed() -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and starts (B, T) of the documents."""
    positions, starts = torch.full((B, T), -1), torch.full((B, T), -1)
    for row, lengths in enumerate(DOCUMENTS):
        begin = 0
        for length in lengths:
            positions[row, begin : begin + length] = torch.arange(begin, begin + length)
            starts[row, begin : begin + length] = begin
            begin += length
    return positions, starts


def documents() -> list[tuple[int, slice]]:
    """The row and the slice of every document."""
    found = []
    for row, lengths in enumerate(DOCUMENTS):
        ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
        found += [
            (row, slice(end - length, end)) for end, length in zip(ends, lengths, strict=True)
        ]
    return found


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("layers", [*ALL, "moe(experts=4, router=expert_choice)"])
def test_packing(layers, training):
    """Documents in one row give what each gives alone: outputs, and the gradients
    of inputs and parameters."""
    stack, x = make(layers).train(training), text().requires_grad_()
    weight = torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view_as(x)
    together, _ = stack(x, None, Context(*packed()))
    wanted = [x, *stack.parameters()]
    loss = sum((together * weight)[row, place].sum() for row, place in documents())
    expected = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
    total = [torch.zeros_like(each) for each in wanted]
    for row, place in documents():
        alone, _ = stack(x[row : row + 1, place])
        same(together[row : row + 1, place], alone)
        loss = (alone * weight[row : row + 1, place]).sum()
        gradients = torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)
        total = [a + b for a, b in zip(total, gradients, strict=True)]
    for name, a, b in zip(["x", *dict(stack.named_parameters())], total, expected, strict=True):
        torch.testing.assert_close(
            b, a, rtol=1e-7, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}"
        )


@law
def test_no_document_sees_another(layers):
    """The gradient of a document's outputs is exactly zero in all others."""
    stack, x = make(layers), text().requires_grad_()
    y, _ = stack(x, None, Context(*packed()))
    for row, place in documents():
        (gradient,) = torch.autograd.grad(y[row, place].sum(), x, retain_graph=True)
        outside = torch.ones(B, T, dtype=torch.bool)
        outside[row, place] = False
        assert (gradient[outside] == 0).all()
        assert (gradient[row, place] != 0).any()


@law
def test_packed_documents_in_pieces(layers):
    """A row of documents that is cut at any place continues as if it were whole."""
    stack, x = make(layers), text()
    context = Context(*packed())
    whole, _ = stack(x, None, context)
    for cuts in ([8], [1, 2, 10], [4, 9, 15, 22]):
        outputs, state = [], None
        pieces = (part.tensor_split(cuts, dim=1) for part in (x, context.positions, context.starts))
        for chunk, positions, starts in zip(*pieces, strict=True):
            y, state = stack(chunk, state, Context(positions, starts))
            outputs.append(y)
        y = torch.cat(outputs, dim=1)
        for row, place in documents():
            same(y[row, place], whole[row, place])


@law
def test_a_packed_row_continues(layers):
    """After documents and padding, the last document of each row continues as it would alone."""
    stack, x, more = make(layers), text(), text(2)[:, :4]
    positions, starts = packed()
    _, state = stack(x, None, Context(positions, starts))
    seen = positions.amax(1, keepdim=True) + 1
    last = starts.amax(1, keepdim=True)
    y, _ = stack(more, state, Context(seen + torch.arange(4), last.expand(-1, 4)))
    for row, lengths in enumerate(DOCUMENTS):
        end = sum(lengths)
        _, alone = stack(x[row : row + 1, end - lengths[-1] : end])
        same(y[row : row + 1], stack(more[row : row + 1], alone)[0])


@pytest.mark.parametrize("layers", SHARED)
def test_a_shared_layer_is_one_layer(layers):
    """Its parameters exist once, its gradient is the sum over its uses, and
    each use has its own state."""
    shared = make(layers)
    apart = make(layers.partition(":=")[0] + "=" + layers.partition(":=")[2])
    names = dict(shared.named_parameters())
    assert len(names) < len(dict(apart.named_parameters()))
    source = {
        name: tensor.detach() for name, tensor in shared.named_parameters(remove_duplicate=False)
    }
    apart.load_state_dict({**apart.state_dict(), **source})
    x = text()
    y, state = shared(x)
    same(y, apart(x)[0])
    assert len(state) == len(shared)
    expected: dict[int, torch.Tensor] = {}
    unused = {"allow_unused": True, "materialize_grads": True}  # the predictor of mixture-of-depths
    gradients = torch.autograd.grad(apart(x)[0].sum(), list(apart.parameters()), **unused)
    owners = dict(shared.named_parameters(remove_duplicate=False))
    for (name, _), gradient in zip(apart.named_parameters(), gradients, strict=True):
        key = id(owners[name])
        expected[key] = expected.get(key, 0) + gradient
    for parameter, gradient in zip(
        names.values(), torch.autograd.grad(y.sum(), list(names.values()), **unused), strict=True
    ):
        same(gradient, expected[id(parameter)], 1e-8)


@law
@pytest.mark.parametrize("ragged", [False, True], ids=["whole", "ragged"])
def test_states_stay_good(layers, ragged, monkeypatch):
    """In generation, states may share memory. Still, tokens one by one give what the whole text
    gives, and any state can be continued a second time, in another way."""
    monkeypatch.setattr("minimodels.ops.cache.SPARE", 3)  # so that the spare memory is not enough
    stack, x, other = make(layers), text(), text(2)
    positions = None
    if ragged:
        positions = torch.arange(5).expand(B, 5)
        positions = positions.masked_fill(positions >= torch.tensor([5, 1, 3])[:, None], -1)
    with torch.inference_mode():
        _, start = stack(x[:, :5], None, Context(positions))
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
def test_reference_equals_torch(layers, training):
    """Every path of an operation gives the same outputs, states and gradients."""
    x, state = text().requires_grad_(), None
    results = {}
    for impl in ("reference", "torch"):
        stack = make(layers, impl=impl).train(training)
        if not training:
            with torch.no_grad():
                _, state = stack(x[:, :5])
        y, after = stack(x[:, 5:], state)
        results[impl] = [y, *tensors(after), *gradients(stack, x, y, after).values()]
    for reference, fast in zip(results["reference"], results["torch"], strict=True):
        same(fast, reference, 1e-8)


@once
@pytest.mark.parametrize("autocast", [False, True], ids=["cast", "autocast"])
def test_runs_in_bfloat16(layers, autocast):
    """A model in bfloat16, or under autocast to it, trains and carries its state, with results
    close to those in full precision."""
    stack, x = make(layers).train(), 0.5 * text()
    exact, _ = stack(x)
    dtype = torch.float32 if autocast else torch.bfloat16
    half, x = make(layers).to(dtype).train(), x.to(dtype)
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


@once
def test_compiles_to_one_graph(layers):
    """In training, torch.compile never falls back to Python, and computes the same."""
    stack, x = make(layers).train(), text()
    expected, _ = stack(x)
    torch.compiler.reset()
    with torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True
    ):
        y, _ = torch.compile(stack, fullgraph=True, backend="aot_eager")(x)
    same(y, expected)


@law
# at which C · T is whole, and which are longer than the windows
@pytest.mark.parametrize("context", [20, 160])
def test_ledger_equals_measurement(layers, context):
    """Parameters, FLOPs and bytes of state are those of a real model in a real forward pass."""
    stack = make(layers, dtype=torch.float32).train()
    config = Config(layers=layers, width=D)
    x = torch.randn(2, context, D)
    with FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: attention_flops}) as counter:
        _, state = stack(x)
    assert flops(stack, context) * 2 * context == pytest.approx(counter.get_total_flops())
    assert state_bytes(stack, context, 4) * 2 == sum(
        leaf.nbytes for leaf in tensors(state) if leaf.is_floating_point()
    )
    cost = ledger(config, context)
    assert cost.parameters == sum(p.numel() for p in LM(config).parameters())
    assert cost.active == cost.parameters - inactive_parameters(stack)


@pytest.mark.parametrize("layers", ["mlp", "moe(experts=4)", "mamba(state_size=4)"])
def test_a_backward_pass_costs_two_forward_passes(layers):
    """The ledger counts a training step this way. The convolution is left out, because PyTorch
    counts its derivative differently."""
    stack, x = (
        make(layers, dtype=torch.float32).train(),
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


@pytest.mark.parametrize("layers", [*NAMES, *MODELS.values()])
def test_overfits_one_batch(layers):
    """Training reaches every part: a small model memorises one batch."""
    torch.manual_seed(0)
    if layers.startswith((*TOKENWISE, "mod(")) or "mod(" in layers:
        tokens = torch.randperm(16).expand(2, 16)  # each token alone determines the next
    else:
        tokens = torch.randint(16, (2, 16))  # the tokens before are needed
    lm = LM(Config(layers=layers, width=32, vocab=16)).train()
    optimizer = torch.optim.Adam(lm.parameters(), lr=3e-3)
    for _ in range(300):
        loss, parts = lm.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        lm.after_step()
    assert parts["cross_entropy"] < 0.2
    lm.loss(tokens[:, :-1], tokens[:, 1:])
    copied = copy.deepcopy(lm)  # impossible if a graph remained from the last forward pass
    same(copied.eval()(tokens)[0], lm.eval()(tokens)[0])


def test_a_model_refuses_no_tokens():
    with pytest.raises(
        ValueError, match=r"tokens are \(2, 0\); accepted: \(B, T\), both 1 or more"
    ):
        LM(Config(vocab=7, width=8, layers="mamba"))(torch.zeros(2, 0, dtype=torch.int64))


@pytest.mark.parametrize("layers", NAMES)
def test_states_hold_no_memory_but_their_own(layers):
    stack, positions = make(layers), torch.arange(T).expand(B, T).clone()
    positions[0, 10:] = -1
    for given in (None, positions):
        with torch.no_grad():
            _, state = stack(text(), None, Context(given))
        for part in tensors(state):
            assert part.untyped_storage().nbytes() == part.nbytes


def test_a_stack_adds_up():
    stack, x = make("attention mlp mod(mlp, capacity=0.5) mamba mod(mlp, capacity=0.5) mlp"), text()
    expected = x
    for layer in stack:
        wrapper = hasattr(layer, "group")
        expected = (
            layer(expected)[0] if wrapper else expected + layer.layer(layer.norm(expected))[0]
        )
    same(stack(x)[0], expected)


def test_initial_weights():
    """N(0, init_std²), divided by the square root of the depth for what is added to the
    stream; biases are zero."""
    torch.manual_seed(0)
    layers = "(attention(bias=true) mlp(bias=true) moe)*3"
    config = Config(layers=layers, width=256, tie_embeddings=False)
    for name, parameter in LM(config).named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == float("norm" in name)).all(), name
        else:
            std = config.init_std / (config.depth**0.5 if ".out" in name else 1)
            assert parameter.detach().std() == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("balance", ["layer", "pooled"])
def test_the_parts_of_the_loss_add_up(balance):
    torch.manual_seed(0)
    moe = f"moe(experts=4, balance={balance})"
    lm = LM(Config(layers=f"{moe}*2 mod({moe}, capacity=0.5)", vocab=7, width=D))
    total, parts = lm.loss(tokens := torch.randint(7, (2, 6)), tokens)
    assert not any(part.requires_grad for part in parts.values())
    same(sum(parts.values()), total.detach(), 1e-6)
    assert parts["balance"] < 0.1  # it is weighted


def test_a_step_reaches_every_layer():
    torch.manual_seed(0)
    moe = "moe(experts=4, router=sigmoid_bias)"
    lm = LM(Config(layers=f"{moe} mod({moe}, capacity=0.5)", vocab=7, width=D)).train()
    lm.loss(*torch.randint(7, (2, 2, 6)))
    lm.after_step()
    biases = [buffer for name, buffer in lm.named_buffers() if name.endswith("bias")]
    assert len(biases) == 2
    assert all(bias.abs().sum() > 0 for bias in biases)


def test_a_model_counts_its_head():
    lm = LM(Config(vocab=7, width=16, layers="mlp"))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm(torch.zeros(1, 5, dtype=torch.int64))
    assert lm.flops(5) * 5 == counter.get_total_flops()


def test_a_model_refuses_targets_of_another_shape():
    with pytest.raises(ValueError, match="targets are"):
        LM(Config(vocab=7, width=8, layers="mlp")).loss(
            *(torch.zeros(s, dtype=torch.int64) for s in ((2, 6), (6, 2)))
        )
