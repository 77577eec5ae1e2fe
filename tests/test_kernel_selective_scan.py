"""The selective scan's kernels against the reference: splits of time and of channels,
padding, carried states."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import selective_scan as module
from minimodels.kernels.common import compare, run

from minimodels.architectures.mamba import selective_scan as operation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRADIENTS = "dx", "ddelta", "dA", "dB", "dC", "dskip", "dz", "dbias", "dstate"


def reference(*arguments):
    *arguments, resets = (*arguments, None) if len(arguments) < 10 else arguments
    return operation(*arguments, impl="reference", resets=resets)


def arguments(
    batch: int, time: int, D: int, N: int, z: bool = True, bias: bool = True, state: bool = True
) -> list:
    x, delta, gate = torch.randn(3, batch, time, D, device=DEVICE).unbind(0)
    B, C = torch.randn(2, batch, time, N, device=DEVICE).unbind(0)
    A, skip, shift = (
        -2 * torch.rand(D, N, device=DEVICE),
        torch.randn(D, device=DEVICE),
        torch.randn(D, device=DEVICE),
    )
    h = torch.randn(batch, D, N, device=DEVICE)
    return [
        x,
        delta - 1,
        A,
        B,
        C,
        skip,
        gate if z else None,
        shift if bias else None,
        h if state else None,
    ]


@pytest.fixture
def divided(monkeypatch):
    """A function that sets the steps per interval, the intervals per chunk, and
    the blocks per program."""

    def divide(interval: int, span: int, share: int = 1) -> None:
        monkeypatch.setattr(module, "INTERVAL", interval)
        monkeypatch.setattr(
            module,
            "divide",
            lambda walks, intervals, multiprocessors: (min(span, intervals), share),
        )

    return divide


@pytest.mark.parametrize("z", [False, True], ids=["open", "gated"])
@pytest.mark.parametrize(
    "bias, state", [(False, False), (True, True)], ids=["bare", "bias and state"]
)
@pytest.mark.parametrize("batch, time, D, N", [(1, 1, 1, 1), (2, 5, 5, 3)])
def test_selective_scan(batch, time, D, N, bias, state, z):
    torch.manual_seed(0)
    compare(module.selective_scan, reference, tuple(arguments(batch, time, D, N, z, bias, state)))


@pytest.mark.parametrize(
    "time, interval, span", [(12, 8, 2), (9, 4, 1), (7, 8, 1), (9, 4, 2), (5, 3, 1), (8, 3, 2)],
    ids=["whole", "chunks of one interval", "one interval", "a short last chunk", "intervals that groups do not fill",
         "and they fill the time"],
)  # fmt: skip
def test_split(divided, time, interval, span):
    torch.manual_seed(1)
    divided(interval, span)
    compare(module.selective_scan, reference, tuple(arguments(1 if time > 8 else 2, time, 3, 5)))


@pytest.mark.parametrize("D, N, share", [(70, 2, 2), (20, 33, 2)])
def test_blocks_of_channels(divided, D, N, share):
    """The last of several blocks is incomplete, and so is the last program's share of them. N =
    33 is not a power of two."""
    torch.manual_seed(2)
    divided(4, 1, share)
    compare(module.selective_scan, reference, tuple(arguments(1, 5, D, N)))


def test_padding(divided):
    """A step size of zero freezes the state and stops the gradient, at both ends
    and across a chunk's edge."""
    torch.manual_seed(3)
    divided(4, 1)
    given = arguments(2, 7, 3, 2)
    given[1][0, 5:], given[1][1, :5] = float("-inf"), float("-inf")
    compare(module.selective_scan, reference, tuple(given))
    gradients = dict(
        zip(
            GRADIENTS,
            run(module.selective_scan, [part.requires_grad_() for part in given])[2:],
            strict=True,
        )
    )
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    ddelta, dB = gradients["ddelta"], gradients["dB"]
    assert (
        not ddelta[0, 5:].any()
        and not ddelta[1, :5].any()
        and not dB[0, 5:].any()
        and not dB[1, :5].any()
    )
    shorter = [
        part if part is None or part.ndim < 3 or part.shape[1] != 7 else part[:1, :5]
        for part in given
    ]
    shorter[8] = given[8][:1]
    torch.testing.assert_close(
        module.selective_scan(*given)[1][:1], module.selective_scan(*shorter)[1]
    )


@pytest.mark.parametrize("interval, span", [(4, 1), (4, 2), (3, 1), (16, 1)])
def test_documents(divided, interval, span):
    """Documents have odd lengths, one a single token, and begin at the edges of intervals and
    chunks. Two rows begin a document at once, and one continues."""
    torch.manual_seed(8)
    divided(interval, span)
    resets = torch.zeros(2, 11, dtype=torch.bool)
    resets[0, [3, 4, 8]] = resets[1, [0, 7]] = True
    given = arguments(2, 11, 3, 2)
    given[1][1, 9:] = float("-inf")  # padding
    compare(module.selective_scan, reference, (*given, resets))
    given = [part.requires_grad_() for part in given]
    results = run(module.selective_scan, [*given, resets.to(DEVICE)])
    gradients = dict(zip(GRADIENTS, results[2:], strict=True))
    assert not gradients["dstate"][1].any() and gradients["dstate"][0].any()


