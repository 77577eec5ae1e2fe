"""The delta rule's kernels against the reference: odd lengths, chunks, blocks of channels,
states, documents, padding."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")

from minimodels.kernels import delta_rule as module
from minimodels.kernels.common import CHECKED, GPU, compare, run

from minimodels.ops.delta_rule import delta_rule as operation

DEVICE = "cuda" if GPU else "cpu"
NAMES = ("y", "state", "dq", "dk", "dv", "dg", "de", "dstate")
KINDS = {
    "decay": {"erase": False},
    "delta": {},
    "decay of channels": {"erase": False, "vector": True},
    "delta with decay of channels": {"vector": True},
}


def arguments(
    T: int, K: int = 5, V: int = 3, G: int = 1, H: int = 1, batch: int = 1, resets=(), **kind
) -> tuple:
    *given, _ = module.arguments(batch, T, G, H, K, V, **kind)
    starts = None
    if resets:
        starts = torch.zeros(batch, T, dtype=torch.bool)
        starts[0, list(resets)] = True
    return *given, starts


def named(given: tuple) -> dict[str, torch.Tensor]:
    """The kernels' outputs and gradients, in fp64."""
    given = [p.double().to(DEVICE).requires_grad_() if is_number(p) else p for p in given]
    names = [name for name in NAMES if name != "de" or given[4] is not None]
    return dict(zip(names, run(module.delta_rule, given), strict=True))


def equal(rule, expected, given: tuple) -> None:
    """Compare them. In the interpreter only fp64 is tested, because each
    precision takes a second."""
    compare(rule, expected, given, CHECKED if GPU else (torch.float64,))


def is_number(part: object) -> bool:
    return isinstance(part, torch.Tensor) and part.is_floating_point()


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    """Chunks of 16 tokens, the shortest possible."""
    monkeypatch.setattr(module, "CHUNK", 16)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 15, 33])
def test_delta_rule(T, kind):
    torch.manual_seed(T)
    compare(module.delta_rule, module.reference, arguments(T, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [32, 64])
def test_chunks_of_several_blocks(monkeypatch, C, kind):
    """The inverse is assembled from two and from four blocks of 16."""
    monkeypatch.setattr(module, "CHUNK", C)
    torch.manual_seed(C)
    equal(module.delta_rule, module.reference, arguments(C + 3, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_channels(kind):
    """Keys and values have two blocks, the second incomplete. One group has two heads."""
    torch.manual_seed(3)
    equal(module.delta_rule, module.reference, arguments(3, 70, 80, 1, 2, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_documents(kind):
    """One document begins at the first token, one at a chunk's edge, two inside a chunk, one with
    the last token. One row has none."""
    torch.manual_seed(4)
    given = arguments(35, batch=2, resets=(0, 16, 20, 21, 34), **KINDS[kind])
    equal(module.delta_rule, module.reference, given)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_across_a_start(kind):
    """Not one bit of a document's outputs or gradients depends on another document, or on the
    gate of its first token."""
    torch.manual_seed(5)
    given = arguments(35, resets=(20,), **KINDS[kind])
    other = tuple(part.clone() if is_number(part) else part for part in given)
    for part in other[:5]:
        if part is not None:
            part[0, :20] *= 3
    other[3][0, 20] = float("-inf")
    other[5].mul_(3)
    one, two = named(given), named(other)
    for name in one:
        if name == "dstate":  # only that of the first document
            continue
        now = 0 if name == "state" else (0, slice(20, None))
        assert torch.equal(one[name][now], two[name][now]), name
    assert not one["dg"][0, 20].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [-50.0, float("-inf")])
def test_strong_gates(kind, gate):
    """Neither one gate that forgets everything nor several of them give a
    NaN, forward or backward."""
    torch.manual_seed(6)
    given = arguments(20, **KINDS[kind])
    given[3][:, 5] = gate
    given[3][:, 16:] = gate
    compare(module.delta_rule, module.reference, given)


@pytest.mark.parametrize("kind", KINDS)
def test_padding(kind):
    """If k, e and g are 0, the state does not change by a single bit."""
    torch.manual_seed(7)
    given = arguments(35, **KINDS[kind])
    for part in (given[1], given[3], given[4]):
        if part is not None:
            part[:, 20:] = 0
    equal(module.delta_rule, module.reference, given)
    for part in (given[1], given[3], given[4]):
        if part is not None:
            part.zero_()
    assert torch.equal(named(given)["state"].float(), given[5].to(DEVICE))


def test_no_state():
    torch.manual_seed(8)
    given = arguments(17)
    without = module.delta_rule(*(p.to(DEVICE) for p in given[:5]))
    zeros = module.delta_rule(*(p.to(DEVICE) for p in given[:5]), 0 * given[5].to(DEVICE))
    for one, other in zip(without, zeros, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("weight_y, weight_state", [(0, 1), (1, 0)], ids=["state", "y"])
def test_each_output_alone(weight_y, weight_state):
    """Gradients flow from y and from the final state, even if only one of them is used."""
    torch.manual_seed(9)

    def weighed(rule):
        return lambda *given: sum(
            weight * output.sum()
            for weight, output in zip((weight_y, weight_state), rule(*given), strict=True)
        )

    equal(weighed(module.delta_rule), weighed(module.reference), arguments(18))


def test_heads_with_erase_vectors_of_their_own():
    torch.manual_seed(10)
    q, k, v, g, e, state, resets = arguments(17, G=1, H=2)
    e = torch.cat((e, -0.5 * e), dim=2)
    equal(module.delta_rule, module.reference, (q, k, v, g, e, state, resets))


def test_same_bits_twice():
    torch.manual_seed(11)
    given = arguments(35, G=1, H=2, vector=True)
    once, again = named(given), named(given)
    for name, part in once.items():
        assert torch.equal(part, again[name]), name


def test_compiled():
    torch.manual_seed(12)
    given = [p.to(DEVICE).requires_grad_() if is_number(p) else p for p in arguments(17)]

    def function(q, *rest):
        y, state = module.delta_rule(2 * q, *rest)
        return torch.tanh(y), state

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for plain, same in zip(run(function, given), run(compiled, given), strict=True):
        torch.testing.assert_close(same, plain, rtol=1e-6, atol=1e-6)


def test_the_operation_takes_the_kernel():
    torch.manual_seed(13)
    given = [p.to(DEVICE) if isinstance(p, torch.Tensor) else p for p in arguments(17)][:6]
    for one, other in zip(operation(*given, impl="triton"), module.delta_rule(*given), strict=True):
        assert torch.equal(one, other)


def test_sizes_it_does_not_take():
    with pytest.raises(ValueError, match="256"):
        module.delta_rule(*arguments(2, K=257))
    with pytest.raises(ValueError, match=r"delta_rule: q \("):
        q, *rest = arguments(2)
        module.delta_rule(q[:, 1:], *rest)
