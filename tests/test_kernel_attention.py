"""Attention's kernel against its reference: output, dq, dk and dv, with every way to hide keys.

Without a GPU, blocks have 16 queries and 16 keys unless a test says otherwise. So some lengths are
shorter than a block, and some need several.
"""

from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need the package triton")

import minimodels.kernels.attention as kernels
from minimodels.kernels import INTERPRETED
from minimodels.kernels.attention import (
    attention,
    backward_keys_kernel,
    backward_queries_kernel,
    blocks,
    forward_kernel,
)
from minimodels.kernels.common import compare

from minimodels.errors import InputError
from minimodels.ops.attention import attention as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def parts(
    B: int, H: int, G: int, T: int, S: int, d: int, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """q, k and v, as the views that the layer passes on."""
    torch.manual_seed(seed)
    return tuple(
        torch.randn(B, length, heads, d).transpose(1, 2)
        for length, heads in ((T, H), (S, G), (S, G))
    )


def check(q, k, v, queries=None, keys=None, window=None, starts=None):
    """Compare the two. A row that is not a query is left out: here it is 0, and in the
    reference it may be anything."""

    def comparable(operation, **options):
        def run(q, k, v, queries, keys, starts):
            y = operation(q, k, v, queries, keys, window, query_starts=starts, **options)
            return y if queries is None else y * (queries >= 0)[:, None, :, None]

        return run

    compare(
        comparable(attention),
        comparable(reference, impl="reference"),
        (q, k, v, queries, keys, starts),
    )


@pytest.mark.parametrize("T, S", [(1, 1), (5, 5), (37, 37), (1, 33), (20, 41)])
@pytest.mark.parametrize("window", [None, 1, 7], ids=lambda window: f"window {window}")
def test_a_row_of_tokens(T, S, window):
    check(*parts(1, 1, 1, T, S, 16), window=window)


@pytest.mark.parametrize("T, S, window", [(53, 53, 31), (40, 70, 33), (30, 64, 63)])
def test_windows_over_several_blocks(T, S, window):
    check(*parts(1, 1, 1, T, S, 16), window=window)


@pytest.mark.parametrize("ahead", [False, True], ids=["scores in time", "scores ahead"])
@pytest.mark.parametrize("T, S, window", [(37, 37, None), (37, 70, 33), (1, 33, None), (40, 40, 5)])
def test_blocks_of_other_shapes(monkeypatch, T, S, window, ahead):
    for kernel in (forward_kernel, backward_queries_kernel, backward_keys_kernel):
        also = {"AHEAD": ahead} if kernel is forward_kernel else {}
        monkeypatch.setattr(
            kernel, "configs", blocks((16, 32, 4, 2) if ahead else (32, 16, 4, 2), **also)
        )
    check(*parts(1, 2, 1, T, S, 16), window=window)


@pytest.mark.parametrize("ahead", [False, True], ids=["scores in time", "scores ahead"])
@pytest.mark.parametrize(
    "T, window, positions", [(1, None, False), (16, 40, False), (5, None, True), (3, 40, True)]
)
def test_keys_dealt_out(monkeypatch, T, window, positions, ahead):
    monkeypatch.setattr(kernels, "KEYS_EACH", 16)
    monkeypatch.setattr(kernels, "multiprocessors", lambda q: 8)
    monkeypatch.setattr(forward_kernel, "configs", blocks((16, 16, 4, 2), AHEAD=ahead))
    chosen, choose = [], kernels.parts_of
    monkeypatch.setattr(
        kernels, "parts_of", lambda q, met: chosen.append(choose(q, met)) or chosen[-1]
    )
    inputs = parts(2, 2, 1, T, 75, 16)
    places = torch.arange(75).repeat(2, 1)
    places[0, 20:60] = -1  # for the first row, some programs have no keys
    places[1, :74] = -1
    check(*inputs, *((places[:, 75 - T :], places) if positions else ()), window=window)
    assert min(chosen) > 1


@pytest.mark.parametrize("H, G", [(4, 2), (3, 1)])
def test_shared_keys(H, G):
    check(*parts(1, H, G, 17, 19, 16), window=18)


@pytest.mark.parametrize("H, G", [(6, 2), (20, 1)])
@pytest.mark.parametrize("window", [None, 30], ids=lambda window: f"window {window}")
@pytest.mark.parametrize("masks", ["in a row", "positions", "documents"])
@pytest.mark.parametrize("dealt", [False, True], ids=["", "dealt out"])
def test_decoding_heads_that_share_keys(monkeypatch, H, G, window, masks, dealt):
    """The heads are all at one position. A mask that treated them as tokens in a row would show the
    last head the most keys."""
    if dealt:
        monkeypatch.setattr(kernels, "KEYS_EACH", 16)
        monkeypatch.setattr(kernels, "multiprocessors", lambda q: 8)
    places = starts = None
    if masks == "positions":
        places = torch.arange(75).repeat(2, 1) * 2
        places[1, 30:] = -1
    if masks == "documents":
        starts = torch.tensor([[11], [70]])
    last = None if places is None else places[:, -1:]
    check(*parts(2, H, G, 1, 75, 16), last, places, window, starts)


@pytest.mark.parametrize("d", [17, 24, 64, 100, 256])
def test_widths(d):
    check(*parts(2, 1, 1, 9, 18, d))


PADDED = torch.tensor([[-1] * 9 + list(range(14)), list(range(18)) + [-1] * 5])
GAPS = torch.tensor(
    [
        [
            0,
            1,
            -1,
            2,
            5,
            -1,
            -1,
            6,
            7,
            8,
            9,
            20,
            -1,
            22,
            23,
            -1,
            -1,
            25,
            26,
            30,
            -1,
            32,
            33,
            -1,
            50,
        ],
        [-1] * 25,
    ]
)
APART = torch.arange(29).repeat(2, 1) * 3


@pytest.mark.parametrize("T", [1, 21])
@pytest.mark.parametrize("window", [None, 6], ids=lambda window: f"window {window}")
@pytest.mark.parametrize("positions", [PADDED, GAPS, APART], ids=["padded", "gaps", "apart"])
def test_positions(positions, window, T):
    check(*parts(2, 1, 1, T, positions.shape[1], 16), positions[:, -T:], positions, window)


def test_padded_queries_give_nothing_and_disturb_nothing():
    q, k, v = (part.to(DEVICE).requires_grad_() for part in parts(2, 2, 1, 23, 23, 16))
    positions, keep = PADDED.to(DEVICE), (PADDED >= 0).to(DEVICE)[:, None, :, None]
    y = attention(q, k, v, positions, positions)
    assert not y.masked_select(~keep).any()
    dy = torch.randn_like(y)
    careless = torch.autograd.grad(y, (q, k, v), dy, retain_graph=True)
    careful = torch.autograd.grad(y, (q, k, v), dy * keep)
    for name, one, other in zip("dq dk dv".split(), careless, careful, strict=True):
        assert torch.equal(one, other) and one.isfinite().all(), name
    assert not careless[0].masked_select(~keep).any()


def test_positions_without_gaps_are_as_none():
    q, k, v = (part.to(DEVICE) for part in parts(2, 1, 1, 20, 37, 16))
    positions = torch.arange(5, 42, device=DEVICE).expand(2, -1)
    for window in (None, 9):
        torch.testing.assert_close(
            attention(q, k, v, positions[:, 17:], positions, window),
            attention(q, k, v, window=window),
        )


def starts_of(*rows: tuple[int, ...]) -> torch.Tensor:
    """Where each token's document begins, computed from the documents' lengths."""
    ends = [torch.tensor(lengths).cumsum(0) for lengths in rows]
    return torch.stack(
        [
            torch.repeat_interleave(end - torch.tensor(lengths), torch.tensor(lengths))
            for end, lengths in zip(ends, rows, strict=True)
        ]
    )


@pytest.mark.parametrize("window", [None, 1, 5, 20], ids=lambda window: f"window {window}")
@pytest.mark.parametrize("sizes", [(16, 16), (16, 32), (32, 16)], ids=str)
@pytest.mark.parametrize("positions", [False, True], ids=["in a row", "positions"])
def test_documents(monkeypatch, window, sizes, positions):
    """The documents have odd lengths, one of them a single token. Some span several blocks,
    and some are inside one."""
    for kernel in (forward_kernel, backward_queries_kernel, backward_keys_kernel):
        also = {"AHEAD": False} if kernel is forward_kernel else {}
        monkeypatch.setattr(kernel, "configs", blocks((*sizes, 4, 2), **also))
    starts = starts_of((37, 1, 15), (3, 50), (53,))
    places = None
    if positions:  # apart, and with padding
        starts, places = 2 * starts, 2 * torch.arange(53).repeat(3, 1)
        places[1, 40:] = starts[1, 40:] = -1
    check(*parts(3, 2, 1, 53, 53, 16), places, places, window, starts)


@pytest.mark.parametrize("window", [None, 9], ids=lambda window: f"window {window}")
@pytest.mark.parametrize("T", [1, 9, 30])
def test_documents_on_a_carried_state(window, T):
    """One document began before the remembered keys, one among them, and others in the chunk."""
    starts = starts_of((20, 21), (15, 17, 9))[:, 41 - T :]
    starts[0] -= 30 * (starts[0] == 0)
    check(*parts(2, 2, 2, T, 41, 16), window=window, starts=starts)


def test_documents_dealt_out(monkeypatch):
    monkeypatch.setattr(kernels, "KEYS_EACH", 16)
    monkeypatch.setattr(kernels, "multiprocessors", lambda q: 8)
    check(*parts(1, 2, 2, 3, 75, 16), starts=torch.tensor([[5, 40, 73]]))


def test_no_bit_of_another_document():
    starts = starts_of((19, 11, 3)).to(DEVICE)
    inputs = [part.to(DEVICE) for part in parts(1, 2, 1, 33, 33, 16)]
    y = attention(*inputs, query_starts=starts)
    changed = [1e3 * torch.randn_like(part) for part in inputs]
    for part, given in zip(changed, inputs, strict=True):
        part[:, :, 19:30] = given[:, :, 19:30]
    assert torch.equal(attention(*changed, query_starts=starts)[:, :, 19:30], y[:, :, 19:30])


def test_large_scores():
    q, k, v = parts(1, 1, 1, 20, 20, 16)
    check(6 * q, 6 * k, v)  # exp of some of them overflows fp32


def test_strides():
    q, k, v = parts(1, 2, 2, 19, 19, 16)
    check(q.transpose(2, 3).contiguous().transpose(2, 3), k[:, :1].expand(-1, 2, -1, -1), v)
    y = attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE))
    assert y.transpose(1, 2).is_contiguous()


