"""Malformed files that chance does not find, by format: each turns a good file, at a path, into a bad one.

What they attack: counts and sizes that ask for more than there is, names that are there twice, kinds of values that are
not expected, compressed bombs, expressions that backtrack, and tokens that texts may spell.
"""

from __future__ import annotations

import gzip
import json
import lzma
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Craft = Callable[[Path], None]

HUGE = 1 << 62


def content(value: bytes) -> Craft:
    """A craft that replaces the file."""

    def craft(path: Path) -> None:
        path.write_bytes(value)

    return craft


def made(make: Callable[[], bytes]) -> Craft:
    """As `content`, of bytes that are made when they are needed."""

    def craft(path: Path) -> None:
        path.write_bytes(make())

    return craft


def edited(change: Callable[[Any], Any]) -> Craft:
    """A craft that changes the JSON in the file, in place or by returning another value."""

    def craft(path: Path) -> None:
        value = json.loads(path.read_bytes())
        other = change(value)
        path.write_text(json.dumps(value if other is None else other))

    return craft


def line(value: object) -> bytes:
    return json.dumps({"text": value}).encode() + b"\n"


def long_line(size: int) -> bytes:
    return line("x" * size)


_TXT = {
    "empty": content(b""),
    "mark alone": content(b"\xef\xbb\xbf"),
    "utf-16": content("words".encode("utf-16")),
    "utf-16 without mark": content(("words and more words" * 9).encode("utf-16-le")),
    "latin-1": content("caf\u00e9".encode("latin-1")),
    "zeros": content(bytes(1000)),
    "long": made(lambda: b"a line of text\n" * 3_000_000),
    "one long line": made(lambda: b"x" * 40_000_000),
}

_JSONL = {
    "empty": content(b""),
    "mark": content(b"\xef\xbb\xbf" + line("a")),
    "utf-16": content(line("words").decode().encode("utf-16")),
    "deep": content(b'{"text":' + b"[" * 200_000),
    "many digits": content(b'{"text":' + b"9" * 20_000 + b"}"),
    "half a pair": content(b'{"text": "\\ud800"}'),
    "no text": content(b'{"text": null}\n'),
    "list": content(b"[1]\n"),
    "number": content(b"NaN\n"),
    "long line": made(lambda: long_line(40_000_000)),
    "long blank line": made(lambda: b" " * 40_000_000),
}

_GZ = {
    "bomb": made(lambda: gzip.compress(long_line(300_000_000), 1)),
    "garbage behind": made(lambda: gzip.compress(line("a")) + b"garbage"),
    "no gzip": content(b"words"),
    "header alone": content(gzip.compress(b"")[:10]),
}

_XZ = {
    "bomb": made(lambda: lzma.compress(long_line(200_000_000), preset=0)),
    "garbage behind": made(lambda: lzma.compress(line("a")) + b"garbage"),
    "header alone": content(b"\xfd7zXZ\x00\x00\x04"),
    "dictionary of 4 GB": content(b"\x5d\xff\xff\xff\xff" + b"\xff" * 8 + bytes(20)),
}


def _zstd(value: bytes) -> bytes:
    import zstandard

    return zstandard.compress(value, 1)


_ZST = {
    "bomb": made(lambda: _zstd(long_line(300_000_000))),
    "incomplete": made(lambda: _zstd(line("a"))[:-2]),
    "skippable frame": made(lambda: b"\x50\x2a\x4d\x18\xff\xff\xff\x7f" + _zstd(line("a"))),
    "magic alone": content(b"\x28\xb5\x2f\xfd"),
}


def _parquet(column: Callable[[Any], Any], names: tuple[str, ...] = ("text",), store_schema: bool = True) -> Craft:
    def craft(path: Path) -> None:
        import pyarrow
        from pyarrow import parquet

        table = pyarrow.Table.from_arrays([column(pyarrow)] * len(names), names=list(names))
        parquet.write_table(table, path, store_schema=store_schema)

    return craft


