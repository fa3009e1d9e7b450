"""`unipool data`: files of text -> token store."""

from __future__ import annotations

import os
from pathlib import Path

from unipool_jax.data.errors import DataError
from unipool_jax.data.inputs import find_inputs
from unipool_jax.data.losses import loss_report
from unipool_jax.data.pieces import plan_cut
from unipool_jax.data.readers import file_format
from unipool_jax.data.requests import DataRequest
from unipool_jax.data.splits import SPLIT_NAMES
from unipool_jax.data.token_store import TokenStore, build_store, open_store


def data_command(request: DataRequest) -> int:
    """Build or check stores, and print what is in them.

    Raises:
      DataError: with what to do about it.
    """
    if request.verify is not None:
        store = open_store(request.verify)
        store.verify()
        print(_describe(store))
        return 0
    inputs = find_inputs(request.files)
    for files, out in _plan(request, inputs.files):
        store = build_store(
            files,
            out,
            request.tokenizer,
            request.split,
            request.split_order,
            field=request.field,
            workers=request.workers or os.cpu_count() or 1,
            progress=request.progress,
            cut=plan_cut(files, request.split, request.split_order, request.field),
            notes=[inputs.note()],
        )
        print(_describe(store))
    return 0


def _describe(store: TokenStore) -> str:
    tokens = {name: int(store.document_lengths(store.split_documents(name)).sum()) for name in SPLIT_NAMES}
    parts = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    described = f"{store.path}: {store.num_documents:,} documents, {store.num_tokens:,} tokens ({parts})"
    report = loss_report(store)
    return described if report is None else f"{described}\n{report}"


def _plan(request: DataRequest, files: list[Path]) -> list[tuple[list[Path], Path]]:
    """(files, store) pairs to build."""
    assert request.out is not None
    out = Path(request.out)
    if not request.per_file:
        return [(files, out)]
    plan = [([file], out / file.name[: -len(file_format(file))]) for file in files]
    if len({store for _, store in plan}) < len(plan):
        raise DataError("per_file=true: two files have one name; give them different names")
    return plan
