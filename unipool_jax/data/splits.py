"""Which documents of a store belong to train, valid and test."""

import itertools
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from unipool_jax.data.errors import DataError

SplitName = Literal["train", "valid", "test"]
SplitOrder = Literal["contiguous", "interleaved"]
Split = tuple[float, float, float]

SPLIT_NAMES: tuple[SplitName, ...] = get_args(SplitName)
SPLIT_ORDERS: tuple[SplitOrder, ...] = get_args(SplitOrder)
PILE_SPLIT: Split = (969.0, 30.0, 1.0)


def check_split(split: Sequence[float], order: str) -> Split:
    """`split` as three floats.

    Raises:
      DataError: not three finite non-negative numbers with a positive sum, an unknown order, or
        fractions with `order="interleaved"`.
    """
    parts = tuple(float(part) for part in split)
    if len(parts) != 3 or not np.isfinite(parts).all() or min(parts) < 0 or sum(parts) == 0:
        raise DataError(
            f"split={tuple(split)!r}: must be three non-negative numbers for train,valid,test, for example [969,30,1]"
        )
    if order not in SPLIT_ORDERS:
        raise DataError(f"split_order={order!r}: choose one of {', '.join(SPLIT_ORDERS)}")
    if order == "interleaved" and any(part != int(part) for part in parts):
        raise DataError(
            f"split={tuple(split)!r}: split_order=interleaved counts documents, so the three numbers must be "
            "whole; for example [969,30,1]"
        )
    return parts


def split_borders(num_documents: int, split: Split) -> list[int]:
    """The four boundaries `b` of a contiguous split: part p holds documents `b[p] .. b[p+1]-1`.

    As in Megatron, the cumulative fractions times the number of documents D are rounded half to
    even: 969,30,1 puts documents `[0, round(.969 D))` into train.
    """
    total = float(np.sum(split))
    sums = itertools.accumulate((part / total for part in split), initial=0.0)
    return [round(fraction * num_documents) for fraction in sums]


def split_documents(num_documents: int, split: Split, order: SplitOrder, name: SplitName) -> np.ndarray:
    """Indices of the documents of split `name`, ascending, int32.

    contiguous: three consecutive ranges. interleaved: of every `sum(split)` consecutive documents
    the first `split[0]` are train, the next `split[1]` valid, the rest test.

    Raises:
      DataError: an unknown split name.
    """
    if name not in SPLIT_NAMES:
        raise DataError(f"split {name!r}: choose one of {', '.join(SPLIT_NAMES)}")
    part = SPLIT_NAMES.index(name)
    if order == "contiguous":
        borders = split_borders(num_documents, split)
        return np.arange(borders[part], borders[part + 1], dtype=np.int32)
    borders = np.concatenate([[0], np.cumsum(split)]).astype(np.int64).tolist()
    position = np.arange(num_documents, dtype=np.int32) % borders[-1]
    in_part = (position >= borders[part]) & (position < borders[part + 1])
    return np.flatnonzero(in_part).astype(np.int32)
