"""The experts' kernel against its reference: every kind of routing, odd sizes,
blocks of more than one tile."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import INTERPRETED
from minimodels.kernels.common import compare
from minimodels.kernels.grouped_mlp import grouped_mlp

from minimodels.errors import InputError
from minimodels.ops.grouped_mlp import grouped_mlp as grouped_mlp_reference


def arguments(n: int, E: int, D: int, I: int, visits: torch.Tensor) -> tuple:
    weights = (
        torch.randn(E, I, D) / D**0.5,
        torch.randn(E, I, D) / D**0.5,
        torch.randn(E, D, I) / I**0.5,
    )
    return torch.randn(n, D), torch.rand(n, E), visits, *weights


def top(n: int, E: int, K: int) -> torch.Tensor:
    return torch.rand(n, E).argsort(1) < K


def same(most: int | None, arguments: tuple) -> None:
    compare(
        lambda *parts: grouped_mlp(*parts, most),
        lambda *parts: grouped_mlp_reference(*parts, impl="reference"),
        arguments,
    )


@pytest.mark.parametrize(
    "n, E, K, D, I",
    [(1, 1, 1, 1, 1), (5, 3, 2, 7, 9), (19, 4, 2, 33, 20), (140, 2, 1, 17, 17), (4, 3, 2, 4, 130)],
)
def test_top_k(n, E, K, D, I):
    torch.manual_seed(0)
    same(K, arguments(n, E, D, I, top(n, E, K)))


ROUTES = {
    "none": lambda n, E: torch.zeros(n, E, dtype=torch.bool),
    "all": lambda n, E: torch.ones(n, E, dtype=torch.bool),
    "one expert": lambda n, E: torch.arange(E).expand(n, E) == 1,
    "last expert empty": lambda n, E: (torch.rand(n, E) < 0.6) & (torch.arange(E) < E - 1),
    "any number": lambda n, E: torch.rand(n, E) < torch.rand(n, 1),
    "expert choice": lambda n, E: torch.rand(n, E).argsort(0) < 5,
}


@pytest.mark.parametrize("route", ROUTES)
def test_routes(route):
    torch.manual_seed(0)
    same(None, arguments(18, 3, 10, 12, ROUTES[route](18, 3)))


def test_most_bounds_the_visits_of_all_tokens_together():
    torch.manual_seed(0)
    visits = torch.zeros(6, 4, dtype=torch.bool)
    visits[0], visits[3, 1:3] = True, True  # six in all: one per token on average
    parts = arguments(6, 4, 5, 6, visits)
    same(1, parts)
    visits[5, 0] = True
    # there, the assertion would end the process's use of the device
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="more visits"):
            grouped_mlp(*parts, most=1)


def test_gates_that_are_not_visited_have_no_gradient_and_no_effect():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, gates, visits, *weights = (part.to(device) for part in arguments(9, 4, 6, 5, top(9, 4, 2)))
    gates = gates.masked_fill(~visits, float("nan")).requires_grad_()
    y = grouped_mlp(x, gates, visits, *weights, most=2)
    (dgates,) = torch.autograd.grad(y.square().sum(), gates)
    assert y.isfinite().all() and (dgates[~visits] == 0).all() and (dgates[visits] != 0).all()


def test_no_tokens():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parts = [part.to(device) for part in arguments(0, 3, 4, 5, top(0, 3, 2))]
    parts = [part.requires_grad_() if part.is_floating_point() else part for part in parts]
    y = grouped_mlp(*parts)
    assert y.shape == (0, 4)
    dgate, dout = torch.autograd.grad(y.sum(), (parts[3], parts[5]))
    assert not dgate.any() and not dout.any()


def test_layouts_and_gates_of_another_dtype():
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, gates, visits, gate, up, out = (
        part.to(device) for part in arguments(9, 4, 6, 5, top(9, 4, 2))
    )
    plain = grouped_mlp(x, gates, visits, gate, up, out, 2)
    strided = (
        part.transpose(0, 1).contiguous().transpose(0, 1)
        for part in (x, gates.double(), visits, gate, up, out)
    )
    torch.testing.assert_close(grouped_mlp(*strided, 2), plain, rtol=1e-6, atol=1e-6)


def gradients(operation, parts: list) -> list[torch.Tensor]:
    y = operation(*parts)
    return [
        y,
        *torch.autograd.grad(y.square().sum(), [part for part in parts if part.requires_grad]),
    ]


@pytest.fixture
def parts() -> list:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensors = [part.to(device) for part in arguments(18, 2, 18, 9, top(18, 2, 1))]
    return [part.requires_grad_() if part.is_floating_point() else part for part in tensors]


def test_the_same_bits_every_time(parts):
    for one, other in zip(
        gradients(grouped_mlp, parts), gradients(grouped_mlp, parts), strict=True
    ):
        assert torch.equal(one, other)


def test_compiles_to_one_graph(parts):
    def layer(*parts):
        return 2 * grouped_mlp(*parts, most=1)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one, other in zip(gradients(layer, parts), gradients(compiled, parts), strict=True):
        assert torch.equal(one, other)


def test_without_gradients(parts):
    with torch.no_grad():
        without = grouped_mlp(*parts)
    assert torch.equal(without, grouped_mlp(*parts))


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="the interpreter's bf16 products are wrong"
)
def test_autocast(parts):
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y, true = (grouped_mlp_reference(*parts, impl=impl) for impl in ("triton", "torch"))
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, true, rtol=2e-2, atol=2e-2)


def test_wrong_arguments(parts):
    x, gates, visits, gate, up, out = parts
    for wrong in (
        (x[:, 1:], gates, visits, gate, up, out),
        (x, gates[1:], visits, gate, up, out),
        (x, gates, visits, gate, up, out.transpose(1, 2)),
        (x, gates, visits.int(), gate, up, out),
        (x, gates, visits, gate.double(), up, out),
        (*parts, 0),
    ):
        with pytest.raises(ValueError, match="grouped_mlp"):
            grouped_mlp(*wrong)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies bfloat16 rightly")
def test_what_the_interpreter_computes_wrongly_is_refused():
    x, gates, visits, *weights = arguments(5, 3, 4, 6, top(5, 3, 1))
    low = (part.bfloat16() for part in weights)
    with pytest.raises(InputError, match="^impl: 'triton' .* bfloat16 wrongly; .* float32$"):
        grouped_mlp(x.bfloat16(), gates, visits, *low)