_PARQUET = {
    "binary": _parquet(lambda pa: pa.array([b"\xff"])),
    "not utf-8": _parquet(lambda pa: pa.array([b"\xff"]).view("string")),
    "dictionary": _parquet(lambda pa: pa.array(["a"] * 9).dictionary_encode()),
    "view": _parquet(lambda pa: pa.array(["a"], pa.string_view())),
    "nulls": _parquet(lambda pa: pa.nulls(3, pa.string())),
    "null kind": _parquet(lambda pa: pa.nulls(3)),
    "no rows": _parquet(lambda pa: pa.array([], pa.string())),
    "lists": _parquet(lambda pa: pa.array([["a"]])),
    "twice": _parquet(lambda pa: pa.array(["a"]), ("text", "text")),
    "another name": _parquet(lambda pa: pa.array(["a"]), ("body",)),
    "one large value in many rows": _parquet(
        lambda pa: pa.DictionaryArray.from_arrays([0] * 200, ["x" * 8_000_000]), store_schema=False
    ),
    "a value too large": _parquet(lambda pa: pa.array(["x" * 40_000_000])),
    "footer alone": content(b"PAR1" + struct.pack("<I", 1 << 31) + b"PAR1"),
    "magic alone": content(b"PAR1PAR1"),
}

_END = "<|endoftext|>"


def _vocabulary(kind: str, **more: Any) -> Craft:
    """A tokenizer of another model, whose vocabulary has the end token."""
    letters = [chr(code) for code in range(32, 127)]
    tokens: Any = {token: index for index, token in enumerate([_END, *letters])}
    if kind == "Unigram":
        tokens = [[token, -1.0] for token in tokens]
    model = {"type": kind, "vocab": tokens} | more
    return edited(lambda found: found | {"model": model, "pre_tokenizer": None, "decoder": None})


def _pattern(expression: str) -> Craft:
    split = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}
    return edited(lambda found: found.update(pre_tokenizer=split))


def _added(**more: Any) -> Craft:
    token = {"id": 0, "content": _END, "special": False} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    return edited(lambda found: found.update(added_tokens=[token | more]))


def _normalizer(**component: Any) -> Craft:
    return edited(lambda found: found.update(normalizer=component))


