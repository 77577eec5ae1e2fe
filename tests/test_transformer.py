"""Attention, checked against its definition."""

import copy
import itertools
import math
import pickle
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
import torch.multiprocessing  # which teaches the pickler to share tensors
from models import WIDTH, make, same
from torch.utils._python_dispatch import TorchDispatchMode

from minimodels import LM, Config
from minimodels.architectures.transformer import Attention, default_width
from minimodels.context import Context
from minimodels.ops.attention import attention
from minimodels.ops.rotary import Llama3, angles_operation, rotary, rotate
from minimodels.parts import RMSNorm

T, D = 24, WIDTH
WINDOW = "attention(window=5)"


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


@pytest.mark.parametrize(
    "positions", [torch.arange(9), torch.arange(18).view(3, 6).T, torch.arange(6).expand(3, 1, 6)]
)
def test_rotary_angles_are_an_operation_that_a_compiler_may_trust(positions):
    torch.library.opcheck(angles_operation, (positions, 8, 1e4, "linear(factor=2)"))


def test_layers_that_turn_alike_share_their_angles(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "minimodels.architectures.transformer.rotary",
        lambda *args: calls.append(args[0]) or rotary(*args),
    )
    pair = f"attention {WINDOW}"
    stack = make(f"{pair} mod({pair}, capacity=0.5)")
    stack.train()(torch.randn(2, 9, D, dtype=torch.float64))
    everyone, routed = calls  # the group in mixture-of-depths has its own positions
    assert everyone.tolist() == list(range(9))
    assert routed.shape == (2, 1, 5)


def test_layers_that_turn_otherwise_do_not_share_their_angles():
    """A stack of different layers gives what the layers give one after the
    other, each in its own pass."""
    scaled = "attention(rope_scaling=linear(factor=4))"
    for other in ("attention(rope_base=100)", "attention(head_dim=8)", scaled):
        stack, x = make(f"attention {other}"), text()
        expected = x
        for block in stack:
            expected = expected + block.layer(block.norm(expected))[0]
        same(stack(x)[0], expected)


def test_rmsnorm_is_its_equation():
    norm, x = RMSNorm(D), torch.randn(3, D)
    norm.weight.data.normal_()
    same(norm(x), norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt(), 1e-5)
    half = x.bfloat16()
    assert norm(half).dtype == torch.bfloat16  # as under autocast
    # the mean is not in bfloat16
    assert torch.allclose(norm.bfloat16()(half).float(), norm.float()(half.float()), rtol=2**-7)


def test_grouped_queries_equal_repeated_keys():
    """Four query heads on two key heads give what four give on four, if
    each key head is repeated."""
    grouped, full = make("attention(kv_heads=2)"), make("attention")
    few, many = grouped[0].layer, full[0].layer
    for name in ("q", "out"):
        getattr(many, name).weight.data = getattr(few, name).weight.data
    for name in ("k", "v"):  # (G d, D) -> (H d, D)
        getattr(many, name).weight.data = (
            getattr(few, name).weight.data.view(2, 4, D).repeat_interleave(2, 0).flatten(0, 1)
        )
    full[0].norm.weight.data = grouped[0].norm.weight.data
    same(full(text())[0], grouped(text())[0])


def test_window_is_full_attention_while_it_holds_the_text():
    for window in (T, 2 * T):
        windowed = make(f"attention(window={window})")
        same(windowed(text())[0], make("attention")(text())[0])
    assert not torch.allclose(make(WINDOW)(text())[0], make("attention")(text())[0])


@pytest.mark.parametrize("window", [1, 2, 5, 11, 12, 23])
def test_window_sees_itself_and_what_came_just_before(window):
    """L window layers see 1 + L(w - 1) tokens and no more, on every path."""
    for impl in ("reference", "torch"):
        stack = make(f"attention(window={window})*2", impl=impl)
        x = text().requires_grad_()
        stack(x)[0][:, -1].sum().backward()
        reached = x.grad.abs().sum((0, 2)) > 0
        assert reached.sum() == min(T, 1 + 2 * (window - 1))
        assert reached[-1]


def test_window_state_stays_bounded():
    stack, state = make(WINDOW), None
    for _ in range(3):
        _, state = stack(text(), state)
        assert state[0].keys.shape[2] == 4
        assert state[0].keys.untyped_storage().nbytes() == state[0].keys.nbytes