def test_two_runs_give_the_same_bits():
    q, k, v = (part.to(DEVICE).requires_grad_() for part in parts(1, 4, 2, 20, 37, 16))

    def once():
        y = attention(q, k, v, window=20)
        return y, *torch.autograd.grad(y.sin().sum(), (q, k, v))

    for name, one, other in zip("y dq dk dv".split(), once(), once(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("positions", [False, True], ids=["in a row", "positions"])
def test_a_compiled_graph_is_whole(positions):
    q, k, v = (part.to(DEVICE).requires_grad_() for part in parts(2, 1, 1, 18, 18, 16))
    places = torch.arange(18, device=DEVICE).repeat(2, 1) if positions else None

    def layer(q, k, v):
        return attention(2 * q, k, v, places, places, 5).transpose(1, 2).flatten(2).square()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(q, k, v), layer(q, k, v)
    torch.testing.assert_close(y, expected)
    gradients = (torch.autograd.grad(out.sum(), (q, k, v)) for out in (y, expected))
    for name, one, other in zip("dq dk dv".split(), *gradients, strict=True):
        torch.testing.assert_close(one, other, msg=name)


def test_the_operations_are_registered_rightly():
    q, k, v = (part.to(DEVICE).requires_grad_() for part in parts(1, 2, 1, 5, 7, 16))
    torch.library.opcheck(
        torch.ops.minimodels.attention_forward.default, (q, k, v, None, None, None, 3)
    )


@pytest.mark.parametrize(
    "shapes",
    [
        ((1, 2, 5, 16), (1, 2, 5, 16), (1, 2, 6, 16)),
        ((1, 2, 5, 16), (1, 2, 4, 16), (1, 2, 4, 16)),
        ((1, 3, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)),
        ((1, 2, 5, 16), (1, 2, 5, 24), (1, 2, 5, 24)),
        ((2, 2, 5, 16), (1, 2, 5, 16), (1, 2, 5, 16)),
    ],
    ids=["k is not v", "more queries than keys", "heads not shared evenly", "widths", "batches"],
)
def test_wrong_shapes_are_refused(shapes):
    with pytest.raises(ValueError, match="attention: q .* do not fit"):
        attention(*(torch.zeros(shape) for shape in shapes))


def test_wrong_positions_and_dtypes_are_refused():
    q, k, v = (torch.zeros(1, 2, 5, 16) for _ in range(3))
    places = torch.arange(5)[None]
    for queries, keys in (
        (None, places),
        (places, None),
        (places[:, 1:], places),
        (places, places[0]),
    ):
        for path in (
            attention,
            partial(reference, impl="torch"),
            partial(reference, impl="reference"),
        ):
            with pytest.raises(ValueError, match="attention: positions .* do not fit"):
                path(q, k, v, queries, keys)
    with pytest.raises(ValueError, match="attention: q .*float32.* do not fit"):
        attention(q, k.half(), v.half())


@pytest.mark.skipif(not INTERPRETED, reason="a GPU multiplies bfloat16 rightly")
def test_what_the_interpreter_computes_wrongly_is_refused():
    q, k, v = (torch.zeros(1, 2, 5, 16, dtype=torch.bfloat16) for _ in range(3))
    for call in (attention, partial(reference, impl="triton")):
        with pytest.raises(InputError, match="^impl: 'triton' .* bfloat16 wrongly; .* float32$"):
            call(q, k, v)
    attention(q.float(), k.float(), v.float())
