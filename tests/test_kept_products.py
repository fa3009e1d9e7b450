"""Products that layers keep in arrays they share: no other number than kept apart, and no copy of them on a TPU."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import grouped_oracle as oracle
from planned import needs_compiler, small
from test_pallas_tpu import REPLICATED, mesh_of
from unipool_jax.config.compose import compose_config
from unipool_jax.kernels import tpu_passes
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, Products, accumulating_ffn, stacking_ffn
from unipool_jax.kernels.tpu_passes import stack_shape
from unipool_jax.moe.bank import kept_products
from unipool_jax.planner.collectives import Module, parse
from unipool_jax.planner.compilation import compile_step, topology_mesh
from unipool_jax.planner.instructions import Traffic
from unipool_jax.planner.schedule import sequences

SHAPE = oracle.Shape(rows=70, experts=4, width=8, hidden=24)
LAYERS = 2


def layers_over_one_bank(
    rows_RD: jax.Array, bank: Bank, accumulator: Bank, sizes_LE: jax.Array, products: Products | None
) -> tuple[jax.Array, Bank, Products | None]:
    """A scan that carries the accumulator, and the products if there are any."""

    def layer(
        carry: tuple[jax.Array, Bank, Products | None], inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, Bank, Products | None], None]:
        (rows_RD, accumulator, products), (sizes_E, place) = carry, inputs
        plan = make_group_plan(sizes_E, rows_RD.shape[0], implementation="pallas_tpu")
        if products is None:
            out_RD, accumulator = accumulating_ffn(rows_RD, bank, accumulator, plan)
        else:
            out_RD, accumulator, products = stacking_ffn(rows_RD, bank, accumulator, products, place, plan)
        return (rows_RD + out_RD, accumulator, products), None

    places = jnp.arange(sizes_LE.shape[0], dtype=jnp.int32)
    return jax.lax.scan(layer, (rows_RD, accumulator, products), (sizes_LE, places))[0]


def gradients(
    rows_RD: jax.Array, bank: Bank, sums: Bank, sizes_LE: jax.Array, grad_RD: jax.Array, products: Products | None
) -> tuple[jax.Array, jax.Array, Bank]:
    """Rows after the layers, the gradient of the first rows, and `sums` with that of the bank."""
    (out_RD, _, kept), pullback = jax.vjp(
        lambda rows, sums, products: layers_over_one_bank(rows, bank, sums, sizes_LE, products), rows_RD, sums, products
    )
    rows_grad_RD, sums, _ = pullback((grad_RD, sums, kept))
    return out_RD, rows_grad_RD, sums


@pytest.mark.parametrize("sizes", [([20, 0, 33, 5], [0, 1, 0, 69]), ([0] * 4, [16, 16, 0, 30])], ids=str)
def test_products_kept_in_shared_arrays_give_the_same_bits(
    sizes: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that share a block of 16 rows, rows of no group, a layer without rows; arrays full of NaN before."""
    monkeypatch.setattr(tpu_passes, "INTERPRET", pltpu.InterpretParams(uninitialized_memory="nan"))
    rng = np.random.default_rng(0)
    wide, narrow = (SHAPE.experts, SHAPE.width, SHAPE.hidden), (SHAPE.experts, SHAPE.hidden, SHAPE.width)
    sums = Bank._make(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (wide, wide, narrow))
    rows, grad = (jnp.asarray(rng.normal(size=(SHAPE.rows, SHAPE.width)), jnp.bfloat16) for _ in range(2))
    nothing = jnp.full((LAYERS, *stack_shape(SHAPE.rows, SHAPE.hidden)), jnp.nan, jnp.bfloat16)
    run = jax.jit(gradients)
    found, wanted = (
        run(rows, sums.astype(jnp.bfloat16), sums, jnp.asarray(sizes), grad, products)
        for products in (Products(nothing, nothing), None)
    )
    for new, old in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert np.isfinite(np.asarray(old, np.float32)).all()
        np.testing.assert_array_equal(new, old)


