"""The linear scan's kernels against the reference: odd lengths, chunks of time, blocks of
channels, documents, padding."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import linear_scan as module
from minimodels.kernels.common import GPU, compare, run

from minimodels.ops.linear_scan import linear_scan as operation

DEVICE = "cuda" if GPU else "cpu"


def arguments(time: int, D: int = 3, batch: int = 2) -> list[torch.Tensor]:
    return [torch.rand(batch, time, D), torch.randn(batch, time, D), torch.randn(batch, D)]


def with_resets(time: int, *starts: int) -> torch.Tensor:
    resets = torch.zeros(2, time, dtype=torch.bool)
    resets[0, list(starts)] = True
    return resets


def results(given: list, resets=None) -> list[torch.Tensor]:
    """h, the final state, da, dx and dstate, in fp64."""
    parts = [part.double().to(DEVICE).requires_grad_() for part in given]
    return run(module.linear_scan, [*parts, None if resets is None else resets.to(DEVICE)])


@pytest.fixture
def chunks_of(monkeypatch):
    """A function that sets the tokens per chunk."""
    return lambda length: monkeypatch.setattr(module, "chunk_length", lambda *_: length)


@pytest.mark.parametrize("time", [1, 7, 8, 9, 21])
@pytest.mark.parametrize("length", [8, 16, 24])
def test_linear_scan(chunks_of, time, length):
    torch.manual_seed(0)
    chunks_of(length)
    compare(module.linear_scan, module.reference, tuple(arguments(time)))


def test_blocks_of_channels(chunks_of):
    torch.manual_seed(1)
    chunks_of(8)
    compare(module.linear_scan, module.reference, tuple(arguments(10, 70, 1)))


def test_documents(chunks_of):
    """Documents begin at the first token, at a chunk's edge, inside a chunk, and with the last
    token. The other row is one document."""
    torch.manual_seed(2)
    chunks_of(8)
    given, resets = arguments(19), with_resets(19, 0, 8, 11, 18)
    compare(module.linear_scan, module.reference, (*given, resets))


def test_nothing_leaks_across_a_start(chunks_of):
    torch.manual_seed(3)
    chunks_of(8)
    given, resets = arguments(19), with_resets(19, 11)
    other = [part.clone() for part in given]
    for part in other:
        part[0, :11] *= 3
    one, two = results(given, resets), results(other, resets)
    for i, name in ((0, "h"), (2, "da"), (3, "dx")):
        assert torch.equal(one[i][0, 11:], two[i][0, 11:]), name
    assert not one[2][0, 11].any()


def test_padding(chunks_of):
    """a = 1 and x = 0 do not change the state by a single bit."""
    torch.manual_seed(4)
    chunks_of(8)
    a, x, state = arguments(19)
    a[0], x[0], a[1, 12:], x[1, 12:] = 1, 0, 1, 0
    final = results([a, x, state])[1]
    assert torch.equal(final[0].float().cpu(), state[0])
    alone = results([a[1:, :12], x[1:, :12], state[1:]])[1]
    torch.testing.assert_close(final[1:], alone, rtol=1e-12, atol=1e-12)


def test_same_bits_twice(chunks_of):
    torch.manual_seed(5)
    chunks_of(8)
    given = arguments(19)
    for once, again in zip(results(given), results(given), strict=True):
        assert torch.equal(once, again)


@pytest.mark.parametrize(
    "T, walks, length", [(4096, 10000, 4096), (4096, 33, 64), (4100, 528, 1032), (5, 1, 64)]
)
def test_chunks(T, walks, length):
    """There is one chunk if the walks fill the machine. Otherwise there are enough
    chunks, none too short."""
    assert module.chunk_length(T, walks, 132) == length


def test_compiled():
    torch.manual_seed(6)
    given = [part.to(DEVICE).requires_grad_() for part in arguments(9)]

    def function(a, x, state):
        h, final = module.linear_scan(a.sigmoid(), x, state)
        return h.tanh(), final

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for plain, same in zip(run(function, given), run(compiled, given), strict=True):
        torch.testing.assert_close(same, plain, rtol=1e-6, atol=1e-6)


def test_the_operation_takes_the_kernel():
    torch.manual_seed(7)
    given = [part.to(DEVICE) for part in arguments(9)]
    for one, other in zip(
        operation(*given, impl="triton"), module.linear_scan(*given), strict=True
    ):
        assert torch.equal(one, other)


def test_wrong_shapes():
    a, x, state = arguments(3)
    with pytest.raises(ValueError, match=r"linear_scan: a \("):
        module.linear_scan(a[:, 1:], x, state)
