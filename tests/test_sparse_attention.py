"""Sparse attention: what the indexer chooses, how it learns, and that decoding chooses the same."""

import pytest
import torch
import torch.nn.functional as F

from minimodels import LM, Config, InputError
from minimodels.architectures import sparse_attention
from minimodels.architectures.registry import build
from minimodels.context import Context
from minimodels.layers import state_bytes

OPTIONS = "q_rank=6, kv_rank=5, head_dim=3, rope_dim=2, value_dim=7"
FEW = f"sparse_attention(keys=4, index_heads=1, {OPTIONS})"  # half of the scores are zero


def make(text, seed=0, **fields):
    torch.manual_seed(seed)
    layer = build(Config(**{"width": 16, "layers": text, **fields})).double()[0].layer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer.eval()


def text(rows=2, length=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, 16, dtype=torch.float64, generator=generator)


def same(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_with_k_as_large_as_the_text_it_is_latent_attention(impl, training):
    """The outputs agree to 1e-12, and so do the gradients of the parameters that both have."""
    layer = make(f"sparse_attention(keys=16, {OPTIONS})", impl=impl).train(training)
    dense = make(f"latent_attention({OPTIONS})").train(training)
    dense.load_state_dict(layer.latent.state_dict())
    y, expected = layer(text())[0], dense(text())[0]
    same(y, expected)
    gradients = torch.autograd.grad(y.square().sum(), list(layer.latent.parameters()))
    for gradient, other in zip(
        gradients,
        torch.autograd.grad(expected.square().sum(), list(dense.parameters())),
        strict=True,
    ):
        same(gradient, other, 1e-10)


@pytest.mark.parametrize("k", [1, 3, 8, 16])
def test_the_latest_of_equal_scores_are_chosen(k):
    """As by a stable sort of the scores from the last to the first."""
    scores = torch.randint(3, (50, 16), generator=torch.Generator().manual_seed(0)).double()
    scores[:, 13:] = float("-inf")
    chosen = sparse_attention.latest_of_the_best(scores, k).sort(-1).values
    expected = 15 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)[:, :k]
    assert torch.equal(chosen, expected.sort(-1).values)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_decoding_equals_prefill_although_many_scores_are_equal(dtype, impl):
    layer, x = make(FEW, impl=impl).to(dtype), text(4, 40).to(dtype)
    expected, _ = layer(x)
    state, outputs = None, []
    for token in x.split(1, dim=1):
        y, state = layer(token, state)
        outputs.append(y)
    same(torch.cat(outputs, 1), expected, 1e-5 if dtype == torch.float32 else 1e-12)


@torch.no_grad()
def test_decoding_reads_only_the_chosen_latents(monkeypatch):
    """The others may be anything, even nan."""
    layer, x, chosen = make(FEW), text(), []
    choose = sparse_attention.latest_of_the_best
    monkeypatch.setattr(
        sparse_attention,
        "latest_of_the_best",
        lambda *given: chosen.append(choose(*given)) or chosen[-1],
    )
    _, state = layer(x[:, :-1])
    expected, _ = layer(x[:, -1:], state)
    unread = torch.ones(2, 16, dtype=torch.bool).scatter(1, chosen[-1].squeeze(1), False)[:, :-1]
    assert unread.sum(1).ge(16 - 4 - 1).all()
    memory = state.keys.masked_fill(unread[:, None, :, None], float("nan"))
    assert torch.equal(layer(x[:, -1:], state._replace(keys=memory, room=None))[0], expected)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("k", [4, 12])
def test_the_loss_is_the_divergence_from_the_mean_weights(k, impl):
    """Equation (3) if k is as large as the text and equation (4) if not: over the chosen keys of
    each real token."""
    layer = make(f"sparse_attention(keys={k}, index_loss=0.5, {OPTIONS})", impl=impl).train()
    x, positions = text(2, 12), torch.arange(12).expand(2, -1).clone()
    positions[1, 9:] = -1
    context = Context(positions)
    layer(x, None, context)

    low, plain, turned, memory = layer.latent.project(x, torch.arange(12), {})
    queries, keys, shares = layer.indexer(x, low, layer.latent.angles(torch.arange(12), {}))
    k_all, _ = layer.latent.expand(memory)
    logits = torch.cat((plain, turned), -1) @ k_all.mT * layer.latent.scale  # (B, H, T, S)
    losses = []
    for row, length in ((0, 12), (1, 9)):
        for t in range(length):
            scores = torch.stack([
                (shares[row, t] * F.relu(queries[row, t] @ keys[row, 0, s])).sum()
                for s in range(t + 1)
            ])  # fmt: skip
            best = sorted(range(t + 1), key=lambda s: (scores[s].item(), s))[-k:]
            p = logits[row, :, t, best].softmax(-1).mean(0)
            losses.append((p * (p.log() - scores[best].log_softmax(-1))).sum())
    same(context.record.finish()["index"], 0.5 * sum(losses) / len(losses), 1e-10)


