"""The grouped product against a float64 loop over experts: forward and both gradients."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grouped_oracle as oracle
from unipool_jax.kernels.group_plan import block_shape, make_group_plan
from unipool_jax.kernels.grouped_matmul import grouped_matmul
from unipool_jax.kernels.implementations import Implementation

IMPLEMENTATIONS: tuple[Implementation, ...] = ("xla", "reference")


@cache
def compiled(implementation: Implementation) -> Any:
    return oracle.gradients(grouped_matmul, implementation)


def check(shape: oracle.Shape, sizes: list[int], dtype: str, implementation: Implementation, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    rows = oracle.poisoned(rng.standard_normal((shape.rows, shape.width)), sizes)
    grad = oracle.poisoned(rng.standard_normal((shape.rows, shape.hidden)), sizes)
    bank = rng.standard_normal((shape.experts, shape.width, shape.hidden))
    operands, exact = zip(*(oracle.rounded(array, dtype) for array in (grad, rows, bank)), strict=True)
    results = compiled(implementation)(jnp.array(sizes), *operands)
    wanted = oracle.matmul(sizes, *exact)
    for name, actual, expected in zip(("output", "rows gradient", "bank gradient"), results, wanted, strict=True):
        oracle.assert_close_per_expert(actual, expected, sizes, dtype, name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_edge_sizes(shape: oracle.Shape, dtype: str, implementation: Implementation) -> None:
    for sizes in oracle.edge_sizes(shape):
        check(shape, sizes, dtype, implementation)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=st.sampled_from(oracle.SHAPES), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_any_sizes(data: st.DataObject, shape: oracle.Shape, dtype: str) -> None:
    sizes = data.draw(oracle.group_sizes(shape))
    check(shape, sizes, dtype, "xla", seed=data.draw(st.integers(0, 99)))


def test_bank_gradient_accumulates_in_float32() -> None:
    """A large sum from the first rows, then many contributions each below half a bfloat16 step of it."""
    rows, experts, sizes = 4096, 64, [0] * 63 + [4096]
    block, _ = block_shape(rows, experts)
    grad = np.full((rows, 3), 0.5)
    grad[:block] = 256
    _, _, bank_grad = compiled("xla")(
        jnp.array(sizes),
        jnp.asarray(grad, jnp.bfloat16),
        jnp.ones((rows, 2), jnp.bfloat16),
        jnp.ones((experts, 2, 3), jnp.bfloat16),
    )
    assert bank_grad.dtype == jnp.bfloat16
    expected = jnp.asarray(grad.sum(0), jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_array_equal(bank_grad[-1].astype(jnp.float32), np.broadcast_to(expected, (2, 3)))


def test_nan_of_one_expert_stays_with_it() -> None:
    """A diverged expert, or a NaN in one expert's row, leaves the other experts' results finite."""
    shape, sizes = oracle.SHAPES[0], [40, 8, 0, 16]
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((shape.rows, shape.width)).astype(np.float32)
    bank = rng.standard_normal((shape.experts, shape.width, shape.hidden)).astype(np.float32)
    grad = rng.standard_normal((shape.rows, shape.hidden)).astype(np.float32)
    rows[45], bank[1] = np.nan, np.nan
    out, rows_grad, bank_grad = compiled("xla")(jnp.array(sizes), grad, rows, bank)
    others = np.r_[0:40, 48:64]
    assert np.isfinite(np.asarray(out)[others]).all()
    assert np.isfinite(np.asarray(rows_grad)[others]).all()
    assert np.isfinite(np.asarray(bank_grad)[[0, 2, 3]]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows(implementation: Implementation) -> None:
    bank = jnp.ones((2, 3, 4))
    out, _, bank_grad = compiled(implementation)(jnp.zeros(2, jnp.int32), jnp.zeros((0, 4)), jnp.zeros((0, 3)), bank)
    assert out.shape == (0, 4)
    assert not bank_grad.any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map(implementation: Implementation) -> None:
    """A replicated bank with sharded rows: the derivative must vary over the mesh as JAX's checks demand."""
    sizes, rows, bank = jnp.array([10, 2]), jnp.ones((16, 3)), jnp.ones((2, 3, 4))

    def loss(rows: jax.Array, bank: jax.Array) -> jax.Array:
        return (grouped_matmul(rows, bank, make_group_plan(sizes, 16, implementation=implementation)) ** 2).sum()

    def shard_loss(rows: jax.Array, bank: jax.Array) -> jax.Array:
        return jax.lax.psum(loss(rows, bank), "data")

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(shard_loss, mesh=mesh, in_specs=(spec, replicated), out_specs=replicated)
    for ours, plain in zip(
        jax.jit(jax.grad(sharded, (0, 1)))(rows, bank), jax.grad(loss, (0, 1))(rows, bank), strict=True
    ):
        np.testing.assert_allclose(ours, plain, rtol=1e-5)


def test_errors_name_the_argument() -> None:
    plan = make_group_plan(jnp.array([1, 2]), 4)
    rows, bank = jnp.ones((4, 3)), jnp.ones((2, 3, 5))
    for bad_rows, bad_bank, message in (
        (rows[0], bank, r"rows_RK has shape \(3,\).*4 rows"),
        (rows[:3], bank, r"rows_RK has shape \(3, 3\).*4 rows"),
        (rows[:, :2], bank, r"rows_RK has shape \(4, 2\); expected \[R, 3\]"),
        (rows.astype(int), bank, r"rows_RK has dtype int32; expected a floating"),
        (rows, bank[0], r"bank_EKN has shape \(3, 5\).*2 experts"),
        (rows, bank[:1], r"bank_EKN has shape \(1, 3, 5\).*2 experts"),
        (rows, bank.astype(jnp.bfloat16), r"bank_EKN has dtype bfloat16 but rows_RK has float32.*cast"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_matmul(bad_rows, bad_bank, plan)
    with pytest.raises(ValueError, match=r"implementation='fast': expected one of 'auto', 'reference', 'xla'"):
        make_group_plan(jnp.array([1, 2]), 4, implementation="fast")  # type: ignore[arg-type]
