"""What a model refuses because it would silently be wrong, and what stays exact in half precision."""

import os

import pytest
import torch
import torch.utils.checkpoint

from minimodels import LM, Config, InputError
from minimodels.training import checkpoint
from minimodels.training.log import forget_after, write_log

SMALL = {"vocab": 16, "width": 16}


def tokens() -> torch.Tensor:
    return torch.randint(16, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "row",
    [
        [-1, -1, 0, 1, 2, 3],  # padding on the left
        [0, 1, 2, 0, 1, 2],  # packed documents without starts
        [0, 1, -1, 3, 4, 5],  # a gap
        [0, 1, 1, 2, 3, 4],
        [-2, -1, 0, 1, 2, 3],
    ],
)
def test_positions_against_the_contract_are_refused(row):
    model = LM(Config(layers="attention mamba", **SMALL)).eval()
    with pytest.raises(ValueError, match="ascending in each row, with -1"):
        model(tokens(), positions=torch.tensor([[0, 1, 2, 3, 4, 5], row]))


def test_positions_of_the_contract_are_accepted():
    model = LM(Config(layers="attention mamba", **SMALL)).eval()
    positions = torch.tensor([[0, 2, 3, 7, 8, 9], [4, 5, -1, -1, -1, -1]])
    assert model(tokens(), positions=positions)[0].isfinite().all()


def test_a_selection_bias_moves_in_half_precision():
    model = LM(Config(layers="moe(experts=4, router=sigmoid_bias)", **SMALL)).to(torch.bfloat16)
    moe = model.layers[0].layer
    assert moe.bias.dtype == moe.visited.dtype == torch.float32
    assert moe.router.weight.dtype == torch.bfloat16
    moe.bias.fill_(0.5)
    model.loss(tokens()[:, :-1], tokens()[:, 1:])
    model.after_step()
    assert ((moe.bias - 0.5).abs() > 5e-4).any()
    assert ((moe.bias - 0.5).abs() < 2e-3).all()
    with torch.device("meta"):
        empty = LM(Config(layers="moe(experts=4, router=sigmoid_bias)", **SMALL))
    assert (
        empty.to(torch.bfloat16).to_empty(device="cpu").layers[0].layer.bias.dtype == torch.float32
    )


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_loss_that_lost_its_gradient_is_refused(reentrant):
    """Reentrant checkpoints compute the layers, including their own losses, without gradients."""
    torch.manual_seed(0)
    model = LM(Config(layers="moe(experts=4) attention", **SMALL))
    layer = model.layers[0].layer
    forward = layer.forward

    def checkpointed(x, state=None, context=None):
        return torch.utils.checkpoint.checkpoint(
            forward, x, state, context, use_reentrant=reentrant
        )

    layer.forward = checkpointed
    if reentrant:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            model.loss(tokens()[:, :-1], tokens()[:, 1:])
        return
    loss, _ = model.loss(tokens()[:, :-1], tokens()[:, 1:])
    loss.backward()
    assert layer.router.weight.grad.abs().sum() > 0


def test_files_that_would_block_are_refused(tmp_path):
    model = LM(Config(layers="mlp", **SMALL))
    checkpoint.save(tmp_path, model, None, {"step": 1})
    for name in ("shard-00001-model-00001-of-00001.safetensors", "progress.json"):
        (tmp_path / "checkpoints/step-1" / name).unlink()
        os.mkfifo(tmp_path / "checkpoints/step-1" / name)
        with pytest.raises(InputError, match="not a regular file"):
            checkpoint.load(tmp_path, model)
    os.mkfifo(tmp_path / "log.jsonl")
    forget_after(tmp_path, 0)
    with pytest.raises(InputError, match="a regular file, or none"):
        write_log(tmp_path, {"step": 1})
    os.mkfifo(tmp_path / "options.json")
    with pytest.raises(InputError, match="not a regular file"):
        checkpoint.load_model(tmp_path)


@pytest.mark.parametrize(
    "tokens, accepted",
    [
        (torch.tensor([[1, 50]]), "1 to 50' is not accepted; accepted: ids 0 to 9"),
        (torch.tensor([[-1, 5]]), "-1 to 5' is not accepted; accepted: ids 0 to 9"),
        (torch.ones(1, 2), "float32' is not accepted; accepted: int64 or int32 ids"),
    ],
)
def test_what_are_no_tokens_is_named(tokens, accepted):
    model = LM(Config(layers="mlp", width=8, vocab=10))
    with pytest.raises(InputError, match=f"^tokens: '{accepted}"):
        model(tokens)
