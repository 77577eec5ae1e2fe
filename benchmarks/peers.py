"""How fast are we compared with other implementations of the same model, with the same weights?

    python -m benchmarks.peers               Llama, Mixtral and Mamba: training step, generation
    python -m benchmarks.peers --only llama

Each model is made by transformers (width 256, 4 layers, fp32), saved, and loaded by us. If
x-transformers and mambapy are installed and have the architecture, they get the same weights. The
logits are compared before any timing. Then one forward and backward pass at each length, and greedy
generation with a carried state, are timed in turn with each peer.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minimodels import InputError, from_pretrained
from minimodels.command import keep_freed_memory, parse_options, run_command
from minimodels.errors import missing
from minimodels.generate import Sampling, generate
from minimodels.measure import check_writable, interleave, ratio, write
from minimodels.ops.linear_cross_entropy import IGNORE

D, DEPTH, H, V, WIDE = 256, 4, 4, 256, 704
SHAPE = {"vocab_size": V, "hidden_size": D, "num_hidden_layers": DEPTH}
NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# x-transformers has no eps, so the eps of the norms is tiny
HEADS = {
    "num_attention_heads": H,
    "num_key_value_heads": H,
    "rms_norm_eps": 1e-12,
}
MODELS = {
    "llama": {**HEADS, "intermediate_size": WIDE},
    "mixtral": {**HEADS, "num_local_experts": 8, "intermediate_size": WIDE // 2},
    "mamba": {"layer_norm_epsilon": 1e-5},
}


@dataclass
class Contender:
    """A model, and how its package uses it."""

    model: nn.Module
    logits: Callable[[Tensor], Tensor]
    """(B, T) -> (B, T, V)"""
    loss: Callable[[Tensor], Tensor]
    """tokens (B, T) -> the mean cross-entropy of each next token"""
    generate: Callable[[Tensor, int], Tensor]
    """a prompt (T,), a count -> that many tokens, each the most likely"""


def transformers(name: str) -> Contender:
    """The model of transformers, with random weights that are always the same."""
    import transformers as package

    torch.manual_seed(0)
    config = package.AutoConfig.for_model(name, **{**SHAPE, **MODELS[name], **NO_SPECIAL})
    model = package.AutoModelForCausalLM.from_config(config)
    return Contender(
        model,
        lambda tokens: model(tokens).logits,
        lambda tokens: model(tokens, labels=tokens, use_cache=False).loss,
        lambda prompt, count: model.generate(prompt[None], max_new_tokens=count, do_sample=False)[
            0, len(prompt) :
        ],
    )


def minimodels(source: nn.Module) -> Contender:
    """Our model, read from what transformers saves."""
    with tempfile.TemporaryDirectory() as folder:
        source.save_pretrained(folder)
        model = from_pretrained(folder)

    def loss(tokens: Tensor) -> Tensor:
        targets = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], IGNORE)), dim=1)
        return model.loss(tokens, targets)[0]

    return Contender(
        model,
        lambda tokens: model(tokens)[0],
        loss,
        lambda prompt, count: torch.cat(
            list(generate(model, [prompt], count, Sampling(temperature=0)))
        ),
    )


def x_transformers(source: nn.Module) -> Contender:
    """The Llama of x-transformers. Its rotary pairs are neighbours, its gate and up projections are
    one matrix, and its norms multiply by 1 + g."""
    from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

    d = D // H
    rotary, glu = (
        {"rotary_pos_emb": True, "rotary_emb_dim": d},
        {"ff_glu": True, "ff_swish": True, "ff_no_bias": True},
    )
    layers = Decoder(
        dim=D,
        depth=DEPTH,
        heads=H,
        attn_dim_head=d,
        use_rmsnorm=True,
        attn_flash=True,
        ff_mult=WIDE / D,
        **rotary,
        **glu,
    )
    net = TransformerWrapper(
        num_tokens=V, max_seq_len=2**16, use_abs_pos_emb=False, attn_layers=layers
    )
    weights = {
        "token_emb.emb": source.model.embed_tokens,
        "attn_layers.final_norm": source.model.norm,
    }
    weights["to_logits"] = source.lm_head
    for i, layer in enumerate(source.model.layers):
        attention, mlp = f"attn_layers.layers.{2 * i}", f"attn_layers.layers.{2 * i + 1}"
        weights |= {
            f"{attention}.0.0": layer.input_layernorm,
            f"{mlp}.0.0": layer.post_attention_layernorm,
        }
        weights |= {
            f"{attention}.1.to_{part}": getattr(layer.self_attn, f"{part}_proj") for part in "qkv"
        }
        weights |= {
            f"{attention}.1.to_out": layer.self_attn.o_proj,
            f"{mlp}.1.ff.2": layer.mlp.down_proj,
        }
        net.get_submodule(f"{mlp}.1.ff.0.proj").load_state_dict(
            {
                "weight": torch.cat((layer.mlp.up_proj.weight, layer.mlp.gate_proj.weight)),
                "bias": torch.zeros(2 * WIDE),
            }
        )
    for target, module in weights.items():
        weight = module.weight
        if target.endswith(("to_q", "to_k")):
            weight = rearrange(weight, "(h two half) d -> (h half two) d", h=H, two=2)
        net.get_submodule(target).load_state_dict(
            {"g": weight - 1} if weight.ndim == 1 else {"weight": weight}
        )
    model = AutoregressiveWrapper(net)
    return Contender(
        model,
        net,
        model,
        lambda prompt, count: model.generate(prompt[None], count, temperature=0.0, cache_kv=True)[
            0
        ],
    )


class MambaPy(nn.Module):
    """The layers of mambapy between an embedding and a head. Its own language model cannot be
    imported without a CUDA package."""

    def __init__(self):
        super().__init__()
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        self.embeddings, self.lm_head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.backbone, self.norm_f = Mamba(MambaConfig(d_model=D, n_layers=DEPTH)), RMSNorm(D, 1e-5)

    def forward(self, tokens: Tensor) -> Tensor:
        """The logits (B, T, V) of tokens (B, T)."""
        return self.lm_head(self.norm_f(self.backbone(self.embeddings(tokens))))

    @torch.no_grad()
    def generate(self, prompt: Tensor, count: int) -> Tensor:
        """Generate step by step, including the prompt, as mambapy does."""
        config = self.backbone.config
        caches = [(None, torch.zeros(1, config.d_inner, config.d_conv - 1)) for _ in range(DEPTH)]
        tokens = prompt.tolist()
        for i in range(len(prompt) + count - 1):
            x, caches = self.backbone.step(self.embeddings(torch.tensor(tokens[i : i + 1])), caches)
            if i + 1 == len(tokens):
                tokens.append(int(self.lm_head(self.norm_f(x)).argmax()))
        return torch.tensor(tokens[len(prompt) :])


def mambapy(source: nn.Module) -> Contender:
    """The Mamba of mambapy, which keeps transformers' names."""
    model = MambaPy()
    weights = source.state_dict().items()
    moved = ("backbone.embeddings", "backbone.norm_f")  # out of the backbone
    model.load_state_dict(
        {
            key.removeprefix("backbone.") if key.startswith(moved) else key: tensor
            for key, tensor in weights
        }
    )
    return Contender(
        model,
        model,
        lambda tokens: F.cross_entropy(
            model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        ),
        model.generate,
    )


