"""Batches: the order of method M5.4 against brute-force oracles, and evaluation's exact counts."""

import collections
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from unipool_jax.data import pipeline
from unipool_jax.data.errors import DataError
from unipool_jax.data.pipeline import (
    Batch,
    EvalWindows,
    WindowSource,
    batch_at,
    evaluation_batches,
    moving_evaluation_batches,
    training_batches,
)
from unipool_jax.data.splits import PILE_SPLIT, Split, SplitName, SplitOrder, check_split
from unipool_jax.data.store_reader import TokenStore
from unipool_jax.data.streams import DocumentStream, read_ranges
from unipool_jax.data.token_store import build_store, open_store

EOD = 7


class ArrayStore(TokenStore):
    """A token store in memory, made of documents given as arrays."""

    def __init__(
        self,
        documents: list[np.ndarray],
        split: Split = (1, 0, 0),
        order: SplitOrder = "contiguous",
        tokenizer: str = "test",
    ) -> None:
        self.path = Path("memory") / tokenizer
        self.documents = documents
        self._all = np.concatenate(documents)
        self.document_offsets = np.cumsum([0, *map(len, documents)])
        self.num_tokens, self.num_documents = len(self._all), len(documents)
        self.tokenizer_name = self.tokenizer_sha256 = tokenizer
        self.vocab_size, self.eod = 10_000, EOD
        self.split, self.split_order = check_split(split, order), order

    def _read_many(self, starts: Sequence[int], stops: Sequence[int]) -> list[np.ndarray]:
        return [self._all[a:b].astype(np.int32) for a, b in zip(starts, stops, strict=True)]


def numbered(lengths: Iterable[int], first: int = 100) -> list[np.ndarray]:
    """Documents of these lengths whose tokens are all different, so that positions are distinguishable."""
    numbers = itertools.count(first)
    return [np.array([next(numbers) for _ in range(n - 1)] + [EOD], np.int64) for n in lengths]


def oracle_windows(documents: Sequence[np.ndarray], length: int, needed: int, seed: int) -> list[np.ndarray]:
    """Method M5.4 for one store, written down literally: one long list of tokens, cut up."""
    tokens_per_epoch = sum(map(len, documents))
    epochs = 1
    while epochs * tokens_per_epoch < needed * length + 1:
        epochs += 1
    windows_per_epoch = (tokens_per_epoch - 1) // length
    windows_before_last = ((epochs - 1) * tokens_per_epoch - 1) // length
    used_of_last = needed - windows_before_last
    separate = epochs > 1 and used_of_last < int(0.8 * windows_per_epoch)
    random = np.random.RandomState(seed)
    order = np.array(list(range(len(documents))) * (epochs - 1 if separate else epochs))
    random.shuffle(order)
    if separate:
        last = np.arange(len(documents))
        random.shuffle(last)
        order = np.concatenate([order, last])
    stream = np.concatenate([documents[i] for i in order])
    windows: list[np.ndarray] = []
    while len(windows) * length + length + 1 <= len(stream):
        start = len(windows) * length
        windows.append(stream[start : start + length + 1])
    index = np.arange(len(windows))
    if separate:
        head, tail = index[:windows_before_last], index[windows_before_last:]
        random.shuffle(head)
        random.shuffle(tail)
    else:
        random.shuffle(index)
    return [windows[i] for i in index]


def oracle_blend(count: int, stores: int) -> list[tuple[int, int]]:
    """(store, sample) of every index by the largest-deficit rule, ties to the lowest id."""
    weights = [1.0 / stores] * stores
    used = [0] * stores
    picks = []
    for j in range(count):
        deficits = [w * max(j, 1) - u for w, u in zip(weights, used, strict=True)]
        store = deficits.index(max(deficits))
        picks.append((store, used[store]))
        used[store] += 1
    return picks


def rows(batch: Batch) -> np.ndarray:
    """Inputs and the last target of each row, joined: windows of S + 1 tokens."""
    assert (batch.inputs[..., 1:] == batch.targets[..., :-1]).all()
    assert batch.inputs.dtype == batch.targets.dtype == np.int32
    assert batch.weights.dtype == np.float32
    return np.concatenate([batch.inputs, batch.targets[..., -1:]], axis=-1)


