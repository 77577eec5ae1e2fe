"""Continuing text as people use it: chat templates, several ends, stops, penalties, and the same
text from an exported model in transformers."""

import json

import pytest
import torch
from models import same

from minimodels import LM, Config, InputError, complete, from_pretrained, save_pretrained
from minimodels.data.chat import read_template, render
from minimodels.data.tokenizer import TokenizerFile, train_bpe
from minimodels.generate import Sampling, generate, pick, until
from minimodels.sample import Options, main

tokenizers = pytest.importorskip("tokenizers", reason="tokenizer.json needs the extra `hub`")
GREEDY = Sampling(temperature=0)
TEXT = "a user asks and the assistant answers: añadir 日本. " * 20
HELLO = [{"role": "user", "content": "a user asks <日>"}]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "tokens": "{{ bos_token }}{% for m in messages %}[INST] {{ m.content | trim }} [/INST]{{ eos_token }}{% endfor %}",
    "blocks": "{%- set ns = namespace(n=0) %}\n{% for m in messages %}\n    {% set ns.n = ns.n + 1 %}\n"
    "  {% generation %}{{ m['content'] }}{% endgeneration %}\n{% if loop.first %}{% continue %}{% endif %}\n"
    "{% endfor %}{{ ns.n }}",
    "json": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2) }}{{ dict(a=1) }}",
    "date": "{{ strftime_now('%Y') }}{% if tools %}tools{% endif %}{{ messages[0].content }}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published chat model with two ends and a template."""
    torch.manual_seed(0)
    lm = LM(Config(width=16, layers="attention mlp", vocab=300))
    tokenizer = train_bpe([TEXT], 290).tokenizer
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    folder = tmp_path_factory.mktemp("chat") / "model"
    save_pretrained(lm, folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": CHATML,
        "bos_token": "<|end|>",
        "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 7]}))
    return folder


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_give_what_transformers_gives(template, folder):
    transformers = pytest.importorskip("transformers", reason="templates are those of transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    given = {"chat_template": template, "add_generation_prompt": True}
    expected = theirs.apply_chat_template(HELLO, tokenize=False, **given)
    special = {"bos_token": "<|end|>", "eos_token": "<|im_end|>"}
    assert render(template, HELLO, special) == expected
    ids = theirs.apply_chat_template(HELLO, tokenize=True, return_dict=False, **given)
    assert TokenizerFile(folder).encode(expected, whole=False).tolist() == ids


def test_a_message_is_a_conversation_that_the_model_continues(folder):
    transformers = pytest.importorskip("transformers", reason="templates are those of transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ids = theirs.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert TokenizerFile(folder).chat(HELLO[0]["content"]).tolist() == ids


def test_a_template_in_a_file_of_its_own_comes_first(folder, tmp_path):
    settings = {
        "chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": "y"}]
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_template(tmp_path) == "y"
    (tmp_path / "chat_template.jinja").write_text("z日")
    assert read_template(tmp_path) == "z日"


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ self.__init__.__globals__ }}",
        "{{ strftime_now.__globals__['json'] }}",
        "{{ raise_exception('not this role') }}",
        "{% if %}",
        "{{ 1 + 'a' }}",
        "{% include 'file' %}",
    ],
)
def test_a_template_that_is_wrong_or_reaches_out_is_refused(template):
    with pytest.raises(InputError, match="chat: 'the template'"):
        assert render(template, HELLO, {}) == ""


def test_without_a_template_chat_is_refused(tmp_path):
    save_pretrained(LM(Config(width=16, layers="attention mlp")), tmp_path / "a")
    with pytest.raises(InputError, match="chat: .*a model whose tokenizer has a chat template"):
        main(Options(str(tmp_path / "a"), chat=True))


def test_a_chat_ends_with_any_of_its_ends_and_prints_the_answer_alone(folder, capsys):
    tokenizer = TokenizerFile(folder)
    named = tokenizer.tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.end == {0, 7, named}
    lm = from_pretrained(folder)
    answer = [int(t) for t in generate(lm, [tokenizer.chat("hello")], 12, GREEDY)]
    main(Options(str(folder), GREEDY, "hello", chat=True, tokens=12))
    whole = capsys.readouterr().out
    assert whole == "".join(tokenizer.stream(torch.tensor([]).long(), answer)) + "\n"
    entries = (folder / "generation_config.json").read_text()
    last = next(i for i, token in enumerate(answer) if token not in answer[:i] and i > 2)
    try:
        ends = json.dumps({"eos_token_id": [299, answer[last]]})
        (folder / "generation_config.json").write_text(ends)
        main(Options(str(folder), GREEDY, "hello", chat=True, tokens=12))
    finally:
        (folder / "generation_config.json").write_text(entries)
    short = capsys.readouterr().out.removesuffix("\n")
    assert short == "".join(tokenizer.stream(torch.tensor([]).long(), answer[:last]))