@pytest.mark.parametrize("layer", ["attention", WINDOW])
def test_generation_does_not_copy_what_is_remembered(layer, monkeypatch):
    """A new token is written into free memory after the others. The amount of
    free memory is bounded."""
    monkeypatch.setattr("minimodels.ops.cache.SPARE", 8)
    stack, places = make(layer), []
    with torch.inference_mode():
        _, state = stack(text())
        for token in torch.cat((text(), text()), dim=1)[:, :36].split(1, dim=1):
            _, state = stack(token, state)
            keys = state[0].keys
            places.append(keys.data_ptr() - keys.storage_offset() * keys.element_size())
            assert keys.untyped_storage().nbytes() <= (keys.shape[2] + 9) * keys[:, :, :1].nbytes
    assert keys.shape[2] == (T + 36 if layer == "attention" else 4)
    # after 9 tokens each
    assert sum(place != after for place, after in itertools.pairwise(places)) == 3


@pytest.mark.parametrize(("window", "most"), [(None, 34 + 9), (5, 4 + 9)])
def test_slots_without_a_token_are_given_up(window, most, monkeypatch):
    """Each row has a token only every third time. Memory is used only for tokens that exist."""
    monkeypatch.setattr("minimodels.ops.cache.SPARE", 8)
    layer, state = Attention(Attention.Options(window=window), Config(width=D)), None
    with torch.inference_mode():
        for t in range(100):
            positions = torch.where(torch.arange(3) == t % 3, t, -1)[:, None]
            _, state = layer(torch.randn(3, 1, D), state, Context(positions))
    assert state.keys.shape[2] <= most
    assert state.seen.tolist() == [100, 98, 99]


def generated(layer: str = "attention", dtype: torch.dtype = torch.float64):
    """A stack, and a state with free memory after it."""
    stack = make(layer, dtype=dtype)
    _, state = stack(text().to(dtype))
    return stack, stack(text()[:, :1].to(dtype), state)[1]


def joined(stack, x, state):
    """The continuation without shared memory."""
    with torch.enable_grad():
        return stack(x, state)[0].detach()


def test_a_state_outlives_inference_mode():
    stack = make("attention")
    with torch.inference_mode():
        _, state = stack(text())
        _, state = stack(text()[:, :1], state)
    with torch.no_grad():
        y, _ = stack(text(), state)
    same(y, joined(stack, text(), state))


@torch.no_grad()
def test_a_state_survives_an_error():
    stack, state = generated()
    expected = joined(stack, text()[:, :1], state)
    with pytest.raises(RuntimeError):
        stack(torch.randn(5, 1, D, dtype=torch.float64), state)  # another batch size
    same(stack(text()[:, :1], state)[0], expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda state: pickle.loads(ForkingPickler.dumps(state))]
)
def test_a_copy_of_a_state_shares_no_free_memory(copied):
    """Nor does one that is sent to another process, although its tensors are shared."""
    stack, state = generated()
    other = copied(state)
    _, after = stack(text()[:, :1], state)
    keys = after[0].keys.clone()
    stack(-text()[:, :1], other)
    same(after[0].keys, keys)


@torch.no_grad()
def test_a_changed_state_is_what_it_was_changed_to():
    stack, (state,) = generated()
    for changed in (state._replace(values=2 * state.values), state._replace(keys=2 * state.keys)):
        same(stack(text()[:, :1], [changed])[0], joined(stack, text()[:, :1], [changed]))


@torch.no_grad()
def test_one_thread_alone_writes_behind_a_state():
    """Several threads may claim the free memory at once, such as with a shared prefix. One gets it;
    the others allocate their own."""
    _, (state,) = generated()
    barrier, claims = threading.Barrier(8), []

    def claim():
        barrier.wait()
        claims.append(state.room.claim(state, state._replace(keys=state.keys[:, :, :1])))

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(claims) == 1


@torch.no_grad()
@pytest.mark.parametrize("layer", ["attention", WINDOW])
def test_a_state_in_less_precision_can_be_continued_in_more(layer):
    stack = make(layer, dtype=torch.float32)
    x = text()[:, :3].float()
    for steps in (1, 2):  # with and without free memory after it
        state = None
        with torch.autocast("cpu", torch.bfloat16):
            for _ in range(steps):
                _, state = stack(x, state)
        y, after = stack(x[:, :1], state)
        assert after[0].keys.dtype == torch.float32
        same(y, joined(stack, x[:, :1], state), 1e-5)


@torch.no_grad()
def test_a_window_does_not_hold_a_long_chunk():
    stack, state = generated(WINDOW)
    for _ in range(2):
        _, state = stack(text().repeat(1, 20, 1), state)
        assert state[0].keys.untyped_storage().nbytes() == state[0].keys.nbytes


@torch.no_grad()
def test_decoding_compiles_to_one_graph():
    torch.compiler.reset()
    stack, state = generated()
    expected = joined(stack, text()[:, :1], state)
    same(torch.compile(stack, fullgraph=True, backend="eager")(text()[:, :1], state)[0], expected)


