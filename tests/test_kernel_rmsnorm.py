"""RMSNorm's kernel against its reference: without a GPU in the interpreter, in fp32 and fp64; on
a GPU in fp32 and bf16."""

import os
import subprocess
import sys

import pytest
import torch
from models import same

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import rmsnorm as module
from minimodels.kernels.common import compare
from minimodels.kernels.rmsnorm import rmsnorm, rmsnorm_forward

from minimodels.parts import rmsnorm as rmsnorm_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("shape", [(1, 1), (2, 3, 5), (7, 33), (3, 64), (2, 100)])
@pytest.mark.parametrize("add", [False, True], ids=["alone", "with an update"])
def test_rmsnorm(shape, add):
    torch.manual_seed(0)
    x, update, weight = torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])
    compare(
        lambda x, weight, update: rmsnorm(x, weight, 1e-5, update),
        lambda x, weight, update: rmsnorm_reference(x, weight, 1e-5, update, "reference"),
        (x, weight, update if add else None),
    )


def test_a_sum_in_half_precision_is_rounded_before_it_is_normalised():
    """Backward reads the rounded sum, so forward must too."""
    x, update = torch.randn(2, 5, 24, device=DEVICE).bfloat16()
    weight = torch.ones(24, device=DEVICE)
    _, total, rstd = rmsnorm_forward(x, update, weight, 1e-5, torch.bfloat16)
    expected = (total.float().square().mean(-1) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.view(expected.shape), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("used", [0, 1], ids=["the norm", "the sum"])
def test_one_of_the_outputs_is_enough(used):
    torch.manual_seed(0)
    arguments = [
        torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for shape in ((3, 5), (5,), (3, 5))
    ]
    gradients = []
    for operation in (rmsnorm, rmsnorm_reference):
        x, weight, update = arguments
        output = operation(x, weight, 1e-5, update)[used]
        gradients.append(
            torch.autograd.grad(output, arguments, torch.ones_like(output), allow_unused=True)
        )
    for kernel, reference in zip(*gradients, strict=True):
        same(kernel, reference)


@pytest.mark.parametrize("add", [False, True], ids=["alone", "with an update"])
def test_under_autocast_the_norm_has_its_precision_and_the_stream_keeps_its_own(add):
    torch.manual_seed(0)
    x, weight, update = (torch.randn(shape, device=DEVICE) for shape in ((7, 33), (33,), (7, 33)))
    results = {}
    for impl in ("reference", "torch", "triton"):
        given = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        more = update.bfloat16().requires_grad_() if add else None  # as a linear map returns it
        with torch.autocast(DEVICE, torch.bfloat16):
            y, total = rmsnorm_reference(*given, 1e-5, more, impl)
        assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32), impl
        wanted = given + [more] * add
        gradients = torch.autograd.grad(y.float().square().sum() + total.sum(), wanted)
        assert [part.dtype for part in gradients] == [part.dtype for part in wanted]
        results[impl] = [y, total, *gradients]
    for impl in ("torch", "triton"):
        for one, other in zip(results[impl], results["reference"], strict=True):
            assert (one - other).float().norm() < 1e-2 * other.float().norm(), impl


@pytest.mark.parametrize("D", [64, 768, 4096, 16384])
def test_the_programs_of_backward_fit_the_multiprocessors(D, monkeypatch):
    """Each SM holds 32 warps of 64 registers a thread. What does not fit runs in a second wave."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *given, num_warps: launched.append(grid[0] * num_warps)

    monkeypatch.setattr(module, "backward_kernel", Kernel())
    monkeypatch.setattr(module, "multiprocessors", lambda tensor: 10)
    total, weight, rstd = torch.zeros(2, D), torch.zeros(D), torch.zeros(2)
    module.rmsnorm_backward(total, None, total, weight, rstd)
    assert 0 < launched[0] <= 10 * 32


def test_it_compiles_for_a_gpu():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "minimodels.kernels.compile", "rmsnorm"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count(" registers, ") == 4  # forward and backward, with and without an update
