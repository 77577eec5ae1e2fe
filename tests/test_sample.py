"""Generation: it agrees with training's forward pass, and is the same alone as in a batch."""

import sys

import pytest
import torch
from models import same
from small import small

from minimodels import LM, Config, InputError, preset, save_model
from minimodels import sample as sampling
from minimodels.generate import Sampling, complete, generate, keep, pick
from minimodels.presets import PRESETS
from minimodels.sample import TOKENS, tokens_to_add

GREEDY = Sampling(temperature=0)


def model(name: str) -> LM:
    torch.manual_seed(0)
    lm = LM(preset(name, "tiny", *small(name), width=16, vocab=32)).eval()
    for parameter in lm.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return lm.double()


def continued(lm, prompts, count, **options) -> torch.Tensor:
    return torch.stack(list(generate(lm, prompts, count, **options)), dim=1)


@pytest.mark.parametrize("name", PRESETS)
def test_state_carried_equals_everything_recomputed(name):
    lm, tokens = model(name), torch.arange(5)
    expected = tokens
    for _ in range(12):
        logits, _ = lm(expected[None])
        expected = torch.cat((expected, logits[0, -1:].argmax(-1)))
    assert continued(lm, [tokens], 12, sampling=GREEDY)[0].tolist() == expected[5:].tolist()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "sampling", [GREEDY, Sampling(temperature=1.0, top_k=8)], ids=["greedy", "random"]
)
def test_a_prompt_in_a_batch_is_continued_as_alone(name, sampling):
    lm, prompts = model(name), [torch.arange(5), torch.tensor([9]), torch.arange(20, 31)]
    together = continued(lm, prompts, 10, sampling=sampling, seed=3)
    for row, prompt in enumerate(prompts):
        assert (
            together[row].tolist()
            == continued(lm, [prompt], 10, sampling=sampling, seed=3 + row)[0].tolist()
        )


def test_a_seed_draws_the_same_text():
    lm, prompts, loose = model("transformer"), [[0, 1, 2]], Sampling(temperature=2.0)
    first, again, other = (
        continued(lm, prompts, 20, sampling=loose, seed=seed) for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_seed_every_text_is_another():
    lm, loose = model("transformer"), Sampling(temperature=2.0)
    once, again = (continued(lm, [[0, 1, 2]] * 2, 20, sampling=loose) for _ in range(2))
    assert not torch.equal(once, again)
    seeded = continued(lm, [[0, 1, 2]] * 2, 20, sampling=loose, seed=1)
    for rows in (once, seeded):  # nor are two rows of one batch the same
        assert not torch.equal(rows[0], rows[1])


def test_text_in_text_out():
    torch.manual_seed(0)
    lm = LM(preset("transformer", width=16)).eval()
    text = complete(lm, "abc", 12, GREEDY)
    tokens = continued(lm, [list(b"abc")], 12, sampling=GREEDY)[0]
    assert text == bytes(tokens.tolist()).decode(errors="replace")
    assert complete(lm, "abc", 0) == ""
    assert complete(lm, "abc", 20, seed=1) == complete(lm, "abc", 20, seed=1)


def kept(probabilities, **options) -> list[bool]:
    return keep(torch.tensor([probabilities]).log(), Sampling(**options))[0].isfinite().tolist()


def test_filters_keep_what_they_say():
    p = [0.4, 0.3, 0.2, 0.1]
    assert kept(p) == [True] * 4
    assert kept(p, top_k=2) == [True, True, False, False]
    assert kept(p, top_k=9) == [True] * 4
    assert sum(kept([0.25] * 4, top_k=1)) == 1
    assert kept(p, top_p=0.5) == [True, True, False, False]
    assert kept(p, top_p=0.05) == [True, False, False, False]
    assert kept(p, top_p=1e-300) == [True, False, False, False]
    assert kept(p[::-1], top_p=0.75) == [False, True, True, True]
    assert kept(p, min_p=0.6) == [True, True, False, False]
    assert kept(p, min_p=1.0) == [True, False, False, False]


def test_min_p_is_a_threshold_on_logits():
    """p_i >= m · max p is z_i >= z_max + T ln m: a higher temperature widens the set."""
    logits, temperature, m = torch.randn(1, 50), 1.7, 0.1
    expected = logits >= logits.max() + temperature * torch.tensor(m).log()
    assert torch.equal(keep(logits / temperature, Sampling(min_p=m)).isfinite(), expected)


def test_temperature_shapes_the_frequencies():
    logits = torch.tensor([[2.0, 1.0, 0.0]]).expand(4000, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    drawn = pick(logits, Sampling(temperature=2.0), generators)
    same(drawn.bincount(minlength=3) / 4000, (logits[0] / 2).softmax(-1), 0.03)


def test_no_temperature_is_too_low():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    for temperature in (1e-40, 1e-300):
        assert pick(logits, Sampling(temperature=temperature), [torch.Generator()]).tolist() == [0]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"min_p": 1.1},
    ],
)
def test_refuses_sampling(options):
    (name,) = options
    with pytest.raises(InputError, match=name):
        Sampling(**options)


