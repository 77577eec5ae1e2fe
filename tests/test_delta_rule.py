"""The delta rule: chunks against the recurrence, gradients by name, states, documents, padding,
extreme values and identities."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minimodels.ops import delta_rule as module
from minimodels.ops.delta_rule import chunk_length, delta_rule, flops

B, G, H, K, V = 2, 2, 4, 5, 3
KINDS = {
    "decay": {"erase": False},
    "delta": {},
    "delta of heads": {"erase_heads": H},
    "decay of channels": {"erase": False, "vector": True},
    "delta with decay of channels": {"vector": True},
}


def arguments(
    T: int = 37,
    vector: bool = False,
    erase: bool = True,
    erase_heads: int = G,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor | None]:
    """Random inputs. Keys and erase vectors are short, so that the state stays about
    as large as the values."""
    generator = torch.Generator().manual_seed(T)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    gates = (B, T, H, K) if vector else (B, T, H)
    given = {"q": normal(B, T, G, K), "k": 0.5 * normal(B, T, G, K), "v": normal(B, T, H, V)}
    given["g"] = -normal(*gates).abs()
    given["e"] = 0.5 * normal(B, T, erase_heads, K) if erase else None
    given["state"] = normal(B, H, K, V)
    return given


def results(given: dict[str, Tensor | None], impl: str = "torch", **options) -> dict[str, Tensor]:
    """y, the final state, and the gradients of both by name."""
    given = {n: p if p is None else p.detach().requires_grad_() for n, p in given.items()}
    y, state = delta_rule(**given, impl=impl, **options)
    loss = (y * weights(y)).sum() + (state * weights(state)).sum()
    wanted = {name: part for name, part in given.items() if part is not None}
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    named = {f"d{name}": part for name, part in zip(wanted, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def weights(x: Tensor) -> Tensor:
    """A different weight for each number. A shorter text has the weights of a
    longer text's first tokens."""
    return torch.cos(torch.arange(x[0].numel(), dtype=x.dtype)).view_as(x[0])