def test_products_that_do_not_fit_are_refused() -> None:
    sums = Bank._make(jnp.zeros(shape) for shape in ((4, 8, 24), (4, 8, 24), (4, 24, 8)))
    rows, products = jnp.zeros((70, 8)), Products(*(jnp.zeros((2, 70, 24)) for _ in range(2)))
    plan = make_group_plan(jnp.zeros(4, jnp.int32), 70, implementation="pallas_tpu")
    with pytest.raises(ValueError, match=r"products.gate_LRF is float32\[2, 70, 24\]; expected float32\[L, 80, 128\]"):
        stacking_ffn(rows, sums, sums, products, jnp.zeros((), jnp.int32), plan)
    plan = make_group_plan(jnp.zeros(4, jnp.int32), 70, implementation="xla")
    with pytest.raises(ValueError, match="the plan is for xla; only pallas_tpu writes products into stacks"):
        stacking_ffn(rows, sums, sums, products, jnp.zeros((), jnp.int32), plan)


def test_products_are_kept_where_the_kernels_are_and_nothing_recomputes_them() -> None:
    """One device: all rows of a micro-batch, R and F padded to blocks of 16 rows and 128 columns."""
    shared = ("scale=182m", "train.batch_size=8", "train.microbatch_size=4", "data.sequence_length=18")
    for implementation, remat, kept in (
        ("pallas_tpu", "none", True),
        ("pallas_tpu", "attention", True),
        ("pallas_tpu", "experts", False),
        ("pallas_tpu", "moe", False),
        ("pallas_tpu", "full", False),
        ("xla", "none", False),
    ):
        config = compose_config([*shared, f"kernels.implementation={implementation}", f"model.remat={remat}"])
        found = jax.eval_shape(lambda config=config: kept_products(config))
        assert (found is not None) == kept
        if found is not None:
            layers = config.model.num_layers
            assert {array.shape for array in found} == {(1, layers, 80, config.model.ffn_size)}


def moved_arrays(module: Module, shape: str) -> list[str]:
    """Instructions outside kernels that only move data and whose result has an array of this shape, a pattern."""
    traffic = Traffic(module)
    return [
        line.name
        for name in sequences(module)
        for line in module.computations[name]
        if re.search(shape, line.type) and traffic.moves(name, line) and line.opcode not in ("bitcast", "parameter")
    ]


def compiled_layers(topology: str, *, stacked: bool) -> Module:
    """The gradient of three layers over one bank on one TPU: 512 rows, 64 experts, width 256, expert width 640."""
    wide, narrow, bank = (64, 256, 640), (64, 640, 256), jnp.bfloat16
    place = jax.sharding.NamedSharding(mesh_of(topology), REPLICATED)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def step(rows: jax.Array, sums: Bank, sizes_LE: jax.Array, grad: jax.Array) -> Any:
        empty = Products(*(jax.lax.empty((3, 512, 640), bank) for _ in Products._fields))
        return gradients(rows, sums.astype(bank), sums, sizes_LE, grad, empty if stacked else None)

    sums = Bank._make(shape(*sizes, dtype=jnp.float32) for sizes in (wide, wide, narrow))
    with jax.set_mesh(mesh_of(topology)):
        lowered = jax.jit(step).lower(shape(512, 256), sums, shape(3, 64, dtype=jnp.int32), shape(512, 256))
        text = lowered.compile().as_text()
    assert text is not None
    return parse(text)


@needs_compiler
@pytest.mark.parametrize("topology", ["v5p:2x2x1", pytest.param("v6e:2x2", marks=pytest.mark.slow)])
def test_a_scan_on_tpu_copies_no_kept_products(topology: str) -> None:
    assert moved_arrays(compiled_layers(topology, stacked=True), r"bf16\[(3,)?512,640\]") == []
    # What the test would see if the scan kept them: into the stacked arrays, and out of them.
    assert len(moved_arrays(compiled_layers(topology, stacked=False), r"bf16\[(3,|1,)?512,640\]")) >= 3


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize("microbatch", [8, 16])
def test_a_compiled_step_copies_no_kept_products(topology: str, microbatch: int) -> None:
    """Over fsdp and expert axes: room for 1024 or 2048 rows of 640 channels in each of four layers."""
    config = small("unipool", "model.remat=none", f"mesh.topology={topology}", f"train.microbatch_size={microbatch}")
    module = parse(compile_step(config, topology_mesh(config)).text)
    assert moved_arrays(module, rf"bf16\[([14],)*{microbatch * 128},640\]") == []
