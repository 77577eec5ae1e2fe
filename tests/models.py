"""The layers that every law is tested on, as texts. To add a layer, add a line to CASES.

The texts set the options that the width of 16 needs, or that give several chunks, windows or
documents in 23 tokens. The first text of a layer is tested with all laws, the others with the fast
ones. Wrappers are tested around REPRESENTATIVES.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from minimodels.architectures.registry import build
from minimodels.config import Config
from minimodels.context import Context, Record
from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.presets import PRESETS

WIDTH = 16
CASES = {
    "attention": [
        "attention",
        "attention(rope_base=0)",
        "attention(kv_heads=2, qk_norm=head)",
        "attention(kv_heads=2, qk_norm=full, bias=true)",
        "attention(rope_scaling=llama3(factor=8, low=1, high=4, context=16))",
        "attention(window=5)",
        "attention(window=1)",
        "attention(bias=qkv, scale=0.3, rope_fraction=0.5, rope_scaling=yarn(factor=4, context=16))",
        "attention(kv_heads=2, softcap=2.0, sink=true, gate=full)",
        "attention(window=5, softcap=2.0, sink=true, gate=head)",
        "attention(value_residual=true) attention(value_residual=true, kv_heads=2)",
    ],
    "mlp": ["mlp", "mlp(bias=true)", "mlp(gated=false, activation=gelu)"],
    "mamba": [
        "mamba(state_size=4)",
        "mamba(state_size=4, conv_width=1)",
        "mamba(state_size=4, norm=plain, norm_eps=1e-6)",
        "mamba(state_size=4, norm=learned, bias=true, conv_bias=false)",
    ],
    "moe": [
        "moe(experts=4)",
        "moe(experts=4, router=softmax, experts_per_token=1)",
        "moe(experts=4, router=softmax, groups=2)",
        "moe(experts=4, balance=pooled)*2",
        "moe(experts=4, router=sigmoid_bias, shared_experts=1, bias=true)",
        "moe(experts=4, expert_bias=true, activation=clamped)",
        "moe(experts=4, shared_experts=1, shared_width=24, shared_gate=true)",
    ],
    "mamba2": [
        "mamba2(state_size=4)",
        "mamba2(heads=2, state_size=4, groups=2, norm=norm_gate, step_min=0.05, step_max=0.2)",
        "mamba2(state_size=4, norm=none, bias=true, conv_bias=false)",
    ],
    "retention": [
        "retention",
        "retention(feature_map=elu, rope_base=0, decay=none, norm=sum, gate=none)",
        "retention(feature_map=silu, rope_base=0, decay=layers, block=2, scale=false, norm=full, gate=sigmoid,"
        " residual=deep_norm, stream_scale=3, residual_scale=0.5)*3",
        "retention(rope_base=0, decay=channels)",
    ],
    "deltanet": [
        "deltanet",
        "deltanet(heads=2, key_heads=1, gate=scalar, output_gate=silu)",
        "deltanet(gate=vector, output_gate=sigmoid, output_rank=head)",
        "deltanet(gate=vector, gate_bound=5, conv_width=1)",
        "deltanet(beta_max=2, steps=2)",
    ],
    "short_convolution": ["short_convolution", "short_convolution(conv_width=4, bias=true)"],
    "latent_attention": [
        "latent_attention",
        "latent_attention(q_rank=6, kv_rank=5, head_dim=3, rope_dim=2, value_dim=7, bias=true)",
    ],
    "sparse_attention": [
        "sparse_attention(keys=5, index_heads=2)",
        "sparse_attention(keys=64, q_rank=6, kv_rank=5, head_dim=3, rope_dim=2, value_dim=7, bias=true)",
        "sparse_attention(keys=3, index_heads=1, index_dim=5, rope_base=0)",
    ],
    "differential_attention": [
        "differential_attention",
        "differential_attention(heads=4, kv_heads=2, version=v1)",
    ],
    "learned_positions": ["learned_positions(context=160) attention(rope_base=0)"],
    "mod": [
        "mod(attention mlp, capacity=0.3)",
        "mod(attention mlp, capacity=0.3, route=router)",
        # the window is wider than the number of routed tokens, but narrower than their positions
        "mod(attention(window=8), capacity=0.3)",
        "mod(attention mod(mamba mlp, capacity=0.5), capacity=0.5)",
    ],
}
REPRESENTATIVES = ["attention(window=5)", "mamba(state_size=4)", "moe(experts=4)", "deltanet"]
SHARED = [
    "A:=attention A mlp A",
    "A:=mamba(state_size=4) A mod(A, capacity=0.75)",
    "A:=mod(moe(experts=4), capacity=0.5) A attention A",
]
WRAPPED = [f"mod({layer}, capacity=0.75)" for layer in REPRESENTATIVES]
NAMES = [texts[0] for texts in CASES.values()]
MODELS = {  # presets that mix layers
    name: PRESETS[name].format(n=2, twice=4, half=2, quarter=1)
    for name in ("transformer", "moe", "mod", "hybrid", "olmo_hybrid")
}
ALL = list(
    dict.fromkeys(
        [text for texts in CASES.values() for text in texts]
        + SHARED
        + WRAPPED
        + list(MODELS.values())
    )
)
TOKENWISE = ("mlp", "moe")  # layers that see one token at a time
NOT_CAUSAL = {  # text -> whether this is so only in training mode
    "mod(attention mlp, capacity=0.3)": True,
    "moe(experts=4, router=expert_choice)": False,
}


def make(layers: str, seed: int = 0, dtype: torch.dtype = torch.float64, **fields) -> nn.Module:
    """A stack in evaluation mode, with parameters so large that every part,
    gate and router matters."""
    torch.manual_seed(seed)
    stack = build(Config(**{"layers": layers, "width": WIDTH, **fields})).to(dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in stack.named_buffers():
            if name.endswith("bias"):
                buffer.uniform_(-0.2, 0.2)
    return stack.eval()


def observe(
    layer: nn.Module, x: torch.Tensor, state=None, **given
) -> tuple[torch.Tensor, object, Record]:
    """The output of a layer for x, its state, and the record of the pass, including traces."""
    context = Context(**given)
    context.record.traces = {}
    y, state = layer(x, state, context)
    context.record.finish()
    return y, state, context.record


def scored(model: nn.Module, batches) -> tuple[float, float]:
    """What an evaluation should give for the targets that count: mean loss in nats,
    share of right answers."""
    model.eval()
    losses, right = [], []
    for tokens, targets in batches:
        logits, asked = model(tokens)[0], targets != IGNORE
        losses.append(F.cross_entropy(logits[asked], targets[asked], reduction="none"))
        right.append(logits[asked].argmax(-1) == targets[asked])
    return torch.cat(losses).mean().item(), torch.cat(right).float().mean().item()


def tensors(state) -> list[torch.Tensor]:
    """The tensors of a state, in order."""
    return [leaf for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor)]


def same(actual, expected, tolerance: float = 1e-9):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
