"""The experts of a mixture, computed together."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from minimodels.errors import InputError
from minimodels.ops.activation import GATED
from minimodels.paths import choose, is_transformed


def grouped_mlp(
    x: Tensor,
    gates: Tensor,
    visits: Tensor,
    gate: Tensor,
    up: Tensor,
    out: Tensor,
    most: int | None = None,
    impl: str = "auto",
    biases: tuple[Tensor, Tensor, Tensor] | None = None,
    activation: str = "silu",
) -> Tensor:
    """y_t = Σ_e visits_te · gates_te · out_e (silu(gate_e x_t) ⊙ up_e x_t).

    x (n, D); gates (n, E); visits (n, E) bool; gate, up (E, I, D); out (E, D, I). `most` is the
    largest number of experts that a token visits, None for E. The kernel allocates memory for n ·
    most visits, so that the host does not have to wait for the GPU to count them. biases: those of
    the three products, (E, I) twice and (E, D). activation: one of GATED, instead of silu. Returns
    (n, D). Raises ValueError if shapes disagree, and InputError for impl="triton" with biases or an
    activation other than silu, which the kernel does not have.
    """
    check_shapes(x, gates, visits, gate, up, out)
    path = path_of(impl, x.device, biases is None and activation == "silu")
    act = GATED[activation]
    if path == "reference" and is_transformed():
        return dense(x, gates, visits, (gate, up, out), biases or (None, None, None), act)
    if path == "reference":
        y = torch.zeros_like(x)
        for e in range(len(gate)):
            (token,) = visits[:, e].nonzero(as_tuple=True)
            rows = x[token]  # (A_e, D)
            of_gate, of_up, of_out = biases_of(biases, e, rows.dtype)
            hidden = act(F.linear(rows, gate[e], of_gate), F.linear(rows, up[e], of_up))
            expert = F.linear(hidden, out[e], of_out)
            y = y.index_add(0, token, (expert * gates[token, e, None]).to(y.dtype))
        return y
    dtype = x.dtype
    # autocast does not reach into the operations below
    if torch.is_autocast_enabled(x.device.type):
        x, gate, up, out = (
            part.to(torch.get_autocast_dtype(x.device.type)) for part in (x, gate, up, out)
        )
    if path == "triton":
        from minimodels.kernels.grouped_mlp import grouped_mlp as kernel

        return kernel(x, gates, visits, gate, up, out, most).to(dtype)
    expert, token = visits.t().nonzero(as_tuple=True)  # (A,) each: A visits, ordered by expert
    # (E,), (A, D); x[token] has a slower derivative
    counts, rows = visits.sum(0), x.index_select(0, token)
    parts = [grouped_linear(rows, weight, counts) for weight in (gate, up)]  # (A, I) twice
    of_gate, of_up, of_out = biases_of(biases, expert, rows.dtype)
    if biases is not None:
        parts = [part + bias for part, bias in zip(parts, (of_gate, of_up), strict=True)]
    hidden = act(*parts)  # (A, I)
    y = grouped_linear(hidden, out, counts)  # (A, D)
    y = (y if of_out is None else y + of_out) * gates[token, expert, None].to(hidden.dtype)
    return torch.zeros_like(x, dtype=dtype).index_add(0, token, y.to(dtype))


def path_of(impl: str, device: torch.device, plain: bool) -> str:
    """The path of the experts. `plain`: without biases and with silu, as in the kernel."""
    path = choose(impl, "grouped_mlp", device)
    if path != "triton" or plain:
        return path
    if impl != "auto":
        accepted = "auto, reference or torch, because the kernel has no biases and only silu"
        raise InputError("impl", impl, accepted)
    return "torch"


def dense(
    x: Tensor,
    gates: Tensor,
    visits: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    biases: tuple[Tensor | None, ...],
    act: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Apply every expert to every token: E / K times the work, but no size depends on visits."""

    def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = x @ weight.mT  # (E, n, ·)
        return y if bias is None else y + bias.unsqueeze(1).to(y.dtype)

    gate, up, out = zip(weights, biases, strict=True)
    experts = product(act(product(x, *gate), product(x, *up)), *out)  # (E, n, D)
    share = gates.masked_fill(~visits, 0).mT.unsqueeze(-1)  # (E, n, 1)
    return (share.to(experts.dtype) * experts).sum(0)


def biases_of(
    biases: tuple[Tensor, Tensor, Tensor] | None, expert: Tensor | int, dtype: torch.dtype
) -> list[Tensor | None]:
    """The three biases of one expert, or of each visit's expert."""
    return [None] * 3 if biases is None else [bias[expert].to(dtype) for bias in biases]


def check_shapes(
    x: Tensor, gates: Tensor, visits: Tensor, gate: Tensor, up: Tensor, out: Tensor
) -> None:
    """Raise ValueError unless the arguments have the shapes in grouped_mlp's docstring.

    The kernel uses this check too.
    """
    (n, D), (E, I, _) = x.shape, gate.shape
    if (gates.shape, visits.shape, gate.shape, up.shape, out.shape) != (
        (n, E),
        (n, E),
        (E, I, D),
        (E, I, D),
        (E, D, I),
    ):
        raise ValueError(
            f"grouped_mlp: x {tuple(x.shape)}, gates {tuple(gates.shape)}, visits {tuple(visits.shape)}, "
            f"gate {tuple(gate.shape)}, up {tuple(up.shape)} and out {tuple(out.shape)} do not fit"
        )


@torch.library.custom_op("minimodels::grouped_linear", mutates_args=())
def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the rows of x by their group's matrix.

    x (A, in) ordered by group, weight (E, out, in), counts (E,) -> (A, out).
    """
    y, start = x.new_empty(x.shape[0], weight.shape[1]), 0
    for e, count in enumerate(counts.tolist()):
        if count:
            group, start = slice(start, start + count), start + count
            # written in place, because joining the results would copy them
            torch.mm(x[group], weight[e].t(), out=y[group])
    return y


@torch.library.custom_op("minimodels::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    dy: Tensor, x: Tensor, weight: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; they are zero for a group without rows."""
    dx, dweight, sizes = torch.empty_like(x), torch.empty_like(weight), counts.tolist()
    parts = (x.split(sizes), weight, dy.split(sizes), dx.split(sizes), dweight)
    for rows, matrix, gradient, drows, dmatrix in zip(*parts, strict=True):
        torch.mm(gradient, matrix, out=drows)
        torch.mm(gradient.t(), rows, out=dmatrix)
    return dx, dweight


@grouped_linear.register_fake
def _(x, weight, counts):
    return x.new_empty(x.shape[0], weight.shape[1])


@grouped_linear_backward.register_fake
def _(dy, x, weight, counts):
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy):
    return *grouped_linear_backward(dy.contiguous(), *ctx.saved_tensors), None


grouped_linear.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.minimodels.grouped_linear)
def _grouped_flops(x, weight, counts, out_shape=None):
    return 2 * x[0] * weight[1] * weight[2]


@register_flop_formula(torch.ops.minimodels.grouped_linear_backward)
def _grouped_backward_flops(dy, x, weight, counts, out_shape=None):
    return 2 * _grouped_flops(x, weight, counts)
