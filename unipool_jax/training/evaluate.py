"""Loss, perplexity and bits per byte of a model on text, with exact denominators."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from unipool_jax.config.schema import Config
from unipool_jax.data.corpus import Corpus
from unipool_jax.data.pipeline import Batch, EvalWindows, WindowSource, evaluation_batches, moving_evaluation_batches
from unipool_jax.data.splits import SplitName
from unipool_jax.data.store_format import json_sha256
from unipool_jax.data.unigram import token_counts, unigram_loss
from unipool_jax.parallel.mesh import num_shards
from unipool_jax.training.metrics import perplexity
from unipool_jax.training.sharding import process_rows, replicated, to_devices
from unipool_jax.training.step import EvalSums, make_eval_step

UNIGRAM_MAX_TOKENS = 200_000_000
"""Train splits with more tokens get no unigram baseline, which must read all of them."""


class EvalResult(NamedTuple):
    """Evaluation of one split."""

    loss: float
    """Language-model loss, nats per token, without auxiliary losses."""
    perplexity: float
    bits_per_byte: float | None
    """None where the tokenizer has no exact byte count per token."""
    tokens: int
    """Predicted tokens."""
    bytes: int | None
    """UTF-8 bytes of the predicted tokens."""
    counts_LE: np.ndarray
    """Routing counts per layer and expert, int64: each layer's sum to `tokens` times the experts per token."""
    zero_gates_L: np.ndarray
    """Share of the predicted tokens whose gates are all zero, per layer, float64."""
    unfaded_counts_LE: np.ndarray | None = None
    """`counts_LE` without the fade of a lock; None in runs without a lock."""

    text: str | None = None
    """Fingerprint of the evaluated text, its tokenizer and windows; None where batches came without one."""

    def as_json(self) -> dict[str, float | int | str | None]:
        """The numbers and the fingerprint, without what there is of each layer."""
        return {key: value for key, value in self._asdict().items() if "_L" not in key}


class TextBatches:
    """The batches of an evaluation, each time from the first, and the fingerprint of their text."""

    def __init__(self, make: Callable[[], Iterator[Batch]], fingerprint: Callable[[], str]):
        self._make, self.fingerprint = make, fingerprint

    def __iter__(self) -> Iterator[Batch]:
        return self._make()


