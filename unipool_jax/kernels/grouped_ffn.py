"""Gated expert feed-forward network on a group plan: what the layers above import."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from unipool_jax.kernels import deferred, pallas_tpu, reference
from unipool_jax.kernels.deferred import Pending
from unipool_jax.kernels.group_plan import GroupPlan
from unipool_jax.kernels.grouped_matmul import BACK_ENDS, check_operands, vary_alike
from unipool_jax.kernels.tpu_layouts import stack_shape


class Bank(NamedTuple):
    """The E experts of one pool; expert e computes `(silu(x gate_e) * (x up_e)) down_e`."""

    gate_EDF: jax.Array
    up_EDF: jax.Array
    down_EFD: jax.Array

    def astype(self, dtype: jax.typing.DTypeLike) -> "Bank":
        """The same experts in another dtype."""
        return Bank(*(weights.astype(dtype) for weights in self))


class Products(NamedTuple):
    """What the L layers over a bank keep for the backward pass, in the rows' dtype: gate and up products, and rows.

    A scan over layers that keeps the products of each layer copies them into such arrays, and out of them again. Here
    the kernels write and read one layer of them where it stays.
    """

    gate_LRF: jax.Array
    up_LRF: jax.Array
    rows_LR2H: jax.Array | None = None
    """`[L, R, 2, D / 2]`: the rows, halved, where an exchange between devices has put them; None: a scan keeps them."""
    pending: Pending | None = None
    """Where rows are kept so: what a layer leaves to be done while the layer below it waits for an exchange."""


class Carried(NamedTuple):
    """What goes from layer to layer beside the rows: see `accumulating_ffn` and `stacking_ffn`."""

    accumulator: Bank | None
    products: Products | None


def grouped_ffn(rows_RD: jax.Array, bank: Bank, plan: GroupPlan, keep_products: bool = True) -> jax.Array:
    """SwiGLU of each row with its own expert: `(silu(x Wg) * (x Wu)) Wd` (Shazeer 2020, arXiv:2002.05202).

    SiLU is computed in float32 and products accumulate in float32. Float32 weights are used in the rows' dtype and
    their gradients stay float32; gradients of narrower weights are summed in float32 and rounded once. Rows past the
    last group are zero in the output and in the row gradient and never reach a weight gradient, even where they hold
    NaN. Reverse-mode derivatives only; the backward pass keeps the rows and the gate and up products.

    Args:
        rows_RD: `[R, D]` rows sorted by group.
        bank: experts, of the rows' dtype or float32.
        plan: from `make_group_plan(sizes, R)`; says which implementation computes the products.
        keep_products: whether the backward pass finds the gate and up products, or computes them again.

    Returns:
        `[R, D]` in the rows' dtype.

    Raises:
        ValueError: on shapes or dtypes that do not fit together.
    """
    _check(rows_RD, bank, plan)
    if rows_RD.shape[0] == 0:
        return jnp.zeros_like(rows_RD)
    rows_RD, bank, plan = vary_alike((rows_RD, bank, plan))
    if plan.tiling.implementation == "reference":
        return reference.grouped_ffn(rows_RD, *bank.astype(rows_RD.dtype), plan)
    return _ffn(rows_RD, bank, Carried(None, None), None, plan, keep_products)[0]


def accumulating_ffn(
    rows_RD: jax.Array, bank: Bank, accumulator: Bank, plan: GroupPlan, keep_products: bool = True
) -> tuple[jax.Array, Bank]:
    """`grouped_ffn` for weights that several layers share: the backward pass adds to one gradient, in place.

    Pass the returned accumulator to the next layer that uses the same experts. Forward it is the one that came in.
    Backward its cotangent is the gradient of the layers above; this layer adds its share in float32, touching only
    experts that have rows, and the sum goes to the layer below. A scan over layers that carries the accumulator holds
    one gradient of the bank; differentiating `bank` would make and add one of full size per layer.

    Args:
        rows_RD: `[R, D]` rows sorted by group.
        bank: experts in the rows' dtype; they get no gradient.
        accumulator: float32, shaped as `bank`; its values are not used.
        plan: from `make_group_plan(sizes, R)`.
        keep_products: see `grouped_ffn`.

    Returns:
        `[R, D]` in the rows' dtype, and the accumulator.

    Raises:
        ValueError: on shapes or dtypes that do not fit together.
    """
    _check(rows_RD, bank, plan, accumulator)
    bank = jax.lax.stop_gradient(bank)
    if rows_RD.shape[0] == 0:
        return jnp.zeros_like(rows_RD), accumulator
    rows_RD, bank, accumulator, plan = vary_alike((rows_RD, bank, accumulator, plan))
    if plan.tiling.implementation == "reference":
        # The values of `bank` with the gradient of the accumulator.
        bank = jax.tree.map(lambda weights, sums: sums + jax.lax.stop_gradient(weights - sums), bank, accumulator)
        return reference.grouped_ffn(rows_RD, *bank.astype(rows_RD.dtype), plan), accumulator
    out_RD, (passed_on, _) = _ffn(rows_RD, bank, Carried(accumulator, None), None, plan, keep_products)
    assert passed_on is not None
    return out_RD, passed_on


def stacking_ffn(
    rows_RD: jax.Array, bank: Bank, accumulator: Bank, products: Products, place: jax.Array, plan: GroupPlan
) -> tuple[jax.Array, Bank, Products]:
    """`accumulating_ffn` that keeps its gate and up products in arrays that all layers share.

    Pass both returned values to the next layer. What comes out of the last layer as products is full, and is to be
    given to the backward pass as its own cotangent: each layer reads its part of it and hands it on. They have no
    derivative. With something `pending` the gradient of the gate matrices lacks that of the first layer, which is left
    in the cotangent of the products: `deferred.added` adds it.

    Args:
        rows_RD: `[R, D]` rows sorted by group. If `products` has rows, those of `place` in `[R, 2, D / 2]`; the values
            are then read in `products`, and only the gradient is that of this argument.
        bank: experts in the rows' dtype; they get no gradient.
        accumulator: float32, shaped as `bank`; its values are not used.
        products: of all layers, R and F as `tpu_layouts.stack_shape` pads them; values of other layers are not used.
        place: which of the L layers this is, int32 scalar.
        plan: from `make_group_plan(sizes, R)`, for `pallas_tpu`.

    Returns:
        The outputs in shape and dtype of the rows, the accumulator, and the products. Halved outputs of rows of no
        group are arbitrary.

    Raises:
        ValueError: on shapes or dtypes that do not fit together, or a plan for another implementation.
    """
    _check(rows_RD.reshape(rows_RD.shape[0], -1), bank, plan, accumulator)
    if plan.tiling.implementation != "pallas_tpu":
        raise ValueError(f"the plan is for {plan.tiling.implementation}; only pallas_tpu writes products into stacks")
    wanted = stack_shape(rows_RD.shape[0], bank.gate_EDF.shape[2])
    for name, array in zip(Products._fields[:2], products[:2], strict=True):
        if array.shape[1:] != wanted or array.dtype != rows_RD.dtype:
            raise ValueError(
                f"products.{name} is {array.dtype}{list(array.shape)}; "
                f"expected {rows_RD.dtype}[L, {wanted[0]}, {wanted[1]}]"
            )
    operands = vary_alike((rows_RD, jax.lax.stop_gradient(bank), Carried(accumulator, products), place, plan))
    out_RD, (passed_on, stacks) = _ffn(*operands, True)
    assert passed_on is not None
    assert stacks is not None
    return out_RD, passed_on, stacks


def _check(rows_RD: jax.Array, bank: Bank, plan: GroupPlan, accumulator: Bank | None = None) -> None:
    check_operands({"rows_RD": rows_RD}, bank._asdict(), plan)
    rows, (experts, width, hidden) = rows_RD.shape[0], bank.gate_EDF.shape
    expected = {
        "rows_RD": (rows_RD.shape, (rows, width)),
        "up_EDF": (bank.up_EDF.shape, (experts, width, hidden)),
        "down_EFD": (bank.down_EFD.shape, (experts, hidden, width)),
    }
    for name, (actual, wanted) in expected.items():
        if actual != wanted:
            raise ValueError(f"{name} has shape {actual}; expected {wanted} to fit gate_EDF {bank.gate_EDF.shape}")
    for name, weights, sums in zip(Bank._fields, bank, accumulator or (), strict=accumulator is not None):
        if sums.shape != weights.shape or sums.dtype != jnp.float32:
            raise ValueError(
                f"accumulator.{name} is {sums.dtype}{list(sums.shape)}; "
                f"expected float32{list(weights.shape)} as bank.{name}"
            )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _ffn(
    rows_RD: jax.Array, bank: Bank, carried: Carried, place: jax.Array | None, plan: GroupPlan, keep_products: bool
) -> tuple[jax.Array, Carried]:
    """The products of a back end; an accumulator takes the gradient of the bank, stacks those that are kept."""
    return _products(rows_RD, bank, plan, keep=False)[0], carried


def _products(
    rows_RD: jax.Array, bank: Bank, plan: GroupPlan, *, keep: bool
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    weights = bank.astype(rows_RD.dtype)
    return BACK_ENDS[plan.tiling.implementation].ffn_forward(rows_RD, *weights, plan, keep_products=keep)


def _forward(
    rows_RD: jax.Array, bank: Bank, carried: Carried, place: jax.Array | None, plan: GroupPlan, keep_products: bool
) -> tuple[tuple[jax.Array, Carried], tuple[Any, ...]]:
    if carried.products is not None:
        stacks, dtype = carried.products, rows_RD.dtype
        if stacks.rows_LR2H is not None:
            rows_RD = stacks.rows_LR2H
        out_RD, (gate_LRF, up_LRF) = pallas_tpu.ffn_forward(
            rows_RD, *bank.astype(dtype), plan, keep_products=True, stacks=stacks[:2], place=place
        )
        kept = carried._replace(products=stacks._replace(gate_LRF=gate_LRF, up_LRF=up_LRF))
        return (out_RD, kept), (None if rows_RD.ndim == 4 else rows_RD, bank, place, plan, None)
    out_RD, products = _products(rows_RD, bank, plan, keep=keep_products)
    return (out_RD, carried), (rows_RD, bank, place, plan, products if keep_products else None)


def _backward(
    keep_products: bool, residuals: tuple[Any, ...], cotangents: tuple[jax.Array, Carried]
) -> tuple[jax.Array, Bank | None, Carried, None, None]:
    grad_RD, (gradient, stacks) = cotangents
    rows_RD, bank, place, plan, products = residuals
    gate_EDF, up_EDF, down_EFD = bank.astype(grad_RD.dtype)
    into = None if gradient is None else (gradient.gate_EDF, gradient.up_EDF, gradient.down_EFD)
    if stacks is not None and stacks.pending is not None:
        return *_leaving(grad_RD, cotangents[1], bank, place, plan), None, None
    if stacks is not None:
        rows_grad_RD, sums = pallas_tpu.ffn_backward(
            grad_RD,
            rows_RD if stacks.rows_LR2H is None else stacks.rows_LR2H,
            gate_EDF,
            up_EDF,
            down_EFD,
            plan,
            stacks[:2],
            into,
            place,
        )
        return rows_grad_RD, None, Carried(Bank(*sums), stacks), None, None
    if products is None:
        # The output is not used, so the compiler leaves out the product with the third matrix.
        products = _products(rows_RD, bank, plan, keep=True)[1]
    back_end = BACK_ENDS[plan.tiling.implementation]
    rows_grad_RD, sums = back_end.ffn_backward(grad_RD, rows_RD, gate_EDF, up_EDF, down_EFD, plan, products, into)
    if into is not None:
        return rows_grad_RD, None, Carried(Bank(*sums), None), None, None
    bank_grads = Bank(*(total.astype(weights.dtype) for total, weights in zip(sums, bank, strict=True)))
    return rows_grad_RD, bank_grads, Carried(None, None), None, None


def _leaving(
    grad_RD: jax.Array, carried: Carried, bank: Bank, place: jax.Array, plan: GroupPlan
) -> tuple[jax.Array, None, Carried]:
    """`_backward` that adds the gradient of the gate matrices that the layer above left, and leaves its own.

    Behind the barrier nothing waits for one of the two alone: before it, an exchange of `grad_RD` may still run.
    """
    gradient, stacks = carried
    assert gradient is not None
    assert stacks is not None
    rows_LR2H, pending = stacks.rows_LR2H, stacks.pending
    assert rows_LR2H is not None
    assert pending is not None
    gate_sum_EDF = deferred.added(pending, rows_LR2H, gradient.gate_EDF)
    grad_RD, gate_sum_EDF = jax.lax.optimization_barrier((grad_RD, gate_sum_EDF))
    rows_grad_RD, hidden_RF, gate_grad_RF, up_grad_RF = pallas_tpu.row_gradients(
        grad_RD, *bank.astype(grad_RD.dtype), plan, stacks[:2], place
    )
    up_sum_EDF = pallas_tpu.bank_gradient(rows_LR2H, up_grad_RF, plan, gradient.up_EDF, place)
    down_sum_EFD = pallas_tpu.bank_gradient(hidden_RF, grad_RD, plan, gradient.down_EFD)
    sums = Bank(gate_sum_EDF, up_sum_EDF, down_sum_EFD)
    return rows_grad_RD, None, Carried(sums, stacks._replace(pending=deferred.left(gate_grad_RF, plan, place)))


_ffn.defvjp(_forward, _backward)
