"""A language model's loss without its logits: the head's linear map and the cross-entropy in one.

With n tokens and a vocabulary of V, the logits (n, V) are the largest tensor of a small model, and
their gradient is as large again. Here both exist only for a few rows at a time. The gradient of a
row follows from its logits alone. So it is turned into the gradients of x and of the weight at once
(Liger Kernel, arXiv:2410.10989), and backward only multiplies them by the incoming gradient.

    name        shape
    x           (n, D)     the input of the head
    weight      (V, D)     the head's matrix
    targets     (n,)       int64 below V; IGNORE if nothing is to be predicted
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from minimodels.paths import choose, full_precision

IGNORE = -100
# Logits computed at a time. With so many, the products over them run at full speed. On a GPU the
# number is larger, because each chunk adds to dweight, which moves 8·V·D bytes in fp32. At n 16384,
# D 4096, V 131072 that is 34 GB in all, and with 2²⁶ it was 137. The logits take 1 GiB in fp32.
WORK = {"cpu": 2**24, "cuda": 2**28}


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, impl: str = "auto") -> Tensor:
    """mean_t (logsumexp(W x_t) - (W x_t)_target) over the targets that are not IGNORE, in nats.

    x (n, D); weight (V, D); targets (n,). Returns a scalar in full precision, which is NaN if every
    target is IGNORE. Raises ValueError if shapes disagree. All paths but the reference compute the
    gradients before a loss scale reaches them, so they raise ValueError for gradients in fp16. They
    have no second derivative, and asking for it raises RuntimeError.
    """
    check_shapes(x, weight, targets)
    path = choose(impl, "linear_cross_entropy", x.device)
    if path == "reference":
        return F.cross_entropy(full_precision(F.linear(x, weight)), targets, ignore_index=IGNORE)
    # autocast does not reach into the operation
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    learn = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if learn and x.dtype == torch.float16:
        raise ValueError(
            'linear_cross_entropy: gradients in float16; accepted: bfloat16, full precision, or impl="reference"'
        )
    if path == "triton":
        from minimodels.kernels.linear_cross_entropy import linear_cross_entropy as kernel

        return kernel(x, weight, targets)
    return chunked_loss(x, weight, targets, learn)[0]


def check_shapes(x: Tensor, weight: Tensor, targets: Tensor) -> None:
    """Raise ValueError unless the arguments have the shapes in linear_cross_entropy's docstring.

    The kernel uses this check too.
    """
    if x.ndim != 2 or weight.shape[1:] != x.shape[1:] or targets.shape != x.shape[:1]:
        shapes = (
            f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and targets {tuple(targets.shape)}"
        )
        raise ValueError(f"linear_cross_entropy: {shapes} do not fit")


def tally(logits: Tensor, targets: Tensor) -> Tensor:
    """Sums over a batch, (3,) in fp32: the losses in nats, the correct answers and the targets.

    They can be added over batches. logits (B, T, V); targets (B, T), of which IGNORE is left out.
    """
    nats = F.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return torch.stack(
        (nats, (logits.argmax(-1) == targets).sum().float(), (targets != IGNORE).sum().float())
    )


@torch.library.custom_op("minimodels::chunked_loss", mutates_args=())
def chunked_loss(
    x: Tensor, weight: Tensor, targets: Tensor, learn: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss and, if `learn`, its gradients for x and weight; otherwise two empty tensors."""
    present = targets != IGNORE
    # (n,), each row's share in the mean
    share = full_precision(present.to(x.dtype)) / present.sum()
    rows = max(1, WORK.get(x.device.type, WORK["cuda"]) // weight.shape[0])
    loss = share.new_zeros(())
    dx = torch.empty_like(x) if learn else x.new_empty(0)
    dweight = torch.zeros_like(weight, dtype=share.dtype) if learn else x.new_empty(0)
    for start in range(0, len(x), rows):
        at = slice(start, start + rows)
        target = targets[at].masked_fill(~present[at], 0).unsqueeze(1)  # (rows, 1)
        logp = full_precision(x[at] @ weight.t()).log_softmax(-1)  # (rows, V)
        # not share[at] @ ..., which autocast would round
        loss -= (share[at] * logp.gather(1, target).squeeze(1)).sum()
        if learn:
            gradient = logp.exp_().scatter_add_(1, target, -torch.ones_like(logp[:, :1]))
            gradient = gradient.mul_(share[at].unsqueeze(1)).to(x.dtype)
            torch.mm(gradient, weight, out=dx[at])
            if dweight.dtype == x.dtype:
                dweight.addmm_(gradient.t(), x[at])
            else:
                dweight += gradient.t() @ x[at]
    return loss, dx, dweight.to(weight.dtype)


@chunked_loss.register_fake
def _(x, weight, targets, learn):
    full = torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty((), dtype=full),
        torch.empty_like(x) if learn else x.new_empty(0),
        torch.empty_like(weight) if learn else weight.new_empty(0),
    )


def _save(ctx, inputs, output):
    ctx.save_for_backward(*output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dloss, *_):
    if torch.is_grad_enabled():
        raise RuntimeError('linear_cross_entropy: only impl="reference" has a second derivative')
    dx, dweight = ctx.saved_tensors
    return (dloss * dx).to(dx.dtype), (dloss * dweight).to(dweight.dtype), None, None


chunked_loss.register_autograd(_differentiate, setup_context=_save)


@register_flop_formula(torch.ops.minimodels.chunked_loss)
def _flops(x, weight, targets, learn, out_shape=None):
    return (6 if learn else 2) * x[0] * weight[0] * weight[1]
