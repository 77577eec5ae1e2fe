"""The loss without its logits against its reference: loss and gradients, with chunks, ignored
targets, low precision and autocast."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import linear_cross_entropy as module
from minimodels.kernels.common import compare
from minimodels.kernels.linear_cross_entropy import linear_cross_entropy

from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.ops.linear_cross_entropy import linear_cross_entropy as operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(x, weight, targets):
    return operation(x, weight, targets, "reference")


def arguments(n, D, V, ignored=()):
    torch.manual_seed(n)
    targets = torch.randint(V, (n,))
    targets[list(ignored)] = IGNORE
    return torch.randn(n, D), torch.randn(V, D), targets


def gradients(function, x, weight, targets, dtype=torch.float32):
    x, weight = (part.to(DEVICE, dtype, copy=True).requires_grad_() for part in (x, weight))
    loss = function(x, weight, targets.to(DEVICE))
    return loss.detach(), *torch.autograd.grad(loss, (x, weight))


@pytest.fixture
def small(monkeypatch):
    """Chunks of 64 columns and blocks of 16, so that a small vocabulary has several."""
    for name, value in {"COLUMNS": 64, "WORK": 64, "BLOCK": 16}.items():
        monkeypatch.setattr(module, name, value)


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 2), (7, 33, 100), (12, 8, 64)], ids=str)
def test_one_chunk(shape):
    compare(linear_cross_entropy, reference, arguments(*shape))


@pytest.mark.parametrize("shape", [(1, 3, 65), (5, 9, 200), (3, 16, 129), (4, 2, 7)], ids=str)
def test_chunks_and_blocks(shape, small):
    compare(linear_cross_entropy, reference, arguments(*shape, ignored=[0] if shape[0] > 1 else []))


def test_ignored_targets(small):
    compare(linear_cross_entropy, reference, arguments(9, 5, 130, ignored=[0, 3, 4, 8]))


def test_a_second_derivative_is_refused():
    x, weight, targets = (part.to(DEVICE) for part in arguments(7, 5, 11))
    x.requires_grad_()
    with pytest.raises(RuntimeError, match="no autograd formula"):
        (dx,) = torch.autograd.grad(linear_cross_entropy(x, weight, targets), x, create_graph=True)
        torch.autograd.grad(dx.square().sum(), x)


def test_every_target_ignored():
    loss, *others = gradients(linear_cross_entropy, *arguments(3, 4, 10, ignored=range(3)))
    assert loss.isnan() and not any(other.any() for other in others)


def test_a_target_that_is_no_token_is_not_a_number():
    for wrong in (10, -1):
        x, weight, targets = arguments(3, 4, 10)
        targets[1] = wrong
        assert gradients(linear_cross_entropy, x, weight, targets)[0].isnan()


def test_first_and_last_token_of_every_chunk(small):
    x, weight, _ = arguments(6, 5, 192)
    compare(linear_cross_entropy, reference, (x, weight, torch.tensor([0, 63, 64, 127, 128, 191])))


def test_large_logits_do_not_overflow(small):
    x, weight, targets = arguments(4, 6, 150)
    compare(linear_cross_entropy, reference, (100 * x, 10 * weight, targets))


def test_strides(small):
    x, weight, targets = (part.to(DEVICE) for part in arguments(5, 6, 70))
    wide = x.repeat(1, 2)[:, :6], weight.t().contiguous().t(), targets.repeat_interleave(2)[::2]
    for one, other in zip(
        gradients(linear_cross_entropy, x, weight, targets),
        gradients(linear_cross_entropy, *wide),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_bfloat16(small):
    inputs = arguments(40, 16, 300)
    exact = gradients(
        reference,
        *(part.bfloat16() if part.is_floating_point() else part for part in inputs),
        torch.float64,
    )
    low, results = (
        gradients(function, *inputs, torch.bfloat16)
        for function in (reference, linear_cross_entropy)
    )
    assert [result.dtype for result in results] == [torch.float32, torch.bfloat16, torch.bfloat16]
    for result, other, true in zip(results, low, exact, strict=True):
        assert (result - true).abs().max() <= 2 * (other - true).abs().max() + 1e-6


def test_autocast():
    x, weight, targets = arguments(5, 8, 30)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, dx, dweight = gradients(linear_cross_entropy, x, weight, targets)
    assert dx.dtype == dweight.dtype == loss.dtype == torch.float32
    for one, other in zip(
        (loss, dx, dweight),
        gradients(linear_cross_entropy, x, weight, targets, torch.bfloat16),
        strict=True,
    ):
        torch.testing.assert_close(one, other.float())


def test_the_gradient_that_comes_in_scales(small):
    inputs = arguments(5, 9, 100)
    scaled = gradients(lambda *a: 3 * linear_cross_entropy(*a), *inputs)
    for one, other in zip(scaled, gradients(linear_cross_entropy, *inputs), strict=True):
        torch.testing.assert_close(one, 3 * other)


def test_never_all_logits(small, monkeypatch):
    """Each pass computes every column once, one chunk at a time, in one buffer."""
    original, seen = module.chunks, []

    def watched(x, weight):
        for at, logits in original(x, weight):
            seen.append(
                (
                    at.start,
                    at.stop,
                    logits.untyped_storage().nbytes() // logits.itemsize,
                    logits.data_ptr(),
                )
            )
            yield at, logits

    monkeypatch.setattr(module, "chunks", watched)
    n, V = 20, 400
    gradients(linear_cross_entropy, *arguments(n, 2, V))
    for half in (seen[: len(seen) // 2], seen[len(seen) // 2 :]):
        starts, stops, sizes, places = zip(*half, strict=True)
        assert (0, *stops) == (*starts, V) and len(set(places)) == 1 and max(sizes) == n * 64


def test_same_bits_twice(small):
    one, other = (gradients(linear_cross_entropy, *arguments(9, 5, 130)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_compiled_whole():
    def loss(x, weight, targets):
        return 2 * linear_cross_entropy(x.tanh(), weight, targets)

    inputs = arguments(7, 5, 30, ignored=[2])
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for eager, other in zip(gradients(loss, *inputs), gradients(compiled, *inputs), strict=True):
        torch.testing.assert_close(eager, other)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 4), (5, 4), (2,)),
        ((3, 4), (5, 3), (3,)),
        ((3, 4), (5, 4), (2,)),
        ((3, 4), (5,), (3,)),
    ],
)
def test_wrong_shapes(shapes):
    x, weight, targets = (torch.zeros(shape, device=DEVICE) for shape in shapes)
    with pytest.raises(ValueError, match="linear_cross_entropy"):
        linear_cross_entropy(x, weight, targets.long())


@pytest.mark.parametrize("scale", [1, 20])
def test_gradients_at_large_logits_are_as_good_as_those_of_the_plain_loss(scale, small):
    """If the right token is nearly certain, its whole gradient is in digits that a
    rounded logsumexp has lost."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 8), torch.randn(200, 8)
    x *= scale / (x @ weight.t()).std()
    targets = (x @ weight.t()).argmax(1)
    exact = gradients(reference, x, weight, targets, torch.float64)
    plain, kernel = (gradients(f, x, weight, targets) for f in (reference, linear_cross_entropy))
    for name, low, ours, true in zip("loss dx dweight".split(), plain, kernel, exact, strict=True):
        error, allowed = ((part - true).norm() for part in (ours, low))
        assert error <= 3 * allowed + 1e-7 * true.norm(), name


@pytest.mark.parametrize("adds", [False, True], ids=["PyTorch 2.9", "PyTorch 2.11"])
def test_a_product_is_added_in_full_precision_by_what_pytorch_has(adds, monkeypatch):
    """The factors claim to be on a GPU. Before 2.11, addmm cannot add products of bf16 in fp32."""
    called = []

    def product(name):
        def call(*parts, out_dtype, out=None):
            called.append((name, out_dtype))
            return torch.ones(2, 2)

        return call

    monkeypatch.setattr(module, "ADDS", adds)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, product(name))
    factor, total = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True), torch.zeros(2, 2)
    module.add_product(total, factor, factor)
    assert called == [("addmm" if adds else "mm", torch.float32)]
    assert adds or total.eq(1).all()
