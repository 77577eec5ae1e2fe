"""The delta rule: one recurrence for seven architectures.

These are linear attention, RetNet, GLA, Mamba-2, DeltaNet, Gated DeltaNet and KDA. Schlag et al.,
"Linear Transformers Are Secretly Fast Weight Programmers", arXiv:2102.11174. The chunked form: Yang
et al., arXiv:2406.06484 and (with gates) arXiv:2412.06464. One gate per channel: Kimi Linear,
arXiv:2510.26692. Without erasing, it is the state space duality of Mamba-2, arXiv:2405.21060.

A head remembers a matrix S that maps keys to values. Each token lets S decay and reads what is
already stored under the erase vector e. Under the key k it then stores only what is still missing
of the value v. Without e the token simply adds its value.

    Ŝ_t = Diag(exp(g_t)) S_{t-1}        decay       (1)
    u_t = v_t - Ŝ_tᵀ e_t                correction  (2)
    S_t = Ŝ_t + k_t u_tᵀ                write       (3)
    y_t = S_tᵀ q_t                      read        (4)

    name        symbol  shape
    q, k        q, k    (B, T, G, K)            query and key; value head h reads group h // (H/G)
    v           v       (B, T, H, V)            value
    g           g       (B, T, H)               log-decay <= 0, one per head ("scalar"),
                        or (B, T, H, K)         or one per key channel ("vector")
    e           e       as k, or (B, T, H, K)   erase vector; DeltaNet: v is β v, e is β k, |k| = 1
    state       S       (B, H, K, V)            in fp32 (fp64 for fp64 inputs)
    resets              (B, T) bool             a document begins here: the decay is 0 whatever g is

The fast path cuts time into chunks of C tokens. With α = exp(g), a chunk that starts from S is

    A_i,j = Σ_d q_i,d k_j,d (α_{j+1} ... α_i)_d  for j <= i      E: with e for q, and j < i
    U = (I + E)⁻¹ (V - ē S)                                         all corrections by one triangular solve
    Y = q̄ S + A U           S' = ᾱ S + k̄ᵀ U

The bars stand for decays: q̄_i and ē_i decay from the chunk's start to i, k̄_j decays from j to the
chunk's end, and ᾱ is the whole chunk's decay. Only the lines with S wait for the chunk before. With
one gate per head, a decay is exp(G_i - G_j), and G is the running sum of g. The mask is applied
before the exponential. With one gate per channel, a decay is a product of numbers in [0, 1],
computed by joining blocks of tokens in pairs. So no exponent is positive and nothing overflows,
however strong a gate is.

The gradient R of the state obeys the same rule backwards, with k and e exchanged. So the backward
pass is chunked in the same way. It saves the inputs and the states between chunks, and recomputes
the rest.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from minimodels.ops.before import Before
from minimodels.paths import by_token, choose, full_precision

# C, a power of two. On a CPU 64 took 0 to 45 % longer. With keys of 128 numbers, 16 took 5 to 15 %
# longer.
CHUNK = 32
# Tokens times heads that are computed at once: few on a CPU, so that their tensors stay in the
# cache, and many on a GPU, because each operation is a launch.
WORK, GPU_WORK = 2**11, 2**17


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None = None,
    state: Tensor | Before | None = None,
    impl: str = "auto",
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equations (1) to (4) over a text: y (B, T, H, V) in v's dtype and the final state (B, H, K, V).

    q, k (B, T, G, K); v (B, T, H, V), H a multiple of G; g (B, T, H) or (B, T, H, K), at most 0; e
    as k or (B, T, H, K), None for zeros; state (B, H, K, V), None for zeros, Before if other ranks
    have the tokens before; resets (B, T) bool, True if a document begins, which forgets everything
    before it. A token with g = 0, k = 0 and e = 0 leaves the state exactly as it is, and padding
    works this way. Nothing is scaled or normalised here. Raises ValueError if shapes disagree.
    """
    if isinstance(state, Before):
        return delta_rule_of_ranks(q, k, v, g, e, state, impl, resets)
    check_shapes(q, k, v, g, e, state, resets)
    path = choose(impl, "delta_rule", q.device)
    if path == "triton":
        from minimodels.kernels.delta_rule import delta_rule as kernel

        return kernel(q, k, v, g, e, state, resets=resets)
    dtype, (batch, T, H, V), K = v.dtype, v.shape, k.shape[-1]
    with torch.autocast(v.device.type, enabled=False):  # the state sums over the whole text
        q, k, v, g = (full_precision(part) for part in (q, k, v, g))
        e = None if e is None else full_precision(e)
        state = v.new_zeros(batch, H, K, V) if state is None else state.to(v.dtype)
        g = g if g.ndim == 4 else g.unsqueeze(3)  # (B, T, H, 1 | K)
        q, k, e = same_heads(q, k, g, e)
        if path == "reference" or T == 1:
            y, state = reference(q, k, v, g, e, state, resets)
        else:
            y, state, _ = delta_rule_forward(q, k, v, g, e, state, resets)
    return y.to(dtype), state