def test_no_bit_of_another_document(divided):
    torch.manual_seed(9)
    divided(4, 1)
    resets = torch.zeros(1, 11, dtype=torch.bool, device=DEVICE)
    resets[0, [3, 6]] = True
    given = arguments(1, 11, 3, 2)
    y, _ = module.selective_scan(*given, resets)
    for i in (0, 1, 3, 4, 6):
        given[i][:, :3] *= 1e3
        given[i][:, 6:] *= -1e3
    given[8] *= 1e8
    assert torch.equal(module.selective_scan(*given, resets)[0][:, 3:6], y[:, 3:6])


@pytest.mark.parametrize("weight_y, weight_state", [(0, 1), (1, 0)], ids=["state", "y"])
def test_each_output_alone(divided, weight_y, weight_state):
    """Gradients flow from y and from the final state, even if only one of them is used."""
    torch.manual_seed(4)
    divided(4, 1)

    def weighed(operation):
        return lambda *given: sum(
            w * output.sum()
            for w, output in zip((weight_y, weight_state), operation(*given), strict=True)
        )

    compare(
        weighed(module.selective_scan), weighed(reference), tuple(arguments(1, 6, 3, 2, z=False))
    )


def test_gate_as_it_lies():
    """z may be half of a projection, in which rows are twice as far apart."""
    torch.manual_seed(5)
    given = arguments(2, 3, 4, 2)
    expected = module.selective_scan(*given)[0]
    wide = torch.cat((given[0], given[6]), dim=-1)
    torch.testing.assert_close(
        module.selective_scan(*given[:6], wide[..., 4:], *given[7:])[0], expected, rtol=0, atol=0
    )


def test_same_bits_twice(divided):
    torch.manual_seed(6)
    divided(4, 1, 2)
    given = [part.requires_grad_() for part in arguments(1, 5, 40, 2)]
    for once, again in zip(
        run(module.selective_scan, given), run(module.selective_scan, given), strict=True
    ):
        assert torch.equal(once, again)


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "skip", "z", "delta_bias", "state"])
def test_wrong_shapes(name):
    given = dict(
        zip(
            ("x", "delta", "A", "B", "C", "skip", "z", "delta_bias", "state"),
            arguments(2, 3, 4, 2),
            strict=True,
        )
    )
    given[name] = given[name][:-1]
    with pytest.raises(ValueError, match=f"selective_scan: {name if name != 'A' else ''}"):
        module.selective_scan(**given)


def test_sizes_it_does_not_take():
    for time, N in ((0, 2), (3, 65)):
        with pytest.raises(ValueError, match="1 to 64"):
            module.selective_scan(*arguments(1, time, 4, N))


def test_division():
    """With enough walks, time is not split. With few, it is split, up to every interval. The
    backward pass never runs many small programs."""
    assert module.divide(walks=64 * 48, intervals=4, multiprocessors=132) == (4, 3)
    assert module.divide(walks=48, intervals=256, multiprocessors=132) == (2, 6)
    assert module.divide(walks=1, intervals=1, multiprocessors=132) == (1, 1)
    for walks in (1, 48, 192, 768, 1056, 5000):
        for intervals in (1, 7, 256):
            span, share = module.divide(walks, intervals, 132)
            assert 1 <= span <= intervals and walks * -(-intervals // span) / share <= 8 * 132


@pytest.mark.parametrize("setting", module.SWEEP, ids=str)
def test_every_setting_of_the_sweep_computes_the_same(setting, monkeypatch):
    torch.manual_seed(10)
    given = tuple(arguments(1, 35, 3, 2))
    expected = module.selective_scan(*given)
    for name, value in setting.items():
        monkeypatch.setattr(module, name, value)
    for one, other in zip(module.selective_scan(*given), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_the_warps_that_a_split_plans_fit_an_sm():
    """An SM has 65,536 registers. What does not fit runs in a second wave."""
    x = torch.zeros(1, 64, 32)
    registers = module.sizes_of(x, 16, 64, 4, module.REGISTERS)["maxnreg"]
    assert module.FILL * 32 * registers <= 2**16
    for setting in ({}, *module.SWEEP):
        used = setting.get("BACKWARD_REGISTERS", module.BACKWARD_REGISTERS) or 255
        assert setting.get("RESIDENT", module.RESIDENT) * 32 * used <= 2**16


def test_compiled():
    torch.manual_seed(7)
    given = [part.requires_grad_() for part in arguments(1, 3, 4, 2)]

    def function(x, *rest):
        y, state = module.selective_scan(2 * x, *rest)
        return torch.tanh(y), state

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for plain, same in zip(run(function, given), run(compiled, given), strict=True):
        torch.testing.assert_close(same, plain, rtol=1e-6, atol=1e-6)