def test_refuses_prompts():
    lm = model("transformer")
    for prompt in (
        torch.arange(0),
        torch.tensor([32]),
        torch.tensor([-1]),
        torch.ones(3),
        torch.arange(4).view(1, 4),
    ):
        with pytest.raises(InputError, match="prompt"):
            generate(lm, [prompt], 1)
    for prompts in ([], "def ", ["def "], [[1, "d"]], [None], [[10**30]], 1, torch.tensor(1)):
        with pytest.raises(InputError, match="prompts"):
            generate(lm, prompts, 1)
    for prompts in (torch.arange(3), [1, 2]):
        given = f"prompts: '{type(prompts).__name__} of numbers' .* a list of prompts, each a seq"
        with pytest.raises(InputError, match=given):
            generate(lm, prompts, 1)
    for prompts in ([[1.0]], [[]]):
        with pytest.raises(InputError, match="prompt:"):
            generate(lm, prompts, 1)
    with pytest.raises(InputError, match="in training mode.*eval"):
        generate(model("mod").train(), [torch.arange(3)], 1)
    lm = LM(preset("moe", "tiny", "moe.router=expert_choice", vocab=32)).eval()
    with pytest.raises(InputError, match="not causal.* route over the whole sequence"):
        generate(lm, [torch.arange(3)], 1)


def test_no_temperature_is_too_small():
    assert pick(
        torch.tensor([[200.0, 100.0, -50.0]]), Sampling(temperature=1e-37), [torch.Generator()]
    ).tolist() == [0]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_low_precision_draws_what_full_precision_does(top_p):
    logits = (
        torch.randn(1, 50, generator=torch.Generator().manual_seed(0)).bfloat16().expand(2000, -1)
    )
    drawn = [
        pick(
            given,
            Sampling(temperature=0.7, top_p=top_p),
            [torch.Generator().manual_seed(seed) for seed in range(2000)],
        )
        for given in (logits, logits.float())
    ]
    assert torch.equal(*drawn)


def test_logits_that_are_not_finite_are_refused():
    for broken in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="dtype: 'float16'"):
            pick(torch.tensor([[0.0, broken]]).half(), GREEDY, [torch.Generator()])


def test_filters_come_after_the_temperature():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(500, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(500)]
    assert pick(logits, Sampling(temperature=100.0, top_p=0.5), generators).unique().tolist() == [
        0,
        1,
    ]


def test_top_p_stops_where_it_is_reached():
    assert kept([0.5, 0.25, 0.125, 0.125], top_p=0.75) == [True, True, False, False]


def test_refuses_a_negative_count():
    with pytest.raises(InputError, match="tokens: -1"):
        generate(model("transformer"), [torch.arange(3)], -1)


def test_a_sample_ends_at_the_trained_context_or_says_that_it_goes_beyond(capsys):
    assert tokens_to_add(None, 256, 6) == 250
    assert tokens_to_add(250, 256, 6) == 250
    assert tokens_to_add(None, None, 6) == TOKENS  # a published model
    assert capsys.readouterr().err == ""
    assert tokens_to_add(251, 256, 6) == 251
    assert tokens_to_add(1, 256, 300) == 1
    notes = capsys.readouterr().err.splitlines()
    assert notes == 2 * [
        "note: the model was trained on texts of 256 tokens and may be worse beyond"
    ]


def test_a_prompt_that_fills_the_context_is_not_continued_unless_tokens_are_asked_for(capsys):
    assert tokens_to_add(None, 256, 255) == 1
    assert capsys.readouterr().err == ""
    for prompt in (256, 1000):
        assert tokens_to_add(None, 256, prompt) == 0
        assert capsys.readouterr().err == (
            f"note: the prompt's {prompt} tokens already fill the context of 256; "
            "--tokens N writes more\n"
        )


def test_only_text_is_completed():
    for text in (torch.tensor([[1]]), [1], b"def ", None):
        with pytest.raises(InputError, match=f"text: '{type(text).__name__}' .* accepted: text; "):
            complete(model("transformer"), text)


@pytest.mark.parametrize(
    "terminal, expected",
    [
        (True, ["a\\x1b[31m\n", "\t\\x00", "\\x07é\\x9b", "\n"]),
        (False, ["a\x1b[31m\n", "\t\0", "\x07é\x9b", "\n"]),
    ],
)
def test_each_token_is_written_at_once_and_only_a_terminal_gets_escapes(
    terminal, expected, tmp_path, monkeypatch, capsys
):
    save_model(LM(Config(layers="mlp", vocab=256, width=8)), tmp_path / "run")
    monkeypatch.setattr(sampling, "stream", lambda *_: iter(["a\x1b[31m\n", "\t\0", "\x07é\x9b"]))
    written = []
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setattr(sys.stdout, "write", written.append)
    sampling.main(sampling.Options(str(tmp_path / "run"), device="cpu"))
    assert [text for text in written if text] == expected