# --------------------------------------------------------------------------- order of windows


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=30), min_size=1, max_size=4),
    st.integers(1, 17),
    st.integers(1, 200),
    st.integers(0, 2**32 - 1),
)
@example([[30, 20, 11]], 4, 15, 1234)  # exactly one epoch
@example([[30, 20, 11]], 4, 16, 1234)  # one window more: a separate last epoch
@example([[30, 20, 11]], 4, 29, 1234)  # most of the second epoch: shuffled together
def test_windows_follow_the_written_rule(lengths: list[list[int]], length: int, count: int, seed: int) -> None:
    stores = [ArrayStore(numbered(n, 1000 * (i + 1))) for i, n in enumerate(lengths)]
    if any(store.num_tokens < length + 1 for store in stores[:count]):
        with pytest.raises(DataError, match=r"one window of data\.sequence_length"):
            WindowSource(stores, "train", length, count, seed).batch(range(count))
        return
    source = WindowSource(stores, "train", length, count, seed)
    needed = count
    if len(stores) > 1:
        needed = int(np.ceil(-(-count // len(stores)) * 1005 / 1000))
    windows = [oracle_windows(store.documents, length, needed, seed) for store in stores[:count]]
    expected = [windows[store][sample] for store, sample in oracle_blend(count, len(stores))]
    np.testing.assert_array_equal(rows(source.batch(range(count))), expected)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=20), min_size=1, max_size=3),
    st.integers(1, 9),
    st.lists(st.integers(1, 120), min_size=2, max_size=4, unique=True).map(sorted),
    st.integers(0, 2**32 - 1),
)
def test_an_extended_source_begins_as_the_shorter_one(
    lengths: list[list[int]], length: int, counts: list[int], seed: int
) -> None:
    stores = [ArrayStore(numbered(n, 1000 * (i + 1))) for i, n in enumerate(lengths)]
    assume(all(store.num_tokens > length for store in stores))
    longest = rows(WindowSource(stores, "train", length, counts, seed).batch(range(counts[-1])))
    for k in range(1, len(counts)):
        shorter = WindowSource(stores, "train", length, counts[:k] if k > 1 else counts[0], seed)
        np.testing.assert_array_equal(longest[: counts[k - 1]], rows(shorter.batch(range(counts[k - 1]))))


@pytest.mark.parametrize("counts", [[5, 60], [30, 60], [7, 19, 60], [29, 31, 60]])
def test_an_extension_repeats_nothing_before_all_is_read(counts: list[int]) -> None:
    store = ArrayStore(numbered([21] * 10 + [31]))  # 241 tokens: 30 windows of 8 targets an epoch
    targets = WindowSource(store, "train", 8, counts, 3).tokens(range(60))[:, 1:]
    read = [collections.Counter(targets[:windows][targets[:windows] != EOD].tolist()) for windows in (30, 60)]
    # A second epoch begins only after the first, wherever the run was extended.
    assert [max(times.values()) for times in read] == [1, 2]
    assert all(len(times) >= 241 - 11 - 1 for times in read)


def test_the_fingerprint_of_an_extended_source_is_its_own(real_store: TokenStore) -> None:
    one, more = (WindowSource(real_store, "train", 16, n, 1).fingerprint() for n in (64, [32, 64]))
    assert one == WindowSource(real_store, "train", 16, [64], 1).fingerprint() != more
    with pytest.raises(DataError, match="must ascend"):
        WindowSource(real_store, "train", 16, [64, 64], 1)