_BPE: dict[str, Any] = {"merges": [], "unk_token": None, "fuse_unk": False, "byte_fallback": False}
_TOKENIZER = {
    "deep": content(b"[" * 200_000),
    "number": content(b"3"),
    "no model": edited(lambda found: found.pop("model") and None),
    "empty vocabulary": edited(lambda found: found["model"].update(vocab={}, merges=[])),
    "huge id": edited(lambda found: found["model"]["vocab"].update({"huge": (1 << 32) - 1})),
    "id of 2^62": edited(lambda found: found["model"]["vocab"].update({"huge": HUGE})),
    "negative id": edited(lambda found: found["model"]["vocab"].update({"less": -1})),
    "one id twice": edited(lambda found: found["model"]["vocab"].update({"twice": 0})),
    "ids of text": edited(lambda found: found["model"]["vocab"].update({"text": "0"})),
    "unknown merge": edited(lambda found: found["model"].update(merges=[["no", "such"]])),
    "bpe": _vocabulary("BPE", **_BPE),
    "bpe of whole words": _vocabulary("BPE", **_BPE, ignore_merges=True),
    "bpe, end for unknown": _vocabulary("BPE", **(_BPE | {"unk_token": _END})),
    "bpe with dropout": _vocabulary("BPE", **_BPE, dropout=0.5),
    "unigram": _vocabulary("Unigram", unk_id=5),
    "unigram without unknown": _vocabulary("Unigram", unk_id=None),
    "unigram, unknown outside": _vocabulary("Unigram", unk_id=1000),
    "words": _vocabulary("WordLevel", unk_token=_END),
    "word pieces": _vocabulary(
        "WordPiece", unk_token="a", continuing_subword_prefix="##", max_input_chars_per_word=100
    ),
    "added, not special": _added(),
    "added under another id": _added(id=7),
    "added far away": _added(id=1 << 31, content="far"),
    "added, absorbing": _added(id=300, content="w", lstrip=True, rstrip=True),
    "added, empty": _added(id=300, content=""),
    "backtracking": _pattern(r"(a+)+$"),
    "backtracking on x": _pattern(r"(p|pp|ppp)+$"),
    "no expression": _pattern(r"(["),
    "large repetition": _pattern(r"(a{1,1000}){1,1000}b"),
    "lower case": _normalizer(type="Lowercase"),
    "a normalizer that writes the end": _normalizer(type="Replace", pattern={"String": "a"}, content=_END),
    "a normalizer that deletes": _normalizer(type="Replace", pattern={"Regex": "."}, content=""),
    "a normalizer that grows": _normalizer(type="Replace", pattern={"String": "a"}, content="a" * 100_000),
    "truncation": edited(
        lambda found: found.update(
            truncation={"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
        )
    ),
    "spaces removed": edited(lambda found: found.update(pre_tokenizer={"type": "WhitespaceSplit"})),
}


_MANIFESTS: tuple[dict[str, Any], ...] = (
    {"tokens": HUGE},
    {"tokens": "1"},
    {"tokens": -1},
    {"documents": HUGE},
    {"documents": 0},
    {"dtype": "object"},
    {"dtype": "uint32"},
    {"dtype": 3},
    {"split": [1]},
    {"split": ["a", "b", "c"]},
    {"split_order": "backwards"},
    {"shard_tokens": 0},
    {"shard_tokens": HUGE},
    {"shards": []},
    {"shards": [3]},
    {"shards": {"a": 1}},
    {"tokenizer": None},
    {"tokenizer": {"name": "../../etc", "sha256": "0", "vocab_size": HUGE, "eod": -1}},
    {"document_offsets": {"bytes": 1, "sha256": "0"}},
    {"version": HUGE},
)


def _manifest(**changes: Any) -> Craft:
    return lambda path: edited(lambda found: found.update(changes))(path / "manifest.json")


def _store_file(name: str, craft: Craft) -> Craft:
    return lambda path: craft(path / name)


def npy(shape: str, descr: str = "'<i8'", extra: str = "", data: bytes = bytes(64)) -> bytes:
    """An array file whose header says what it is told to."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, {extra}}}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


_NPY_FILES = {
    "empty": b"",
    "huge shape": npy(f"({HUGE},)"),
    "shape of 2^80": npy(f"({1 << 80},)"),
    "negative shape": npy("(-8,)"),
    "many dimensions": npy(f"({'1,' * 100})"),
    "objects": npy("(1,)", "'|O'", data=b"cos\nsystem\n(S'true'\ntR."),
    "no header": npy("open('x')"),
    "unknown kind": npy("(1,)", "'<q9'"),
    "kind of kinds": npy("(1,)", "[('a', '<i8', (1000000, 1000000))]"),
    "zip": b"PK\x03\x04" + bytes(100),
    "pickle": b"\x80\x04N.",
    "version 9": b"\x93NUMPY\x09\x00" + bytes(100),
    "long header": b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + bytes(100),
}

_STORE = (
    {f"offsets: {name}": _store_file("document_offsets.npy", content(value)) for name, value in _NPY_FILES.items()}
    | {
        f"manifest: {name}": _store_file("manifest.json", content(value))
        for name, value in {"empty": b"", "list": b"[]", "deep": b"[" * 200_000, "not utf-8": b"\xff"}.items()
    }
    | {f"manifest: {'.'.join(changes)}={next(iter(changes.values()))}": _manifest(**changes) for changes in _MANIFESTS}
    | {
        "zarr: shape": _store_file("tokens/zarr.json", edited(lambda found: found.update(shape=[1 << 50]))),
        "zarr: kind": _store_file("tokens/zarr.json", edited(lambda found: found.update(data_type="float64"))),
        "zarr: list": _store_file("tokens/zarr.json", content(b"[]")),
        "no tokenizer": lambda path: (path / "tokenizer.json").unlink(),
        "no shard": lambda path: (path / "tokens/c/0").unlink(),
    }
)


def _index(version: int = 1, code: int = 8, count: int = 3, entries: int = 4, body: bytes = bytes(68)) -> Craft:
    def craft(path: Path) -> None:
        head = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", version, code, count, entries)
        path.with_suffix(".idx").write_bytes(head + body)

    return craft


def _body(lengths: list[int], pointers: list[int]) -> bytes:
    return np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + bytes(32)


_MEGATRON = {
    "version": _index(version=2),
    "kind": _index(code=6),
    "unknown kind": _index(code=200),
    "no sequences": _index(count=0),
    "2^63 sequences": _index(count=1 << 63),
    "2^63 entries": _index(entries=1 << 63),
    "counts that wrap": _index(count=(1 << 64) // 12 + 1),
    "negative length": _index(body=_body([-1, 6, 5], [0, 0, 0])),
    "overlap": _index(body=_body([3, 5, 2], [0, 0, 0])),
    "too long": _index(body=_body([3, 5, 1 << 30], [0, 6, 16])),
    "empty ids": lambda path: path.with_suffix(".bin").write_bytes(b""),
    "ids outside": lambda path: path.with_suffix(".bin").write_bytes(b"\xff" * 20),
}


def safetensors(header: Any, data: bytes = bytes(16)) -> Craft:
    """A file with a header and data as they are told."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return content(struct.pack("<Q", len(text)) + text + data)


def _entry(shape: list[Any], first: int, end: int, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


def _metadata(change: Callable[[dict[str, str]], Any]) -> Craft:
    def craft(path: Path) -> None:
        whole = path.read_bytes()
        size = struct.unpack("<Q", whole[:8])[0]
        header = json.loads(whole[8 : 8 + size])
        change(header["__metadata__"])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])

    return craft


