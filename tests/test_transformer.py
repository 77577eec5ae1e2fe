"""Attention, checked against what defines it."""

import itertools

import pytest
import torch
from models import SHAPE, make, same

from minimodels import Config
from minimodels.layers import RMSNorm, rotary, rotate
from minimodels.transformer import Attention, attention

T, D = 24, SHAPE["width"]


def text(rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def test_rotation_depends_on_distance_alone_and_keeps_length():
    q, k = torch.randn(2, 8, dtype=torch.float64)

    def product(m, n):
        at_m, at_n = (rotary(torch.tensor([p]), 8, 10_000.0) for p in (m, n))
        return rotate(q[None], *at_m) @ rotate(k[None], *at_n).T

    same(product(17, 5), product(12, 0), 1e-6)
    assert not torch.allclose(product(17, 5), product(17, 6))
    same(rotate(q[None], *rotary(torch.tensor([11]), 8, 10_000.0)).norm(), q.norm(), 1e-6)


def test_rmsnorm_is_its_equation():
    norm, x = RMSNorm(D), torch.randn(3, D)
    norm.weight.data.normal_()
    same(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), 1e-5)
    half = x.bfloat16()
    assert torch.allclose(norm.bfloat16()(half).float(), norm.float()(half.float()), rtol=2**-7)  # the mean is not in bfloat16


def test_grouped_queries_equal_repeated_keys():
    """Four query heads on two key heads are four on four, where each key head stands twice."""
    grouped, full = make({"layers": "attention", "kv_heads": 2}), make({"layers": "attention"})
    few, many = grouped[0].layer, full[0].layer
    for name in ("q", "out"):
        getattr(many, name).weight.data = getattr(few, name).weight.data
    for name in ("k", "v"):  # (G d, D) -> (H d, D)
        getattr(many, name).weight.data = getattr(few, name).weight.data.view(2, 4, D).repeat_interleave(2, 0).flatten(0, 1)
    full[0].norm.weight.data = grouped[0].norm.weight.data
    same(full(text())[0], grouped(text())[0])


def test_window_is_full_attention_while_it_holds_the_text():
    for window in (T, 2 * T):
        same(make({"layers": "window", "window": window})(text())[0], make({"layers": "attention"})(text())[0])
    assert not torch.allclose(make({"layers": "window"})(text())[0], make({"layers": "attention"})(text())[0])


@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 23])
def test_window_sees_itself_and_what_came_just_before(window):
    """L window layers see 1 + L(w - 1) tokens and no more, whichever path computes them."""
    for impl in ("reference", "torch"):
        stack, x = make({"layers": "window window", "window": window, "impl": impl}), text().requires_grad_()
        stack(x)[0][:, -1].sum().backward()
        reached = x.grad.abs().sum((0, 2)) > 0
        assert reached.sum() == min(T, 1 + 2 * (window - 1))
        assert reached[-1]


def test_window_state_stays_bounded():
    stack, state = make({"layers": "window", "window": 5}), None
    for _ in range(3):
        _, state = stack(text(), state)
        assert state[0].keys.shape[2] == 4
        assert state[0].keys.untyped_storage().nbytes() == state[0].keys.nbytes


@pytest.mark.parametrize("layer", ["attention", "window"])
def test_generation_does_not_copy_what_is_remembered(layer, monkeypatch):
    """A token more goes into free memory behind the others, of which there is a bounded amount."""
    monkeypatch.setattr("minimodels.transformer.SPARE", 8)
    stack, places = make({"layers": layer}), []
    with torch.inference_mode():
        _, state = stack(text())
        for token in torch.cat((text(), text()), dim=1)[:, :36].split(1, dim=1):
            _, state = stack(token, state)
            keys = state[0].keys
            places.append(keys.data_ptr() - keys.storage_offset() * keys.element_size())
            assert keys.untyped_storage().nbytes() <= (keys.shape[2] + 9) * keys[:, :, :1].nbytes
    assert keys.shape[2] == (T + 36 if layer == "attention" else 4)
    assert sum(place != after for place, after in itertools.pairwise(places)) == 3  # after 9 tokens each


@pytest.mark.parametrize(("window", "most"), [(None, 34 + 9), (5, 4 + 9)])
def test_slots_without_a_token_are_given_up(window, most, monkeypatch):
    """Where each row has a token but every third time, a room is made for those that there are."""
    monkeypatch.setattr("minimodels.transformer.SPARE", 8)
    layer, state = Attention(Config(**SHAPE), window), None
    with torch.inference_mode():
        for t in range(100):
            positions = torch.where(torch.arange(3) == t % 3, t, -1)[:, None]
            _, state = layer(torch.randn(3, 1, D), state, positions)
    assert state.keys.shape[2] <= most
    assert state.seen.tolist() == [100, 98, 99]


def test_a_state_outlives_inference_mode():
    stack = make({"layers": "attention"})
    with torch.inference_mode():
        _, state = stack(text())
        _, state = stack(text(), state)
    with torch.no_grad():
        y, _ = stack(text(), state)
    same(y, stack(text(), state)[0])


def test_refuses_shapes_that_do_not_fit():
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"attention: q \(1, 3, 4, 8\)"):
        attention(q, k, k, torch.arange(4)[None], torch.arange(4)[None])


@pytest.mark.parametrize("window", [None, 5])
def test_low_precision_is_within_twice_the_plain_error(window):
    """In bfloat16 the fast path errs at most twice as much as the plain equation in bfloat16."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, T, 8, dtype=torch.float64)
    at = torch.arange(T).expand(2, T)
    exact = attention(q, k, v, at, at, window, "reference")
    low = [part.bfloat16() for part in (q, k, v)]
    error = {impl: (attention(*low, at, at, window, impl) - exact).abs().max() for impl in ("reference", "torch")}
    assert error["torch"] <= 2 * error["reference"]


def test_state_of_attention_counts_what_it_has_seen():
    layer = Attention(Config(**SHAPE))
    _, state = layer(torch.randn(2, 3, D))
    _, state = layer(torch.randn(2, 1, D), state)
    assert (state.seen, state.positions) == (4, None)
    _, state = layer(torch.randn(2, 2, D), state, torch.tensor([[4, 6], [5, -1]]))  # from here on with gaps
    assert state.seen.tolist() == [7, 6]
    assert state.positions.tolist() == [[0, 1, 2, 3, 4, 6], [-1, 0, 1, 2, 3, 5]]
