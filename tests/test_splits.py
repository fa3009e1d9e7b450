"""Document splits: Megatron's borders, and interleaved splits."""

from typing import cast

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unipool_jax.data.errors import DataError
from unipool_jax.data.splits import PILE_SPLIT, SPLIT_NAMES, SplitName, SplitOrder, check_split, split_documents


def test_pile_borders() -> None:
    # train = documents [0, round(.969 D)), valid the next 3%, test the last 0.1%.
    parts = [split_documents(100_000, PILE_SPLIT, "contiguous", name) for name in SPLIT_NAMES]
    assert [(part[0], part[-1]) for part in parts] == [(0, 96_899), (96_900, 99_899), (99_900, 99_999)]
    # Halves go to the even neighbor: .5 * 5 = 2.5 -> 2 and .5 * 7 = 3.5 -> 4.
    assert len(split_documents(5, (1, 1, 0), "contiguous", "train")) == 2
    assert len(split_documents(7, (1, 1, 0), "contiguous", "train")) == 4


@given(
    st.integers(0, 500),
    st.tuples(*[st.integers(0, 30)] * 3).filter(any),
    st.sampled_from(["contiguous", "interleaved"]),
)
def test_splits_partition_the_documents(count: int, split: tuple[int, ...], order: SplitOrder) -> None:
    parts = [split_documents(count, check_split(split, order), order, name) for name in SPLIT_NAMES]
    assert sorted(np.concatenate(parts)) == list(range(count))
    for part, weight in zip(parts, split, strict=True):
        assert part.dtype == np.int32
        assert (np.diff(part) > 0).all()
        assert weight or not len(part)


def test_interleaved_deals_documents_in_rounds() -> None:
    split = check_split((2, 1, 1), "interleaved")
    owners = np.empty(10, object)
    for name in SPLIT_NAMES:
        owners[split_documents(10, split, "interleaved", name)] = name
    assert owners.tolist() == ["train", "train", "valid", "test"] * 2 + ["train", "train"]


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3,4", "-1,1,1", "0,0,0", "nan,1,1", "inf,1,1"])
def test_bad_splits_are_refused(text: str) -> None:
    with pytest.raises(DataError, match="969,30,1"):
        check_split([float(part) for part in text.split(",") if part], "contiguous")


def test_other_refusals() -> None:
    with pytest.raises(DataError, match="must be whole"):
        check_split((96.9, 3, 0.1), "interleaved")
    with pytest.raises(DataError, match="split_order='sorted'"):
        check_split((1, 1, 1), "sorted")
    with pytest.raises(DataError, match="split 'dev'"):
        split_documents(3, PILE_SPLIT, "contiguous", cast(SplitName, "dev"))