def _config(**changes: Any) -> Craft:
    def change(metadata: dict[str, str]) -> None:
        config = json.loads(metadata["config"])
        for name, value in changes.items():
            section, setting = name.split("__")
            config[section][setting] = value
        metadata["config"] = json.dumps(config)

    return _metadata(change)


_LARGE = {"model__num_layers": 1024, "model__hidden_size": 1 << 16, "model__ffn_size": 1 << 20, "pool__groups": 1024}
_SAFETENSORS = {
    "empty": content(b""),
    "header of 2^63": content(struct.pack("<Q", 1 << 63) + bytes(100)),
    "deep": safetensors(b"[" * 200_000),
    "list": safetensors([]),
    "twice": safetensors(
        b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    ),
    "overlap": safetensors({"a": _entry([4], 0, 16), "b": _entry([4], 0, 16)}),
    "gap": safetensors({"a": _entry([1], 0, 4), "b": _entry([1], 12, 16)}),
    "beyond": safetensors({"a": _entry([1 << 60], 0, 1 << 62)}),
    "product wraps": safetensors({"a": _entry([1 << 62, 4], 0, 16)}),
    "negative": safetensors({"a": _entry([-4], 0, 16)}),
    "unknown kind": safetensors({"a": _entry([4], 0, 16, "F33")}),
    "kind is a list": safetensors({"a": _entry([4], 0, 16, [])}),
    "no entry": safetensors({"a": None}),
    "metadata of numbers": safetensors({"__metadata__": {"config": 1}}, b""),
    "configuration: no json": _metadata(lambda metadata: metadata.update(config="{")),
    "configuration: list": _metadata(lambda metadata: metadata.update(config="[]")),
    "configuration: deep": _metadata(lambda metadata: metadata.update(config="[" * 200_000)),
    "configuration: unknown": _metadata(lambda metadata: metadata.update(config='{"colour": 1}')),
    "configuration: terabytes": _config(**_LARGE),
    "configuration: 2^62 wide": _config(model__hidden_size=HUGE),
    "configuration: negative": _config(model__num_layers=-1),
    "configuration: text": _config(model__num_layers="many"),
    "experts: list": _metadata(lambda metadata: metadata.update(experts="[]")),
    "experts: names": _metadata(lambda metadata: metadata.update(experts='{"a.b": "c"}')),
    "layout: unknown": _metadata(lambda metadata: metadata.update(layout="other")),
}


def _text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def field(name: str, value: Any) -> bytes:
    """A field of a GGUF file."""
    if isinstance(value, list):
        kind = 8 if value and isinstance(value[0], str) else 5
        items = [_text(item) if kind == 8 else struct.pack("<i", item) for item in value]
        return _text(name) + struct.pack("<IIQ", 9, kind, len(value)) + b"".join(items)
    if isinstance(value, str):
        return _text(name) + struct.pack("<I", 8) + _text(value)
    if isinstance(value, float):
        return _text(name) + struct.pack("<If", 6, value)
    if isinstance(value, bool):
        return _text(name) + struct.pack("<I?", 7, value)
    return _text(name) + struct.pack("<IQ", 10, value)


def _tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    return _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)


