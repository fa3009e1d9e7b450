"""Products that layers keep in arrays they share: no other number than kept apart, and no copy of them on a TPU."""

from __future__ import annotations

import dataclasses
import functools
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
from test_transport import all_to_all_by_definition
from tiny import slow_among, tiny_batch, tiny_config, tiny_state
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config, MeshConfig, Remat
from unipool_jax.kernels import pallas_tpu, tpu_call
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, Products, accumulating_ffn, stacking_ffn
from unipool_jax.kernels.recompute import handed_back, recompute
from unipool_jax.kernels.tpu_layouts import can_be_halved, stack_shape
from unipool_jax.moe import mixture
from unipool_jax.moe import products as arrays
from unipool_jax.moe.products import keeps_products, kept_products, scratch_products
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.planner.collectives import Module, parse
from unipool_jax.planner.compilation import compile_step, topology_mesh
from unipool_jax.planner.instructions import Traffic
from unipool_jax.planner.schedule import sequences
from unipool_jax.training.sharding import batch_sharding, state_shardings
from unipool_jax.training.step import make_train_step

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


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [([20, 0, 33, 5], [0, 1, 0, 69]), ([0] * 4, [16, 16, 0, 30])], ids=str)
def test_products_kept_in_shared_arrays_give_the_same_bits(
    sizes: tuple[list[int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Groups that share a block of 16 rows, rows of no group, a layer without rows; arrays full of NaN before."""
    monkeypatch.setattr(tpu_call, "INTERPRET", pltpu.InterpretParams(uninitialized_memory="nan"))
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


def test_each_layer_finds_its_own_part_where_cotangents_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that keep the sum of a row, a layer multiplies the gradient by it and adds it to the bank's."""

    def forward(rows: jax.Array, *_: Any, stacks: Any = (), place: Any = None, keep_products: bool) -> Any:
        assert keep_products == bool(stacks)
        kept = jnp.sum(rows, axis=1, keepdims=True)
        return rows * rows, tuple(
            stack.at[place, : len(rows)].set(factor * kept) for factor, stack in enumerate(stacks, start=1)
        )

    def backward(grad: jax.Array, rows: jax.Array, *others: Any) -> Any:
        *_, (gate, up), into, place = others
        found = gate[place, : len(rows), :1] + up[place, : len(rows), :1]
        return grad * 2 * rows * found / 3, tuple(total + jnp.sum(found) for total in into)

    monkeypatch.setattr(pallas_tpu, "ffn_forward", forward)
    monkeypatch.setattr(pallas_tpu, "ffn_backward", backward)
    rng = np.random.default_rng(0)
    rows, grad = (rng.normal(size=(SHAPE.rows, SHAPE.width)).astype(np.float32) for _ in range(2))
    wide, narrow = (SHAPE.experts, SHAPE.width, SHAPE.hidden), (SHAPE.experts, SHAPE.hidden, SHAPE.width)
    sums = Bank._make(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (wide, wide, narrow))
    nothing = jnp.full((LAYERS, *stack_shape(SHAPE.rows, SHAPE.hidden)), jnp.nan)
    sizes = jnp.zeros((LAYERS, SHAPE.experts), jnp.int32)
    out, rows_grad, totals = jax.jit(gradients)(rows, sums, sums, sizes, grad, Products(nothing, nothing))
    second = rows + rows * rows
    np.testing.assert_allclose(out, second + second * second, rtol=1e-6)
    for before in (second, rows):
        grad = grad + grad * 2 * before * before.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(rows_grad, grad, rtol=1e-3)
    added = 3 * (rows.sum() + second.sum())
    for total, start in zip(totals, sums, strict=True):
        np.testing.assert_allclose(total - start, np.full(start.shape, added), rtol=1e-4)


@pytest.mark.parametrize("backward", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_kernels_on_stacks_and_halved_rows_give_the_same_bits(backward: bool) -> None:
    """Rows and products at one place of stacks, rows in and out as `[R, 2, D / 2]`; all else is NaN."""
    rng, (rows, experts, width, hidden), sizes = np.random.default_rng(0), (80, 4, 256, 384), [20, 0, 33, 5]
    assert can_be_halved(rows, width, hidden, "bfloat16")

    def draw(*shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), dtype)

    banks = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    operands = (draw(rows, width), draw(rows, width), [draw(*s) for s in banks], [draw(*s, dtype=None) for s in banks])
    end = sum(sizes)
    plain, others = jax.jit(both_ways, static_argnums=0)(backward, jnp.array(sizes), *operands)
    for new, old in zip(*map(jax.tree.leaves, (others, plain)), strict=True):
        assert np.isfinite(np.asarray(old, np.float32)).all()
        if new.shape == (rows, 2, width // 2):
            new, old = new.reshape(rows, width)[:end], old[:end]
        np.testing.assert_array_equal(new, old)
    assert others[0].shape == (rows, 2, width // 2)


def both_ways(backward: bool, sizes: jax.Array, rows: Any, grad: Any, banks: Any, sums: Any) -> Any:
    """What the kernels give for plain arrays, and for stacks and halved rows: outputs, and gradients if `backward`."""
    plan, place, nan = make_group_plan(sizes, len(rows), implementation="pallas_tpu"), jnp.int32(1), jnp.nan
    gate, up, down = banks
    end, row = plan.offsets[-1], jnp.arange(len(rows))[:, None]
    rows, grad = (jnp.where(row < end, array, nan) for array in (rows, grad))
    out, kept = pallas_tpu.ffn_forward(rows, gate, up, down, plan, keep_products=True)
    plain = (
        out,
        pallas_tpu.ffn_backward(grad, rows, gate, up, down, plan, (kept[0], kept[1]), tuple(sums))
        if backward
        else None,
    )
    halved, halved_grad = (array.reshape(len(rows), 2, -1) for array in (rows, grad))
    stack = jnp.full((3, *halved.shape), nan, rows.dtype).at[1].set(halved)
    stacks = [jnp.full((3, len(rows), banks[0].shape[2]), nan, rows.dtype)] * 2
    out, kept = pallas_tpu.ffn_forward(stack, gate, up, down, plan, keep_products=True, stacks=stacks, place=place)
    if not backward:
        return plain, (out, None)
    return plain, (
        out,
        pallas_tpu.ffn_backward(halved_grad, stack, gate, up, down, plan, (kept[0], kept[1]), tuple(sums), place),
    )


@jax.custom_vjp
def square_into(rows: jax.Array, written: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Squares, and an array in which the backward pass looks for the rows."""
    return rows * rows, written + rows


square_into.defvjp(
    lambda rows, written: (square_into(rows, written), None),
    lambda _, cotangents: (2 * cotangents[0] * cotangents[1], cotangents[1]),
)


def test_a_recomputed_function_finds_what_it_wrote_where_cotangents_are() -> None:
    def in_scratch(rows: jax.Array) -> jax.Array:
        squares, written = square_into(rows, jnp.zeros_like(rows))
        return handed_back(squares, written)

    def plain(rows: jax.Array) -> jax.Array:
        return jnp.square(rows)

    rows, grad = jnp.arange(4.0), jnp.arange(4.0) + 1
    out, pullback = jax.vjp(recompute(plain, in_scratch), rows)
    np.testing.assert_array_equal(out, rows * rows)
    np.testing.assert_array_equal(pullback(grad)[0], 2 * rows * grad)
    assert "square_into" not in str(jax.make_jaxpr(recompute(plain, in_scratch))(rows))


def own_rows(rows: jax.Array, place: Any) -> jax.Array:
    """`[R, D]`, of one layer where `rows` are those of several, halved."""
    return rows[place].reshape(rows.shape[1], -1) if rows.ndim == 4 else rows.reshape(len(rows), -1)


def plain_products(rows: jax.Array, gate: jax.Array, up: jax.Array, plan: Any) -> tuple[jax.Array, jax.Array]:
    own = jnp.arange(len(rows)) < plan.offsets[-1]
    expert = jnp.searchsorted(plan.offsets[1:-1], jnp.arange(len(rows)), side="right")
    rows = jnp.where(own[:, None], rows, 0)
    return jnp.einsum("rd,rdf->rf", rows, gate[expert]), jnp.einsum("rd,rdf->rf", rows, up[expert])


def plain_outputs(gated: jax.Array, raised: jax.Array, down: jax.Array, plan: Any) -> jax.Array:
    expert = jnp.searchsorted(plan.offsets[1:-1], jnp.arange(len(gated)), side="right")
    return jnp.einsum("rf,rfd->rd", jax.nn.silu(gated) * raised, down[expert])


def plain_forward(
    rows: jax.Array, gate: Any, up: Any, down: Any, plan: Any, *, keep_products: bool, stacks: Any = (), place: Any = 0
) -> Any:
    """`pallas_tpu.ffn_forward`, a row at a time."""
    products = plain_products(own_rows(rows, place), gate, up, plan)
    out = plain_outputs(*products, down, plan)
    if rows.ndim > 2:
        out = out.reshape(len(out), 2, -1)
    if not stacks:
        return out, products if keep_products else None
    height, width = products[0].shape
    parts = zip(stacks, products, strict=True)
    return out, tuple(stack.at[place, :height, :width].set(part) for stack, part in parts)


def plain_backward(
    grad: jax.Array, rows: jax.Array, gate: Any, up: Any, down: Any, plan: Any, products: Any, into: Any, place: Any = 0
) -> Any:
    """`pallas_tpu.ffn_backward`, from the products it is given."""
    own = own_rows(rows, place)
    if products[0].ndim == 3:
        products = [stack[place, : len(own), : gate.shape[2]] for stack in products]
    valid = (jnp.arange(len(own)) < plan.offsets[-1])[:, None]
    out_grad = jnp.where(valid, grad.reshape(len(own), -1), 0)
    *product_grads, down_grad = jax.vjp(functools.partial(plain_outputs, plan=plan), *products, down)[1](out_grad)
    rows_grad, *others = jax.vjp(functools.partial(plain_products, plan=plan), own, gate, up)[1](tuple(product_grads))
    sums = zip(into, (*others, down_grad), strict=True)
    return rows_grad.reshape(grad.shape), tuple(total + part for total, part in sums)


@pytest.mark.parametrize("remat", slow_among(["moe", "full"], ["full"]))
def test_a_recomputed_step_in_scratch_gives_the_same_numbers(remat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers over one bank that two devices share; received rows are in scratch, halved, as on a TPU."""
    monkeypatch.setattr(pallas_tpu, "ffn_forward", plain_forward)
    monkeypatch.setattr(pallas_tpu, "ffn_backward", plain_backward)
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", all_to_all_by_definition)
    monkeypatch.setattr(arrays, "can_be_halved", lambda *_: True)
    made, mesh = [], make_mesh(MeshConfig(1, 1, 2, 1), jax.devices()[:2])

    def scratch(config: Config) -> Products | None:
        made.append(scratch_products(config))
        return made[-1]

    def trained(transport: str, implementation: str) -> Any:
        settings = (f"mesh.transport={transport}", f"kernels.implementation={implementation}", f"model.remat={remat}")
        room = ("model.compute_dtype=float32", "model.num_layers=2", "mesh.capacity_factor=2")
        config = tiny_config("unipool", *settings, *room)
        state = jax.device_put(tiny_state(config), state_shardings(config, mesh, tiny_state(config)))
        with jax.set_mesh(mesh):
            batch = jax.device_put(tiny_batch(config), batch_sharding(mesh))
            return jax.device_get(make_train_step(config, mesh)(state, batch))

    wanted = trained("all_gather", "xla")
    monkeypatch.setattr(mixture, "scratch_products", scratch)
    found = trained("ragged", "pallas_tpu")
    assert made
    assert all(products is not None and products.rows_LR2H is not None for products in made)
    for new, old in zip(*map(jax.tree.leaves, (found[0].params, wanted[0].params)), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found[1]["loss/total"], wanted[1]["loss/total"], rtol=1e-6)


def test_products_that_do_not_fit_are_refused() -> None:
    sums = Bank._make(jnp.zeros(shape) for shape in ((4, 8, 24), (4, 8, 24), (4, 24, 8)))
    rows, products = jnp.zeros((70, 8)), Products(jnp.zeros((2, 70, 24)), jnp.zeros((2, 70, 24)))
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
            layers = config.mixture_layers
            assert {array.shape for array in found[:2]} == {(1, layers, 80, config.model.ffn_size)}
            assert found.rows_LR2H is None
            assert found.pending is None


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
        empty = Products(*(jax.lax.empty((3, 512, 640), bank) for _ in range(2)))
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
    assert len(moved_arrays(compiled_layers(topology, stacked=False), r"bf16\[(3,|1,)?512,640\]")) >= 2


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("topology", "width"), [("v5e:2x2", 768), ("v5e:2x2", 1536), ("v5p:2x2x1", 1536)])
def test_kernels_on_halved_rows_compile_for_tpu(topology: str, width: int) -> None:
    """Forward and backward at published widths, 192 rows an expert, in stacks of two layers that are not copied."""
    experts, rows, hidden = 24, 8192, 4 * width
    place = jax.sharding.NamedSharding(mesh_of(topology), REPLICATED)

    def shape(*sizes: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=place)

    def step(sizes: Any, grad: Any, rows_LR2H: Any, gate_LRF: Any, up_LRF: Any, banks: Any, sums: Any, at: Any) -> Any:
        plan, (gate, up, down) = make_group_plan(sizes, rows, implementation="pallas_tpu"), banks
        out, (first, second) = pallas_tpu.ffn_forward(
            rows_LR2H, gate, up, down, plan, keep_products=True, stacks=(gate_LRF, up_LRF), place=at
        )
        grads = pallas_tpu.ffn_backward(grad, rows_LR2H, gate, up, down, plan, (first, second), tuple(sums), at)
        return out, grads, first, second

    banks = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    with jax.set_mesh(mesh_of(topology)):
        assert can_be_halved(rows, width, hidden, "bfloat16")
        lowered = jax.jit(step, donate_argnums=(3, 4, 6)).lower(
            shape(experts, dtype=jnp.int32),
            shape(rows, 2, width // 2),
            shape(2, rows, 2, width // 2),
            *[shape(2, rows, hidden)] * 2,
            [shape(*bank) for bank in banks],
            [shape(*bank, dtype=jnp.float32) for bank in banks],
            shape(dtype=jnp.int32),
        )
        text = lowered.compile().as_text()
    assert text is not None
    assert moved_arrays(parse(text), rf"bf16\[(2,)?{rows},") == []


def test_layers_with_experts_of_their_own_keep_products_where_they_add_to_a_gradient() -> None:
    """Over a mesh; and nothing is pending, because the layer below has other experts."""
    config = compose_config(["method=vanilla", "scale=182m", "kernels.implementation=pallas_tpu", "model.remat=none"])
    assert not keeps_products(config, "pallas_tpu", on_mesh=False)
    assert keeps_products(config, "pallas_tpu", on_mesh=True)
    keeps: dict[Remat, bool] = {"attention": True, "moe": False}
    for remat, expected in keeps.items():
        recomputed = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=remat))
        assert keeps_products(recomputed, "pallas_tpu", on_mesh=True) == expected
    assert not keeps_products(compose_config(["method=dense", "model.remat=none"]), "pallas_tpu", on_mesh=True)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "topology", "microbatch"),
    [
        ("unipool", "v5p:2x2x1", 8),
        ("unipool", "v5p:2x2x1", 16),
        ("unipool", "v6e:2x2", 8),
        ("unipool", "v6e:2x2", 16),
        ("vanilla", "v5p:2x2x1", 16),
    ],
)
def test_a_compiled_step_copies_no_kept_products(method: str, topology: str, microbatch: int) -> None:
    """Over fsdp and expert axes: room for 1024 or 2048 rows of 512 and 640 channels in each of four layers.

    On v5p neither are received rows laid out anew, before the kernels or behind them; with several micro-batches they
    are in the pass that counts choices, which keeps nothing.
    """
    size, rows = ("model.hidden_size=512", f"train.microbatch_size={microbatch}"), microbatch * 128
    config = small(method, "model.remat=none", f"mesh.topology={topology}", *size)
    module = parse(compile_step(config, topology_mesh(config)).text)
    assert moved_arrays(module, rf"bf16\[([14],)*{rows},640\]") == []
    if topology.startswith("v5p") and config.num_microbatches == 1:
        assert moved_arrays(module, rf"bf16\[([14],)*({rows},(512|2,256)|{rows // 8},8,2,256)\]") == []


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("remat", ["moe", "full"])
def test_a_recomputed_layer_lays_out_no_received_rows(remat: str) -> None:
    """Only the forward pass does, as they come and before they go: two arrays of 2048 rows a layer."""
    size = ("model.hidden_size=512", "train.microbatch_size=16", f"model.remat={remat}")
    config = small("unipool", "mesh.topology=v5p:2x2x1", "loss.pool_statistics=previous", *size)
    module = parse(compile_step(config, topology_mesh(config)).text)
    found = moved_arrays(module, r"bf16\[([14],)*(2048,(512|2,256)|256,8,2,256)\]")
    assert len(found) == 2, found