def test_refuses_shapes_that_do_not_fit():
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8)
    with pytest.raises(ValueError, match=r"attention: q \(1, 3, 4, 8\)"):
        attention(q, k, k, torch.arange(4)[None], torch.arange(4)[None])


class Operations(TorchDispatchMode):
    """Records the names of the operations that run inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.names.add(operation.name())
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [None, 6, 12, 30])
@pytest.mark.parametrize("asked", [1, 5, 24])
@pytest.mark.parametrize("placed", [False, True])
def test_no_mask_leaves_the_fused_attention(window, asked, placed):
    q, k, v = (torch.randn(2, heads, T, 8, requires_grad=True) for heads in (4, 2, 2))
    positions = torch.arange(T).expand(2, T)
    given = (positions[:, -asked:], positions) if placed else (None, None)
    with Operations() as seen:
        attention(q[:, :, -asked:], k, v, *given, window, "torch")
    # otherwise whole rows of scores are kept
    assert any("scaled_dot_product_flash" in name for name in seen.names)


@pytest.mark.parametrize("window", [None, 5])
def test_low_precision_is_within_twice_the_plain_error(window):
    """In bfloat16 the fast path errs at most twice as much as the plain equation in bfloat16."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, T, 8, dtype=torch.float64)
    at = torch.arange(T).expand(2, T)
    exact = attention(q, k, v, at, at, window, "reference")
    low = [part.bfloat16() for part in (q, k, v)]
    error = {
        impl: (attention(*low, at, at, window, impl) - exact).abs().max()
        for impl in ("reference", "torch")
    }
    assert error["torch"] <= 2 * error["reference"]


def test_state_of_attention_counts_what_it_has_seen():
    layer = Attention(Attention.Options(), Config(width=D))
    _, state = layer(torch.randn(2, 3, D))
    _, state = layer(torch.randn(2, 1, D), state)
    assert (state.seen, state.positions) == (4, None)
    gaps = Context(torch.tensor([[4, 6], [5, -1]]))
    _, state = layer(torch.randn(2, 2, D), state, gaps)
    assert state.seen.tolist() == [7, 6]
    assert state.positions.tolist() == [[0, 1, 2, 3, 4, 6], [-1, 0, 1, 2, 3, 5]]


def test_tied_embeddings_stay_one_matrix():
    """This is so however a model is moved or loaded, because the head has no matrix of its own."""
    lm = LM(Config(layers="mlp", vocab=5, width=8))
    logits = lm(tokens := torch.arange(5)[None])[0]
    other = LM(lm.config).to("meta").to_empty(device="cpu")
    other.load_state_dict(lm.state_dict(), assign=True)
    torch.testing.assert_close(other(tokens)[0], logits)
    assert not any("head" in name for name in other.state_dict())


def test_positions_may_be_given_after_chunks_without():
    """The slots that a window has kept are the last ones."""
    stack, x = make(WINDOW), text()[:, :12]
    whole, _ = stack(x)
    for learn in (True, False):
        with torch.set_grad_enabled(learn):
            _, state = stack(x[:, :9])
            y, _ = stack(x[:, 9:], state, Context(torch.arange(9, 12).expand(2, 3)))
        same(y, whole[:, 9:])


@pytest.mark.parametrize("width, hidden", [(128, 352), (96, 256), (768, 2048)])
def test_the_hidden_width_is_rounded_up(width, hidden):
    assert default_width(width) == hidden


def test_llama3_frequencies_are_kept_lowered_or_between():
    """The three frequencies turn 64, 1.6 and 0.64 times in the context."""
    between = (400 * 0.025 / (2 * math.pi) - 1) / 3
    expected = torch.tensor([1.0, 0.025 * (between + (1 - between) / 8), 0.01 / 8])
    same(
        Llama3(8, 1, 4, 400).frequencies(torch.tensor([1.0, 40.0, 100.0]), 1e4),
        expected,
        1e-6,
    )


@torch.no_grad()
def test_padding_pushes_nothing_out_of_a_window():
    stack, x = make(WINDOW), text()[:, :13]
    _, state = stack(x[:, :7])
    _, state = stack(x[:, 7:8], state, Context(torch.full((2, 1), 7)))
    padded = torch.tensor([[8, 9, 10, 11], [8, -1, -1, -1]])
    _, state = stack(x[:, 8:12], state, Context(padded))
    y, _ = stack(x[:, 12:], state)
    _, alone = stack(x[1:, :9])
    same(y[1:], stack(x[1:, 12:], alone)[0])


def test_one_query_sees_no_more_than_its_window():
    q, k, v = (torch.randn(1, 2, length, 8, dtype=torch.float64) for length in (1, 6, 6))
    same(*(attention(q, k, v, window=5, impl=impl) for impl in ("reference", "torch")))
