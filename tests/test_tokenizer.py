"""Tokenizers: known ids, exact round trips and exact byte counts."""

import hashlib
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from unipool_jax.cli.main import main
from unipool_jax.data import assets
from unipool_jax.data.errors import DataError
from unipool_jax.data.requests import DEMO_VOCAB_SIZE
from unipool_jax.data.tokenizer import BUILT_IN, END_OF_TEXT, load_tokenizer, parse_tokenizer
from unipool_jax.data.train_tokenizer import demo_training_texts, train_tokenizer

ODD_TEXTS = [
    "",
    " ",
    "Hello world",
    "  leading\tand trailing \r\n\n",
    "na\u00efve e\u0301 \ufb01 \u00c5 \u1e9b\u0323",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1fa\U0001f1f3 \u0378 \U000e0001",
    "\x00\x01\x7f\u0085\u2028\u202e\ufeff\ufffd\uffff",
    "x<|endoftext|>y <|endoftext|>",
    "\u2581 </s> <0x41>",
]


@pytest.mark.parametrize(
    ("name", "vocab_size", "eod"), [("bytes", 257, 256), ("demo", 8192, 0), ("gpt2", 50257, 50256)]
)
def test_built_in_sizes(name: str, vocab_size: int, eod: int) -> None:
    tokenizer = load_tokenizer(name)
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.eod) == (name, vocab_size, eod)
    assert tokenizer.token_bytes is not None
    assert tokenizer.token_bytes.shape == (vocab_size,)
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes[eod] == 0
    assert np.delete(tokenizer.token_bytes, eod).min() == 1
    assert len(tokenizer.sha256) == 64


def test_gpt2_known_ids() -> None:
    # Ids published with GPT-2; also pins that text is never taken for the special token.
    tokenizer = load_tokenizer("gpt2")
    plain, special = tokenizer.encode_batch(["Hello world", "<|endoftext|>"])
    assert plain.tolist() == [15496, 995]
    assert plain.dtype == np.int32
    assert 50256 not in special
    assert tokenizer.decode([50256]) == END_OF_TEXT


@pytest.mark.parametrize("name", BUILT_IN)
def test_odd_unicode_round_trip(name: str) -> None:
    tokenizer = load_tokenizer(name)
    assert tokenizer.token_bytes is not None
    for text, ids in zip(ODD_TEXTS, tokenizer.encode_batch(ODD_TEXTS), strict=True):
        assert tokenizer.decode(ids) == text
        assert tokenizer.eod not in ids
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_any_text_round_trips_with_exact_byte_counts(texts: list[str]) -> None:
    for name in BUILT_IN:
        tokenizer = load_tokenizer(name)
        assert tokenizer.token_bytes is not None
        for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
            assert tokenizer.decode(ids) == text
            assert tokenizer.token_bytes[ids].sum() == len(text.encode())


@pytest.mark.parametrize("name", BUILT_IN)
def test_decode_keeps_document_borders_and_survives_broken_utf8(name: str) -> None:
    tokenizer = load_tokenizer(name)
    ids = tokenizer.encode_batch(["one", "\u00e9"])
    joined = np.concatenate([ids[0], [tokenizer.eod], ids[1]])
    assert tokenizer.decode(joined) == f"one{END_OF_TEXT}\u00e9"
    half = tokenizer.encode_batch(["\U0001f469"])[0][:1]
    assert "\ufffd" in tokenizer.decode(half)


def test_demo_tokenizer_is_regenerated_exactly() -> None:
    shipped = json.loads(assets.read_asset("demo_tokenizer.json"))
    again = json.loads(train_tokenizer(demo_training_texts(), DEMO_VOCAB_SIZE))
    assert again["model"]["vocab"] == shipped["model"]["vocab"]
    assert again["model"]["merges"] == shipped["model"]["merges"]
    assert len(demo_training_texts()) == 211


def test_training_command_writes_a_loadable_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "a.txt", tmp_path / "tok.json"
    text.write_text("the cat sat on the mat, the cat sat\n" * 50)
    assert main(["tokenizer", str(text), "vocab_size=264", f"out={out}"]) == 0
    assert f"wrote {out}: 264 entries\n" in capsys.readouterr().out
    assert main(["tokenizer", str(text), "vocab_size=5000", f"out={tmp_path / 'large.json'}"]) == 0
    assert "entries; the text gave no more than these of vocab_size=5000" in capsys.readouterr().out
    tokenizer = load_tokenizer(str(out))
    assert tokenizer.vocab_size == 264
    assert len(tokenizer.encode_batch(["the cat"])[0]) < 7
    assert tokenizer.definition == out.read_bytes()
    assert main(["tokenizer", str(text), "vocab_size=100", f"out={out}"]) == 2
    assert "vocab_size=100" in capsys.readouterr().err


