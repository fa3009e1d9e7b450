"""Command line: files of text -> token store.

python -m unipool_jax.data corpus.jsonl.gz --out stores/corpus --tokenizer gpt2
python -m unipool_jax.data pile/*.jsonl.zst --out stores/pile --tokenizer gpt2 --per-file
python -m unipool_jax.data --verify stores/corpus
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from unipool_jax.data.errors import DataError
from unipool_jax.data.readers import SUFFIXES, file_format
from unipool_jax.data.splits import SPLIT_NAMES, SPLIT_ORDERS, parse_split
from unipool_jax.data.token_store import TokenStore, build_store, open_store


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m unipool_jax.data",
        description="Tokenises files of text into a token store. An interrupted build goes on "
        "from where it was when the same command is given again.",
    )
    parser.add_argument("files", nargs="*", metavar="FILES", help=" ".join(SUFFIXES))
    parser.add_argument("--out", type=Path, metavar="DIR", help="store to build")
    parser.add_argument(
        "--tokenizer", default="gpt2", metavar="NAME", help="bytes, demo, gpt2 (default) or a path to tokenizer.json"
    )
    parser.add_argument(
        "--split", default="969,30,1", metavar="TRAIN,VALID,TEST", help="parts of the documents (default 969,30,1)"
    )
    parser.add_argument("--split-order", choices=SPLIT_ORDERS, default="contiguous")
    parser.add_argument("--field", default="text", help="JSON field or parquet column (default text)")
    parser.add_argument(
        "--per-file",
        action="store_true",
        help="one store per file, DIR/NAME, each with its own split (as for the Pile)",
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default: all CPUs)")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--verify", type=Path, metavar="DIR", help="instead of building, check every byte of a store")
    return parser


def _describe(store: TokenStore) -> str:
    tokens = {name: int(store.document_lengths(store.split_documents(name)).sum()) for name in SPLIT_NAMES}
    parts = ", ".join(f"{name} {count:,}" for name, count in tokens.items())
    return f"{store.path}: {store.num_documents:,} documents, {store.num_tokens:,} tokens ({parts})"


def _plan(options: argparse.Namespace) -> list[tuple[list[str], Path]]:
    """(files, store) pairs to build."""
    if not options.files or options.out is None:
        raise DataError("give FILES and --out DIR (or --verify DIR)")
    if not options.per_file:
        return [(options.files, options.out)]
    plan = []
    for file in options.files:
        name = Path(file).name
        plan.append(([file], options.out / name[: -len(file_format(Path(file)))]))
    if len({out for _, out in plan}) < len(plan):
        raise DataError("--per-file: two FILES have one name; give them different names")
    return plan


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        if options.verify is not None:
            store = open_store(options.verify)
            store.verify()
            print(_describe(store))
            return 0
        for files, out in _plan(options):
            store = build_store(
                files,
                out,
                options.tokenizer,
                parse_split(options.split),
                options.split_order,
                field=options.field,
                workers=options.workers,
                progress=not options.quiet,
            )
            print(_describe(store))
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: give the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
