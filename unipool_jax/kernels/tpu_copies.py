"""Copies of rows between the memory of a TPU (HBM) and its vector memory, where the kernels compute.

Visits alternate between two slots of every buffer: while one is computed, the rows of the next arrive in the other
slot, and those of the one before leave it. A copy is awaited by its description, so `start` and `wait` of a visit
go through the same code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unipool_jax.kernels.tpu_visits import BLOCK, Visits

Action = Literal["start", "wait"]


class RowBuffers(NamedTuple):
    """Vector memory for tiles of several arrays of rows: what a kernel asks for, and references in the kernel."""

    tiles: list[Any]
    """`[2, T, ...]` each: two slots for a tile of T rows."""
    arrived: Any
    """`[2, 2, arrays]` semaphores: of each slot, for the shared block and for the other rows."""

    @classmethod
    def allocated(cls, rows: Sequence[tuple[int, ...]], tile_rows: int, dtype: jnp.dtype) -> RowBuffers:
        """For arrays of which the shape of one row is given."""
        tiles = [pltpu.VMEM((2, tile_rows, *row), dtype) for row in rows]
        return cls(tiles, pltpu.SemaphoreType.DMA((2, 2, len(rows))))


class RowReader(NamedTuple):
    """Fetches the rows of a visit: a shared block from the slot of the visit before, the others from HBM."""

    visits: Visits
    sources: Sequence[Any]
    """References in HBM, `[R, ...]` each."""
    buffers: RowBuffers

    def start(self, visit: jax.Array | int) -> None:
        """Start the copies."""
        self._copy(visit, "start")

    def wait(self, visit: jax.Array | int) -> None:
        """Wait until all rows of the visit are in its slot."""
        self._copy(visit, "wait")

    def tiles(self, slot: jax.Array, count: int) -> Iterator[jax.Array]:
        """The first rows in a slot, `[count, K]` of each array; halves of a row are put side by side."""
        for tile in self.buffers.tiles:
            yield tile[slot, :count].reshape(count, -1)

    def _copy(self, visit: jax.Array | int, action: Action) -> None:
        visits, (tiles, arrived) = self.visits, self.buffers
        slot, shared, read = lax.rem(visit, 2), visits.shared[visit], visits.read[visit]
        fresh, skip = pl.multiple_of(read - shared, BLOCK), pl.multiple_of(shared, BLOCK)
        start = pl.multiple_of(visits.start[visit] + shared, BLOCK)

        @pl.when(shared > 0)
        def _() -> None:
            last = pl.multiple_of(visits.read[visit - 1] - BLOCK, BLOCK)
            for index, tile in enumerate(tiles):
                block, target = tile.at[1 - slot, pl.ds(last, BLOCK)], tile.at[slot, pl.ds(0, BLOCK)]
                _act(action, block, target, arrived.at[slot, 0, index])

        @pl.when(fresh > 0)
        def _() -> None:
            for index, (source, tile) in enumerate(zip(self.sources, tiles, strict=True)):
                rows, target = source.at[pl.ds(start, fresh)], tile.at[slot, pl.ds(skip, fresh)]
                _act(action, rows, target, arrived.at[slot, 1, index])


class RowWriter(NamedTuple):
    """Writes the rows that a visit completes to HBM: a tile of columns of each output."""

    visits: Visits
    tiles: Any
    """Vector memory, `[2, O, T, C]` for all O outputs, or halved, `[2, T, 2, C / 2]` for the only one."""
    targets: Sequence[Any]
    """References in HBM, `[R, N]` each, or halved, `[R, 2, N / 2]`."""
    columns: Any
    """A `pl.ds`: which columns of the targets, or of both halves of their rows, the tiles are."""
    left: Any
    """`[2, O]` semaphores."""

    def start(self, visit: jax.Array) -> None:
        """Start the copies."""
        self._copy(visit, "start")

    def wait(self, visit: jax.Array) -> None:
        """Wait until the slot of the visit may be written anew."""
        self._copy(visit, "wait")

    def _copy(self, visit: jax.Array, action: Action) -> None:
        size = pl.multiple_of(self.visits.write[visit], BLOCK)
        start, slot = pl.multiple_of(self.visits.start[visit], BLOCK), lax.rem(visit, 2)

        @pl.when(size > 0)
        def _() -> None:
            for index, target in enumerate(self.targets):
                if len(target.shape) == 3:
                    tile = self.tiles.at[slot, pl.ds(0, size)]
                    rows = target.at[pl.ds(start, size), :, self.columns]
                else:
                    tile = self.tiles.at[slot, index, pl.ds(0, size)]
                    rows = target.at[pl.ds(start, size), self.columns]
                _act(action, tile, rows, self.left.at[slot, index])


def _act(action: Action, source: Any, target: Any, semaphore: Any) -> None:
    copy = pltpu.make_async_copy(source, target, semaphore)
    copy.start() if action == "start" else copy.wait()