def delta_rule_of_ranks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    before: Before,
    impl: str,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The rule for a piece of a text, if other ranks have the tokens before.

    The rule is linear: a state S before the piece becomes S_t = M_t S + W_t, and y_t = S_tᵀ q_t has
    the parts W_tᵀ q_t and Sᵀ r_t, with r_t = M_tᵀ q_t. Without e, M_t is the decay from the
    piece's start. With e, the rule itself computes M_t, because it treats the columns of a state
    alike: a state of (0, I) and values of (v, 0) become (W_t, M_t) and read (W_tᵀ q_t, r_t).
    """
    (batch, _, H, V), (G, K) = v.shape, k.shape[2:]
    if e is None:
        y, W = delta_rule(q, k, v, g, None, None, impl, resets)
        g = full_precision(g if g.ndim == 4 else g.unsqueeze(3))
        if resets is not None:
            g = g.masked_fill(resets[:, :, None, None], -math.inf)
        decay = g.cumsum(1).exp()  # (B, T, H, 1 | K)
        r, M, apply = q.repeat_interleave(H // G, 2) * decay, decay[:, -1].unsqueeze(3), torch.mul
    else:
        identity = torch.eye(K, dtype=full_precision(v).dtype, device=v.device)
        start = F.pad(identity, (V, 0)).expand(batch, H, K, V + K)
        reads, end = delta_rule(q, k, F.pad(v, (0, K)), g, e, start, impl, resets)
        (y, r), (W, M), apply = reads.split((V, K), 3), end.split((V, K), 3), torch.matmul
    with torch.autocast(v.device.type, enabled=False):
        S, after = before.find(M, W, apply)
        y = y + torch.einsum("bthk,bhkv->bthv", full_precision(r), S)
    return y.to(v.dtype), after


def check_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    state: Tensor | None,
    resets: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments have the shapes in delta_rule's docstring.

    The kernel uses this check too.
    """
    fits = k.ndim == v.ndim == 4 and v.shape[1] > 0 and v.shape[2] % k.shape[2] == 0
    if fits:
        (batch, T, _, K), (H, V) = k.shape, v.shape[2:]
        wanted = (
            (q, (k.shape,)),
            (v, ((batch, T, H, V),)),
            (g, ((batch, T, H), (batch, T, H, K))),
            (e, (k.shape, (batch, T, H, K))),
            (state, ((batch, H, K, V),)),
            (resets, ((batch, T),)),
        )
        fits = all(part is None or part.shape in shapes for part, shapes in wanted)
    if not fits:
        parts = {"q": q, "k": k, "v": v, "g": g, "e": e, "state": state, "resets": resets}
        shapes = ", ".join(f"{n} {tuple(p.shape)}" for n, p in parts.items() if p is not None)
        raise ValueError(
            f"delta_rule: {shapes} do not fit: q, k (B, T, G, K), v (B, T, H, V), g (B, T, H) or (B, T, H, K), "
            "e as k or (B, T, H, K), state (B, H, K, V), resets (B, T), T at least 1 and H a multiple of G"
        )
    if resets is not None and resets.dtype != torch.bool:
        raise ValueError(f"delta_rule: resets are {resets.dtype}; accepted: bool")


