"""Which text a run reads: a document of fingerprints that travels with checkpoints, summaries and evaluations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unipool_jax.data.corpus import Corpus
from unipool_jax.data.store_format import json_sha256

SHOWN = 12
"""Digits of a fingerprint that messages show."""


def text_identity(corpus: Corpus) -> dict[str, Any]:
    """The identity of a corpus: `fingerprint` of all of it, and what it is made of.

    Equal fingerprints mean the same tokens by the same tokenizer, split in the same way; where they lie does not
    matter. It costs reading what may have changed since it was last hashed (see `hashing`): everything of a small
    corpus.

    Raises:
      DataError: a store was changed after it was built.
    """
    names = corpus.names or tuple(str(store.path) for store in corpus.stores)
    texts = [
        {
            "name": name,
            "path": str(store.path),
            "fingerprint": store.fingerprint(),
            "documents": store.num_documents,
            "tokens": store.num_tokens,
        }
        for name, store in zip(names, corpus.stores, strict=True)
    ]
    whole = json_sha256([corpus.tokenizer.sha256, [text["fingerprint"] for text in texts]])
    return {"fingerprint": whole, "tokenizer_sha256": corpus.tokenizer.sha256, "texts": texts}


def text_differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """What differs between two identities, one line each; empty where they are the same text."""
    if stored["fingerprint"] == found["fingerprint"]:
        return []
    before, now = stored["texts"], found["texts"]
    lines = []
    if stored["tokenizer_sha256"] != found["tokenizer_sha256"]:
        lines.append(f"tokenizer: {stored['tokenizer_sha256'][:SHOWN]} there, {found['tokenizer_sha256'][:SHOWN]} now")
    if len(before) != len(now):
        lines.append(f"{len(before)} texts there, {len(now)} now")
    lines += [
        f"{new['name']}: {_described(old)} there{_elsewhere(old, new)}, {_described(new)} now"
        for old, new in zip(before, now, strict=False)
        if old["fingerprint"] != new["fingerprint"]
    ]
    return lines


def _described(text: Mapping[str, Any]) -> str:
    return f"fingerprint {text['fingerprint'][:SHOWN]} ({text['documents']:,} documents, {text['tokens']:,} tokens)"


def _elsewhere(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return "" if old["name"] == new["name"] else f" (of {old['name']})"
