"""Tokenizers that people bring: no text makes an end token, and what a text loses is counted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from unipool_jax.cli.main import main
from unipool_jax.config.schema import Config, DataConfig
from unipool_jax.data.corpus import open_corpus
from unipool_jax.data.errors import DataError
from unipool_jax.data.losses import loss_report, measure
from unipool_jax.data.time_limit import within
from unipool_jax.data.token_store import build_store
from unipool_jax.data.tokenizer import SlowTokenizerError, TokenizerError, load_tokenizer, parse_tokenizer
from unipool_jax.evaluation.generate import encode_prompts

END = "</s>"
LETTERS = [chr(code) for code in range(33, 127)]


def definition(core: Tokenizer) -> bytes:
    return core.to_str().encode()


def unigram(unknown: int | None = 2, prepend: str = "always") -> Tokenizer:
    pieces = [("<pad>", 0.0), (END, 0.0), ("<unk>", 0.0), ("\u2581", -2.0), *((letter, -5.0) for letter in LETTERS)]
    core = Tokenizer(models.Unigram(pieces, unk_id=unknown))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend)
    core.decoder = decoders.Metaspace(prepend_scheme=prepend)
    core.add_special_tokens(["<pad>", END, "<unk>"])
    return core


def letters(*more: str, merges: tuple[tuple[str, str], ...] = (), **options: object) -> Tokenizer:
    """BPE of ASCII letters and `more`, which knows no other text; the end token is an ordinary entry."""
    vocab = {token: index for index, token in enumerate([END, *LETTERS, " ", *more])}
    return Tokenizer(models.BPE(vocab=vocab, merges=list(merges), **options))


def words(before: pre_tokenizers.PreTokenizer) -> Tokenizer:
    core = Tokenizer(models.WordLevel({"[UNK]": 0, END: 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = before
    return core


def word_pieces() -> Tokenizer:
    core = Tokenizer(models.WordPiece({"[UNK]": 0, END: 1, "a": 2, "b": 3}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(rf"\s|{END}"), "isolated")
    return core


def byte_level(normalizer: normalizers.Normalizer | None = None) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate([*alphabet, END])}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    if normalizer:
        core.normalizer = normalizer
    return core


def matched(core: Tokenizer) -> Tokenizer:
    """With the end token as an added token that is looked for in texts."""
    core.add_tokens([AddedToken(END, normalized=False)])
    return core


SPELLING = {
    "unigram": unigram,
    "whole words of bpe": lambda: letters(ignore_merges=True),
    "merges": lambda: letters("</", "s>", merges=(("<", "/"), ("s", ">"), ("</", "s>"))),
    "added, not special": lambda: matched(letters()),
    "added to bytes": lambda: matched(byte_level()),
    "unknown is the end": lambda: letters(unk_token=END),
    "words": lambda: words(pre_tokenizers.Split(Regex(rf"\s|{END}"), "isolated")),
    "word pieces": word_pieces,
    "a normalizer writes it": lambda: matched(byte_level(normalizers.Replace("\n", END))),
}


@pytest.mark.parametrize("kind", SPELLING)
def test_no_text_makes_the_end_token(kind: str) -> None:
    tokenizer = parse_tokenizer(kind, definition(SPELLING[kind]()))
    texts = [END, f"a{END}b", f"a {END} b", f"{END}{END}", "a\nb", "\u65e5a", "plain text"]
    for text, row in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.eod not in row, text
    # What spells it is still there, or counted as lost.
    rows = tokenizer.encode_batch([f"a{END}b"])
    assert measure(tokenizer, [f"a{END}b"], rows).characters[0] or END in tokenizer.decode(rows[0])


def test_encoding_draws_nothing() -> None:
    tokenizer = parse_tokenizer("drop", definition(letters("ab", merges=(("a", "b"),), dropout=0.9)))
    assert {tuple(row) for row in tokenizer.encode_batch(["ab" * 20] * 8)} == {(len(LETTERS) + 2,) * 20}


NORMALIZERS = {
    "lower case": normalizers.Lowercase(),
    "replacement": normalizers.Replace("a", "bbb"),
    "compatibility": normalizers.NFKC(),
    "no accents": normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
    "composition": normalizers.NFC(),
    "decomposition": normalizers.NFD(),
    "stripped": normalizers.Strip(),
    "bert": normalizers.BertNormalizer(),
}
TEXTS = ["plain", "a B \u0130", "e\u0301 \ufb01 \u00c5", " a \n", "\u65e5\u672c\u8a9e", "\u2581", "x\x00y"]


@pytest.mark.parametrize("kind", NORMALIZERS)
def test_bytes_are_exact_or_unknown(kind: str) -> None:
    tokenizer = parse_tokenizer(kind, definition(byte_level(NORMALIZERS[kind])))
    rows = tokenizer.encode_batch(TEXTS)
    losses = measure(tokenizer, TEXTS, rows)
    assert tokenizer.token_bytes is None
    for text, row, changed, inexact in zip(TEXTS, rows, losses.changed, losses.inexact, strict=True):
        assert changed == (tokenizer.decode(row) != text)
        if not inexact:
            assert tokenizer.piece_bytes is not None
            assert tokenizer.piece_bytes[row].sum() == len(text.encode())


@pytest.mark.parametrize(
    ("core", "lost"),
    [
        (unigram(), [0, 1, 3, 2, 3, 1, 1]),
        (letters(), [0, 1, 3, 1, 3, 1, 1]),
        (byte_level(), [0] * 7),
        (words(pre_tokenizers.WhitespaceSplit()), [5, 4, 6, 3, 3, 1, 3]),
    ],
    ids=["unigram", "bpe", "bytes", "words"],
)
def test_lost_characters_are_counted(core: Tokenizer, lost: list[int]) -> None:
    tokenizer = parse_tokenizer("mine", definition(core))
    losses = measure(tokenizer, TEXTS, tokenizer.encode_batch(TEXTS))
    assert losses.characters.tolist() == lost


def write(folder: Path, texts: list[str], core: Tokenizer) -> tuple[Path, Path]:
    """A corpus and a tokenizer."""
    corpus, file = folder / "corpus.jsonl", folder / "mine.json"
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    file.write_bytes(definition(core))
    return corpus, file


JAPANESE = "\u3053\u3093\u306b\u3061\u306f"


def test_documents_that_vanish_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, file = write(tmp_path, ["english", " \n", JAPANESE], letters())
    assert (
        main(["data", str(corpus), f"out={tmp_path / 'store'}", f"tokenizer={file}", "workers=1", "split=[1,0,0]"]) == 2
    )
    assert f"corpus.jsonl, line 3: tokenizer {file}: none of 5 characters" in capsys.readouterr().err
    assert not (tmp_path / "store").exists()


def test_what_a_corpus_lost_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, file = write(tmp_path, ["one two", f"three {JAPANESE}", f"{JAPANESE}!", " "], letters())
    assert (
        main(["data", str(corpus), f"out={tmp_path / 'store'}", f"tokenizer={file}", "workers=1", "split=[1,0,0]"]) == 0
    )
    said = "changed 2 of 4 documents and lost 10 of their characters"
    assert said in capsys.readouterr().out
    data = DataConfig(source="stores", stores=(str(tmp_path / "store"),), tokenizer=str(file))
    opened = open_corpus(data, 128)
    assert said in capsys.readouterr().err
    assert opened.token_bytes(128) is None
    assert opened.stores[0].manifest["inputs"][0]["inexact_documents"] == 2


def test_bytes_of_a_corpus_without_losses_are_exact(tmp_path: Path) -> None:
    texts = ["one two", "three", "caf\u00e9"]
    corpus, file = write(tmp_path, texts[:2], letters())
    store = build_store([corpus], tmp_path / "store", str(file), progress=False)
    assert loss_report(store) is None
    data = DataConfig(source="stores", stores=(str(tmp_path / "store"),), tokenizer=str(file))
    table = open_corpus(data, 128).token_bytes(128)
    assert table is not None
    assert table[store.read(0, store.num_tokens)].sum() == len("".join(texts[:2]))


def test_a_text_that_cannot_be_encoded_is_named(tmp_path: Path) -> None:
    corpus, file = write(tmp_path, ["known", "unknown \u00e9", "known"], unigram(unknown=None))
    with pytest.raises(DataError, match=r"corpus\.jsonl, line 2: tokenizer .*mine\.json: cannot encode this text"):
        build_store([corpus], tmp_path / "store", str(file), progress=False)
    with pytest.raises(TokenizerError):
        load_tokenizer(str(file)).encode_batch(["\u00e9"])


def test_a_continuation_is_decoded_after_its_prompt() -> None:
    tokenizer = parse_tokenizer("mine", definition(unigram()))
    (row,) = tokenizer.encode_batch(["one two"])
    assert tokenizer.decode(row[4:]) == "two"
    assert tokenizer.decode_after(row[:4], row[4:]) == " two"
    pieces = load_tokenizer("bytes")
    (half,) = pieces.encode_batch(["caf\u00e9"])
    assert pieces.decode_after(half[:4], half[4:]) == "\u00e9"
    assert pieces.decode_after(half[:0], half) == "caf\u00e9"


def test_a_prompt_that_the_model_sees_otherwise_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = parse_tokenizer("mine", definition(letters()))
    encode_prompts(["plain", f"a {JAPANESE} b"], tokenizer, Config(), 4)
    assert capsys.readouterr().err == f"prompt='a {JAPANESE} b': the model sees 'a  b'\n"


def test_a_missing_decoder_is_found() -> None:
    for core, text in ((letters(), "a b"), (unigram(), "a b"), (byte_level(), "\u65e5 b")):
        without = json.loads(core.to_str()) | {"decoder": None}
        tokenizer = parse_tokenizer("mine", json.dumps(without).encode())
        assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d["model"]["vocab"].update({"too far": 1 << 30}), "id 1073741824 is too large"),
        (lambda d: d["model"]["vocab"].update({"twice": 0}), "have one id, 0"),
        (lambda d: d["added_tokens"][0].update(id=200), "has id 200, but the tokenizers package gives it 256"),
        (lambda d: d.update(model=[]), "it has no model"),
        (lambda d: d["model"].update(merges=[["x", "yz"]]), "not a tokenizer.json"),
    ],
    ids=["large id", "one id", "renumbered", "no model", "unknown merge"],
)
def test_definitions_that_do_not_mean_what_they_say(change: Callable[[dict[str, Any]], None], message: str) -> None:
    content = json.loads(matched(byte_level()).to_str())
    change(content)
    with pytest.raises(DataError, match=message):
        parse_tokenizer("mine", json.dumps(content).encode())


def test_patterns_that_backtrack_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    core = letters()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+$"), "isolated")
    with pytest.raises(SlowTokenizerError, match="regular expressions"):
        parse_tokenizer("mine", definition(core))
    assert capfd.readouterr().err == ""  # the package reports its panics there


def test_encoding_has_a_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    core = letters()
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"(q|qq)+$"), "isolated")  # not among the repetitions tried
    tokenizer = parse_tokenizer("mine", definition(core))
    monkeypatch.setattr("unipool_jax.data.tokenizer._SECONDS", 0.1)
    with pytest.raises(SlowTokenizerError, match="took more than 0 seconds"):
        tokenizer.encode_batch([("q" * 29 + "!") * 20])


def test_within_passes_results_and_errors_on() -> None:
    assert within(10, lambda: 3) == 3
    with pytest.raises(ValueError, match="invalid literal"):
        within(10, lambda: int("x"))
    reading, writing = os.pipe()
    with pytest.raises(TimeoutError):
        within(0.01, lambda: os.read(reading, 1))
    os.write(writing, b"x")


def test_the_byte_tokenizer_loses_nothing() -> None:
    tokenizer = load_tokenizer("bytes")
    assert not np.concatenate(measure(tokenizer, TEXTS, tokenizer.encode_batch(TEXTS))).any()
