"""The layers and models that every law is tested on. A new layer joins with one line in CASES; what its fields must be at a
width of 16, or to have several chunks or windows in 23 tokens, stands in SHAPE."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_leaves

from minimodels.config import Config, parse_layers
from minimodels.lm import LAYERS, build
from minimodels.ops.linear_cross_entropy import IGNORE
from minimodels.presets import PRESETS

SHAPE = {"width": 16, "heads": 4, "window": 5, "state_size": 4, "experts": 4, "capacity": 0.3}

CASES = {
    "attention": {"layers": "attention"},
    "attention without positions": {"layers": "attention", "rope_base": 0.0},
    "attention, grouped queries, QK-norm": {
        "layers": "attention",
        "kv_heads": 2,
        "qk_norm": "head",
    },
    "attention, QK-norm across heads, biases": {
        "layers": "attention",
        "kv_heads": 2,
        "qk_norm": "full",
        "attention_bias": True,
    },
    "attention, slowed rotation": {
        "layers": "attention",
        "rope_scaling": "llama3:factor=8,low=1,high=4,context=16",
    },
    "window": {"layers": "window"},
    "window of one": {"layers": "window", "window": 1},
    "mlp": {"layers": "mlp"},
    "mlp with biases": {"layers": "mlp", "mlp_bias": True},
    "mamba": {"layers": "mamba"},
    "mamba, one tap": {"layers": "mamba", "conv_width": 1},
    "mamba, Falcon": {"layers": "mamba", "mamba_norm": "plain", "mamba_norm_eps": 1e-6},
    "mamba, Jamba": {
        "layers": "mamba",
        "mamba_norm": "learned",
        "mamba_bias": True,
        "conv_bias": False,
    },
    "moe": {"layers": "moe"},
    "moe, Switch": {"layers": "moe", "router": "softmax", "experts_per_token": 1},
    "moe, pooled balance": {"layers": "moe moe", "balance": "pooled"},
    "moe, DeepSeek, shared biases": {
        "layers": "moe",
        "router": "sigmoid_bias",
        "shared_experts": 1,
        "mlp_bias": True,
    },
    "mod, auxiliary loss": {"layers": "mod(attention mlp)", "mod_route": "router"},
    "mod, predictor": {"layers": "mod(attention mlp)", "mod_route": "predictor"},
    **{f"mod around {name}": {"layers": f"mod({name})", "capacity": 0.75} for name in LAYERS},
    "mod around mamba and moe": {"layers": "mod(mamba moe)"},
    "mod around a wide window": {
        "layers": "mod(window)",
        "window": 8,
    },  # which holds the tokens but not their positions
    "mod around mod": {"layers": "mod(attention mod(mamba mlp))", "capacity": 0.5},
    **{f"{model} preset": {"layers": layers(4)} for model, layers in PRESETS.items()},
}
TOKENWISE = {"mlp", "moe"}  # layers that see a token alone
NOT_CAUSAL = {  # name -> fields, training mode
    "mixture-of-depths in training": ({"layers": "mod(attention mlp)"}, True),
    "expert choice": ({"layers": "moe", "router": "expert_choice"}, False),
}


def make(fields: dict, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A stack in evaluation mode with parameters so large that every part, gate and router has its say."""
    torch.manual_seed(seed)
    config = Config(**{**SHAPE, **fields})
    stack = build(config, parse_layers(config.layers)).to(dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in stack.named_buffers():
            if name.endswith("bias"):
                buffer.uniform_(-0.2, 0.2)
    return stack.eval()


def scored(model: nn.Module, batches) -> tuple[float, float]:
    """What an evaluation must find: mean loss in nats, and share of right answers, over the targets that are asked for."""
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
