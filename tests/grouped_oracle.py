"""NumPy oracle of grouped products: a float64 loop over experts, written without the package."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.implementations import Implementation

Array = NDArray[np.float64]


class Shape(NamedTuple):
    rows: int
    experts: int
    width: int
    hidden: int


# Between them: blocks smaller and larger than 48 rows, fewer rows than experts, one expert, one row.
SHAPES = (Shape(64, 4, 8, 16), Shape(96, 12, 5, 7), Shape(200, 2, 8, 4), Shape(7, 12, 3, 5), Shape(1, 1, 2, 2))
# Relative to the largest value of the same expert: rounding of inputs is shared with the oracle.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
POISON = (np.nan, np.inf, -np.inf)


@st.composite
def group_sizes(draw: st.DrawFn, shape: Shape) -> list[int]:
    """Sizes that sum to at most the rows: even, skewed, empty groups, one group with everything."""
    cuts = sorted(draw(st.lists(st.integers(0, shape.rows), min_size=shape.experts, max_size=shape.experts)))
    sizes = [end - start for start, end in zip([0, *cuts[:-1]], cuts, strict=True)]
    return draw(st.permutations(sizes))


def edge_sizes(shape: Shape) -> list[list[int]]:
    """The corners of `group_sizes`: none, all in the first, all in the last, even, one row left over."""
    rows, experts = shape.rows, shape.experts
    none = [0] * experts
    even = [rows // experts] * experts
    return [none, [rows, *none[1:]], [*none[1:], rows], even, [*none[1:], rows - 1]]


def rounded(array: Array, dtype: str) -> tuple[jax.Array, Array]:
    """The array in `dtype`, and the same values in float64."""
    device = jnp.asarray(array, dtype)
    return device, np.asarray(device.astype(jnp.float32), np.float64)


def poisoned(array: Array, sizes: list[int]) -> Array:
    """A copy whose rows of no group hold NaN and infinities in turn."""
    array = array.copy()
    tail = array[sum(sizes) :]
    tail[:] = np.resize(POISON, tail.shape)
    return array


def gradients(function: Callable[..., jax.Array], implementation: Implementation) -> Any:
    """Compiled `(sizes, cotangent, *operands) -> (output, *gradients of operands)` of `function(*operands, plan)`."""

    @jax.jit
    def run(sizes_E: jax.Array, cotangent: jax.Array, *operands: jax.Array) -> tuple[jax.Array, ...]:
        plan = make_group_plan(sizes_E, operands[0].shape[0], implementation=implementation)
        output, pullback = jax.vjp(lambda *operands: function(*operands, plan), *operands)
        return output, *pullback(cotangent)

    return run


def _spans(sizes: list[int]) -> list[tuple[int, int, int]]:
    ends = np.cumsum(sizes).tolist()
    return [(expert, end - size, end) for expert, (size, end) in enumerate(zip(sizes, ends, strict=True))]


def matmul(sizes: list[int], grad: Array, rows: Array, bank: Array) -> tuple[Array, ...]:
    """Output, row gradient and bank gradient of the grouped product."""
    out = np.zeros((rows.shape[0], bank.shape[2]))
    rows_grad, bank_grad = np.zeros_like(rows), np.zeros_like(bank)
    for expert, start, end in _spans(sizes):
        out[start:end] = rows[start:end] @ bank[expert]
        rows_grad[start:end] = grad[start:end] @ bank[expert].T
        bank_grad[expert] = rows[start:end].T @ grad[start:end]
    return out, rows_grad, bank_grad


def ffn(sizes: list[int], grad: Array, rows: Array, gate: Array, up: Array, down: Array) -> tuple[Array, ...]:
    """Output and the gradients of rows, gate, up and down of the gated FFN."""
    out, rows_grad = np.zeros_like(rows), np.zeros_like(rows)
    gate_bank, up_bank, down_bank = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)
    for expert, start, end in _spans(sizes):
        x, dy = rows[start:end], grad[start:end]
        a, b = x @ gate[expert], x @ up[expert]
        sigmoid = 1 / (1 + np.exp(-a))
        hidden = a * sigmoid * b
        d_hidden = dy @ down[expert].T
        d_b = d_hidden * a * sigmoid
        d_a = d_hidden * b * sigmoid * (1 + a * (1 - sigmoid))
        out[start:end] = hidden @ down[expert]
        rows_grad[start:end] = d_a @ gate[expert].T + d_b @ up[expert].T
        gate_bank[expert], up_bank[expert], down_bank[expert] = x.T @ d_a, x.T @ d_b, hidden.T @ dy
    return out, rows_grad, gate_bank, up_bank, down_bank


def ffn_magnitudes(
    sizes: list[int], grad: Array, rows: Array, gate: Array, up: Array, down: Array
) -> tuple[Array, ...]:
    """What rounding errors of `ffn` are proportional to: the same sums without cancellation.

    Terms enter with their absolute values, and the slope of SiLU with its largest value, 1.1: near its zero a rounded
    gate product changes the slope by more than the slope itself.
    """
    out, rows_grad = np.zeros_like(rows), np.zeros_like(rows)
    gate_bank, up_bank, down_bank = np.zeros_like(gate), np.zeros_like(up), np.zeros_like(down)
    for expert, start, end in _spans(sizes):
        x, dy = np.abs(rows[start:end]), np.abs(grad[start:end])
        a, b = rows[start:end] @ gate[expert], np.abs(rows[start:end] @ up[expert])
        silu = np.abs(a) / (1 + np.exp(-a))
        d_hidden = np.abs(grad[start:end] @ down[expert].T)
        d_a, d_b = 1.1 * d_hidden * b, d_hidden * silu
        out[start:end] = (silu * b) @ np.abs(down[expert])
        rows_grad[start:end] = d_a @ np.abs(gate[expert]).T + d_b @ np.abs(up[expert]).T
        gate_bank[expert], up_bank[expert], down_bank[expert] = x.T @ d_a, x.T @ d_b, (silu * b).T @ dy
    return out, rows_grad, gate_bank, up_bank, down_bank


def assert_close_per_expert(
    actual: jax.Array, wanted: Array, sizes: list[int], dtype: str, name: str, magnitude: Array | None = None
) -> None:
    """Compare expert by expert, so that an error in a small one cannot hide behind a large one.

    Arrays of three dimensions are banks, those of two are rows; rows of no group must be exactly zero. Errors are
    relative to the expert's largest `magnitude`, by default to its largest value.
    """
    magnitude = wanted if magnitude is None else magnitude
    assert actual.dtype == dtype, name
    values = np.asarray(actual.astype(jnp.float32), np.float64)
    assert values.shape == wanted.shape, name
    assert np.isfinite(values).all(), f"{name} holds a NaN or infinity; sizes {sizes}"
    if wanted.ndim == 2:
        assert not values[sum(sizes) :].any(), f"{name}: rows past the last group are not zero; sizes {sizes}"
    for expert, start, end in _spans(sizes):
        ours, theirs = (a[expert] if wanted.ndim == 3 else a[start:end] for a in (values, wanted))
        if theirs.size:
            error = np.abs(ours - theirs).max()
            scale = np.abs(magnitude[expert] if wanted.ndim == 3 else magnitude[start:end]).max()
            assert error <= TOLERANCE[dtype] * scale, f"{name}, expert {expert}: {error} of {scale}; sizes {sizes}"