@pytest.mark.parametrize(
    ("pieces", "stop", "expected"),
    [
        (["ab", "cd"], [], "abcd"),
        (["ab", "cd"], ["bc"], "a"),
        (["a", "b", "c", "d"], ["bcd"], "a"),
        (["a", "b", "c", "x"], ["bcd"], "abcx"),
        (["aab"], ["ab", "aa"], ""),
        (["x", "a", "a", "b"], ["aab"], "x"),
        (["ab"], ["abc"], "ab"),
        (["one\n", "\ntwo"], ["\n\n", "two"], "one"),
    ],
)
def test_a_text_ends_before_the_first_stop(pieces, stop, expected):
    assert "".join(until(pieces, stop)) == expected


def test_a_stop_is_not_waited_for_longer_than_it_takes():
    assert list(until(["a", "b", "c"], ["bx"])) == ["a", "", "bc", ""]


def test_the_command_stops_and_completes_alike(folder, capsys):
    lm = from_pretrained(folder)
    whole = complete(lm, "a user", 20, GREEDY)
    stop = whole[3:5]
    expected = whole[: whole.index(stop)]
    assert complete(lm, "a user", 20, GREEDY, stop=[stop]) == expected
    main(Options(str(folder), GREEDY, "a user", tokens=20, stop=(stop,)))
    assert capsys.readouterr().out == "a user" + expected + "\n"
    with pytest.raises(InputError, match="stop"):
        Options(str(folder), stop=("",))


def test_the_penalty_for_repetition_is_that_of_transformers():
    transformers = pytest.importorskip("transformers", reason="the penalty is that of transformers")
    logits, ids = torch.randn(3, 11), torch.tensor([[1, 2, 2], [5, 5, 5], [0, 9, 3]])
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(ids, logits).argmax(-1)
    seen = torch.zeros(3, 11, dtype=torch.bool).scatter_(1, ids, True)
    sampling = Sampling(temperature=0, repetition_penalty=1.7)
    same(pick(logits, sampling, [torch.Generator()] * 3, seen), expected)


def test_a_penalised_text_is_that_of_transformers_and_the_same_in_a_batch(folder):
    transformers = pytest.importorskip("transformers", reason="the penalty is that of transformers")
    sampling, ours = Sampling(temperature=0, repetition_penalty=1.3), from_pretrained(folder)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = [5, 9, 9, 4]
    expected = theirs.generate(
        torch.tensor([prompt]), max_new_tokens=15, min_new_tokens=15, do_sample=False,
        repetition_penalty=1.3, eos_token_id=None, pad_token_id=0,
    )[0, 4:].tolist()  # fmt: skip
    plain = [int(t) for t in generate(ours, [prompt], 15, GREEDY)]
    assert expected != plain
    together = torch.stack(list(generate(ours, [[8], prompt], 15, sampling)), 1)
    assert together[1].tolist() == expected


@pytest.mark.parametrize("bpe", [False, True], ids=["bytes", "bpe"])
def test_an_exported_model_continues_a_text_here_and_in_a_pipeline(bpe, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="pipelines are those of transformers")
    torch.manual_seed(0)
    tokenizer = train_bpe([TEXT], 290) if bpe else None
    lm = LM(Config(width=16, layers="attention mlp", vocab=290 if bpe else 256)).eval()
    lm.tokenizer = tokenizer
    text = "a user asks 日"
    expected = complete(lm, text, 12, GREEDY)
    save_pretrained(lm, tmp_path / "model")
    assert complete(from_pretrained(tmp_path / "model"), text, 12, GREEDY) == expected
    main(Options(str(tmp_path / "model"), GREEDY, text, tokens=12))
    assert capsys.readouterr().out == text + expected + "\n"
    pipeline = transformers.pipeline("text-generation", str(tmp_path / "model"))
    (answer,) = pipeline(text, max_new_tokens=12, do_sample=False)
    assert answer["generated_text"] == text + expected
    assert TokenizerFile(tmp_path / "model").end == ({0} if bpe else set())