def test_packaged_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sotu.jsonl", "gpt2_encoder.json", "gpt2_vocab.bpe", "demo_tokenizer.json"):
        assert hashlib.sha256(assets.read_asset(name)).hexdigest() == assets.SHA256[name]
    monkeypatch.setattr(assets, "ASSET_FOLDER", tmp_path)
    with pytest.raises(DataError, match=r"gpt2_vocab\.bpe"):
        assets.read_asset("gpt2_vocab.bpe")
    (tmp_path / "gpt2_vocab.bpe.xz").write_bytes(lzma.compress(b"#version: 0.2\n"))
    with pytest.raises(DataError, match="content differs"):
        assets.read_asset("gpt2_vocab.bpe")


def test_unknown_names_and_bad_definitions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such-tokenizer.*bytes, demo, gpt2"):
        load_tokenizer("no-such-tokenizer")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer"):
        load_tokenizer(str(bad))
    bad.write_bytes(b"\xff")
    with pytest.raises(DataError, match=r"bad\.json: not a tokenizer"):
        load_tokenizer(str(bad))


def _definition(core: tokenizers.Tokenizer, *special: str) -> bytes:
    core.add_special_tokens(list(special))
    return core.to_str().encode()


def _byte_level(prefix_space: bool = False) -> tokenizers.Tokenizer:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    core = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    core.decoder = tokenizers.decoders.ByteLevel()
    return core


def _byte_fallback(prepend: bool) -> tokenizers.Tokenizer:
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581": 256, "a": 257, "\u2581a": 258}
    core = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("\u2581", "a")], byte_fallback=True, fuse_unk=True)
    )
    steps = [tokenizers.normalizers.Replace(" ", "\u2581")]
    core.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), *steps] if prepend else steps
    )
    core.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("\u2581", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
        ]
    )
    return core


def test_missing_end_of_document_token_is_refused() -> None:
    with pytest.raises(DataError, match=r"mine: no end-of-document token.*endoftext"):
        parse_tokenizer("mine", _definition(_byte_level()))
    assert parse_tokenizer("mine", _definition(_byte_level(), "</s>")).eod == 256


def test_special_tokens_truncation_and_padding_of_a_definition_do_not_act() -> None:
    core = _byte_level()
    core.add_special_tokens([END_OF_TEXT, "<s>"])
    core.enable_truncation(4)
    core.enable_padding(length=64)
    core.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    tokenizer = parse_tokenizer("mine", core.to_str().encode())
    text = "spelled <s> and <|endoftext|> in a text"
    ids = tokenizer.encode_batch([text])[0]
    assert len(ids) == len(text)
    assert ids.max() < 256


def test_byte_counts_exist_only_where_they_are_exact() -> None:
    pieces = parse_tokenizer("a", _definition(_byte_fallback(prepend=False), "</s>"))
    text = " a aa \u00e9\U0001f469\n"
    ids = pieces.encode_batch([text])[0]
    assert pieces.piece_bytes is not None
    assert pieces.piece_bytes[ids].sum() == len(text.encode())
    assert pieces.decode(ids) == text
    assert 258 in ids
    assert pieces.token_bytes is None  # U+2581 in a text counts as a space
    for inexact in (_byte_fallback(prepend=True), _byte_level(prefix_space=True)):
        assert parse_tokenizer("b", _definition(inexact, "</s>")).piece_bytes is None
    lossy = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    assert parse_tokenizer("c", _definition(lossy, "</s>")).piece_bytes is None
    nfc = _byte_level()
    nfc.normalizer = tokenizers.normalizers.NFC()
    composing = parse_tokenizer("d", _definition(nfc, "</s>"))
    assert composing.piece_bytes is not None
    assert composing.token_bytes is None  # exact for texts that are composed already


@pytest.mark.parametrize("name", ["demo", "gpt2"])
def test_long_texts_are_encoded_in_parts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(name)
    lines = "".join(f"Line {number}, with words.\n\n\n" if number % 7 else "  in\n" for number in range(200)) + "end"
    texts = ["short", lines + "\nmore" * 300, " more words" * 300, "x" * 3000, ""]
    whole = tokenizer.encode_batch(texts)
    monkeypatch.setattr("unipool_jax.data.tokenizer._PART", 500)
    cut = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(row) for row in cut] == texts
    for number in (0, 1, 2, 4):  # where there are lines or words, the tokens are the same
        np.testing.assert_array_equal(cut[number], whole[number])