class Evaluator:
    """Evaluates parameters on splits of a corpus; compiles once for all splits.

    Args:
      config: model, sequence length and batch sizes.
      corpus: the text.
      splits: the splits that will be evaluated.
      limited: whether to evaluate only the first `train.eval_batches x train.batch_size` sequences of a split.
      mesh: of the run; None for a single device.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        splits: Sequence[SplitName],
        *,
        limited: bool,
        mesh: Mesh | None = None,
    ):
        self._config = config
        self._corpus = corpus
        self._mesh = mesh
        self._step = make_eval_step(config, mesh)
        self.compiled = False
        """Whether an evaluation has been started before."""
        table = corpus.token_bytes(config.model.vocab_size)
        self.exact_bytes = table is not None
        place = None if mesh is None else replicated(mesh)
        table = np.zeros(config.model.vocab_size, np.int32) if table is None else table
        self._token_bytes_V = jax.device_put(table, place)
        self._max_windows: int | None = None
        if limited and config.train.eval_batches is not None:
            self._max_windows = config.train.eval_batches * config.train.batch_size
        # One batch shape for all splits, no larger than the largest split.
        largest = max(len(self.windows(split)) for split in splits)
        if mesh is not None:
            parts = num_shards(mesh, "batch")
            largest = -(-largest // parts) * parts
        self._batch_size = min(config.train.eval_batch_size, largest)
        self._options: dict[str, Any] = {
            "batch_size": self._batch_size,
            "rows": None if mesh is None else process_rows(mesh, self._batch_size),
            "num_threads": config.data.num_threads,
        }

    def windows(self, split: SplitName) -> EvalWindows:
        """The text of `split` as windows; raises DataError if it is empty."""
        data = self._config.data
        return EvalWindows(
            self._corpus.stores, split, data.sequence_length, self._max_windows, document_mask=data.document_mask
        )

    def fixed(self, split: SplitName) -> TextBatches:
        """Batches over the same text at every evaluation."""
        windows = self.windows(split)
        return TextBatches(lambda: evaluation_batches(windows, **self._options), windows.fingerprint)

    def moving(self, evaluation: int) -> TextBatches:
        """Batches over the next slice of the shuffled valid split (the published protocol).

        Args:
          evaluation: number of slices used before this one.
        """
        config = self._config
        size = self._max_windows or len(self.windows("valid"))
        # An extension that is shorter than the time between evaluations adds none.
        totals = sorted({size * (steps // max(config.train.eval_every, 1) + 1) for steps in config.train.lengths})
        data, seed = config.data, config.train.seed
        source = WindowSource(
            self._corpus.stores, "valid", data.sequence_length, totals, seed, document_mask=data.document_mask
        )
        return TextBatches(
            lambda: moving_evaluation_batches(source, evaluation, size, **self._options),
            lambda: json_sha256([source.fingerprint(), evaluation, size]),
        )

    def evaluate(
        self,
        params: Any,
        balance: Any,
        batches: Iterable[Batch],
        cancelled: Callable[[], bool] = lambda: False,
    ) -> EvalResult | None:
        """The result over `batches`; None if `cancelled` returned True before the end.

        Devices return float32 sums per sequence; the host adds them in float64.
        """
        self.compiled, total, pending = True, _Totals(), None
        for batch in batches:
            if cancelled():
                return None
            placed = jax.device_put(batch) if self._mesh is None else to_devices(self._mesh, batch, self._batch_size)
            sums = self._step(params, balance, placed, self._token_bytes_V)
            if pending is not None:
                total.add(pending)
            pending = sums
        if pending is not None:
            total.add(pending)
        text = batches.fingerprint() if isinstance(batches, TextBatches) else None
        return total.result(self.exact_bytes)._replace(text=text)


class _Totals:
    """Sums over batches, on the host, in float64 and integers."""

    def __init__(self) -> None:
        self._loss = 0.0
        self._tokens = self._bytes = 0
        self._counts: Any = 0
        self._unfaded: Any = None
        self._zero_gates: Any = 0

    def add(self, sums: EvalSums) -> None:
        host = jax.device_get(sums)
        self._loss += float(np.sum(host.loss_B, dtype=np.float64))
        self._tokens += int(np.sum(host.tokens_B, dtype=np.float64))
        self._bytes += int(np.sum(host.bytes_B, dtype=np.int64))
        self._counts = self._counts + host.counts_LE.astype(np.int64)
        self._zero_gates = self._zero_gates + host.zero_gates_L.astype(np.int64)
        if host.unfaded_counts_LE is not None:
            before = 0 if self._unfaded is None else self._unfaded
            self._unfaded = before + host.unfaded_counts_LE.astype(np.int64)

    def result(self, exact_bytes: bool) -> EvalResult:
        loss = self._loss / self._tokens
        bits = self._loss / math.log(2) / self._bytes if exact_bytes and self._bytes else None
        num_bytes = self._bytes if exact_bytes else None
        zero_gates = self._zero_gates / self._tokens
        return EvalResult(
            loss, perplexity(loss), bits, self._tokens, num_bytes, self._counts, zero_gates, self._unfaded
        )


def unigram_baseline(corpus: Corpus, windows: Mapping[str, EvalWindows]) -> dict[str, dict[str, float | None]] | None:
    """Loss and bits per byte of the unigram model of the train split; None if that split is too large to read."""
    if corpus.num_tokens("train") > UNIGRAM_MAX_TOKENS:
        return None
    train_counts = token_counts(corpus.stores, "train")
    table = corpus.token_bytes(len(train_counts))
    losses = {name: unigram_loss(train_counts, window.target_counts(), table) for name, window in windows.items()}
    return {name: {"loss": x.nats_per_token, "bits_per_byte": x.bits_per_byte} for name, x in losses.items()}


def print_results(
    results: Mapping[str, Mapping[str, Any]],
    unigram: Mapping[str, Mapping[str, float | None]] | None = None,
    facts: Mapping[str, str] | None = None,
    title: str | None = None,
) -> None:
    """Print `title`, a table with one column per split and rows for the model and the unigram model, and `facts`."""
    if title:
        print(title)
    table = Table()
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")

    def row(label: str, values: Iterable[float | int | None], pattern: str) -> None:
        table.add_row(label, *("-" if value is None else format(value, pattern) for value in values))

    row("loss (nats per token)", (r["loss"] for r in results.values()), ".4f")
    row("perplexity", (r["perplexity"] for r in results.values()), ".3f")
    row("bits per byte", (r["bits_per_byte"] for r in results.values()), ".4f")
    if unigram:
        row("loss of a unigram model", (unigram[name]["loss"] for name in results), ".4f")
        row("bits per byte of a unigram model", (unigram[name]["bits_per_byte"] for name in results), ".4f")
    row("tokens", (r["tokens"] for r in results.values()), ",d")
    row("bytes", (r["bytes"] for r in results.values()), ",d")
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    for label, fact in (facts or {}).items():
        console.print(f"{label}: {fact}", highlight=False)
    if any(r["bits_per_byte"] is None for r in results.values()):
        console.print("bits per byte: unknown, as this tokenizer has no exact byte count per token")
