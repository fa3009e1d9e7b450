"""The expert FFN as loops over experts, as wide experts have it on a CPU, against the float64 loop of the oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import grouped_oracle as oracle
from test_grouped_ffn import NAMES, random_arrays
from unipool_jax.kernels import xla_loops
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn, grouped_ffn

SHAPE = oracle.Shape(rows=420, experts=3, width=4, hidden=6)
"""Steps of 32 rows, so turns of at most 384 of the 420."""
SIZES = [[140, 140, 140], [0, 420, 0], [400, 1, 16], [0, 0, 0], [33, 0, 300], [17, 387, 16]]
"""Even; two turns of one expert; turns that would end behind the buffer; nothing; rows of no expert."""


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loops for experts of any width."""
    monkeypatch.setattr(xla_loops, "LEAST_WEIGHTS", 1)


@pytest.mark.usefixtures("loops")
def test_output_and_gradients() -> None:
    def function(rows: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, plan: object) -> jax.Array:
        return grouped_ffn(rows, Bank(gate, up, down), plan)  # type: ignore[arg-type]

    run = oracle.gradients(function, "xla")
    plan = make_group_plan(jnp.array(SIZES[0]), SHAPE.rows, implementation="xla")
    assert xla_loops.step_rows(plan.tiling.block_rows) == 32
    assert xla_loops.suits(jnp.zeros((1, 4)), jnp.zeros((3, 4, 6)), plan)
    for seed, sizes in enumerate(SIZES):
        pairs = (oracle.rounded(array, "float32") for array in random_arrays(SHAPE, sizes, seed))
        operands, exact = zip(*pairs, strict=True)
        results = run(jnp.array(sizes), *operands)
        wanted, magnitudes = oracle.ffn(sizes, *exact), oracle.ffn_magnitudes(sizes, *exact)
        for name, actual, expected, magnitude in zip(NAMES, results, wanted, magnitudes, strict=True):
            oracle.assert_close_per_expert(actual, expected, sizes, "float32", f"{name} of {sizes}", magnitude)


@pytest.mark.usefixtures("loops")
def test_adds_to_a_gradient_inside_a_mesh() -> None:
    """Under `shard_map`, whose loops must carry what varies over the devices as such."""
    sizes = [30, 100, 290]
    cotangent, rows, *weights = (oracle.rounded(array, "float32")[0] for array in random_arrays(SHAPE, sizes, 1))
    bank, start = Bank(*weights), Bank(*(jnp.full(array.shape, 2.0) for array in weights))

    def gradients(
        sizes_E: jax.Array, rows: jax.Array, bank: Bank, start: Bank, cotangent: jax.Array
    ) -> tuple[jax.Array, Bank]:
        plan = make_group_plan(sizes_E, SHAPE.rows, implementation="xla")
        pullback = jax.vjp(lambda rows, sums: accumulating_ffn(rows, bank, sums, plan), rows, start)[1]
        found: tuple[jax.Array, Bank] = pullback((cotangent, start))
        return found

    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharded = jax.shard_map(gradients, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
    _, sums = jax.jit(sharded)(jnp.array(sizes), rows, bank, start, cotangent)
    wanted = oracle.ffn(sizes, *(np.asarray(array, np.float64) for array in (cotangent, rows, *weights)))[2:]
    for name, total, gradient in zip(NAMES[2:], sums, wanted, strict=True):
        np.testing.assert_allclose(total, gradient + 2, rtol=1e-4, atol=1e-4, err_msg=name)


def test_only_wide_experts_with_many_rows_have_loops() -> None:
    """Of a buffer that is larger than what is expected in it, the latter counts."""

    def suits(rows: int, experts: int, width: int, dtype: str = "float32", buffer: int = 0) -> bool:
        sizes_E = jnp.zeros((experts,), jnp.int32)
        plan = make_group_plan(sizes_E, buffer or rows, implementation="xla", expected_rows=rows)
        bank = jax.ShapeDtypeStruct((experts, width, 4 * width), dtype)
        return xla_loops.suits(jnp.zeros((1, 1), dtype), bank, plan)  # type: ignore[arg-type]

    assert suits(2048, 24, 768)
    assert suits(2048, 24, 768, buffer=4096)
    assert not suits(1024, 24, 768)
    assert not suits(1024, 24, 768, buffer=2048)
    assert not suits(2048, 8, 128)
    assert not suits(2048, 8, 768, "bfloat16")
