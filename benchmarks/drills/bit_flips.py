"""Flips one bit of a random byte in files of a checkpoint and of a token store, one flip at a time, and reads them.

Held: the flip is refused with a message, the checkpoint before is used, or everything read is bit for bit what was
written. A bit of a random file is flipped, so that small files count as much as large ones.

    python -m benchmarks.drills.bit_flips --count 400
"""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np

from benchmarks.drills.tally import Tally, arguments
from unipool_jax.config.compose import compose_config
from unipool_jax.config.errors import UserError
from unipool_jax.config.files import write_text
from unipool_jax.config.schema import Config
from unipool_jax.data.store_format import CHUNK_TOKENS
from unipool_jax.data.token_store import TokenStore, build_store, open_store
from unipool_jax.training.checkpoint import Checkpoints, make_meta, restore_model
from unipool_jax.training.state import init_state, state_shapes

_SMALL = (
    "method=unipool_lock model.num_layers=2 model.hidden_size=16 model.num_heads=2 model.num_kv_heads=1 "
    "model.ffn_size=16 model.vocab_size=257 moe.experts_per_layer=2 data.tokenizer=bytes data.sequence_length=16"
)


def flip(path: Path, chance: random.Random) -> str:
    """Flip a random bit of a file; which one, in words."""
    content = bytearray(path.read_bytes())
    byte, bit = chance.randrange(len(content)), chance.randrange(8)
    content[byte] ^= 1 << bit
    path.write_bytes(content)
    return f"{path.name} byte {byte} of {len(content)} bit {bit}"


def drill(tally: Tally, folder: Path, copy: Path, chance: random.Random, read: Callable[[Path], str]) -> None:
    """Flip a bit in a copy of `folder` and read it; `read` returns how it held or raises."""
    shutil.copytree(folder, copy)
    files = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.stat().st_size]
    path = chance.choice(files)
    where = f"{path.relative_to(copy)}: {flip(path, chance)}"
    try:
        tally.held(read(copy))
    except UserError:
        tally.held("refused with a message")
    except Exception as error:
        tally.failed(f"{where}: {type(error).__name__}: {str(error)[:200]}")
    finally:
        shutil.rmtree(copy)


def _leaves(tree: Any) -> list[bytes]:
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def checkpoint_reader(config: Config, saved: dict[int, Any]) -> Callable[[Path], str]:
    """Reads checkpoints as a resumed run and as an evaluation do, and compares them with what was `saved` by step."""
    target = state_shapes(config)._asdict()
    newest = max(saved)

    def read(folder: Path) -> str:
        with Checkpoints(folder, read_only=True) as checkpoints, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored = checkpoints.restore(target)
            if _leaves(restored.items) != _leaves(saved[restored.step]._asdict()):
                raise AssertionError("other numbers were restored without a word")
            if restored.meta != make_meta(config, restored.step, "0" * 64):
                raise AssertionError("another meta document was restored without a word")
            if restored.step != newest:
                return "went back to the checkpoint before"
            model = restore_model(checkpoints, config, newest)
            if _leaves(model.params) != _leaves(saved[newest].params):
                raise AssertionError("other parameters were restored for an evaluation")
        return "harmless: the same bits"

    return read


def _used(store: TokenStore) -> tuple[Any, ...]:
    """What a store's manifest and tokenizer decide."""
    counts = store.num_documents, store.num_tokens, store.text_bytes, store.vocab_size, store.eod
    return store.fingerprint(), store.tokenizer.sha256, store.split, store.split_order, counts


def store_reader(path: Path) -> Callable[[Path], str]:
    """Reads a store as training does, and compares it with the one at `path`."""
    whole = open_store(path)
    tokens, offsets = whole.read(0, whole.num_tokens), whole.document_offsets.copy()
    identity = _used(whole)

    def read(folder: Path) -> str:
        store = open_store(folder)
        if not (np.array_equal(store.document_offsets, offsets) and np.array_equal(store.read(0, len(tokens)), tokens)):
            raise AssertionError("other tokens were read without a word")
        if _used(store) != identity:
            raise AssertionError("another manifest was read without a word")
        return "harmless: the same bits"

    return read


def main() -> int:
    """Run the drill; the exit code."""
    chance, count = arguments(__doc__ or "", 300)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax says of every opening that it is read-only
    config = compose_config(_SMALL.split())
    tally = Tally("bit_flips")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved = {step: jax.jit(init_state, static_argnums=0)(config, jax.random.key(step)) for step in (1, 2)}
        with Checkpoints(folder / "checkpoints", keep=2) as checkpoints:
            for step, state in saved.items():
                checkpoints.save(step, state._asdict(), make_meta(config, step, "0" * 64))
            checkpoints.wait()
        text = folder / "text.jsonl"
        words = ["pool", "expert", "router", "depth", "layer"]
        lines = [json.dumps({"text": " ".join(chance.choices(words, k=400))}) for _ in range(40)]
        write_text(text, "\n".join(lines) + "\n")
        build_store([text], folder / "store", "bytes", progress=False, shard_tokens=CHUNK_TOKENS)
        read_checkpoint, read_store = checkpoint_reader(config, saved), store_reader(folder / "store")
        for _ in range(count):
            if chance.random() < 0.7:
                drill(tally, folder / "checkpoints", folder / "copy", chance, read_checkpoint)
            else:
                drill(tally, folder / "store", folder / "copy", chance, read_store)
    return tally.report()


if __name__ == "__main__":
    sys.exit(main())
