"""The linear scan: pieces against the recurrence, gradients by name, states, documents, padding."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minimodels.ops import linear_scan as module
from minimodels.ops.linear_scan import linear_scan

B, T, D = 2, 37, 3
NAMES = ("h", "final", "da", "dx", "dstate")


def arguments(time: int = T, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(time)
    a = torch.rand(B, time, D, dtype=torch.float64, generator=generator)
    x = torch.randn(B, time, D, dtype=torch.float64, generator=generator)
    state = torch.randn(B, D, dtype=torch.float64, generator=generator)
    return [part.to(dtype) for part in (a, x, state)]


def results(given: list[Tensor], impl: str = "torch", resets: Tensor | None = None) -> dict:
    given = [part.detach().requires_grad_() for part in given]
    h, final = linear_scan(*given, impl=impl, resets=resets)
    weights = torch.cos(torch.arange(h[0].numel(), dtype=h.dtype)).view_as(h[0])
    loss = (h * weights).sum() + final.sin().sum()
    gradients = torch.autograd.grad(loss, given)
    return dict(zip(NAMES, (h.detach(), final.detach(), *gradients), strict=True))


def same(actual: dict, expected: dict, tolerance: float = 1e-12) -> None:
    for name in NAMES:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=tolerance, atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.fixture
def pieces(monkeypatch):
    """A function that sets the number of pieces of a text."""
    return lambda count: monkeypatch.setattr(
        module, "count_pieces", lambda x: min(count, x.shape[1])
    )


@pytest.mark.parametrize("count", [1, 2, 3, 36, 37])
@pytest.mark.parametrize("time", [1, 2, 5, 36, 37])
def test_pieces_equal_the_recurrence(pieces, time, count):
    pieces(count)
    given = arguments(time)
    same(results(given), results(given, "reference"))


def test_how_many_pieces():
    """Each step has enough numbers, and there are few steps. The results are equal if
    the rule itself decides."""
    assert module.count_pieces(torch.empty(1, 1024, 512)) == 45
    assert module.count_pieces(torch.empty(64, 16, 1024)) == 1
    same(results(arguments(100)), results(arguments(100), "reference"))


def test_gradcheck(pieces):
    pieces(2)
    given = [part.requires_grad_() for part in arguments(5)]
    torch.autograd.gradcheck(linear_scan, given)


@pytest.mark.parametrize("split", [1, 18, 36])
def test_a_state_continues_a_text(split):
    a, x, state = (part.requires_grad_() for part in arguments())
    whole = linear_scan(a, x, state)
    first, between = linear_scan(a[:, :split], x[:, :split], state)
    second, final = linear_scan(a[:, split:], x[:, split:], between)
    outputs = [whole, (torch.cat((first, second), dim=1), final)]
    named = []
    for h, last in outputs:
        gradients = torch.autograd.grad(h.sin().sum() + last.cos().sum(), (a, x, state))
        named.append(dict(zip(NAMES, (h, last, *gradients), strict=True)))
    same(*named)


def test_no_state_is_a_state_of_zero():
    a, x, state = arguments()
    for one, other in zip(linear_scan(a, x), linear_scan(a, x, 0 * state), strict=True):
        assert torch.equal(one, other)


def test_a_final_state_keeps_only_itself():
    """A final state that was a view would keep the memory of all states of its text."""
    _, final = linear_scan(*arguments())
    assert final.untyped_storage().nbytes() == final.nbytes


@pytest.mark.parametrize("count", [1, 5])
def test_a_document_is_what_it_is_alone(pieces, count):
    pieces(count)
    starts = (0, 3, 4, 20, 36)
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, list(starts)] = True
    given = arguments()
    packed = results(given, resets=resets)
    same(packed, results(given, "reference", resets))
    a, x, _ = given
    for first, end in zip(starts, (*starts[1:], T), strict=True):
        h, final = linear_scan(a[:1, first:end], x[:1, first:end])
        torch.testing.assert_close(packed["h"][:1, first:end], h, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(packed["final"][:1], final, rtol=1e-12, atol=1e-12)
    assert not packed["da"][0, list(starts)].any() and not packed["dstate"][0].any()
    other = [part.clone() for part in given]
    for part in other:
        part[0, :20] *= 3
    again = results(other, resets=resets)
    for name in ("h", "da", "dx"):
        assert torch.equal(again[name][0, 20:], packed[name][0, 20:]), name


def test_padding_changes_nothing(pieces):
    pieces(4)
    a, x, state = arguments()
    a[0], x[0], a[1, 20:], x[1, 20:] = 1, 0, 1, 0
    padded = results([a, x, state])
    assert torch.equal(padded["final"][0], state[0])
    alone = results([a[1:, :20], x[1:, :20], state[1:]])
    torch.testing.assert_close(padded["final"][1:], alone["final"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded["h"][1:, :20], alone["h"], rtol=1e-12, atol=1e-12)


def test_precision_inside():
    given = [part.bfloat16() for part in arguments()]
    expected, last = linear_scan(*(part.float() for part in given))
    with torch.autocast("cpu", torch.bfloat16):
        h, final = linear_scan(*given)
    assert h.dtype == torch.bfloat16 and final.dtype == torch.float32
    assert torch.equal(h, expected.bfloat16()) and torch.equal(final, last)


def test_compiled():
    given = [part.requires_grad_() for part in arguments()]
    resets = torch.zeros(B, T, dtype=torch.bool)

    def loss(a, x, state, resets):
        h, final = linear_scan(a.sigmoid(), x, state, resets=resets)
        return h.sin().sum() + final.cos().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = (torch.autograd.grad(f(*given, resets), given) for f in (compiled, loss))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


def test_counted_flops():
    given = [part.requires_grad_() for part in arguments()]
    with FlopCounterMode(display=False) as counter:
        h, _ = linear_scan(*given)
    assert counter.get_total_flops() == 2 * B * T * D
    with FlopCounterMode(display=False) as counter:
        h.sum().backward()
    assert counter.get_total_flops() == 3 * B * T * D


@pytest.mark.parametrize("name", ["a", "x", "state", "resets"])
def test_wrong_shapes(name):
    given = dict(zip(("a", "x", "state"), arguments(), strict=True))
    given["resets"] = torch.zeros(B, T, dtype=torch.bool)
    given[name] = given[name][:, :-1]
    with pytest.raises(ValueError, match=rf"linear_scan: .*{name} \("):
        linear_scan(**given)
    given = dict(zip(("a", "x", "state"), arguments(), strict=True))
    with pytest.raises(ValueError, match="bool"):
        linear_scan(**given, resets=torch.zeros(B, T, dtype=torch.int64))
