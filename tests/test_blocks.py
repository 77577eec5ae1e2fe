"""Blocks that are computed again or compiled one by one give the same numbers."""

import pytest
import torch
from models import ALL, WIDTH, tensors

from minimodels import LM, Config
from minimodels.training.blocks import compiled_loss, recompute

VOCAB, T = 31, 23


def learn(layers: str, prepare=lambda model: None, dtype: torch.dtype = torch.float64) -> list:
    """The loss of a packed batch, the gradients, the buffers and the observations."""
    torch.manual_seed(0)
    model = LM(Config(layers=layers, width=WIDTH, vocab=VOCAB)).to(dtype)
    loss_function = prepare(model) or model.loss
    tokens, targets = torch.randint(VOCAB, (2, 3, T))
    starts = torch.where(torch.arange(T) < 10, 0, 10).expand(3, T)
    loss, parts = loss_function(tokens, targets, starts)
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    return tensors([loss.detach(), parts, gradients, list(model.buffers()), model.observed])


@pytest.mark.parametrize("layers", ALL)
def test_blocks_computed_again_give_the_same_gradients_visits_and_observations(layers):
    once, again = learn(layers), learn(layers, recompute)
    assert len(again) == len(once)
    assert all(map(torch.equal, again, once))


def test_blocks_computed_again_remember_less(monkeypatch):
    """A block keeps only its input from the forward pass."""

    def kept(prepare) -> int:
        sizes = []

        def keep(tensor):
            sizes.append(tensor.untyped_storage().nbytes())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            learn("(attention mlp)*3", prepare)
        return sum(sizes)

    assert kept(recompute) < kept(lambda model: None) / 3


def test_blocks_compiled_one_by_one_compute_the_same(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compile(function, backend="eager"))
    layers = "mamba(state_size=4) moe(experts=4) mod(attention mlp, capacity=0.5) attention mlp"
    compiled = learn(layers, lambda model: compiled_loss(model, by_block=True))
    for found, expected in zip(compiled, learn(layers), strict=True):
        torch.testing.assert_close(found, expected)
