"""The selective scan, checked against its equation, its limits and its derivatives."""

import math

import pytest
import torch
import torch.nn.functional as F
from models import make, same, tensors

from minimodels import Config
from minimodels.architectures.mamba import Mamba, recurrence, selective_scan
from minimodels.layers import state_bytes
from minimodels.ops.convolution import causal_conv1d
from minimodels.ops.scan import scan


def arguments(batch=2, time=13, D=3, N=4, seed=0):
    """x, Δ, A, B, C, h_0 in fp64, all with gradients."""
    g = torch.Generator().manual_seed(seed)
    x, C, B = (
        torch.randn(batch, time, width, generator=g, dtype=torch.float64) for width in (D, N, N)
    )
    delta = F.softplus(torch.randn(batch, time, D, generator=g, dtype=torch.float64))
    A = -torch.rand(D, N, generator=g, dtype=torch.float64) - 0.1
    h = torch.randn(batch, D, N, generator=g, dtype=torch.float64)
    return [part.requires_grad_() for part in (x, delta, A, B, C, h)]


NAMES = ("dx", "ddelta", "dA", "dB", "dC", "dstate")


@pytest.mark.parametrize("time", [1, 2, 15, 16, 17, 32, 33, 150])
@pytest.mark.parametrize("batch, D, N", [(1, 1, 1), (2, 5, 3), (3, 8, 16)])
def test_scan_equals_recurrence(time, batch, D, N):
    """They agree inside a chunk and over several, complete or not."""
    inputs = arguments(batch, time, D, N)
    results = []
    for path in (recurrence, scan):
        y, h = path(*inputs)
        loss = (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + (h * h).sum()
        results.append((y, h, *torch.autograd.grad(loss, inputs)))
    for name, reference, fast in zip(("y", "state", *NAMES), *results, strict=True):
        assert torch.allclose(fast, reference, rtol=1e-9, atol=1e-9), name


@pytest.mark.parametrize("time", [1, 7, 35])
def test_scan_passes_gradcheck(time):
    assert torch.autograd.gradcheck(scan, arguments(2, time, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_within_twice_the_plain_error(dtype):
    x, delta, A, B, C, h = (part.detach() for part in arguments(2, 100, 8, 16))
    skip, z = torch.ones(8, dtype=torch.float64), torch.randn_like(x)
    exact, _ = selective_scan(x, delta, A, B, C, skip, z, None, h, "reference")
    low = [part.to(dtype) for part in (x, delta, A, B, C, skip, z)]
    error = {
        impl: (selective_scan(*low, None, h.float(), impl)[0] - exact).abs().max()
        for impl in ("reference", "torch")
    }
    assert error["torch"] <= 2 * error["reference"]


def test_scan_is_one_opaque_operation_that_compiles():
    inputs = [part.detach().float() for part in arguments()]
    torch.library.opcheck(
        torch.ops.minimodels.scan_forward.default, [part.requires_grad_() for part in inputs]
    )
    compiled = torch.compile(scan, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*inputs), scan(*inputs), strict=True):
        same(one, other, 1e-6)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_autocast_leaves_the_state_exact(impl):
    inputs = [part.detach().float() for part in arguments(2, 50, 8, 4)]
    # skip, z, the bias of Δ, the state
    inputs[5:] = (
        torch.ones(8),
        torch.randn(2, 50, 8),
        torch.randn(8),
        inputs[5],
    )
    with torch.autocast("cpu", torch.bfloat16):
        cast = selective_scan(*inputs, impl)
    for one, other in zip(cast, selective_scan(*inputs, impl), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("wanted", [(0,), (4, 5), (2,)])
def test_gradients_of_some_arguments_only(wanted):
    inputs = [part.detach().requires_grad_(i in wanted) for i, part in enumerate(arguments())]
    y, _ = scan(*inputs)
    y.sum().backward()
    assert [part.grad is not None for part in inputs] == [i in wanted for i in range(6)]


def test_no_step_freezes_the_state():
    x, delta, A, B, C, h = arguments()
    y, after = scan(x, torch.zeros_like(delta), A, B, C, h)
    same(after, h)
    same(y, torch.einsum("bdn,btn->btd", h, C))


def test_constant_selection_is_a_convolution():
    """If Δ, B and C are the same at every token, the scan is linear and time-invariant: y = x
    * (Σ_n C_n Ā_n^k Δ B_n)."""
    x, delta, A, B, C, h = arguments(1, 20)
    delta, B, C = (part[:, :1].expand_as(part) for part in (delta, B, C))
    y, _ = scan(x, delta, A, B, C, torch.zeros_like(h))
    steps = torch.arange(20).view(-1, 1, 1)
    kernel = (
        C[0, 0] * B[0, 0] * delta[0, 0, :, None] * torch.exp(steps * delta[0, 0, :, None] * A)
    ).sum(-1)  # (T, D)
    expected = torch.stack([(kernel[: t + 1].flip(0) * x[0, : t + 1]).sum(0) for t in range(20)])
    same(y[0], expected)


def test_convolution_is_pytorchs():
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 4), torch.randn(5)
    y, window = causal_conv1d(x, weight, bias, None)
    expected = F.conv1d(F.pad(x.mT, (3, 0)), weight[:, None], bias, groups=5).mT
    same(y, expected, 1e-5)
    same(window, x[:, -3:])


@torch.no_grad()
def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    layer = Mamba(Mamba.Options(), Config(width=64, layers="mamba*4"))
    same(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16), 1e-5)
    assert (layer.D == 1).all()
    dt = F.softplus(layer.dt_bias)
    assert 0.00099 < dt.min() < 0.003 < 0.03 < dt.max() < 0.101
    assert dt.log().mean() == pytest.approx(math.log(0.01), abs=0.5)
    assert layer.dt_proj.weight.abs().max() <= 4**-0.5
    assert layer.dt_proj.weight.abs().max() > 0.9 * 4**-0.5
    assert layer.out_proj.weight.abs().max() == pytest.approx(128**-0.5 / 4**0.5, rel=0.02)


@pytest.mark.parametrize("impl", ["reference", "torch"])
def test_the_state_is_as_precise_as_x(impl):
    x, delta, A, B, C, h = arguments()
    assert (
        selective_scan(x, delta, A, B, C, torch.ones(3).double(), state=h.float(), impl=impl)[
            1
        ].dtype
        == torch.float64
    )


def test_refuses_shapes_that_do_not_fit():
    x, delta, A, B, C, _ = arguments()
    with pytest.raises(ValueError, match="selective_scan: C is"):
        selective_scan(x, delta, A, B, C[:, :-1], torch.ones(3))
    taps = torch.ones(3, 4)
    for given in (
        (torch.ones(2, 4), None, None, None),
        (taps, torch.ones(1), None, None),  # these shapes would broadcast
        (taps, None, x[:, :2], None),
        (taps, None, None, torch.ones(1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="causal_conv1d: .* do not fit"):
            causal_conv1d(x, *given)


def test_the_rank_of_the_step_size_is_rounded_up():
    ranks = [Mamba(Mamba.Options(), Config(width=width)).R for width in (8, 16, 24, 768)]
    assert ranks == [1, 1, 2, 48]


def test_a_state_in_bfloat16_is_counted_as_it_is():
    stack = make("mamba", dtype=torch.bfloat16)
    _, state = stack(torch.randn(1, 9, 16, dtype=torch.bfloat16))
    assert state_bytes(stack, 9, 2) == sum(part.nbytes for part in tensors(state))