OTHERS = {"x-transformers": (x_transformers, "llama"), "mambapy": (mambapy, "mamba")}


def contenders(name: str) -> dict[str, Contender]:
    """All installed packages that have the architecture, ours first. Their logits
    are checked to be equal."""
    theirs = transformers(name)
    found = {"minimodels": minimodels(theirs.model), "transformers": theirs}
    for package, (make, architecture) in OTHERS.items():
        if architecture == name:
            if importlib.util.find_spec(package.replace("-", "_")):
                found[package] = make(theirs.model)
            else:
                print(f"{package} is not installed: skipped (pip install {package})")
    tokens = torch.randint(V, (1, 128))
    with torch.no_grad():
        expected = theirs.logits(tokens)
        for contender in found.values():
            torch.testing.assert_close(contender.logits(tokens), expected, rtol=1e-4, atol=1e-4)
    return found


def training(contender: Contender, T: int) -> Callable[[], None]:
    """Forward and backward of one sequence."""
    tokens = torch.randint(V, (1, T), generator=torch.Generator().manual_seed(0))
    contender.model.train()

    def step() -> None:
        contender.model.zero_grad()
        contender.loss(tokens).backward()

    return step


def generation(contender: Contender, count: int) -> Callable[[], Tensor]:
    """`count` tokens after a prompt of 32, greedily, with a carried state."""
    prompt = torch.randint(V, (32,), generator=torch.Generator().manual_seed(0))
    contender.model.eval()
    return lambda: contender.generate(prompt, count)