def test_the_losses_are_apart():
    """The indexer's loss reaches the indexer alone, and no other loss reaches it."""
    layer, x, context = make(FEW).train(), text().requires_grad_(), Context()
    y, _ = layer(x, None, context)
    names = ["x", *(name for name, _ in layer.named_parameters())]
    of_index, of_output = (
        dict(zip(names, torch.autograd.grad(
            loss, [x, *layer.parameters()], retain_graph=True, allow_unused=True
        ), strict=True))
        for loss in (context.record.finish()["index"], y.sum())
    )  # fmt: skip
    for name in names:
        inside = name.startswith("indexer.")
        assert (of_index[name] is not None) == inside, name
        assert (of_output[name] is not None) == (not inside), name
        assert (of_index if inside else of_output)[name].abs().sum() > 0, name


def test_there_is_a_loss_only_in_training_and_with_a_weight():
    for options, training in (("", False), (", index_loss=0", True)):
        context = Context()
        make(FEW.replace(")", options + ")")).train(training)(text(), None, context)
        assert not context.record.finish()


def test_the_warm_up_teaches_the_indexer_what_attention_reads():
    """All other parameters are frozen, as in the paper. Afterwards the outputs with few keys are
    closer to those with all keys."""
    torch.manual_seed(0)
    warm = LM(Config(width=16, vocab=11, layers="sparse_attention(keys=24, heads=2)"))
    for parameter in warm.layers[0].layer.latent.parameters():
        parameter.data *= 4  # so that attention prefers some keys
    for name, parameter in warm.named_parameters():
        parameter.requires_grad_(".indexer." in name)
    before = {name: parameter.clone() for name, parameter in warm.named_parameters()}
    learning = [parameter for parameter in warm.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(learning, lr=1e-2)
    losses = []
    for _ in range(80):
        tokens = torch.randint(11, (8, 25))
        loss, parts = warm.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(parts["index"].item())
    assert losses[-1] < 0.5 * losses[0]
    for name, parameter in warm.named_parameters():
        assert torch.equal(parameter, before[name]) == (".indexer." not in name), name

    tokens = torch.randint(11, (8, 24))
    dense, _ = warm.eval()(tokens)
    errors = []
    for weights in (warm.state_dict(), before):  # the sparse stage has the same parameters
        few = LM(Config(width=16, vocab=11, layers="sparse_attention(keys=6, heads=2)")).eval()
        few.load_state_dict(weights)
        errors.append((few(tokens)[0] - dense).square().mean().item())
    assert errors[0] < 0.5 * errors[1]


@torch.no_grad()
def test_blocks_of_queries_change_nothing(monkeypatch):
    layer, x = make(FEW).train(), text()
    context, other = Context(), Context()
    expected, _ = layer(x, None, context)
    monkeypatch.setattr(sparse_attention, "ENTRIES", 2 * (16 + 4 * 7) * 3)  # three tokens at a time
    same(layer(x, None, other)[0], expected)
    same(other.record.finish()["index"], context.record.finish()["index"])


@torch.no_grad()
def test_a_token_is_remembered_as_its_latent_and_two_keys():
    layer = make("sparse_attention(kv_rank=5, rope_dim=2, index_dim=6)")
    _, state = layer(text(3, 11))
    stored = sum(part.numel() for part in state[:2])
    assert stored == 3 * 11 * (5 + 2 + 6)
    assert state_bytes(layer, 11, 8) == stored * 8 / 3


def test_options_that_do_not_fit():
    for options, message in (
        ("heads=5", "sparse_attention.heads: 5"),
        ("rope_dim=4, index_dim=3", "sparse_attention.index_dim: 3 .* 4 or more"),
        ("keys=0", "sparse_attention.keys: 0"),
    ):
        with pytest.raises(InputError, match=message):
            make(f"sparse_attention({options})")
    with pytest.raises(InputError, match="impl: 'triton' .* sparse_attention has no kernel"):
        make(FEW, impl="triton")(text())
