"""The gate's gradient, which a layer leaves to the layer below it: the same sums, and all of them are made."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from planned import needs_compiler, small
from unipool_jax.config.schema import MeshConfig
from unipool_jax.kernels import deferred, pallas_tpu, tpu_call
from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, Products, accumulating_ffn, stacking_ffn
from unipool_jax.kernels.tpu_layouts import stack_shape
from unipool_jax.moe import products as arrays
from unipool_jax.parallel.mesh import make_mesh
from unipool_jax.planner import compilation

LAYERS = 3


@jax.custom_vjp
def put(rows_R2H: jax.Array, stack_LR2H: jax.Array, place: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What an exchange does with rows: into the stack, whose cotangent is passed on."""
    return rows_R2H, stack_LR2H.at[place].set(rows_R2H)


put.defvjp(lambda *operands: (put(*operands), None), lambda _, grads: (*grads, None))


def over_layers(rows_RD: jax.Array, bank: Bank, sums: Bank, sizes_LE: jax.Array, products: Products) -> Any:
    """Rows behind the layers, the accumulator, and the products."""

    def layer(carry: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, None]:
        (rows_RD, sums, products), (sizes_E, place) = carry, inputs
        plan = make_group_plan(sizes_E, rows_RD.shape[0], implementation="pallas_tpu")
        # Gradients and outputs of rows of no group are arbitrary: an exchange sends none of them.
        of_group = jnp.arange(rows_RD.shape[0])[:, None] < plan.offsets[-1]
        sent = jnp.where(of_group, rows_RD, 0).reshape(rows_RD.shape[0], 2, -1)
        halved, stack_LR2H = put(sent, products.rows_LR2H, place)
        products = products._replace(rows_LR2H=stack_LR2H)
        out, sums, products = stacking_ffn(halved, bank, sums, products, place, plan)
        return (rows_RD + jnp.where(of_group, out.reshape(rows_RD.shape), 0), sums, products), None

    places = jnp.arange(LAYERS, dtype=jnp.int32)
    return jax.lax.scan(layer, (rows_RD, sums, products), (sizes_LE, places))[0]


def gradients(rows: jax.Array, bank: Bank, sums: Bank, sizes: jax.Array, grad: jax.Array, products: Products) -> Any:
    """Rows behind the layers, the gradient of the first rows, the bank's gradient added to `sums`, and what is left."""
    (out, _, kept), pullback = jax.vjp(
        lambda rows, sums, products: over_layers(rows, bank, sums, sizes, products), rows, sums, products
    )
    rows_grad, sums, products = pullback((grad, sums, kept))
    if products.pending is not None:
        assert products.rows_LR2H is not None
        sums = sums._replace(gate_EDF=deferred.added(products.pending, products.rows_LR2H, sums.gate_EDF))
    return out, rows_grad, sums, products.pending


def operands(rows: int, experts: int, width: int, hidden: int, dtype: Any) -> tuple[Any, ...]:
    rng = np.random.default_rng(0)
    wide, narrow = (experts, width, hidden), (experts, hidden, width)
    sums = Bank._make(jnp.asarray(rng.normal(0, 0.2, shape), jnp.float32) for shape in (wide, wide, narrow))
    given, grad = (jnp.asarray(rng.normal(size=(rows, width)), dtype) for _ in range(2))
    return given, sums.astype(dtype), sums, grad


