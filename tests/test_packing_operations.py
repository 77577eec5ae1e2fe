"""Several documents in a row: each operation gives a document what it gives it alone, and
nothing reaches another document.

The documents have odd lengths, and one is a single token. The first may continue from a carried
state.
"""

import pytest
import torch
from models import same

import minimodels.ops.attention as attention_module
from minimodels.architectures.mamba import selective_scan
from minimodels.ops.attention import attention
from minimodels.ops.convolution import causal_conv1d

LENGTHS = ((5, 1, 17), (1, 3, 19), (23,))  # of the documents of three rows
ROWS, T = len(LENGTHS), sum(LENGTHS[0])
PATHS = ("reference", "torch")


def resets(first: bool = True) -> torch.Tensor:
    """(ROWS, T) bool: where documents begin. The first of each row continues from a state
    unless `first` is true."""
    begins = torch.zeros(ROWS, T, dtype=torch.bool)
    for row, lengths in zip(begins, LENGTHS, strict=True):
        row[torch.tensor(lengths).cumsum(0)[:-1]] = True
        row[0] = first
    return begins


def starts() -> torch.Tensor:
    """(ROWS, T): the index at which each token's document begins."""
    return torch.where(resets(), torch.arange(T), 0).cummax(1).values


def documents():
    """The row and the slice of each document."""
    for row, lengths in enumerate(LENGTHS):
        ends = torch.tensor(lengths).cumsum(0).tolist()
        for end, length in zip(ends, lengths, strict=True):
            yield row, slice(end - length, end)


