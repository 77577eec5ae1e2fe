"""The kernel of the causal convolution against its reference: outputs, window and all gradients,
with chunks, lengths and strides."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import causal_conv1d as module
from minimodels.kernels.causal_conv1d import causal_conv1d
from minimodels.kernels.common import compare

from minimodels.ops.convolution import causal_conv1d as operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference(x, weight, bias, window, lengths=None, activation=False, resets=None):
    y, window = operation(x, weight, bias, window, lengths, impl="reference", resets=resets)
    return F.silu(y) if activation else y, window


def arguments(batch, T, D, W, bias=True, window=True):
    torch.manual_seed(T)
    x, weight = torch.randn(batch, T, D), torch.randn(D, W)
    return (
        x,
        weight,
        torch.randn(D) if bias else None,
        torch.randn(batch, W - 1, D) if window else None,
    )


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Chunks of 8 tokens, so that a short text has several."""
    monkeypatch.setattr(module, "CHUNK", 8)


@pytest.mark.parametrize("activation", [False, True], ids=["linear", "silu"])
@pytest.mark.parametrize(
    "shape",
    [
        (2, 1, 5, 4),
        (1, 2, 3, 4),
        (2, 7, 33, 2),
        (1, 8, 4, 3),
        (2, 19, 130, 4),
        (1, 26, 3, 8),
        (2, 9, 5, 1),
        (2, 9, 1, 4),
    ],
    ids=str,
)
def test_causal_conv1d(shape, activation):
    compare(causal_conv1d, reference, (*arguments(*shape), None, activation))


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("window", [False, True], ids=["", "window"])
def test_parts_may_be_missing(bias, window):
    compare(causal_conv1d, reference, (*arguments(2, 11, 6, 4, bias, window), None, True))


@pytest.mark.parametrize("window", [False, True], ids=["", "window"])
def test_window_ends_where_the_padding_begins(window):
    lengths = torch.tensor([0, 1, 3, 9, 13])
    compare(causal_conv1d, reference, (*arguments(5, 13, 6, 4, window=window), lengths, False))


@pytest.mark.parametrize("W", [1, 2, 4, 8])
@pytest.mark.parametrize("padded", [False, True], ids=["", "padded"])
def test_documents(W, padded):
    """Documents begin at the edges of chunks and next to them. One is a single token, and one row
    continues from its window."""
    resets = torch.zeros(3, 19, dtype=torch.bool)
    resets[0, [3, 4, 8]] = resets[1, [0, 7, 9, 16]] = resets[2, [1, 15]] = True
    lengths = torch.tensor([19, 8, 0]) if padded and W > 1 else None
    compare(causal_conv1d, reference, (*arguments(3, 19, 5, W), lengths, True, resets))
    compare(
        causal_conv1d, reference, (*arguments(3, 19, 5, W, window=False), lengths, False, resets)
    )


def test_no_bit_of_another_document():
    x, weight, bias, window = (part.to(DEVICE) for part in arguments(1, 19, 5, 4))
    resets = torch.zeros(1, 19, dtype=torch.bool, device=DEVICE)
    resets[0, [6, 11]] = True
    y, _ = causal_conv1d(x, weight, bias, window, resets=resets)
    changed = 1e8 * torch.randn_like(x)
    changed[:, 6:11] = x[:, 6:11]
    other, _ = causal_conv1d(changed, weight, bias, window, resets=resets)
    assert torch.equal(other[:, 6:11], y[:, 6:11])


def test_chunk_of_full_length(monkeypatch):
    monkeypatch.undo()
    compare(causal_conv1d, reference, (*arguments(1, module.CHUNK + 5, 3, 4), None, True))


def test_only_y_or_only_the_window_is_used():
    inputs = arguments(2, 9, 6, 4)
    for i in (0, 1):
        compare(lambda *a, i=i: causal_conv1d(*a, None, True)[i] + 0 * sum(part.sum() for part in a),
                lambda *a, i=i: reference(*a, None, True)[i] + 0 * sum(part.sum() for part in a), inputs)  # fmt: skip


def test_x_may_be_a_part_of_a_wider_tensor():
    wide = torch.randn(2, 10, 12, device=DEVICE)
    _, *others = (part.to(DEVICE) for part in arguments(2, 10, 6, 4))
    gradients = []
    for x in (wide, wide.clone()):
        x.requires_grad_()
        half = x.chunk(2, dim=-1)[0] if x is wide else x.chunk(2, dim=-1)[0].contiguous()
        y, _ = causal_conv1d(half, *others, activation=True)
        gradients.append((y.detach(), *torch.autograd.grad(y.square().sum(), x)))
    for part, whole in zip(*gradients, strict=True):
        torch.testing.assert_close(part, whole, rtol=0, atol=0)
    scattered = torch.randn(2, 6, 10, device=DEVICE).mT  # channels are not neighbours
    torch.testing.assert_close(
        causal_conv1d(scattered, *others)[0],
        causal_conv1d(scattered.contiguous(), *others)[0],
        rtol=0,
        atol=0,
    )


def test_small_parts_may_be_columns():
    x, weight, bias, window = (part.to(DEVICE) for part in arguments(2, 9, 6, 4))
    strided = [torch.stack((part, -part), dim=-1)[..., 0] for part in (weight, bias, window)]
    for part, whole in zip(
        causal_conv1d(x, *strided), causal_conv1d(x, weight, bias, window), strict=True
    ):
        torch.testing.assert_close(part, whole, rtol=0, atol=0)


def test_pieces_are_the_whole():
    x, weight, bias, window = (part.to(DEVICE) for part in arguments(2, 13, 6, 4))
    whole, last = causal_conv1d(x, weight, bias, window, activation=True)
    pieces = []
    for piece in x.split((1, 2, 10), dim=1):
        y, window = causal_conv1d(piece, weight, bias, window, activation=True)
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, dim=1), whole)
    torch.testing.assert_close(window, last, rtol=0, atol=0)


def test_same_bits_twice():
    results = []
    for _ in range(2):
        inputs = [part.to(DEVICE).requires_grad_() for part in arguments(2, 19, 6, 4)]
        y, _ = causal_conv1d(*inputs, activation=True)
        results.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_compiled_whole():
    def loss(x, weight, bias, window):
        y, window = causal_conv1d(2 * x, weight, bias, window, activation=True)
        return y.square().sum() + window.sum()

    inputs = [part.to(DEVICE).requires_grad_() for part in arguments(2, 9, 6, 4)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(function(*inputs), inputs) for function in (loss, compiled)]
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other)


@pytest.mark.parametrize(
    "shapes",
    [
        {"x": (2, 6)}, {"weight": (5, 4)}, {"weight": (6,)}, {"bias": (5,)}, {"window": (2, 4, 6)}, {"window": (1, 3, 6)},
        {"lengths": (3,)}, {"x": (2, 0, 6)},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_shapes(shapes):
    fitting = {"x": (2, 5, 6), "weight": (6, 4), "bias": (6,), "window": (2, 3, 6), "lengths": (2,)}
    with pytest.raises(ValueError, match="causal_conv1d"):
        causal_conv1d(
            **{name: torch.ones(shape, device=DEVICE) for name, shape in (fitting | shapes).items()}
        )