def empty(rows: int, experts: int, width: int, hidden: int, dtype: Any) -> Products:
    """Stacks full of NaN, and nothing left."""
    padded, columns = stack_shape(rows, hidden)
    stack = jnp.full((LAYERS, padded, columns), jnp.nan, dtype)
    nothing = jax.tree.map(lambda x: x[0], deferred.nothing_left(1, rows, hidden, experts, dtype, rows))
    nothing = nothing._replace(grad_RF=jnp.full_like(nothing.grad_RF, jnp.nan))
    return Products(stack, stack, jnp.full((LAYERS, rows, 2, width // 2), jnp.nan, dtype), nothing)


def test_what_layers_leave_is_added_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """With simple kernels, against the sum that each layer makes itself; one layer has no rows."""
    calls = []

    def own(rows: jax.Array, place: jax.Array) -> jax.Array:
        return rows[place].reshape(rows.shape[1], -1) if rows.ndim == 4 else rows.reshape(rows.shape[0], -1)

    def matrices(bank: jax.Array, plan: GroupPlan) -> jax.Array:
        """Of each row, zero for rows of no group, in which there may be NaN."""
        return jnp.take(bank, plan.row_group, axis=0, mode="fill", fill_value=0)

    def product(rows: jax.Array, bank: jax.Array, plan: GroupPlan, form: str) -> jax.Array:
        of_group = plan.row_group[:, None] < plan.group_sizes.shape[0]
        return jnp.einsum(form, jnp.where(of_group, rows, 0), matrices(bank, plan))

    def forward(rows: Any, gate: Any, up: Any, down: Any, plan: GroupPlan, *, keep_products: bool, **at: Any) -> Any:
        if not keep_products:
            return rows, ()
        x = own(rows, at["place"])
        first, second = (product(x, bank, plan, "rd,rdf->rf") for bank in (gate, up))
        stacks = [
            stack.at[at["place"], : len(x), : gate.shape[2]].set(kept)
            for stack, kept in zip(at["stacks"], (first, second), strict=True)
        ]
        out = product(jax.nn.silu(first) * second, down, plan, "rf,rfd->rd")
        return out.reshape(len(x), 2, -1), tuple(stacks)

    def row_gradients(grad: Any, gate: Any, up: Any, down: Any, plan: GroupPlan, kept: Any, place: Any) -> Any:
        rows = len(grad)
        first, second = (stack[place, :rows, : gate.shape[2]] for stack in kept)
        hidden, back = jax.vjp(lambda a, b: jax.nn.silu(a) * b, first, second)
        first_grad, second_grad = back(product(grad.reshape(rows, -1), down, plan, "rd,rfd->rf"))
        rows_grad = product(first_grad, gate, plan, "rf,rdf->rd") + product(second_grad, up, plan, "rf,rdf->rd")
        return rows_grad.reshape(grad.shape), hidden, first_grad, second_grad

    def bank_gradient(rows: Any, grad: Any, plan: GroupPlan, into: Any, place: Any = None) -> Any:
        calls.append(into.shape)
        ones = jnp.broadcast_to(jnp.eye(len(into))[:, :, None], (len(into), len(into), 1))
        of_row = product(jnp.ones((plan.row_group.shape[0], 1)), ones, plan, "ro,reo->re")
        x, grad = (jnp.where(plan.row_group[:, None] < len(into), own(a, place), 0) for a in (rows, grad))
        return into + jnp.einsum("re,rk,rn->ekn", of_row, x, grad)

    for function in (row_gradients, bank_gradient):
        monkeypatch.setattr(pallas_tpu, function.__name__, function)
    monkeypatch.setattr(pallas_tpu, "ffn_forward", forward)
    shape = (48, 4, 8, 12, jnp.float32)
    rows, bank, sums, grad = operands(*shape)
    sizes = jnp.asarray([[10, 0, 30, 5], [0, 0, 0, 0], [1, 2, 3, 42]], jnp.int32)
    found = jax.jit(gradients)(rows, bank, sums, sizes, grad, empty(*shape))
    # Traced once: for what the layer above left, for two gradients of the layer, and behind the first layer.
    assert calls == [(4, 8, 12), (4, 8, 12), (4, 12, 8), (4, 8, 12)]

    def plain(rows: jax.Array, bank: Bank) -> jax.Array:
        def layer(rows: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, None]:
            plan = make_group_plan(sizes_E, 48, implementation="reference")
            return rows + accumulating_ffn(rows, bank, bank, plan)[0], None

        return jax.lax.scan(layer, rows, sizes)[0]

    def both(rows: jax.Array, bank: Bank) -> Any:
        out, back = jax.vjp(plain, rows, bank)
        return out, *back(grad)

    out, rows_grad, bank_grad = jax.jit(both)(rows, bank)
    np.testing.assert_allclose(found[0], out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found[1], rows_grad, rtol=1e-4, atol=1e-4)
    for total, start, wanted in zip(found[2], sums, bank_grad, strict=True):
        np.testing.assert_allclose(total, start + wanted, rtol=1e-4, atol=1e-4)
    assert found[3].place == 0.0


def test_each_device_adds_what_its_first_layer_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two replicas of two devices that share experts; what is left is a device's number, its rows ten times it."""
    monkeypatch.setattr(arrays, "added", lambda pending, rows, into: into + jnp.sum(pending.grad_RF) + jnp.sum(rows))
    number_X = jnp.arange(4.0)
    left = deferred.nothing_left(4, 1, 1, 1, jnp.float32, 1)._replace(grad_RF=number_X[:, None, None])
    products = Products(left.grad_RF, left.grad_RF, 10 * number_X.reshape(4, 1, 1, 1, 1), left)
    sums = Bank(*(jnp.full((1, 2, 2, 1, 1), 100.0 * part) for part in range(1, 4)))
    with jax.set_mesh(make_mesh(MeshConfig(2, 1, 2, 1), jax.devices()[:4])):
        gate, up, down = jax.jit(arrays.settled)(sums, products)
    np.testing.assert_array_equal(gate.reshape(2, 2), 100 + 11 * number_X.reshape(2, 2))
    assert float(up.min()) == float(up.max()) == 200
    assert float(down.min()) == float(down.max()) == 300


class LoweredError(Exception):
    """Ends a compilation before it begins, with the program."""


@needs_compiler
def test_a_step_adds_every_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer adds what the one above left, and two of its own; behind the first layer what is left is added."""

    def stop(lowered: Any, options: dict[str, Any]) -> None:
        raise LoweredError(lowered.as_text())

    monkeypatch.setattr(compilation, "_memory", stop)
    config = small("unipool", "model.remat=none", "model.hidden_size=512", "train.microbatch_size=16")
    with pytest.raises(LoweredError) as program:
        compilation.compile_step(config, compilation.topology_mesh(config))
    assert str(program.value).count("grouped_bank_gradient") == 4


@pytest.mark.slow
def test_kernels_give_the_same_bits_now_or_later(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nothing wrote is NaN; groups share blocks of 16 rows; a layer has no rows."""
    monkeypatch.setattr(tpu_call, "INTERPRET", pltpu.InterpretParams(uninitialized_memory="nan"))
    shape = (80, 4, 256, 384, jnp.bfloat16)
    rows, bank, sums, grad = operands(*shape)
    sizes = jnp.asarray([[20, 0, 33, 5], [0, 0, 0, 0], [1, 2, 0, 77]], jnp.int32)
    later = empty(*shape)
    run = jax.jit(gradients)
    found, wanted = (run(rows, bank, sums, sizes, grad, kept) for kept in (later, later._replace(pending=None)))
    for new, old in zip(*map(jax.tree.leaves, (found[:3], wanted[:3])), strict=True):
        assert np.isfinite(np.asarray(old, np.float32)).all()
        np.testing.assert_array_equal(new, old)