def measure(name: str, question: str, argument: int, found: dict[str, Contender]) -> list[dict]:
    """Time ours against each of the others separately, so that a slow one does not reduce
    the rounds of the rest."""
    rows, ours = [], found["minimodels"]
    for package in [key for key in found if key != "minimodels"]:
        make = generation if question == "generation" else training
        calls = {"minimodels": make(ours, argument), package: make(found[package], argument)}
        if question == "generation":
            # further on, rounding may tip a near tie
            first, second = (call()[:64] for call in calls.values())
            if not torch.equal(first, second):
                raise AssertionError(f"{name}: {package} does not generate the same tokens")
        slow = (name, package) == (
            "mamba",
            "transformers",
        ) and question != "generation"  # a loop over the tokens
        timings = interleave(calls, rounds=2 if slow else 7, warm=not slow)
        median, low, high = ratio(timings, "minimodels", package)
        times = ", ".join(
            f"{provider} {statistics.median(samples) * 1e3:.0f} ms"
            for provider, samples in timings.items()
        )
        print(f"{name:8} {question:28} {median:6.2f}x ({low:.2f}-{high:.2f})   {times}", flush=True)
        shared = {
            "benchmark": "peers",
            "model": name,
            "question": question,
            "tokens": argument,
            "peer": package,
        }
        shared["peer_version"] = importlib.metadata.version(package)
        rows += [
            {**shared, "provider": provider, "seconds": seconds}
            for provider, seconds in timings.items()
        ]
    return rows


@dataclass(frozen=True)
class Options:
    """Time published models against other implementations on the CPU of this machine."""

    only: str = ""
    """one model: llama, mixtral or mamba; all by default"""
    lengths: tuple[int, ...] = (512, 2048)
    """tokens of the forward and backward pass"""
    generate: int = 256
    """tokens to generate"""
    out: Path = Path("runs/benchmarks/peers.jsonl")
    """file for the JSON rows"""


def main(options: Options) -> None:
    """Measure, print, write."""
    if options.only and options.only not in MODELS:
        raise InputError("only", options.only, ", ".join(MODELS))
    for field, values in {"lengths": options.lengths, "generate": (options.generate,)}.items():
        for value in values:
            if value < 2:
                raise InputError(field, value, "2 or more")
    if importlib.util.find_spec("transformers") is None:
        raise missing("transformers", "bench")
    check_writable(options.out)
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    keep_freed_memory()
    rows = []
    print(
        f"width {D}, {DEPTH} layers, vocabulary {V}, batch 1, fp32; how many times faster ours is"
    )
    for name in MODELS:
        if options.only in ("", name):
            found = contenders(name)
            questions = {f"forward + backward, T {T}": T for T in options.lengths} | {
                "generation": options.generate
            }
            for question, argument in questions.items():
                rows += measure(name, question, argument, found)
                write(options.out, rows, torch.device("cpu"))
    print(f"written to {options.out}")


if __name__ == "__main__":
    run_command(main, lambda: parse_options(Options, __doc__))
