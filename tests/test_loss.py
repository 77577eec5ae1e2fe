"""The loss without logits equals the loss with them."""

import pytest
import torch
import torch.nn.functional as F
from models import same
from torch.utils.flop_counter import FlopCounterMode

import minimodels.ops.linear_cross_entropy
from minimodels.ops.linear_cross_entropy import IGNORE, linear_cross_entropy, tally

SHAPES = [(7, 5, 11), (1, 3, 2), (33, 16, 50)]  # n, D, V


def arguments(n, D, V, dtype=torch.float64):
    g = torch.Generator().manual_seed(n)
    x, weight = torch.randn(n, D, generator=g).to(dtype), torch.randn(V, D, generator=g).to(dtype)
    targets = torch.randint(V, (n,), generator=g)
    targets[1::3] = IGNORE
    return x.requires_grad_(), weight.requires_grad_(), targets


def both(impl, x, weight, targets):
    loss = linear_cross_entropy(x, weight, targets, impl)
    return [loss, *torch.autograd.grad(3 * loss, (x, weight))]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_reference_equals_torch(shape, rows, monkeypatch):
    monkeypatch.setitem(minimodels.ops.linear_cross_entropy.WORK, "cpu", rows * shape[2])
    exact, fast = both("reference", *arguments(*shape)), both("torch", *arguments(*shape))
    for quick, true in zip(fast, exact, strict=True):  # loss, dx, dweight
        same(quick, true, 1e-12)


def test_low_precision_is_as_good_as_plain_low_precision():
    exact = both("reference", *arguments(33, 16, 50))
    plain = both("reference", *arguments(33, 16, 50, torch.bfloat16))
    fast = both("torch", *arguments(33, 16, 50, torch.bfloat16))
    for quick, low, true in zip(fast, plain, exact, strict=True):  # loss, dx, dweight
        assert (quick - true).abs().max() <= 2 * (low - true).abs().max() + 1e-3


def test_autocast_reaches_it():
    x, weight, targets = arguments(33, 16, 50, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets, "torch")
    dx, dweight = torch.autograd.grad(loss, (x, weight))
    assert (loss.dtype, dx.dtype, dweight.dtype) == (torch.float32,) * 3
    # summed in full precision
    assert loss == linear_cross_entropy(x.bfloat16(), weight.bfloat16(), targets, "torch")
    same(loss, linear_cross_entropy(x, weight, targets, "reference"), 0.02)


def test_without_gradients_none_are_made():
    x, weight, targets = (tensor.detach() for tensor in arguments(7, 5, 11))
    loss, dx, dweight = minimodels.ops.linear_cross_entropy.chunked_loss(x, weight, targets, False)
    same(loss, F.cross_entropy(x @ weight.t(), targets, ignore_index=IGNORE))
    assert not dx.numel() and not dweight.numel()


def test_large_logits_stay_finite_and_nothing_to_predict_is_nan():
    x, weight, targets = arguments(7, 5, 11, torch.float32)
    same(
        linear_cross_entropy(1e3 * x, weight, targets, "torch"),
        linear_cross_entropy(1e3 * x, weight, targets, "reference"),
        1e-5,
    )
    assert linear_cross_entropy(x, weight, torch.full_like(targets, IGNORE)).isnan()


def test_a_target_outside_the_vocabulary_is_refused():
    for wrong in (-7, 11):
        x, weight, targets = arguments(7, 5, 11)
        targets[0] = wrong
        for impl in ("reference", "torch"):
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                linear_cross_entropy(x, weight, targets, impl)


def test_gradients_in_fp16_are_refused():
    x, weight, targets = arguments(7, 5, 11, torch.float16)
    with pytest.raises(ValueError, match="gradients in float16; accepted: bfloat16"):
        linear_cross_entropy(x, weight, targets, "torch")
    with torch.no_grad():
        assert linear_cross_entropy(x, weight, targets, "torch").isfinite()


def test_a_second_derivative_is_refused():
    x, weight, targets = arguments(7, 5, 11, torch.float32)
    with pytest.raises(RuntimeError, match="second derivative"):
        (dx,) = torch.autograd.grad(
            linear_cross_entropy(x, weight, targets, "torch"), x, create_graph=True
        )
        torch.autograd.grad(dx.square().sum(), x)


def test_shapes_that_disagree_are_refused():
    x, weight, targets = arguments(7, 5, 11)
    for wrong in (
        (x[:, :4], weight, targets),
        (x, weight, targets[:3]),
        (x[None], weight, targets),
    ):
        with pytest.raises(ValueError, match="linear_cross_entropy: x"):
            linear_cross_entropy(*wrong)


def test_a_tally_adds_up_over_batches():
    torch.manual_seed(0)
    logits, targets = (
        torch.randn(4, 7, 11),
        torch.randint(11, (4, 7)).masked_fill(torch.rand(4, 7) < 0.3, IGNORE),
    )
    total = tally(logits[:1], targets[:1]) + tally(logits[1:], targets[1:])
    loss, right, count = total.tolist()
    kept = targets != IGNORE
    assert count == kept.sum() and right == (logits[kept].argmax(-1) == targets[kept]).sum()
    assert loss / count == pytest.approx(
        F.cross_entropy(logits[kept], targets[kept]).item(), rel=1e-6
    )


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_gradients_of_chunks_are_summed_in_full_precision(rows, monkeypatch):
    monkeypatch.setitem(minimodels.ops.linear_cross_entropy.WORK, "cpu", rows * 50)
    x, weight, targets = arguments(200, 16, 50, torch.bfloat16)
    exact = both(
        "reference", *(part.detach().double().requires_grad_() for part in (x, weight)), targets
    )
    for low, plain, true in zip(
        both("torch", x, weight, targets), both("reference", x, weight, targets), exact, strict=True
    ):
        assert low.dtype == plain.dtype
        assert (low - true).norm() <= 1.2 * (plain - true).norm() + 1e-4 * true.norm()


def test_the_loss_is_an_operation_that_a_compiler_may_trust():
    inputs = (*arguments(7, 5, 11, torch.bfloat16), True)
    torch.library.opcheck(
        torch.ops.minimodels.chunked_loss.default,
        inputs,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_sums_of_a_batch_are_in_full_precision():
    g = torch.Generator().manual_seed(0)
    logits, targets = (
        torch.randn(4, 300, 11, generator=g).bfloat16(),
        torch.randint(11, (4, 300), generator=g),
    )
    assert tally(logits, targets).dtype == torch.float32
    same(tally(logits, targets), tally(logits.float(), targets), 1e-6)


@pytest.mark.parametrize("learn, factor", [(True, 6), (False, 2)])
def test_flops_are_those_of_three_products_or_of_one(learn, factor):
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(learn):
        linear_cross_entropy(*arguments(7, 5, 11), "torch")
    assert counter.get_total_flops() == factor * 7 * 5 * 11


@pytest.mark.parametrize("wanted", [0, 1])
def test_the_gradient_of_one_alone(wanted):
    given = arguments(7, 5, 11)
    given[1 - wanted].requires_grad_(False)
    found = [
        torch.autograd.grad(linear_cross_entropy(*given, impl), given[wanted])[0]
        for impl in ("reference", "torch")
    ]
    same(*found)
