"""The kernel of rotary positions with a norm before them, against its reference: without a GPU in
the interpreter, in fp32 and fp64; on a GPU in fp32 and bf16."""

from functools import partial

import pytest
import torch
from models import same

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import norm_rotate as module
from minimodels.kernels.common import compare
from minimodels.kernels.norm_rotate import norm_rotate, reference, turned

from minimodels.ops.rotary import norm_rotate as operation
from minimodels.ops.rotary import rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 1, 1, 2, 2), (2, 3, 5, 6, 4), (1, 2, 33, 8, 8), (2, 1, 3, 20, 20)]


def same_as_the_reference(x, positions, R, weight) -> None:
    compare(partial(turned, norm_rotate), partial(turned, reference), (x, positions, R, weight))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [False, True], ids=["rotation", "norm and rotation"])
@pytest.mark.parametrize("shared", [False, True], ids=["positions of rows", "shared positions"])
def test_norm_rotate(shape, norm, shared, monkeypatch):
    """Outputs and gradients, with several blocks and more than one block for a program."""
    monkeypatch.setattr(module, "NUMBERS", 32)
    monkeypatch.setattr(module, "PROGRAMS", 1)
    torch.manual_seed(0)
    B, H, T, d, R = shape
    positions = torch.arange(T) if shared else torch.randint(99, (B, 1, T))
    weight = torch.randn(d) if norm else None
    same_as_the_reference(torch.randn(B, T, H, d).transpose(1, 2), positions, R, weight)


def test_any_strides():
    torch.manual_seed(0)
    wide = torch.randn(2, 3, 7, 12)
    for x in (wide[..., :8], wide.transpose(0, 1)[..., 4:], wide.mT.contiguous().mT[..., :8]):
        same_as_the_reference(x, torch.arange(x.shape[2]), 8, torch.randn(8))


def test_the_three_paths_agree_and_keep_the_dtype():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 5, 8, device=DEVICE), torch.randn(8, device=DEVICE)
    cos, sin = rotary(torch.arange(5, device=DEVICE), 6, 1e4)
    with torch.autocast(DEVICE, torch.bfloat16):
        for given in (x, x.bfloat16()):
            results = [
                operation(given, cos, sin, weight, 1e-5, impl)
                for impl in ("reference", "torch", "triton")
            ]
            assert {y.dtype for y in results} == {given.dtype}
            for y in results[1:]:
                same(y.float(), results[0].float(), 1e-5 if given is x else 3e-2)


def test_compiled_whole():
    x = torch.randn(1, 2, 3, 8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, device=DEVICE, requires_grad=True)
    cos, sin = rotary(torch.arange(3, device=DEVICE), 8, 1e4)

    def loss(x, weight):
        return torch.tanh(norm_rotate(2 * x, cos, sin, weight)).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        torch.autograd.grad(loss(x, weight), (x, weight)),
        torch.autograd.grad(compiled(x, weight), (x, weight)),
        strict=True,
    ):
        same(one, other)


def test_wrong_shapes():
    x, (cos, sin) = torch.zeros(2, 3, 5, 8), rotary(torch.arange(5), 8, 1e4)
    for wrong in ((x[..., :6], cos, sin), (x, cos[1:], sin[1:]), (x, cos, sin[1:]),
                  (x, cos, sin, torch.ones(7))):  # fmt: skip
        with pytest.raises(ValueError, match="norm_rotate"):
            norm_rotate(*wrong)
