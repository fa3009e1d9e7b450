"""The gated expert FFN against a float64 loop over experts: forward and all four gradients."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import grouped_oracle as oracle
from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, grouped_ffn
from unipool_jax.kernels.implementations import Implementation

NAMES = ("output", "rows gradient", "gate gradient", "up gradient", "down gradient")


@cache
def compiled(implementation: Implementation, remat: bool = False) -> Any:
    def function(rows: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, plan: GroupPlan) -> jax.Array:
        return grouped_ffn(rows, Bank(gate, up, down), plan)

    return oracle.gradients(jax.checkpoint(function) if remat else function, implementation)


def random_arrays(shape: oracle.Shape, sizes: list[int], seed: int) -> list[np.ndarray]:
    """Cotangent, rows, gate, up, down."""
    rng = np.random.default_rng(seed)
    rows, experts, width, hidden = shape
    buffers = [oracle.poisoned(rng.standard_normal((rows, width)), sizes) for _ in range(2)]
    banks = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    return [*buffers, *(rng.standard_normal(bank) / np.sqrt(bank[1]) for bank in banks)]


def check(
    shape: oracle.Shape,
    sizes: list[int],
    dtype: str,
    implementation: Implementation,
    seed: int = 0,
    remat: bool = False,
) -> None:
    pairs = (oracle.rounded(array, dtype) for array in random_arrays(shape, sizes, seed))
    operands, exact = zip(*pairs, strict=True)
    results = compiled(implementation, remat)(jnp.array(sizes), *operands)
    wanted, magnitudes = oracle.ffn(sizes, *exact), oracle.ffn_magnitudes(sizes, *exact)
    for name, actual, expected, magnitude in zip(NAMES, results, wanted, magnitudes, strict=True):
        oracle.assert_close_per_expert(actual, expected, sizes, dtype, name, magnitude)


@pytest.mark.parametrize("implementation", ["xla", "reference"])
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


def test_under_checkpoint() -> None:
    check(oracle.SHAPES[0], [50, 0, 3, 6], "float32", "xla", remat=True)


def test_weight_gradients_accumulate_in_float32() -> None:
    """Many tiles of one expert, each contribution below half a bfloat16 step of the sum of the first rows."""
    rows, experts = 4096, 64
    grad = np.full((rows, 1), 1.0)
    grad[:48] = 1024
    results = compiled("xla")(
        jnp.array([rows] + [0] * (experts - 1)),
        jnp.asarray(grad, jnp.bfloat16),
        *(jnp.ones(shape, jnp.bfloat16) for shape in ((rows, 1), *[(experts, 1, 1)] * 3)),
    )
    sigmoid = 1 / (1 + np.exp(-1.0))
    derivatives = (sigmoid * (2 - sigmoid), sigmoid, sigmoid)
    for name, actual, derivative in zip(NAMES[2:], results[2:], derivatives, strict=True):
        np.testing.assert_allclose(float(actual[0, 0, 0]), derivative * grad.sum(), rtol=0.008, err_msg=name)


def test_memory_grows_with_rows_not_with_rows_times_experts() -> None:
    rows, experts, width, hidden = 2048, 64, 32, 64
    shapes = [(rows, width), (rows, width), *[(experts, width, hidden)] * 2, (experts, hidden, width)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = compiled("xla").lower(jax.ShapeDtypeStruct((experts,), jnp.int32), *arguments).compile()
    one_hidden_block = rows * hidden * 4
    assert program.memory_analysis().temp_size_in_bytes < 16 * one_hidden_block < rows * experts * width * 4


def test_errors_name_the_argument() -> None:
    plan = make_group_plan(jnp.array([1, 2]), 4)
    rows, gate, down = jnp.ones((4, 3)), jnp.ones((2, 3, 5)), jnp.ones((2, 5, 3))
    for arguments, message in (
        ((rows[:, :2], gate, gate, down), r"rows_RD has shape \(4, 2\); expected \(4, 3\)"),
        ((rows, gate, gate[..., :4], down), r"up_EDF has shape \(2, 3, 4\); expected \(2, 3, 5\)"),
        ((rows, gate, gate, gate), r"down_EFD has shape \(2, 3, 5\); expected \(2, 5, 3\)"),
        ((rows, gate[:1], gate, down), r"gate_EDF has shape \(1, 3, 5\).*2 experts"),
        ((rows, gate, gate, down.astype(jnp.bfloat16)), r"down_EFD has dtype bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_ffn(arguments[0], Bank(*arguments[1:]), plan)


def test_float32_weights_are_used_in_the_rows_dtype_and_their_gradients_are_not_rounded() -> None:
    shape, sizes = oracle.SHAPES[0], [20, 0, 30, 10]
    arrays = random_arrays(shape, sizes, 0)
    grad, rows = (oracle.rounded(array, "bfloat16")[0] for array in arrays[:2])
    banks = [oracle.rounded(array, "bfloat16")[0] for array in arrays[2:]]
    narrow = compiled("xla")(jnp.array(sizes), grad, rows, *banks)
    wide = compiled("xla")(jnp.array(sizes), grad, rows, *(bank.astype(jnp.float32) for bank in banks))
    np.testing.assert_array_equal(np.asarray(wide[0], np.float32), np.asarray(narrow[0], np.float32))
    for name, one, other in zip(NAMES[2:], wide[2:], narrow[2:], strict=True):
        assert one.dtype == jnp.float32, name
        np.testing.assert_array_equal(np.asarray(one.astype(jnp.bfloat16), np.float32), np.asarray(other, np.float32))
        assert (one != other).any(), name