def same_heads(
    q: Tensor, k: Tensor, g: Tensor, e: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q, k and e with equal numbers of heads.

    They are repeated for every value head if gates are per channel or if erase vectors differ
    between the heads of a group. Otherwise the groups are kept, because their heads share the
    products of q, e and k.
    """
    G, H = k.shape[2], g.shape[2]
    if g.shape[3] == 1 and (e is None or e.shape[2] == G):
        return q, k, e
    q, k, e = (
        part if part is None or part.shape[2] == H else part.repeat_interleave(H // G, dim=2)
        for part in (q, k, e)
    )
    return q, k, e


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    S: Tensor,
    resets: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The rule, token by token. Decoding uses it too.

    Arguments as in delta_rule; S is the state.
    """
    heads = v.shape[2] // k.shape[2]
    if heads > 1:
        q, k, e = (x if x is None else x.repeat_interleave(heads, 2) for x in (q, k, e))
    decay = decays(g, resets)  # (B, T, H, 1 | K)

    def step(S: Tensor, now: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        q_t, k_t, u, decay_t, *erase = now
        S = decay_t.unsqueeze(-1) * S  # (1), (B, H, K, V)
        if erase:
            u = u - (erase[0].unsqueeze(-2) @ S).squeeze(-2)  # (2), (B, H, V)
        S = S + k_t.unsqueeze(-1) * u.unsqueeze(-2)  # (3)
        return S, (q_t.unsqueeze(-2) @ S).squeeze(-2)  # (4), (B, H, V)

    return by_token(step, S, (q, k, v, decay) if e is None else (q, k, v, decay, e))


def decays(g: Tensor, resets: Tensor | None) -> Tensor:
    """exp(g), and exactly 0 where a document begins."""
    return (g if resets is None else g.masked_fill(resets[:, :, None, None], -math.inf)).exp()


# The chunked form. Inside, a tensor is (N, P, C, ...): N chunks of C tokens, and P = B H heads of
# all texts. What the R heads of a group share exists once per group, P/R times in all. The vectors
# that read, q and e (if there is one), are stacked, J = 1 or 2 for each token, so that one product
# serves both.


class Chunks(NamedTuple):
    """What N chunks compute without the state, in both passes."""

    rows: Tensor  # (N, P/R, C, J, K) q and e
    k: Tensor  # (N, P/R, C, K)
    same: Tensor  # (N, P, C, C), or (C, C) without resets: 1 where j <= i in one document, else 0
    scores: Tensor  # (N, P, C, J, C) A and E; of E only the part below the diagonal is used
    reads: Tensor  # (N, P, C, J, K) q̄ and ē
    writes: Tensor  # (N, P, C, K) k̄
    total: Tensor  # (N, P, 1 | K, 1) ᾱ
    inverse: Tensor | None  # (N, P, C, C) of I + E
    kept: list[tuple[Tensor, ...]]  # other values that the gradients of these need


@torch.library.custom_op("minimodels::delta_rule_forward", mutates_args=())
def delta_rule_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    state: Tensor,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the states between chunks: (chunks + 1, B, H, K, V).

    The states between chunks include the first and the last one.
    """
    y, final_state, boundaries = empty_outputs(q, k, v, g, e, state, resets)
    boundaries[0] = state
    for now, here, C in slabs(v):
        chunk = prepare(q, k, g, e, resets, now, C)
        states = boundaries[here].flatten(1, 2)  # (N+1, P, K, V)
        U = chunked(v[:, now], C)  # (N, P, C, V)
        if e is None:
            torch.matmul(chunk.writes.mT, U, out=states[1:])
            carry(states, chunk.total)
        else:
            U, W = chunk.inverse @ U, chunk.inverse @ chunk.reads[..., 1, :]  # W (N, P, C, K)
            states[1:] = 0
            carry(states, chunk.total, chunk.writes, U, W)
        outputs = chunk.reads[..., 0, :] @ states[:-1] + chunk.scores[..., 0, :] @ U
        y[:, now] = unchunked(outputs, y[:, now])
    return y, final_state.copy_(boundaries[-1]), boundaries


@torch.library.custom_op("minimodels::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    dy: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    e: Tensor | None,
    resets: Tensor | None,
    boundaries: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, g, e (empty without e) and the initial state.

    They follow from the gradients of y and of the final state. Let R be the gradient of the state
    after a chunk, and let Z be that of its V, negated. Then the gradient R' of the state before the
    chunk and the others are

        Z = -(I + E)⁻ᵀ (Aᵀ dY + k̄ R)        R' = ᾱ R + q̄ᵀ dY + ēᵀ Z        dV = -Z
        dA = dY Uᵀ      dE = Z Uᵀ      dq̄ = dY Sᵀ      dē = Z Sᵀ      dk̄ = U Rᵀ
    """
    dq, dk, dv, dg, de, dinitial = empty_gradients(dy, dstate, q, k, v, g, e, resets, boundaries)
    R = dstate.flatten(0, 1)  # (P, K, V)
    for now, here, C in reversed(list(slabs(v))):
        chunk = prepare(q, k, g, e, resets, now, C)
        states = boundaries[here].flatten(1, 2)  # (N+1, P, K, V)
        U, dY = chunked(v[:, now], C), chunked(dy[:, now], C)  # (N, P, C, V)
        dV = chunk.scores[..., 0, :].mT @ dY  # at first that of U, without the part from R
        dstates = torch.empty_like(states)
        dstates[-1] = R
        torch.matmul(chunk.reads[..., 0, :].mT, dY, out=dstates[:-1])
        if e is None:
            carry(dstates, chunk.total, backwards=True)
            dV += chunk.writes @ dstates[1:]
            errors = dY.unsqueeze(3)
        else:
            erase = chunk.reads[..., 1, :]
            U = chunk.inverse @ (U - erase @ states[:-1])
            Z, W = -(chunk.inverse.mT @ dV), chunk.inverse.mT @ chunk.writes
            carry(dstates, chunk.total, erase, Z, W, backwards=True)
            dV = -Z
            errors = torch.stack((dY, Z), dim=3)
        R = dstates[0]
        errors = errors.flatten(2, 3)  # (N, P, C J, V)
        differentiate = differentiate_scalar if g.shape[3] == 1 else differentiate_vector
        drows, dk_now, dg_now = differentiate(
            chunk,
            (errors @ U.mT).view_as(chunk.scores),
            (errors @ states[:-1].mT).view_as(chunk.reads),
            U @ dstates[1:].mT,
            (states[1:] * dstates[1:]).sum(-1, keepdim=True),
        )
        for whole, part in zip((dq, de), drows.unbind(3), strict=False):
            whole[:, now] = unchunked(part, whole[:, now])
        dk[:, now], dv[:, now] = unchunked(dk_now, dk[:, now]), unchunked(dV, dv[:, now])
        dg[:, now] = unchunked(dg_now, dg[:, now])
    if resets is not None:
        dg[resets] = 0
    return dq, dk, dv, dg, de, dinitial.copy_(R.view_as(dinitial))


def carry(
    states: Tensor,
    total: Tensor,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    W: Tensor | None = None,
    backwards: bool = False,
) -> None:
    """Walk the chunks: states[n+1] += ᾱ states[n] + keysᵀ values, after values -= W states[n].

    Both are changed in place. Backwards, from the last state to the first, this carries gradients,
    with k̄ and ē exchanged.
    """
    order = slice(None, None, -1) if backwards else slice(None)
    states = states.unbind()[order]
    for n, decay in enumerate(total.unbind()[order]):
        states[n + 1].addcmul_(decay, states[n])  # (P, K, V)
        if W is not None:
            at = len(total) - 1 - n if backwards else n
            values[at].baddbmm_(W[at], states[n], alpha=-1)  # (P, C, V)
            states[n + 1].baddbmm_(keys[at].mT, values[at])


def prepare(
    q: Tensor,
    k: Tensor,
    g: Tensor,
    e: Tensor | None,
    resets: Tensor | None,
    now: slice,
    C: int,
) -> Chunks:
    """Scores, decayed vectors and the inverse for the tokens of a slab."""
    rows = (q[:, now],) if e is None else (q[:, now], e[:, now])
    rows = chunked(torch.stack(rows, dim=3), C)  # (N, P/R, C, J, K)
    k, g = chunked(k[:, now], C), chunked(g[:, now], C)
    same, starts = torch.ones(C, C, dtype=k.dtype, device=k.device).tril(), None
    if resets is not None:
        starts = chunked(resets[:, now, None].expand(-1, -1, g.shape[1] // len(q)), C)  # (N, P, C)
        document = starts.cumsum(2)
        same = same * (document.unsqueeze(3) == document.unsqueeze(2))
    if g.shape[3] == 1:
        scores, reads, writes, total, kept = weigh_scalar(rows, k, g, same, starts)
    else:
        scores, reads, writes, total, kept = weigh_vector(rows, k, g, starts)
    inverse = None
    if e is not None:
        identity = torch.eye(C, dtype=k.dtype, device=k.device).expand(*scores.shape[:2], C, C)
        inverse = torch.linalg.solve_triangular(
            scores[..., 1, :], identity, upper=False, unitriangular=True
        )
    return Chunks(rows, k, same, scores, reads, writes, total.mT, inverse, kept)


def weigh_scalar(
    rows: Tensor, k: Tensor, g: Tensor, same: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, list]:
    """Scores, reads, writes, total and kept values for one gate per head: g (N, P, C, 1).

    One product serves all heads of a group. It is then multiplied by the decays between all pairs
    of tokens, which are 0 for pairs that look ahead or into another document.
    """
    if starts is not None:
        g = g.masked_fill(starts.unsqueeze(3), 0.0)
    lowest = 1.2 * math.log(torch.finfo(g.dtype).tiny)  # its exponential is 0
    g = g.clamp(min=lowest)  # larger sums would lose digits
    G = same @ g  # (N, P, C, 1) sum of g since the chunk or the document began
    between = (G - G.mT).masked_fill_(same == 0, -math.inf).exp_()  # (N, P, C, C)
    since = G.exp()  # the decay from the chunk's start
    if starts is not None:
        since = since.masked_fill(starts.cumsum(2).unsqueeze(3) > 0, 0.0)
    scores = (rows.flatten(2, 3) @ k.mT).view(*rows.shape[:4], -1)  # (N, P/R, C, J, C)
    scores = times(scores, between.unsqueeze(3))
    reads, writes = times(rows, since.unsqueeze(3)), times(k, between[:, :, -1, :, None])
    return scores, reads, writes, since[:, :, -1:], [(between, since)]


def differentiate_scalar(
    c: Chunks, dscores: Tensor, dreads: Tensor, dwrites: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, k and g from those of scores, reads and writes, which are overwritten.

    `end` (N, P, K, 1) is the gradient of the log of the state after the chunk. A sum of gates G_i
    is in everything that i reads and, negated, in what it writes. g_t is in G_i for all i >= t.
    """
    ((between, since),) = c.kept
    dscores[:, :, :, 1:].diagonal(dim1=2, dim2=4).zero_()  # E ends below the diagonal
    inner = (dscores * c.scores).sum(3)  # (N, P, C, C)
    dG = inner.sum(3) - inner.sum(2) + (c.reads * dreads).sum((3, 4)) - (c.writes * dwrites).sum(3)
    dG[..., -1] += end.sum((2, 3))
    group = c.k.shape[1]
    dscores = grouped(dscores.mul_(between.unsqueeze(3)), group).flatten(2, 3)  # (N, P/R, C J, C)
    drows = (dscores @ c.k).view_as(c.rows) + grouped(dreads.mul_(since.unsqueeze(3)), group)
    dwrites.mul_(between[:, :, -1, :, None])
    dk = dscores.mT @ c.rows.flatten(2, 3) + grouped(dwrites, group)
    return drows, dk, c.same.mT @ dG.unsqueeze(3)


def weigh_vector(
    rows: Tensor, k: Tensor, g: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, list]:
    """As weigh_scalar, for one gate per channel: g (N, P, C, K), R = 1.

    Blocks of 1, 2, 4, ... tokens are joined in pairs. What is read has decayed from its block's
    start, and what is written decays to its block's end. Their product gives the scores of a pair.
    """
    if starts is not None:
        g = g.masked_fill(starts.unsqueeze(3), -math.inf)
    decay = g.exp()  # (N, P, C, K)
    (N, P, C, J, K), kept = rows.shape, []
    scores = rows.new_zeros(N, P, C, J, C)
    scores[:, :, :, 0].diagonal(dim1=2, dim2=3).copy_((rows[:, :, :, 0] * k).sum(3))
    reads, writes, total = rows * decay.unsqueeze(3), k.clone(), decay
    length = 1
    while length < C:
        early = halves(writes, length)[0]  # (pairs, length, K)
        late = halves(reads, length)[1]  # (pairs, length, J, K)
        first, second = halves(total, 1)  # (pairs, 1, K) each
        left, right = late.flatten(1, 2).clone(), early.clone()
        square(scores, length).copy_((left @ right.mT).view(N * P, -1, length, J, length))
        kept.append((left, right, first, second))
        late *= first.unsqueeze(2)
        early *= second
        total = (first * second).view(N, P, -1, K)
        length *= 2
    return scores, reads, writes, total, [(decay,), *kept]


def differentiate_vector(
    c: Chunks, dscores: Tensor, dreads: Tensor, dwrites: Tensor, end: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As differentiate_scalar, from the longest pairs of blocks back to pairs of tokens."""
    (decay,), *levels = c.kept
    length = c.k.shape[2]
    for left, right, first, second in reversed(levels):
        length //= 2
        early, late = halves(dwrites, length)[0], halves(dreads, length)[1]
        block = square(dscores, length).reshape(len(left), -1, length)  # (pairs, length J, length)
        late.mul_(first.unsqueeze(2)).add_((block @ right).view_as(late))
        early.mul_(second).add_(block.mT @ left)
    drows = dreads * decay.unsqueeze(3)
    dG = (c.rows * drows).sum(3) - c.k * dwrites
    dG[:, :, -1] += end.squeeze(3)
    own = dscores[:, :, :, 0].diagonal(dim1=2, dim2=3).unsqueeze(3)  # q_i k_i does not decay
    drows[:, :, :, 0] += own * c.k
    return drows, dwrites + own * c.rows[:, :, :, 0], c.same.mT @ dG


def halves(x: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The first and the second of each pair of blocks: (N, P, C, ...) -> two (pairs, length, ...).

    Both are views.
    """
    return x.view(-1, 2, length, *x.shape[3:]).unbind(1)


def square(scores: Tensor, length: int) -> Tensor:
    """A view of the scores of each pair's second block against its first.

    Its shape is (N P, pairs, length, J, length).
    """
    C, J, _ = scores.shape[2:]
    pairs = C // (2 * length)
    scores = scores.view(-1, pairs, 2, length, J, pairs, 2, length)[:, :, 1, :, :, :, 0]
    return scores.diagonal(dim1=1, dim2=4).movedim(-1, 1)


def times(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply a group's tensor (N, P/R, ...) by those of its heads (N, P, ...): (N, P, ...)."""
    if x.shape[1] == factor.shape[1]:
        return x * factor
    return (x.unsqueeze(2) * factor.unflatten(1, (x.shape[1], -1))).flatten(1, 2)


def grouped(x: Tensor, groups: int) -> Tensor:
    """The sum over the heads of each group: (N, P, ...) -> (N, P/R, ...)."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)


def chunked(x: Tensor, C: int) -> Tensor:
    """(B, T, H, ...) -> (N, B H, C, ...), with zeros after the last token."""
    missing = -x.shape[1] % C
    if missing:
        x = torch.cat((x, x.new_zeros(x.shape[0], missing, *x.shape[2:])), dim=1)
    x = x.unflatten(1, (-1, C)).transpose(0, 1).transpose(2, 3)  # (N, B, H, C, ...)
    return x.flatten(1, 2).contiguous()


def unchunked(x: Tensor, like: Tensor) -> Tensor:
    """Undo `chunked`: back to the shape of `like`, (B, T, H, ...)."""
    batch, T = like.shape[:2]
    x = x.unflatten(1, (batch, -1)).transpose(2, 3).transpose(0, 1)  # (B, N, C, H, ...)
    return x.flatten(1, 2)[:, :T]


def slabs(v: Tensor) -> Iterator[tuple[slice, slice, int]]:
    """Groups of chunks that are computed at once: their tokens, the states around them, and C."""
    (batch, T, H), C = v.shape[:3], chunk_length(v.shape[1])
    chunks = max(1, (WORK if v.is_cpu else GPU_WORK) // (batch * H * C))
    for first in range(0, T, chunks * C):
        now = slice(first, min(first + chunks * C, T))
        yield now, slice(first // C, -(-now.stop // C) + 1), C


def chunk_length(T: int) -> int:
    """C: CHUNK, or a smaller power of two that is enough for a shorter text."""
    length = CHUNK
    while length // 2 >= T:
        length //= 2
    return length


# What PyTorch must know about the two operations: shapes, derivative, precision, cost.


@delta_rule_forward.register_fake
def empty_outputs(q, k, v, g, e, state, resets):
    """y, the final state and the boundaries, not yet filled."""
    chunks = -(-v.shape[1] // CHUNK)  # a shorter text is one chunk
    plain = torch.contiguous_format
    return (
        torch.empty_like(v, memory_format=plain),
        torch.empty_like(state, memory_format=plain),
        v.new_empty(chunks + 1, *state.shape),
    )


@delta_rule_backward.register_fake
def empty_gradients(dy, dstate, q, k, v, g, e, resets, boundaries):
    """dq, dk, dv, dg, de and that of the initial state, not yet filled."""
    return tuple(v.new_empty(0 if part is None else part.shape) for part in (q, k, v, g, e, dstate))


def _save(ctx, inputs, output):
    q, k, v, g, e, _, resets = inputs
    ctx.save_for_backward(q, k, v, g, e, resets, output[2])


def _differentiate(ctx, dy, dstate, _):
    saved = ctx.saved_tensors  # read once: activation checkpointing recomputes them here
    dq, dk, dv, dg, de, dinitial = delta_rule_backward(dy, dstate, *saved)
    return dq, dk, dv, dg, None if saved[4] is None else de, dinitial, None


delta_rule_forward.register_autograd(_differentiate, setup_context=_save)

for operation in (delta_rule_forward, delta_rule_backward):
    for device in ("cpu", "cuda"):
        operation.register_autocast(device, torch.float32)


def flops(C: int, K: int, V: int, erase: bool) -> int:
    """Forward FLOPs per token and head in chunks of C tokens."""
    return 2 * C * (K + V) + 4 * K * V + erase * (2 * C * K + C * (K + V) + 2 * K * V)


@register_flop_formula(torch.ops.minimodels.delta_rule_forward)
def _forward_flops(q, k, v, g, e, *_, out_shape=None):
    (batch, T, H, V), K = v, k[3]
    return batch * T * H * flops(chunk_length(T), K, V, e is not None)


@register_flop_formula(torch.ops.minimodels.delta_rule_backward)
def _backward_flops(dy, dstate, q, k, v, g, e, *_, out_shape=None):
    return 2 * _forward_flops(q, k, v, g, e)