def gradients(outputs, inputs, seed: int = 0) -> list[torch.Tensor]:
    """Gradients of a loss that gives each number of the outputs a different weight."""
    g = torch.Generator().manual_seed(seed)
    loss = sum((o * torch.randn(o.shape, generator=g, dtype=o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(loss, inputs)


def random(*shape: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def assert_same(actual, expected, names: str):
    for name, one, other in zip(names.split(), actual, expected, strict=True):
        torch.testing.assert_close(
            one, other, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


# The causal convolution.

D, W = 6, 4


def convolution(seed: int = 0) -> list[torch.Tensor]:
    shapes = (ROWS, T, D), (D, W), (D,), (ROWS, W - 1, D)
    return [random(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("activation", [False, True], ids=["linear", "silu"])
def test_a_convolution_of_documents_is_that_of_each_alone(impl, activation):
    x, weight, bias, window = inputs = convolution()
    y, after = causal_conv1d(
        x, weight, bias, window, activation=activation, impl=impl, resets=resets(first=False)
    )
    alone, last = torch.empty_like(y), torch.empty_like(after)
    for row, at in documents():
        before = window[row : row + 1] if at.start == 0 else None
        piece, left = causal_conv1d(
            x[row : row + 1, at], weight, bias, before, activation=activation, impl="reference"
        )
        alone[row, at], last[row] = piece[0], left[0]  # the last document's remains
    assert_same((y, after), (alone, last), "y window")
    assert_same(
        gradients((y, after), inputs), gradients((alone, last), inputs), "dx dweight dbias dwindow"
    )


@pytest.mark.parametrize("impl", PATHS)
def test_no_bit_of_another_document_reaches_a_convolution(impl):
    x, weight, bias, window = (part.detach() for part in convolution())
    before = causal_conv1d(x, weight, bias, window, impl=impl, resets=resets())
    for row, at in documents():
        changed = x.clone()
        changed[row] = torch.randn(T, D, dtype=x.dtype) * 1e8
        changed[row, at] = x[row, at]
        y, after = causal_conv1d(changed, weight, bias, -1e8 * window, impl=impl, resets=resets())
        assert torch.equal(y[row, at], before[0][row, at])
        if at.stop == T:
            assert torch.equal(after[row], before[1][row])


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("cut", [1, 5, 6, 7, 22])
def test_pieces_of_documents_convolve_as_the_whole(impl, cut):
    x, weight, bias, window = convolution()
    whole = causal_conv1d(x, weight, bias, window, impl=impl, resets=resets(False))
    pieces = []
    for at in (slice(0, cut), slice(cut, T)):
        y, window = causal_conv1d(
            x[:, at], weight, bias, window, impl=impl, resets=resets(False)[:, at]
        )
        pieces.append(y)
    assert_same((torch.cat(pieces, 1), window), whole, "y window")


@pytest.mark.parametrize("impl", PATHS)
def test_a_window_ends_before_the_padding_of_documents(impl):
    x, weight, bias, window = (part.detach() for part in convolution())
    lengths = torch.tensor([8, 0, 23])
    _, after = causal_conv1d(x, weight, bias, window, lengths, impl=impl, resets=resets())
    assert torch.equal(after[0], torch.cat((torch.zeros(1, D), x[0, 6:8])))
    assert torch.equal(after[1], window[1]) and torch.equal(after[2], x[2, 20:])


def test_a_convolution_of_one_tap_needs_no_documents():
    x, weight, bias, _ = convolution()
    for impl in PATHS:
        y, window = causal_conv1d(x, weight[:, :1], bias, None, impl=impl, resets=resets())
        same(y, weight[:, 0] * x + bias)
        assert window.shape == (ROWS, 0, D)


def test_a_convolution_of_documents_compiles_to_one_graph():
    inputs = convolution()

    def operation(x, weight, bias, window):
        return causal_conv1d(x, weight, bias, window, impl="torch", resets=resets(False))

    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*inputs), operation(*inputs), "y window")


# The selective scan.

N = 3


def scanned(seed: int = 0) -> list[torch.Tensor]:
    shapes = (
        [(ROWS, T, D)] * 2
        + [(D, N)]
        + [(ROWS, T, N)] * 2
        + [(D,), (ROWS, T, D), (D,), (ROWS, D, N)]
    )
    parts = [random(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
    parts[2] = (-parts[2].detach().abs() - 0.1).requires_grad_()
    return parts


@pytest.mark.parametrize("impl", PATHS)
def test_a_scan_of_documents_is_that_of_each_alone(impl):
    x, delta, A, B, C, skip, z, bias, state = inputs = scanned()
    y, final = selective_scan(*inputs, impl, resets=resets(first=False))
    alone, last = torch.empty_like(y), torch.empty_like(final)
    for row, at in documents():
        pick = slice(row, row + 1), at
        before = state[row : row + 1] if at.start == 0 else None
        piece, left = selective_scan(
            x[pick], delta[pick], A, B[pick], C[pick], skip, z[pick], bias, before, "reference"
        )
        alone[row, at], last[row] = piece[0], left[0]
    assert_same((y, final), (alone, last), "y state")
    names = "dx ddelta dA dB dC dskip dz dbias dstate"
    assert_same(gradients((y, final), inputs), gradients((alone, last), inputs), names)


@pytest.mark.parametrize("impl", PATHS)
def test_no_bit_of_another_document_reaches_a_scan(impl):
    given = [part.detach() for part in scanned()]
    before = selective_scan(*given, impl, resets=resets())
    for row, at in documents():
        changed = [part.clone() for part in given]
        for i in (0, 1, 3, 4, 6):
            changed[i][row] = torch.randn_like(given[i][row]) * 1e3
            changed[i][row, at] = given[i][row, at]
        changed[8] *= 1e8
        y, state = selective_scan(*changed, impl, resets=resets())
        assert torch.equal(y[row, at], before[0][row, at])
        if at.stop == T:
            assert torch.equal(state[row], before[1][row])


@pytest.mark.parametrize("impl", PATHS)
def test_the_decay_of_a_reset_has_no_gradient(impl):
    """A's gradient comes only from decays. If every token begins a document, it has none."""
    given = scanned()
    y, state = selective_scan(*given, impl, resets=torch.ones(ROWS, T, dtype=torch.bool))
    dA, dstate = gradients((y, state), (given[2], given[8]))
    assert not dA.any() and not dstate.any()


@pytest.mark.parametrize("impl", PATHS)
def test_a_single_step_may_begin_a_document(impl):
    given = [part[:, :1] if part.ndim == 3 and part.shape[1] == T else part for part in scanned()]
    begins = torch.tensor([True, False, True])
    y, state = selective_scan(*given, impl, resets=begins[:, None])
    kept = given[8] * ~begins[:, None, None]
    assert_same((y, state), selective_scan(*given[:8], kept, "reference"), "y state")


def test_a_scan_of_documents_compiles_to_one_graph():
    given = scanned()

    def operation(*given):
        return selective_scan(*given, "torch", resets=resets(False))

    compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
    results, expected = compiled(*given), operation(*given)
    assert_same(results, expected, "y state")
    names = "dx ddelta dA dB dC dskip dz dbias dstate"
    assert_same(gradients(results, given), gradients(expected, given), names)


# Attention.

H, G, d = 4, 2, 8


def qkv(queries: int = T, keys: int = T, seed: int = 0) -> list[torch.Tensor]:
    shapes = (ROWS, H, queries, d), (ROWS, G, keys, d), (ROWS, G, keys, d)
    return [random(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


@pytest.mark.parametrize("impl", PATHS)
@pytest.mark.parametrize("window", [None, 1, 3, 9, 23, 40])
@pytest.mark.parametrize("positions", [False, True], ids=["in a row", "positions"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_attention_of_documents_is_that_of_each_alone(impl, window, positions, masked, monkeypatch):
    if masked:  # as on a GPU
        monkeypatch.setattr(attention_module, "document_lengths", lambda *_: None)
    inputs = q, k, v = qkv()
    places = 2 * torch.arange(T).repeat(ROWS, 1) if positions else None
    begin = 2 * starts() if positions else starts()
    y = attention(q, k, v, places, places, window, impl, begin)
    alone = torch.empty_like(y)
    for row, at in documents():
        parts = (part[row : row + 1, :, at] for part in inputs)
        at_places = None if places is None else places[:1, at]
        alone[row, :, at] = attention(*parts, at_places, at_places, window, "reference")[0]
    assert_same([y], [alone], "y")
    assert_same(gradients([y], inputs), gradients([alone], inputs), "dq dk dv")


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_no_bit_of_another_document_reaches_attention(window, masked, monkeypatch):
    if masked:
        monkeypatch.setattr(attention_module, "document_lengths", lambda *_: None)
    inputs = [part.detach() for part in qkv()]
    before = attention(*inputs, None, None, window, "torch", starts())
    for row, at in documents():
        changed = [part.clone() for part in inputs]
        for part, given in zip(changed, inputs, strict=True):
            part[row] = 1e3 * torch.randn_like(part[row])
            part[row, :, at] = given[row, :, at]
        y = attention(*changed, None, None, window, "torch", starts())
        assert torch.equal(y[row, :, at], before[row, :, at])


@pytest.mark.parametrize("window", [None, 2, 6])
def test_padding_behind_documents_changes_nothing(window):
    inputs = qkv()
    places = torch.arange(T).repeat(ROWS, 1)
    places[0, 20:] = places[1, 1:] = -1
    outputs = []
    for impl in PATHS:
        y = attention(*inputs, places, places, window, impl, starts())
        assert y.isfinite().all()
        outputs.append(y * (places >= 0)[:, None, :, None])
    assert_same(outputs[1:], outputs[:1], "y")
    assert_same(gradients(outputs[1:], inputs), gradients(outputs[:1], inputs), "dq dk dv")


@pytest.mark.parametrize("window", [None, 1, 4, 9])
@pytest.mark.parametrize("queries", [1, 11, 20])
@pytest.mark.parametrize("entries", [2**25, 40], ids=["", "blocks of queries"])
@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
@pytest.mark.parametrize("positions", [False, True], ids=["in a row", "positions"])
def test_a_chunk_on_a_carried_state(window, queries, entries, packed, positions, monkeypatch):
    """Except for the mask of all queries and keys, all paths leave slots out. Empty slots among the
    remembered ones may contain anything."""
    monkeypatch.setattr(attention_module, "MASK", entries)
    inputs = qkv(queries)
    keys = None
    if positions:
        keys = torch.arange(T).repeat(ROWS, 1)
        keys[0, 1:3], keys[1, : T - queries], keys[2, T - 1 :] = -1, -1, -1
        keys[0, 3:] -= 2
        keys[1] -= T - queries
        keys[1].clamp_(min=-1)
    places = None if keys is None else keys[:, T - queries :]
    begin = starts()[:, T - queries :] if packed else None
    if packed and positions:
        begin = torch.stack((begin[0] - 2, begin[1] - T + queries, begin[2]))
    outputs = []
    for impl in PATHS:
        y = attention(*inputs, places, keys, window, impl, begin)
        outputs.append(y if keys is None else y * (places >= 0)[:, None, :, None])
    assert_same(outputs[1:], outputs[:1], "y")
    assert_same(gradients(outputs[1:], inputs), gradients(outputs[:1], inputs), "dq dk dv")


def test_a_long_chunk_on_a_window_makes_no_mask_of_all_keys(monkeypatch):
    seen, sees = [], attention_module.sees
    monkeypatch.setattr(attention_module, "sees", lambda *a: seen.append(sees(*a)) or seen[-1])
    window, queries = 4, 90
    attention(*qkv(queries, queries + 40), None, None, window, "torch")
    assert sum(mask.numel() for mask in seen) <= ROWS * (queries + window) * 2 * window


def test_starts_that_are_not_those_of_documents_are_masked():
    begin = (torch.arange(T) - 2).clamp(min=0).repeat(ROWS, 1)
    outputs = [attention(*qkv(), None, None, None, impl, begin) for impl in PATHS]
    assert_same(outputs[1:], outputs[:1], "y")
    assert_same([outputs[0]], [attention(*qkv(), None, None, 3, "reference")], "y")


def test_attention_of_documents_compiles_to_one_graph():
    inputs = qkv()
    for window in (None, 3):

        def operation(*inputs, window=window):
            return attention(*inputs, None, None, window, "torch", starts())

        compiled = torch.compile(operation, fullgraph=True, backend="aot_eager")
        assert_same([compiled(*inputs)], [operation(*inputs)], "y")


def test_shapes_that_do_not_fit_are_refused():
    begins = resets()[:, 1:]
    for impl in PATHS:
        with pytest.raises(ValueError, match="causal_conv1d: .*resets"):
            causal_conv1d(*convolution(), impl=impl, resets=begins)
        with pytest.raises(ValueError, match="selective_scan: resets"):
            selective_scan(*scanned(), impl, resets=begins)
        with pytest.raises(ValueError, match="attention: query_starts"):
            attention(*qkv(), impl=impl, query_starts=starts()[:, 1:])


def test_auto_leaves_plain_causal_attention_to_pytorch(monkeypatch):
    """A kernel that was measured to be faster is used for windows, positions,
    documents and decoding."""
    kernels = pytest.importorskip("minimodels.kernels.attention", exc_type=ImportError)
    used = []
    monkeypatch.setattr(kernels, "attention", lambda *given: used.append(given))
    monkeypatch.setattr(attention_module, "choose", lambda *_: "triton")  # measured to be faster
    places = torch.arange(T).repeat(ROWS, 1)
    assert attention(*qkv()) is not None  # PyTorch's
    assert attention(*qkv(), softcap=2.0) is not None  # the kernel has none
    assert used == []
    attention(*qkv(1))
    attention(*qkv(), window=3)
    attention(*qkv(), places, places)
    attention(*qkv(), query_starts=starts())
    assert len(used) == 4
