"""Plans cover every row of every group exactly once; sorting is stable."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grouped_oracle as oracle
from unipool_jax.kernels.group_plan import block_shape, make_group_plan, sort_by_group
from unipool_jax.kernels.implementations import Implementation

make_plan = jax.jit(make_group_plan, static_argnums=1, static_argnames="implementation")


@settings(max_examples=50, deadline=None)
@given(data=st.data(), shape=st.sampled_from(oracle.SHAPES))
def test_blocks_and_tiles_visit_each_row_once(data: st.DataObject, shape: oracle.Shape) -> None:
    sizes = data.draw(oracle.group_sizes(shape))
    plan = make_plan(jnp.array(sizes), shape.rows)
    block, tile = block_shape(shape.rows, shape.experts)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    np.testing.assert_array_equal(plan.offsets, offsets)
    np.testing.assert_array_equal(plan.group_sizes, sizes)
    owner = np.full(shape.rows, shape.experts)
    owner[: sum(sizes)] = np.repeat(np.arange(shape.experts), sizes)
    np.testing.assert_array_equal(plan.row_group, owner)

    visits = np.zeros((shape.rows, shape.experts), int)
    for group, (start, end) in enumerate(pairwise(offsets)):
        visits[start : min(end, start + block), group] += 1
    assert plan.num_tiles <= len(plan.tile_group)
    for group, start in list(zip(plan.tile_group.tolist(), plan.tile_start.tolist(), strict=True))[: plan.num_tiles]:
        visits[start : min(start + tile, offsets[group + 1]), group] += 1
    np.testing.assert_array_equal(visits, owner[:, None] == np.arange(shape.experts))


@settings(max_examples=50, deadline=None)
@given(
    data=st.data(),
    shape=st.sampled_from(oracle.SHAPES),
    implementation=st.sampled_from(["pallas_tpu", "pallas_gpu", "mosaic_gpu"]),
)
def test_tiles_alone_visit_each_row_once(
    data: st.DataObject, shape: oracle.Shape, implementation: Implementation
) -> None:
    """Kernels without blocks: every row is in one tile of its group, rows of no group in one tail tile."""
    sizes = data.draw(oracle.group_sizes(shape))
    plan = make_plan(jnp.array(sizes), shape.rows, implementation=implementation)
    tiling = plan.tiling
    starts, ends = [*plan.offsets.tolist()], [*plan.offsets.tolist()[1:], shape.rows]
    visits = np.zeros((shape.rows, shape.experts + 1), int)
    if implementation == "pallas_tpu":
        # A tail tile starts at the next aligned row: the rows before it share a tile with the last group.
        visits[sum(sizes) : -(-sum(sizes) // tiling.alignment) * tiling.alignment, -1] += 1
    assert tiling.alignment == {"pallas_tpu": 16, "pallas_gpu": 1, "mosaic_gpu": 8}[implementation]
    total = plan.num_tiles + plan.num_tail_tiles
    assert total <= len(plan.tile_group)
    for group, start in list(zip(plan.tile_group.tolist(), plan.tile_start.tolist(), strict=True))[:total]:
        assert start % tiling.alignment == 0
        visits[max(start, starts[group]) : min(start + tiling.tile_rows, ends[group]), group] += 1
    np.testing.assert_array_equal(visits, np.asarray(plan.row_group)[:, None] == np.arange(shape.experts + 1))


def test_sizes_beyond_the_buffer_are_cut_off() -> None:
    plan = make_group_plan(jnp.array([3, 4, 2]), 5)
    assert plan.group_sizes.tolist() == [3, 2, 0]
    assert plan.offsets.tolist() == [0, 3, 5, 5]


@pytest.mark.parametrize("rows", [1, 16, 48, 4096, 100_000])
@pytest.mark.parametrize("experts", [1, 8, 96, 512])
def test_block_holds_about_the_expected_rows(rows: int, experts: int) -> None:
    block, tile = block_shape(rows, experts)
    assert 1 <= tile <= min(block, rows)
    assert min(block, 48) >= min(rows / experts, 48)
    assert block * experts <= 1.5 * rows + 16 * experts


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 6), min_size=50, max_size=50))
def test_sort_is_stable_and_ids_past_the_groups_come_last(ids: list[int]) -> None:
    order, sizes = sort_by_group(jnp.array(ids), num_groups=5)
    np.testing.assert_array_equal(order, np.argsort(np.minimum(ids, 5), kind="stable"))
    np.testing.assert_array_equal(sizes, np.bincount(ids, minlength=7)[:5])
    assert order.dtype == sizes.dtype == jnp.int32


def test_sort_with_more_group_and_row_pairs_than_32_bits_hold() -> None:
    ids = np.random.default_rng(0).integers(0, 40_000, 70_000)
    order, sizes = sort_by_group(jnp.array(ids), num_groups=35_000)
    np.testing.assert_array_equal(order, np.argsort(np.minimum(ids, 35_000), kind="stable"))
    np.testing.assert_array_equal(sizes, np.bincount(ids, minlength=40_000)[:35_000])


def test_sort_of_nothing() -> None:
    order, sizes = sort_by_group(jnp.zeros(0, jnp.int32), num_groups=2)
    assert order.shape == (0,)
    assert sizes.tolist() == [0, 0]


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"group_sizes_E has shape \(1, 2\)"):
        make_group_plan(jnp.ones((1, 2), int), 4)
    with pytest.raises(ValueError, match="group_sizes_E has dtype float32"):
        make_group_plan(jnp.ones(2), 4)
    with pytest.raises(ValueError, match="num_rows is -1"):
        make_group_plan(jnp.ones(2, int), -1)
    with pytest.raises(ValueError, match="group_ids_R has shape"):
        sort_by_group(jnp.ones(2), 4)
    with pytest.raises(ValueError, match="num_groups is 0"):
        sort_by_group(jnp.ones(2, int), 0)