def tiny_gguf(
    change: Callable[[dict[str, Any]], Any] = lambda fields: None,
    shapes: Callable[[dict[str, Any]], Any] = lambda shapes: None,
    numbers: tuple[int, int] | None = None,
    kind: int = 0,
    misaligned: int = 0,
) -> bytes:
    """A GGUF file of one layer of width 8, after changes of its fields and shapes; all weights are zero."""
    alphabet = [chr(code) for code in range(33, 127)]
    fields: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.embedding_length": 8,
        "llama.feed_forward_length": 16,
        "llama.attention.head_count": 2,
        "llama.context_length": 32,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["</s>", *alphabet],
        "tokenizer.ggml.token_type": [3] + [1] * len(alphabet),
        "tokenizer.ggml.merges": [],
    }
    rows = len(alphabet) + 1
    tensors: dict[str, Any] = {"token_embd.weight": (rows, 8), "output_norm.weight": (8,)}
    tensors |= {f"blk.0.attn_{name}.weight": (8, 8) for name in ("q", "k", "v", "output")}
    tensors |= {"blk.0.attn_norm.weight": (8,), "blk.0.ffn_norm.weight": (8,), "blk.0.ffn_down.weight": (8, 16)}
    tensors |= {"blk.0.ffn_gate.weight": (16, 8), "blk.0.ffn_up.weight": (16, 8)}
    sizes = {name: -(-4 * int(np.prod(shape)) // 32) * 32 for name, shape in tensors.items()}
    change(fields)
    shapes(tensors)
    head = b"GGUF" + struct.pack("<IQQ", 3, *(numbers or (len(tensors), len(fields))))
    head += b"".join(field(name, value) for name, value in fields.items())
    offset = 0
    for name, shape in tensors.items():
        head += _tensor(name, shape, kind, (offset + misaligned) % (1 << 64))
        offset += sizes.get(name, 0)
    return head + bytes(-len(head) % 32) + bytes(offset)


def _gguf(**options: Any) -> Craft:
    return made(lambda: tiny_gguf(**options))


def _fields(**changes: Any) -> Craft:
    """A field changed; `__` in a name stands for a dot."""
    return _gguf(change=lambda fields: fields.update({name.replace("__", "."): v for name, v in changes.items()}))


def _embedding(*shape: int) -> Craft:
    return _gguf(shapes=lambda shapes: shapes.update({"token_embd.weight": shape}))


_GGUF = {
    "empty": content(b""),
    "big-endian": content(b"GGUF" + struct.pack(">IQQ", 3, 0, 0)),
    "2^63 tensors": _gguf(numbers=(1 << 63, 11)),
    "2^63 fields": _gguf(numbers=(11, 1 << 63)),
    "no tensors": _gguf(numbers=(0, 11)),
    "no fields": _gguf(numbers=(11, 0)),
    "zero rows": _embedding(0, 8),
    "2^63 rows": _embedding(1 << 63, 8),
    "product wraps": _embedding(1 << 32, 1 << 32),
    "no dimensions": _embedding(),
    "five dimensions": _embedding(1, 1, 1, 95, 8),
    "one row less": _embedding(94, 8),
    "misaligned": _gguf(misaligned=4),
    "beyond": _gguf(misaligned=1 << 40),
    "offset wraps": _gguf(misaligned=(1 << 64) - 4096),
    "unknown kind": _gguf(kind=99),
    "quantized kind": _gguf(kind=12),
    "kind without values": _gguf(kind=26),
    "alignment 0": _fields(general__alignment=0),
    "alignment 3": _fields(general__alignment=3),
    "alignment of text": _fields(general__alignment="32"),
    "2^62 layers": _fields(llama__block_count=HUGE),
    "1000 layers": _fields(llama__block_count=1000),
    "no layers": _fields(llama__block_count=0),
    "layers of text": _fields(llama__block_count="1"),
    "no heads": _fields(llama__attention__head_count=0),
    "heads by layer": _fields(llama__attention__head_count=[2]),
    "2^40 wide": _fields(llama__embedding_length=1 << 40),
    "epsilon of zero": _fields(llama__attention__layer_norm_rms_epsilon=0.0),
    "epsilon not a number": _fields(llama__attention__layer_norm_rms_epsilon=float("nan")),
    "scaling without a type": _fields(llama__rope__scaling__factor=2.0),
    "unknown field": _fields(llama__something=1),
    "one token more": _gguf(change=lambda fields: fields["tokenizer.ggml.tokens"].append("more")),
    "a token twice": _gguf(change=lambda fields: fields["tokenizer.ggml.tokens"].__setitem__(1, "</s>")),
    "tokens of numbers": _fields(tokenizer__ggml__tokens=[1, 2]),
    "unknown merge": _fields(tokenizer__ggml__merges=["no such"]),
    "half a merge": _fields(tokenizer__ggml__merges=["half"]),
    "user-defined end": _gguf(change=lambda fields: fields["tokenizer.ggml.token_type"].__setitem__(0, 4)),
}

CRAFTED: dict[str, dict[str, Craft]] = {
    name: {"good": lambda path: None} | crafts
    for name, crafts in {
        "txt": _TXT,
        "jsonl": _JSONL,
        "gz": _GZ,
        "xz": _XZ,
        "zst": _ZST,
        "parquet": _PARQUET,
        "tokenizer": _TOKENIZER,
        "store": _STORE,
        "megatron": _MEGATRON,
        "safetensors": _SAFETENSORS,
        "gguf": _GGUF,
        "npy": {name: content(value) for name, value in _NPY_FILES.items()},
    }.items()
}
"""By format and name. `good` changes nothing."""