def test_round_robin_is_the_largest_deficit_rule() -> None:
    for stores in (1, 2, 3, 7, 30):
        picks = oracle_blend(3000, stores)
        assert picks == [(j % stores, j // stores) for j in range(3000)]


def test_needed_windows_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    # 30,720,000 windows over 30 shards: 1,024,000 each, +0.5% = 1,029,120.
    store = ArrayStore(numbered([50]))
    asked = []

    class Spy:
        def __init__(self, store: TokenStore, split: Split, length: int, needed: list[int], seed: int) -> None:
            asked.append((needed, seed))
            raise StopIteration

    monkeypatch.setattr(pipeline, "_StoreWindows", Spy)
    with pytest.raises(StopIteration):
        WindowSource([store] * 30, "train", 1024, 30_720_000, 1234).batch([0])
    assert asked == [([1_029_120], 1234)]


def test_windows_of_1025_overlap_by_one_and_keep_end_of_document() -> None:
    lengths = [700, 900, 3, 900, 1600, 2]
    store = ArrayStore(numbered(lengths))
    source = WindowSource(store, "train", 1024, 4, 1)
    windows = rows(source.batch(range(4)))
    assert windows.shape == (4, 1025)
    order = np.argsort(source._store_windows(0).order)
    in_order = windows[order]
    np.testing.assert_array_equal(in_order[:-1, -1], in_order[1:, 0])  # the shared token
    stream = np.concatenate([in_order[:, :-1].reshape(-1), in_order[-1, -1:]])
    # Every end of document in the used stretch is fed as well as predicted, with weight one.
    batch = source.batch(range(4))
    assert (stream == EOD).sum() >= 4  # of 4105 tokens, 4097 are used
    assert (batch.inputs == EOD).sum() == (stream[:-1] == EOD).sum()
    assert (batch.targets == EOD).sum() == (stream[1:] == EOD).sum()
    assert (batch.weights == 1).all()


def test_split_borders_hold_for_windows() -> None:
    documents = numbered([20] * 50)
    store = ArrayStore(documents, (80, 14, 6))
    owner = {token: d for d, document in enumerate(documents) for token in document[:-1]}
    borders: list[tuple[SplitName, int, int]] = [("train", 0, 40), ("valid", 40, 47), ("test", 47, 50)]
    for name, low, high in borders:
        count = 20 * (high - low) - 1  # one epoch of windows of two tokens sees everything
        tokens = rows(WindowSource(store, name, 1, count, 0).batch(range(count)))
        assert {owner[t] for t in tokens[tokens != EOD]} == set(range(low, high))


def test_one_epoch_uses_no_window_twice() -> None:
    store = ArrayStore(numbered([13] * 40))
    source = WindowSource(store, "train", 6, (13 * 40 - 1) // 6, 5)
    starts = [window[0] for window in rows(source.batch(range(len(source)))) if window[0] != EOD]
    assert len(starts) == len(set(starts))


def test_documents_longer_and_shorter_than_a_block_of_the_index() -> None:
    random = np.random.RandomState(0)
    store = ArrayStore(numbered(random.randint(1, 4, 2000)))
    documents = random.permutation(2000).astype(np.int32)
    stream = DocumentStream(store, documents)
    whole = np.concatenate([store.documents[d] for d in documents])
    assert stream.num_tokens == len(whole)
    for start, stop in [
        (0, 1),
        (0, len(whole)),
        (511, 1200),
        (len(whole) - 1, len(whole)),
        *random.randint(0, 1900, (50, 2)),
    ]:
        if start < stop:
            np.testing.assert_array_equal(read_ranges([stream], [(0, start, stop)]), whole[start:stop])


def test_neighboring_documents_are_read_as_one_range() -> None:
    store = ArrayStore(numbered([5] * 100))
    starts, stops = DocumentStream(store, np.arange(100, dtype=np.int32)).segments(3, 444)
    assert (starts.tolist(), stops.tolist()) == ([3], [444])


def test_stores_are_indexed_when_first_used() -> None:
    stores = [ArrayStore(numbered([50]), tokenizer="same") for _ in range(3)]
    source = WindowSource(stores, "train", 8, 9, 0)
    source.batch([1, 4])
    assert [windows is not None for windows in source._windows] == [False, True, False]


def test_refusals() -> None:
    store = ArrayStore(numbered([50]))
    with pytest.raises(DataError, match="no token stores"):
        WindowSource([], "train", 8, 1, 0)
    with pytest.raises(DataError, match="use stores of one tokenizer"):
        WindowSource([store, ArrayStore(numbered([50]), tokenizer="other")], "train", 8, 1, 0)
    with pytest.raises(DataError, match="sequence_length=0"):
        WindowSource(store, "train", 0, 1, 0)
    with pytest.raises(DataError, match=r"split 'valid' has 0 tokens .* needs 9"):
        WindowSource(store, "valid", 8, 1, 0)[0]
    with pytest.raises(IndexError, match="window 1: this source has 1"):
        WindowSource(store, "train", 8, 1, 0)[1]


# --------------------------------------------------------------------------- loading


@pytest.fixture(scope="module")
def real_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder = tmp_path_factory.mktemp("store")
    random = np.random.RandomState(3)
    (folder / "a.jsonl").write_text(
        "".join(
            json.dumps({"text": "".join(map(chr, random.randint(97, 123, n)))}) + "\n"
            for n in random.randint(1, 400, 300)
        )
    )
    return build_store([folder / "a.jsonl"], folder / "s", "bytes", (80, 15, 5), progress=False, shard_tokens=8192)


def test_real_store_gives_the_windows_of_the_rule(real_store: TokenStore) -> None:
    everything = real_store.read(0, real_store.num_tokens)
    documents = np.split(everything, real_store.document_offsets[1:-1])
    source = WindowSource(real_store, "train", 32, 3000, 99)
    expected = oracle_windows(documents[:240], 32, 3000, 99)[:3000]
    np.testing.assert_array_equal(rows(source.batch(range(3000))), expected)
    np.testing.assert_array_equal(rows(source[17]), expected[17])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_batches_do_not_depend_on_processes_or_resume(real_store: TokenStore, count: int) -> None:
    source = WindowSource(real_store, "train", 16, 8 * 12, 1, document_mask=True)
    expected = [source.batch(range(step * 8, step * 8 + 8)) for step in range(12)]
    # First leg on one number of processes, the rest on another.
    for processes, start, stop in ((count, 0, 5), (4 // count, 5, 12)):
        loaders = [
            training_batches(
                WindowSource(real_store, "train", 16, 8 * 12, 1, document_mask=True),
                batch_size=8,
                start_step=start,
                end_step=stop,
                rows=range(process, 8, processes),
                num_threads=2,
                prefetch=3,
            )
            for process in range(processes)
        ]
        for step, parts in zip(range(start, stop), zip(*loaders, strict=True), strict=True):
            for process, part in enumerate(parts):
                for name, found, want in zip(Batch._fields, part, expected[step], strict=True):
                    assert want is not None
                    np.testing.assert_array_equal(found, want[process::processes], err_msg=name)


def test_grain_path_equals_the_direct_one_and_reopened_stores_agree(real_store: TokenStore) -> None:
    source = WindowSource(real_store, "train", 16, 400, 2)
    again = WindowSource(open_store(real_store.path, "bytes"), "train", 16, 400, 2)
    loaded = list(training_batches(source, batch_size=20, start_step=3, end_step=20))
    assert len(loaded) == 17
    for step, batch in enumerate(loaded, start=3):
        for got, want in zip(batch, batch_at(again, step, 20), strict=True):
            np.testing.assert_array_equal(got, want)
    assert list(training_batches(source, batch_size=20, start_step=20, end_step=20)) == []


def test_seed_changes_the_order(real_store: TokenStore) -> None:
    one, two = (WindowSource(real_store, "train", 16, 64, seed).batch(range(64)) for seed in (0, 1))
    assert not np.array_equal(one.inputs, two.inputs)


def test_fingerprint_tells_sources_apart(real_store: TokenStore) -> None:
    arguments: dict[str, Any] = {
        "stores": real_store,
        "split": "train",
        "sequence_length": 16,
        "num_windows": 64,
        "seed": 0,
    }
    first = WindowSource(**arguments).fingerprint()
    assert WindowSource(**arguments | {"stores": open_store(real_store.path)}).fingerprint() == first
    others = {"stores": [real_store] * 2, "split": "valid", "sequence_length": 17, "num_windows": 65, "seed": 1}
    assert others.keys() == arguments.keys()
    changed = [WindowSource(**arguments | {name: other}) for name, other in others.items()]
    assert len({first, *(source.fingerprint() for source in changed)}) == 6


def test_loading_refusals(real_store: TokenStore) -> None:
    source = WindowSource(real_store, "train", 16, 100, 0)
    for wrong in ([], [3, 2], [2, 2], [-1, 4], [0, 10]):
        with pytest.raises(DataError, match=r"rows=\[.*must be ascending numbers from 0 to 9, without repetition"):
            training_batches(source, batch_size=10, start_step=0, end_step=1, rows=wrong)
        with pytest.raises(DataError, match=r"rows=\["):
            evaluation_batches(source, batch_size=10, rows=wrong)
    with pytest.raises(DataError, match="batch_size=0: must be positive"):
        training_batches(source, batch_size=0, start_step=0, end_step=1)
    with pytest.raises(DataError, match=r"steps 0\.\.11 of 10 windows: the source has 100"):
        training_batches(source, batch_size=10, start_step=0, end_step=11)
    with pytest.raises(DataError, match=r"windows 90\.\.101: there are 100"):
        evaluation_batches(source, batch_size=10, start=90, stop=101)


def test_loader_passes_errors_on(real_store: TokenStore) -> None:
    source = WindowSource(ArrayStore(numbered([5])), "train", 16, 100, 0)
    with pytest.raises(DataError, match=r"one window of data\.sequence_length=16 needs 17; add text"):
        list(training_batches(source, batch_size=10, start_step=0, end_step=3))


# --------------------------------------------------------------------------- evaluation


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 30), min_size=3, max_size=12), min_size=1, max_size=3),
    st.integers(1, 20),
    st.sampled_from(["contiguous", "interleaved"]),
)
def test_every_token_is_a_target_once(lengths: list[list[int]], length: int, order: SplitOrder) -> None:
    stores = [ArrayStore(numbered(n, 1000 * (i + 1)), (1, 1, 1), order) for i, n in enumerate(lengths)]
    tokens = np.concatenate([store.documents[d] for store in stores for d in store.split_documents("valid")])
    if len(tokens) < 2:
        with pytest.raises(DataError, match="at least two"):
            EvalWindows(stores, "valid", length)
        return
    windows = EvalWindows(stores, "valid", length)
    assert windows.num_targets == len(tokens) - 1
    assert len(windows) == int(np.ceil((len(tokens) - 1) / length))
    batch = windows.batch(range(len(windows)))
    real = batch.weights == 1
    assert ((batch.weights == 0) | real).all()
    np.testing.assert_array_equal(batch.targets[real], tokens[1:])
    np.testing.assert_array_equal(batch.inputs[real], tokens[:-1])
    assert real[:-1].all()
    assert not batch.inputs[~real].any()
    assert not batch.targets[~real].any()
    assert windows.target_counts().sum() == len(tokens) - 1


def test_denominators_do_not_depend_on_batch_size_or_processes(real_store: TokenStore) -> None:
    windows = EvalWindows(real_store, "valid", 24)
    token_bytes = real_store.tokenizer.token_bytes
    text_bytes = int(windows.target_counts() @ token_bytes)
    documents = real_store.split_documents("valid")
    # All text of the split but its first byte (one byte a token here), and no end of document.
    assert token_bytes is not None
    assert text_bytes == real_store.document_lengths(documents).sum() - len(documents) - 1
    for batch_size, count in ((1, 1), (7, 1), (64, 1), (12, 4), (10_000, 2)):
        tokens = size = 0
        for process in range(count):
            rows = range(process, batch_size, count)
            for batch in evaluation_batches(windows, batch_size=batch_size, rows=rows, num_threads=1):
                assert batch.inputs.shape == (batch_size // count, 24)
                assert batch.weights.dtype == np.float32
                tokens += int(batch.weights.sum())
                size += int((token_bytes[batch.targets] * batch.weights).sum())
        assert (tokens, size) == (windows.num_targets, text_bytes)


def test_slice_is_fixed_and_limited(real_store: TokenStore) -> None:
    whole, part = EvalWindows(real_store, "valid", 24), EvalWindows(real_store, "valid", 24, 5)
    assert (len(part), part.num_targets) == (5, 120)
    np.testing.assert_array_equal(part.batch(range(5)).targets, whole.batch(range(5)).targets)
    assert len(EvalWindows(real_store, "valid", 24, 10**9)) == len(whole)
    with pytest.raises(IndexError):
        part.batch([5])
    with pytest.raises(DataError, match="max_windows=0"):
        EvalWindows(real_store, "valid", 24, 0)


def test_moving_evaluation_does_not_rewind(real_store: TokenStore) -> None:
    source = WindowSource(real_store, "valid", 24, 61, 1234)
    seen = []
    for evaluation, size in ((0, 20), (1, 20), (2, 20)):
        batches = list(moving_evaluation_batches(source, evaluation, size, batch_size=8))
        assert [batch.weights.any(axis=1).sum() for batch in batches] == [8, 8, 4]
        seen += [batch.inputs[row] for batch in batches for row in range(8) if batch.weights[row].any()]
    np.testing.assert_array_equal(seen, source.batch(range(60)).inputs)
    # The last batch may leave a process without rows; it still gets as many batches as the others.
    owned = [[0, 4], [1, 2], [3, 5], [6, 7]]
    parts = [list(moving_evaluation_batches(source, 0, 20, batch_size=8, rows=rows)) for rows in owned]
    assert [len(part) for part in parts] == [3] * 4
    assert not parts[3][-1].weights.any()
    joined = np.zeros((8, 24), np.int32)
    for rows, part in zip(owned, parts, strict=True):
        joined[rows] = part[2].inputs
    np.testing.assert_array_equal(joined[:4], source.batch(range(16, 20)).inputs)
    assert not joined[4:].any()
    with pytest.raises(DataError, match=r"windows 60\.\.80: there are 61"):
        moving_evaluation_batches(source, 3, 20, batch_size=8)


def test_pile_split_is_the_default_of_the_reference() -> None:
    assert PILE_SPLIT == (969, 30, 1)
