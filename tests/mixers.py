"""Shared by the tests of the recurrent mixers: layers built from a text, the laws in
short, copied weights, peers."""

import inspect

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from minimodels.architectures.registry import LAYERS
from minimodels.config import Config
from minimodels.context import Context
from minimodels.grammar import parse_call
from minimodels.layers import Place
from minimodels.options import read_options

WIDTH, ROWS, T = 16, 3, 23
DOCUMENTS = ((1, 7, 15), (9, 13, 1), (2, 3, 4))  # lengths in each row; the last row ends in padding


def make(
    text: str, width: int = WIDTH, impl: str = "torch", place: Place = Place(), seed: int = 0
) -> nn.Module:
    """The one layer of a text, alone, in fp64, with parameters so large that every part matters."""
    torch.manual_seed(seed)
    call = parse_call(text, "layers")
    kind = LAYERS[call.name]
    config = Config(layers=text, width=width, impl=impl)
    layer = kind(read_options(kind.Options, call, text), config, place).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return layer


def random(*shape: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def leaves(state) -> list[torch.Tensor]:
    """The floating-point tensors of a state."""
    return [leaf for leaf in tree_leaves(state) if getattr(leaf, "is_floating_point", bool)()]


def same(actual, expected, tolerance: float = 1e-9, name: str = ""):
    torch.testing.assert_close(
        actual, expected, rtol=tolerance, atol=tolerance, msg=lambda text: f"{name}: {text}"
    )


def gradients(outputs: list[torch.Tensor], inputs: dict[str, torch.Tensor]) -> dict:
    """Gradients of a loss that gives every number of the outputs a different weight."""
    loss = sum(
        (out * random(*out.shape, seed=i).to(out.dtype)).sum() for i, out in enumerate(outputs)
    )
    return dict(zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True))


def check_chunking(text: str):
    """A text in pieces gives the outputs, final state and gradients of the
    whole text, on both paths."""
    expected = None
    for impl, cuts in (("torch", []), ("torch", [1, 4, 17]), ("torch", [5]), ("reference", [])):
        layer, x = make(text, impl=impl), random(ROWS, T, WIDTH).requires_grad_()
        outputs, state = [], None
        for piece in x.tensor_split(cuts, dim=1):
            y, state = layer(piece, state)
            outputs.append(y)
        outputs = [torch.cat(outputs, dim=1), *leaves(state)]
        found = gradients(outputs, {"x": x, **dict(layer.named_parameters())})
        found.update({f"output {i}": output for i, output in enumerate(outputs)})
        expected = expected or found
        assert len(found) == len(expected)
        for name, value in found.items():
            same(value, expected[name], 1e-8, f"{impl}, {cuts}, {name}")


def check_padding(text: str):
    """Padded rows give what each row gives alone, and continue as each would alone.
    Padding changes no state."""
    layer, x, more = make(text), random(ROWS, T, WIDTH), random(ROWS, 6, WIDTH, seed=2)
    lengths = (T, 1, 10)
    positions = torch.stack(
        [torch.where(torch.arange(T) < n, torch.arange(T), -1) for n in lengths]
    )
    y, state = layer(x, None, Context(positions))
    other, _ = layer(torch.where((positions < 0).unsqueeze(-1), 9.0, x), None, Context(positions))
    first, carried = layer(more[:, :1], state)
    second, _ = layer(more[:, 1:], carried)
    nothing, unchanged = layer(more, state, Context(torch.full((ROWS, 6), -1)))
    assert nothing.isfinite().all()
    for before, after in zip(leaves(state), leaves(unchanged), strict=True):
        assert torch.equal(before, after)
    for row, length in enumerate(lengths):
        alone, own = layer(x[row : row + 1, :length])
        same(y[row : row + 1, :length], alone)
        same(other[row : row + 1, :length], alone)
        following, _ = layer(more[row : row + 1], own)
        same(torch.cat((first, second), dim=1)[row : row + 1], following)


def check_packing(text: str):
    """Documents in one row give what each gives alone, with gradients, even if
    the row comes in pieces."""
    layer, x = make(text), random(ROWS, T, WIDTH).requires_grad_()
    positions, starts = torch.full((ROWS, T), -1), torch.zeros(ROWS, T, dtype=torch.int64)
    places = []
    for row, lengths in enumerate(DOCUMENTS):
        begin = 0
        for length in lengths:
            places.append((row, slice(begin, begin + length)))
            positions[row, begin : begin + length] = torch.arange(begin, begin + length)
            starts[row, begin:] = begin
            begin += length
    wanted = {"x": x, **dict(layer.named_parameters())}
    alone = [layer(x[row : row + 1, place])[0] for row, place in places]
    expected = gradients(alone, wanted)
    for cuts in ([], [8], [1, 2, 10]):
        outputs, state = [], None
        pieces = (part.tensor_split(cuts, dim=1) for part in (x, positions, starts))
        for piece, at, begin in zip(*pieces, strict=True):
            y, state = layer(piece, state, Context(at, begin))
            outputs.append(y)
        y = torch.cat(outputs, dim=1)
        parts = [y[row : row + 1, place] for row, place in places]
        for one, other in zip(parts, alone, strict=True):
            same(one, other)
        for name, gradient in gradients(parts, wanted).items():
            same(gradient, expected[name], 1e-8, f"{cuts}, {name}")


def check_parity(ours: nn.Module, peer: nn.Module, layout, tolerance: float, call=None):
    """Copy the peer's weights. Then outputs must be equal at odd lengths, and so must the gradients
    of the input and of all weights.

    layout(tensors by the peer's names) -> the same by our names; it is applied to weights and to
    their gradients. call(x) calls the peer, if that is not peer(x).
    """
    names, theirs = dict(ours.named_parameters()), dict(peer.named_parameters())
    weights = layout(theirs)
    assert set(names) == set(weights)
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(weights[name].view(parameter.shape))
    for length in (1, 7, 37, 71):
        x = random(2, length, WIDTH).to(next(ours.parameters()).dtype).requires_grad_()
        y, expected = ours(x)[0], (call or peer)(x)
        same(y, expected, tolerance, f"outputs at length {length}")
    found = gradients([y], {"x": x, **names})
    answer = gradients([expected], {"x": x, **theirs})
    same_gradient(found.pop("x"), answer.pop("x"), tolerance, "x")
    answer = layout(answer)
    for name, gradient in found.items():
        same_gradient(gradient, answer[name].view(gradient.shape), tolerance, name)


def same_gradient(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, name: str):
    """Compare two gradients, with a tolerance relative to the largest number."""
    scale = expected.abs().max()
    assert scale > 0, name
    same(actual / scale, expected / scale, tolerance, name)


def use_torch(monkeypatch, *modules):
    """Make transformers' modules use their plain torch functions, even if packages
    of kernels are installed."""
    for module in modules:
        for name, value in list(vars(module).items()):
            if inspect.isfunction(value) and value.__module__ == module.__name__:
                monkeypatch.setattr(module, name, inspect.unwrap(value))


def randomise(module: nn.Module, seed: int = 3) -> nn.Module:
    """Moderate random weights, so that every part of a published layer matters."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            around = 1.0 if "norm" in name or name == "D" else 0.0
            parameter.copy_(around + 0.3 * torch.randn_like(parameter))
    return module
