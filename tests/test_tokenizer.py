"""Text to tokens and back, and published models continued from the command line."""

import json

import pytest
import torch

from minimodels import LM, Config, InputError, from_pretrained, save_pretrained
from minimodels.data.tokenizer import Bytes, TokenizerFile, read_end
from minimodels.sample import Options, Sampling, generate, main

TEXT = "def añadir(x):\n    return x + 1  # 日本\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published model with a byte-level tokenizer of its own that puts <s> before a text."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizer.json needs the extra `hub`")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([TEXT] * 10, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("published") / "model"
    save_pretrained(LM(Config(width=16, layers="attention mlp", vocab=300)), folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.mark.parametrize("text", [TEXT, "", "a", "\udcff"])
def test_bytes_give_the_text_back(text):
    tokens = Bytes().encode(text)
    for cut in range(len(tokens) + 1):
        streamed = "".join(Bytes().stream(tokens[:cut], [*tokens[cut:].tolist(), 300]))
        assert streamed == text.encode("utf-8", "surrogateescape").decode(errors="replace")


def test_a_tokenizer_file_gives_the_text_back(folder):
    tokenizer = TokenizerFile(folder)
    tokens = tokenizer.encode(TEXT)
    assert tokens[0] == 0 and len(tokens) < len(TEXT.encode())
    for cut in (1, 5, len(tokens)):
        assert "".join(tokenizer.stream(tokens[:cut], tokens[cut:].tolist())) == TEXT


def test_what_a_command_line_could_not_decode_is_encoded(folder):
    assert len(TokenizerFile(folder).encode("a\udcff"))


def test_bytes_that_are_no_text_do_not_end_it(folder, tmp_path):
    """A tokenizer that falls back on bytes, and a model that has not learnt to spell with them."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {"<unk>": 0, "<0x41>": 1, "<0x80>": 2, "\u2581he": 3}
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>")
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "".join(TokenizerFile(tmp_path).stream(torch.tensor([3]), [1, 2, 3, 3]))
    assert text.count("he") >= 2


def test_the_end_of_a_text_is_what_the_files_say(folder, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    assert TokenizerFile(tmp_path).end == frozenset()
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "eos_token_id": 1}))
    assert TokenizerFile(tmp_path).end == {1}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 7]}))
    assert TokenizerFile(tmp_path).end == {1, 7}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["x"]}))
    with pytest.raises(InputError, match="eos_token_id: .'x'."):
        TokenizerFile(tmp_path)


def test_a_published_model_is_continued_and_stops_where_it_ends(folder, capsys):
    options = Options(model=str(folder), prompt=TEXT, tokens=30, sampling=Sampling(temperature=0))
    main(options)
    written = capsys.readouterr().out
    assert written.startswith(TEXT) and len(written) > len(TEXT) + 1
    main(
        Options(
            model=str(folder),
            prompt=TEXT,
            tokens=30,
            sampling=Sampling(temperature=0),
            dtype="bfloat16",
        )
    )
    assert capsys.readouterr().out.startswith(TEXT)

    tokenizer, config = TokenizerFile(folder), folder / "config.json"
    (first,) = (
        int(token)
        for token in generate(
            from_pretrained(folder), [tokenizer.encode(TEXT)], 1, options.sampling
        )
    )
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), "eos_token_id": first}))
    try:
        main(options)
    finally:
        config.write_text(before)
    assert capsys.readouterr().out == TEXT + "\n"


@pytest.mark.parametrize("content", [None, "{}", "not JSON"])
def test_a_tokenizer_that_is_missing_or_damaged_is_told(folder, tmp_path, content):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        TokenizerFile(tmp_path)


def test_options_of_sampling_are_checked(folder):
    for field, value in {"dtype": "int8", "seed": -1, "device": "tpu"}.items():
        with pytest.raises(InputError, match=field):
            main(Options(**{"model": str(folder), field: value}))


def test_generation_config_need_not_name_an_end(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 1}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"do_sample": True}))
    assert read_end(tmp_path) == {1}


def test_a_character_that_is_cut_off_shows():
    assert "".join(Bytes().stream(torch.tensor([97]), [0xE6, 0x97])) == "a\ufffd"