def same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-11) -> None:
    assert actual.keys() == expected.keys()
    for name, part in actual.items():
        torch.testing.assert_close(
            part, expected[name], rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


def tokens(given: dict, now: slice) -> dict:
    """Part of the tokens, with the state unchanged."""
    return {n: p if p is None or n == "state" else p[:, now] for n, p in given.items()}


@pytest.fixture
def chunks_of(monkeypatch):
    """A function that sets the tokens per chunk, and computes two chunks at once."""

    def fix(C: int) -> None:
        monkeypatch.setattr(module, "CHUNK", C)
        monkeypatch.setattr(module, "WORK", 2 * C * B * H)

    return fix


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "C, T",
    [(1, 5), (4, 7), (4, 8), (4, 9), (4, 21), (16, 15), (16, 33), (64, 2), (64, 63), (64, 65)],
)
def test_chunks_equal_the_recurrence(chunks_of, C, T, kind):
    """They agree in outputs, final state and all six gradients. The state between slabs of
    two chunks is passed on."""
    chunks_of(C)
    given = arguments(T, **KINDS[kind])
    same(results(given), results(given, "reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(chunks_of, kind):
    chunks_of(2)
    given = {n: p for n, p in arguments(5, **KINDS[kind]).items() if p is not None}
    parts = [part[:1].requires_grad_() for part in given.values()]
    torch.autograd.gradcheck(
        lambda *parts: delta_rule(**dict(zip(given, parts, strict=True))), parts
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("T", [1, 33])
def test_single_precision_is_close_to_double(kind, T):
    given = arguments(T, **KINDS[kind])
    exact, single = (
        results(given),
        results({n: p if p is None else p.float() for n, p in given.items()}),
    )
    for name, part in single.items():
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), exact[name], rtol=2e-5, atol=5e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("split", [1, 16, 36])
def test_a_state_continues_a_text(kind, split):
    """Two pieces, with the state between them, give the outputs, state and
    gradients of the whole text."""
    given = {n: p if p is None else p.requires_grad_() for n, p in arguments(**KINDS[kind]).items()}
    wanted = {name: part for name, part in given.items() if part is not None}
    whole = delta_rule(**given)
    first, between = delta_rule(**tokens(given, slice(0, split)))
    second, final = delta_rule(**{**tokens(given, slice(split, None)), "state": between})
    named = []
    for y, state in (whole, (torch.cat((first, second), dim=1), final)):
        gradients = torch.autograd.grad(y.sin().sum() + state.cos().sum(), list(wanted.values()))
        named.append({"y": y, "state": state, **dict(zip(wanted, gradients, strict=True))})
    same(*named)


@pytest.mark.parametrize("T", [1, 37])
def test_no_state_is_a_state_of_zero(T):
    given = arguments(T)
    y, state = delta_rule(**{**given, "state": None})
    zeros, final = delta_rule(**{**given, "state": torch.zeros_like(given["state"])})
    assert torch.equal(y, zeros) and torch.equal(state, final)


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_no_erase_is_an_erase_of_zero(vector):
    given = arguments(vector=vector, erase=False)
    zeros = results({**given, "e": torch.zeros_like(given["k"])})
    zeros.pop("de")
    same(zeros, results(given))


@pytest.mark.parametrize("erase", [False, True], ids=["decay", "delta"])
def test_equal_channels_are_a_scalar_gate(erase):
    given = arguments(erase=erase)
    channels = results({**given, "g": given["g"].unsqueeze(3).repeat(1, 1, 1, K)})
    channels["dg"] = channels["dg"].sum(3)
    same(channels, results(given))


def test_keys_of_one_number():
    """A vector gate of one channel is a scalar gate in another shape."""
    given = {
        n: p[..., :1, :] if n == "state" else p[..., :1] if n in "qke" else p
        for n, p in arguments().items()
    }
    channels = results({**given, "g": given["g"].unsqueeze(3)})
    channels["dg"] = channels["dg"].squeeze(3)
    same(channels, results(given, "reference"))


@pytest.mark.parametrize("kind", KINDS)
def test_groups_are_repeated_heads(kind):
    given = arguments(**KINDS[kind])
    repeated = {
        n: p.repeat_interleave(H // G, 2)
        if n in ("q", "k", "e") and p is not None and p.shape[2] == G
        else p
        for n, p in given.items()
    }
    apart = results(repeated)
    grouped = results(given)
    for name in ("dq", "dk", "de"):
        if name in apart and apart[name].shape != grouped[name].shape:
            apart[name] = apart[name].unflatten(2, (G, H // G)).sum(3)
    same(apart, grouped)


# How tokens change the state.


def test_without_gates_it_is_causal_linear_attention():
    given = arguments(32, erase=False)
    q, k = (given[name].repeat_interleave(H // G, 2).transpose(1, 2) for name in ("q", "k"))
    expected = (q @ k.mT).tril() @ given["v"].transpose(1, 2)
    y, _ = delta_rule(given["q"], given["k"], given["v"], torch.zeros_like(given["g"]))
    torch.testing.assert_close(y, expected.transpose(1, 2), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [-50.0, -1e4, float("-inf")])
def test_one_strong_gate_forgets(kind, gate):
    """Later tokens give what they give after a state of zero. Nothing is NaN,
    and no gradient passes."""
    given = arguments(dtype=torch.float32, **KINDS[kind])
    given["g"][:, 20] = gate
    forgotten = results(given)
    assert all(part.isfinite().all() for part in forgotten.values())
    rest = {**tokens(given, slice(20, None)), "state": torch.zeros_like(given["state"])}
    y, state = delta_rule(**rest)
    torch.testing.assert_close(forgotten["y"][:, 20:], y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(forgotten["state"], state, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gate", [-5.0, -100.0, 0.0])
def test_one_gate_for_all_tokens(kind, gate):
    """There are 64 tokens in one chunk. The product of their decays is 1e-139 at -5, and at -100 it
    is 0 long before the end."""
    given = arguments(64, dtype=torch.float32, **KINDS[kind])
    given["g"] = torch.full_like(given["g"], gate)
    given["e"] = None if given["e"] is None else 0.2 * given["e"]
    exact = results({n: p if p is None else p.double() for n, p in given.items()}, "reference")
    for name, part in results(given).items():
        allowed = 2e-5 * (1 + exact[name].abs().max())
        assert (part - exact[name]).abs().max() < allowed, name


def deltanet(T: int, beta: float, dtype=torch.float64) -> dict[str, Tensor]:
    given = arguments(T, dtype=dtype)
    k = F.normalize(given["k"], dim=-1)
    v = beta * given["v"]
    return {**given, "k": k, "v": v, "e": beta * k, "g": torch.zeros_like(given["g"])}


def test_beta_1_stores_the_value_exactly():
    """The first token's key appears again at the end with another value. Reading with
    it gives the last value."""
    given = deltanet(37, 1.0)
    given["k"][:, -1], given["e"][:, -1] = given["k"][:, 0], given["e"][:, 0]
    _, state = delta_rule(**given)
    key = given["k"][:, -1].repeat_interleave(H // G, 1).unsqueeze(2)  # (B, H, 1, K)
    torch.testing.assert_close((key @ state).squeeze(2), given["v"][:, -1], rtol=1e-11, atol=1e-11)


def test_beta_2_reflects():
    given = deltanet(37, 2.0)
    given["v"] = torch.zeros_like(given["v"])
    _, state = delta_rule(**given)
    torch.testing.assert_close(state.norm(dim=2), given["state"].norm(dim=2), rtol=1e-11, atol=0)
    assert not torch.allclose(state, given["state"], atol=0.1)
    again = {**given, "state": state, **{n: given[n].flip(1) for n in ("k", "e")}}
    torch.testing.assert_close(delta_rule(**again)[1], given["state"], rtol=1e-10, atol=1e-11)


def test_beta_0_changes_nothing():
    given = deltanet(37, 0.0)
    assert torch.equal(delta_rule(**given)[1], given["state"])


@pytest.mark.parametrize("vector", [False, True], ids=["scalar", "vector"])
def test_the_gradient_is_the_operation_with_k_and_e_exchanged(vector):
    """Backwards in time, the gradient is R <- Diag(α)(R + q dyᵀ - e (Rᵀ k)). This is the rule
    applied to R + q dyᵀ, with the decay after the erasing. Each step is two steps of the operation:
    one writes q dyᵀ, and one erases and decays. Every decay comes one step late."""
    given = arguments(9, vector=vector, erase_heads=H)
    given |= {n: given[n].repeat_interleave(H // G, 2) for n in ("q", "k")}
    leaf = {**given, "state": given["state"].requires_grad_()}
    y, final = delta_rule(**leaf)
    dy, dfinal = weights(y).expand_as(y), weights(final).expand_as(final)
    (expected,) = torch.autograd.grad((y, final), given["state"], (dy, dfinal))

    q, k, g, e = (given[n].flip(1) for n in ("q", "k", "g", "e"))
    late = torch.cat((torch.zeros_like(g[:, :1]), g[:, :-1]), dim=1)  # α of the token before
    pairs = lambda first, second: torch.stack((first, second), dim=2).flatten(1, 2)  # noqa: E731
    _, R = delta_rule(
        q=torch.zeros_like(pairs(q, q)),
        k=pairs(q, e),
        v=pairs(dy.flip(1), torch.zeros_like(dy)),
        g=pairs(late, torch.zeros_like(g)),
        e=pairs(torch.zeros_like(k), k),
        state=dfinal.contiguous(),
    )
    decay = g[:, -1].exp() if vector else g[:, -1, :, None].exp()
    torch.testing.assert_close(decay.unsqueeze(3) * R, expected, rtol=1e-10, atol=1e-11)


# Documents and padding.

STARTS = (0, 3, 4, 20, 36)


def with_resets(T: int = 37) -> Tensor:
    resets = torch.zeros(B, T, dtype=torch.bool)
    resets[0, list(STARTS)] = True
    return resets


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("C", [4, 16])
def test_a_document_is_what_it_is_alone(chunks_of, C, kind):
    """Outputs, states and gradients are the same. The other row is one document,
    which continues the state."""
    chunks_of(C)
    given = arguments(**KINDS[kind])
    packed = results(given, resets=with_resets())
    same(packed, results(given, "reference", resets=with_resets()))
    for first, end in zip(STARTS, (*STARTS[1:], 37), strict=True):
        alone = {n: p if p is None else p[:1] for n, p in tokens(given, slice(first, end)).items()}
        alone["state"] = torch.zeros_like(alone["state"])
        alone = {n: p if p is None else p.detach().requires_grad_() for n, p in alone.items()}
        y, state = delta_rule(**alone)
        loss = (y * weights(packed["y"])[first:end]).sum()
        loss = loss + (state * weights(state)).sum() if end == 37 else loss
        names = [name for name, part in alone.items() if part is not None and name != "state"]
        gradients = torch.autograd.grad(loss, [alone[name] for name in names])
        torch.testing.assert_close(packed["y"][:1, first:end], y, rtol=1e-11, atol=1e-11)
        for name, gradient in zip(names, gradients, strict=True):
            if name == "g":
                gradient[:, 0] = 0  # the gate of a first token has no effect
            torch.testing.assert_close(
                packed[f"d{name}"][:1, first:end], gradient, rtol=1e-10, atol=1e-11
            )
    torch.testing.assert_close(packed["state"][:1], state, rtol=1e-11, atol=1e-11)
    one = results({n: p if p is None else p[1:] for n, p in given.items()})
    same({n: p[1:] for n, p in packed.items()}, one)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_leaks_across_a_start(kind):
    """The content of one document does not change a single bit of
    another's outputs or gradients."""
    given = arguments(**KINDS[kind])
    other = {n: p if p is None else p.clone() for n, p in given.items()}
    for name, part in other.items():
        if part is not None:
            part[0, : 20 if name != "state" else None] *= 3
    resets = with_resets()
    one, two = results(given, resets=resets), results(other, resets=resets)
    for name in one:
        now = (0,) if name == "state" else (0, slice(20, None))
        if name == "dstate":
            assert not one[name][0].any() and not two[name][0].any()
        else:
            assert torch.equal(one[name][now], two[name][now]), name
    assert not one["dg"][0, list(STARTS)].any()


@pytest.mark.parametrize("impl", ["reference", "torch"])
@pytest.mark.parametrize("gate", [float("nan"), float("inf"), -1e4])
def test_a_reset_ignores_its_gate(impl, gate):
    given = arguments()
    expected = results(given, impl, resets=with_resets())
    given["g"][0, list(STARTS)] = gate
    same(results(given, impl, resets=with_resets()), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """A row of padding leaves the state unchanged bit for bit. Padding after a text leaves its
    state, outputs and gradients unchanged."""
    given = arguments(64, **KINDS[kind])
    for name in ("k", "g", "e"):
        if given[name] is not None:
            given[name][0] = 0
            given[name][1, 40:] = 0
    padded = results(given)
    assert torch.equal(padded["state"][0], given["state"][0])
    text = {n: p if p is None else p[1:] for n, p in tokens(given, slice(0, 40)).items()}
    alone = results(text)
    torch.testing.assert_close(padded["state"][1:], alone["state"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(padded["y"][1:, :40], alone["y"], rtol=1e-12, atol=1e-12)


# How it is called.


def test_precision_inside():
    """bf16 inputs are computed in fp32, also under autocast. y has v's dtype,
    and the state is in fp32."""
    given = {n: p.bfloat16() for n, p in arguments().items()}
    expected, final = delta_rule(**{n: p.float() for n, p in given.items()})
    with torch.autocast("cpu", torch.bfloat16):
        y, state = delta_rule(**given)
    assert y.dtype == torch.bfloat16 and state.dtype == torch.float32
    assert torch.equal(y, expected.bfloat16()) and torch.equal(state, final)


@pytest.mark.parametrize("kind", ["decay", "delta with decay of channels"])
def test_compiled(kind):
    given = {n: p if p is None else p.requires_grad_() for n, p in arguments(**KINDS[kind]).items()}
    wanted = [part for part in given.values() if part is not None]
    resets = with_resets()

    def loss(given, resets):
        y, state = delta_rule(**given, resets=resets)
        return y.sin().sum() + state.cos().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    gradients = (torch.autograd.grad(f(given, resets), wanted) for f in (compiled, loss))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("weight_y, weight_state", [(0, 1), (1, 0)], ids=["state", "y"])
def test_each_output_alone(weight_y, weight_state):
    """Gradients flow from y and from the final state, even if only one of them is used."""
    given = arguments()
    gradients = []
    for impl in ("torch", "reference"):
        parts = {n: p.detach().requires_grad_() for n, p in given.items()}
        y, state = delta_rule(**parts, impl=impl)
        output = y if weight_y else state
        gradients.append(torch.autograd.grad(output.sin().sum(), [parts[n] for n in "kvge"]))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("erase", [False, True], ids=["decay", "delta"])
def test_counted_flops(erase):
    given = {n: p if p is None else p.requires_grad_() for n, p in arguments(erase=erase).items()}
    with FlopCounterMode(display=False) as counter:
        y, _ = delta_rule(**given)
    forward = B * 37 * H * flops(32, K, V, erase)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def test_what_is_saved():
    """Only the inputs and the states between chunks are saved."""
    given = {n: p.requires_grad_() for n, p in arguments(70).items()}
    saved = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        delta_rule(**given)
    states = (-(-70 // 32) + 1) * given["state"].numel()
    assert sum(t.numel() for t in saved) <= states + sum(p.numel() for p in given.values())


@pytest.mark.parametrize("T, C", [(1, 1), (2, 2), (3, 4), (17, 32), (4096, 32)])
def test_short_texts_have_short_chunks(T, C):
    assert chunk_length(T) == C


@pytest.mark.parametrize("name", ["q", "k", "v", "g", "e", "state", "resets"])
def test_wrong_shapes(name):
    given = {**arguments(), "resets": with_resets()}
    given[name] = given[name][:, :-1]
    with pytest.raises(ValueError, match=rf"delta_rule: .*{name} \("):
        delta_rule(**given)
    given = {**arguments(), "resets": with_resets().long()}
    with pytest.raises(ValueError, match="bool"):
        delta_rule(**given)


# Code of another project.


def fla(name: str):
    """The naive functions of flash-linear-attention. They are loaded by path, because the
    package itself needs a GPU."""
    found = importlib.util.find_spec("fla")
    if found is None:
        pytest.skip("flash-linear-attention is not installed")
    path = Path(found.submodule_search_locations[0], "ops", name, "naive.py")
    spec = importlib.util.spec_from_file_location(f"fla_{name}", path)
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code


@pytest.mark.parametrize("name", ["gated_delta_rule", "kda"])
def test_flash_linear_attention(name):
    code = fla(name)
    given = arguments(vector=name == "kda", dtype=torch.float32)
    q, k = (given[n].repeat_interleave(H // G, 2) for n in ("q", "k"))
    beta = torch.rand(B, 37, H)
    naive = getattr(code, f"naive_recurrent_{name}")
    expected, final = naive(
        q=q, k=k, v=given["v"], g=given["g"], beta=beta, scale=1.0,
        initial_state=given["state"], output_final_state=True,
    )  # fmt: skip
    b = beta.unsqueeze(3)
    y, state = delta_rule(q, k, b * given["v"], given["g"], b * k, given["state"])
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(state, final, rtol=1e-4, atol=1e-4)
