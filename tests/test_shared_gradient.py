"""One gradient buffer for a bank that layers share: its values, and what the compiled program does with memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import grouped_oracle as oracle
from tiny import tiny_batch, tiny_config, tiny_state
from unipool_jax.config.schema import Config
from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn, grouped_ffn
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.model.transformer import forward
from unipool_jax.moe import mixture
from unipool_jax.training.step import make_train_step

# Even, with an expert that no layer uses, and one that takes every row: blocks, tiles and nothing at all.
LAYER_SIZES = ([[16, 16, 0, 16], [30, 0, 0, 34], [64, 0, 0, 0]], [[1, 2, 0, 3], [0, 0, 0, 0], [60, 4, 0, 0]])
SHAPE = oracle.SHAPES[0]


def _operands(dtype: str, layers: int) -> tuple[jax.Array, Bank, jax.Array]:
    """Rows and their cotangent for every layer, and float32 experts."""
    rng = np.random.default_rng(0)
    rows, experts, width, hidden = SHAPE
    x, grad = (jnp.asarray(rng.standard_normal((layers, rows, width)), dtype) for _ in range(2))
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    return (
        x,
        Bank(*(jnp.asarray(rng.standard_normal(shape) / np.sqrt(shape[1]), jnp.float32) for shape in shapes)),
        grad,
    )


@pytest.mark.parametrize("implementation", ["xla", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sizes", LAYER_SIZES, ids=["full", "sparse"])
def test_layers_that_pass_the_accumulator_on_get_the_sum_of_their_gradients(
    sizes: list[list[int]], dtype: str, implementation: Implementation
) -> None:
    x_LRD, accumulator, grad_LRD = _operands(dtype, len(sizes))

    def carried(x_LRD: jax.Array, accumulator: Bank) -> jax.Array:
        bank = accumulator.astype(dtype)

        def layer(accumulator: Bank, inputs: tuple[jax.Array, jax.Array]) -> tuple[Bank, jax.Array]:
            x_RD, sizes_E = inputs
            plan = make_group_plan(sizes_E, x_RD.shape[0], implementation=implementation)
            out_RD, accumulator = accumulating_ffn(x_RD, bank, accumulator, plan)
            return accumulator, out_RD

        return jax.lax.scan(layer, accumulator, (x_LRD, jnp.array(sizes)))[1]

    def layer_by_layer(x_LRD: jax.Array, accumulator: Bank) -> jax.Array:
        plans = [make_group_plan(jnp.array(row), SHAPE.rows, implementation=implementation) for row in sizes]
        return jnp.stack([grouped_ffn(x_RD, accumulator, plan) for x_RD, plan in zip(x_LRD, plans, strict=True)])

    def run(function: Callable[..., jax.Array]) -> tuple[Any, ...]:
        output, pullback = jax.vjp(jax.jit(function), x_LRD, accumulator)
        return output, *pullback(grad_LRD)

    found, expected = run(carried), run(layer_by_layer)
    assert {weights.dtype for weights in found[2]} == {jnp.dtype("float32")}
    assert not any(weights[2].any() for weights in found[2]), "expert 2 has no rows"
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        # The reference sums in another order and the products of narrow rows differ by their rounding.
        tolerance = 1e-5 if dtype == "float32" else 2e-2
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance * np.abs(other).max())


def test_the_gradient_that_arrives_is_added_to_and_unused_experts_pass_it_on_untouched() -> None:
    x, accumulator, grad = (
        operand[0] if isinstance(operand, jax.Array) else operand for operand in _operands("float32", 1)
    )
    plan: GroupPlan = make_group_plan(jnp.array([60, 3, 0, 1]), SHAPE.rows, implementation="xla")
    above = jax.tree.map(lambda weights: jnp.cos(1e3 * weights), accumulator)
    _, pullback = jax.vjp(lambda x, accumulator: accumulating_ffn(x, accumulator, accumulator, plan), x, accumulator)
    own = pullback((grad, jax.tree.map(jnp.zeros_like, accumulator)))[1]
    total = pullback((grad, above))[1]
    for name, arriving, share, found in zip(Bank._fields, above, own, total, strict=True):
        np.testing.assert_array_equal(found[2], arriving[2], err_msg=name)
        np.testing.assert_allclose(found, arriving + share, rtol=1e-5, atol=1e-5, err_msg=name)
        assert share[0].any(), name


def test_products_that_are_computed_again_give_the_same_gradients() -> None:
    """What the backward pass keeps of a layer is then the rows alone."""
    x_LRD, accumulator, grad_LRD = _operands("float32", 1)
    x, grad = x_LRD[0], grad_LRD[0]
    plan: GroupPlan = make_group_plan(jnp.array([60, 3, 0, 1]), SHAPE.rows, implementation="xla")

    def run(keep_products: bool) -> tuple[list[np.ndarray], int]:
        def layer(x: jax.Array, sums: Bank) -> tuple[jax.Array, Bank]:
            return accumulating_ffn(x, accumulator, sums, plan, keep_products)

        (output, _), pullback = jax.vjp(layer, x, accumulator)
        kept = sum(leaf.size for leaf in jax.tree.leaves(pullback))
        return [np.asarray(leaf) for leaf in jax.tree.leaves((output, pullback((grad, accumulator))))], kept

    (kept, most), (again, least) = run(True), run(False)
    for one, other in zip(kept, again, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
    assert most - least >= 2 * SHAPE.rows * accumulator.gate_EDF.shape[2]


def test_errors_name_the_weights_that_do_not_fit_their_accumulator() -> None:
    x, accumulator, _ = _operands("bfloat16", 1)
    plan = make_group_plan(jnp.array([16] * 4), SHAPE.rows)
    bank = accumulator.astype("bfloat16")
    for wrong, message in (
        (bank, r"accumulator.gate_EDF is bfloat16\[4, 8, 16\]; expected float32\[4, 8, 16\]"),
        (accumulator._replace(up_EDF=accumulator.up_EDF[:3]), r"accumulator.up_EDF is float32\[3, 8, 16\]"),
    ):
        with pytest.raises(ValueError, match=message):
            accumulating_ffn(x[0], bank, wrong, plan)


def _loss(config: Config) -> Callable[[Any], jax.Array]:
    tokens = tiny_batch(config).inputs
    bias = jnp.zeros((config.pool.groups, config.layers_per_pool, config.experts_per_pool))

    def loss(params: Any) -> jax.Array:
        logits, stats = forward(config, params, tokens, bias)
        return jnp.mean(jnp.square(logits)) + 1e-3 * jnp.sum(stats.score_sum_AE)

    return loss


def _plain_autodiff(
    rows_RD: jax.Array, bank: Bank, accumulator: Bank, plan: GroupPlan, keep_products: bool
) -> tuple[jax.Array, Bank]:
    return grouped_ffn(rows_RD, accumulator, plan, keep_products), accumulator


@pytest.mark.parametrize(
    ("method", "overrides"),
    [
        ("unipool", ("model.remat=none",)),
        pytest.param("unipool", ("model.remat=moe",), marks=pytest.mark.slow),
        ("unipool", ("model.remat=full", "moe.top_k=2")),
        ("unipool", ("pool.groups=2", "model.compute_dtype=bfloat16")),
        ("vanilla_aux_free", ("pool.groups=2", "moe.top_k=2", "model.remat=moe")),
        pytest.param("shared_layer_aux", ("kernels.implementation=reference",), marks=pytest.mark.slow),
        pytest.param("shared_pool_aux", ("model.remat=moe",), marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_of_plain_autodiff(
    method: str, overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(method, *overrides)
    params = tiny_state(config).params
    found = jax.jit(jax.grad(_loss(config)))(params)
    monkeypatch.setattr(mixture, "accumulating_ffn", _plain_autodiff)
    expected = jax.jit(jax.grad(_loss(config)))(params)
    assert all(np.asarray(leaf).any() for leaf in jax.tree.leaves(found["pools"]["bank"]))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max())), found, expected
    )


def test_micro_batches_leave_the_step_as_plain_autodiff_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("unipool", "train.microbatch_size=4", "model.remat=full")
    batch = tiny_batch(config)
    found, _ = make_train_step(config)(tiny_state(config), batch)
    monkeypatch.setattr(mixture, "accumulating_ffn", _plain_autodiff)
    expected, _ = make_train_step(config)(tiny_state(config), batch)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), found.opt_state, expected.opt_state
    )


def test_the_one_expert_of_a_dense_layer_receives_its_gradient() -> None:
    config = tiny_config("dense")
    params = tiny_state(config).params
    loss = jax.jit(_loss(config))
    gradient = jax.jit(jax.grad(_loss(config)))(params)["pools"]["bank"]
    for name in ("gate", "up", "down"):
        direction = jnp.sign(gradient[name])
        assert direction.any(), name

        def moved(step: float, name: str = name, direction: jax.Array = direction) -> jax.Array:
            bank = params["pools"]["bank"]
            bank = bank | {name: bank[name] + step * direction}
            return loss(params | {"pools": params["pools"] | {"bank": bank}})

        slope = float(moved(1e-3) - moved(-1e-3)) / 2e-3
        assert slope == pytest.approx(float(jnp.sum(jnp.abs(gradient[name]))), rel=0.02), name


# A bank much larger than the activations, of sizes that no other array has.
EXPERTS, WIDTH, HIDDEN = 5, 48, 112
BANK_BYTES = 3 * EXPERTS * WIDTH * HIDDEN * 4


def _large_bank(layers: int, *overrides: str) -> Config:
    return tiny_config(
        "unipool",
        f"model.num_layers={layers}",
        f"model.hidden_size={WIDTH}",
        f"model.ffn_size={HIDDEN}",
        f"pool.experts={EXPERTS}",
        "train.batch_size=4",
        "train.microbatch_size=4",
        *overrides,
    )


def _abstract_params(config: Config) -> Any:
    return jax.eval_shape(lambda: tiny_state(config).params)


def _shapes(jaxpr: jax.extend.core.Jaxpr) -> Iterator[tuple[int, ...]]:
    """Shapes of all values in a program, its inner programs included."""
    for equation in jaxpr.eqns:
        values: list[Any] = [*equation.invars, *equation.outvars]
        yield from (value.aval.shape for value in values)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from _shapes(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("remat", ["none", "moe", "full"])
def test_no_value_of_the_program_holds_the_bank_once_per_layer(remat: str, dtype: str) -> None:
    config = _large_bank(3, f"model.remat={remat}", f"model.compute_dtype={dtype}")
    program = jax.make_jaxpr(jax.value_and_grad(_loss(config)))(_abstract_params(config))
    banks = [s for s in _shapes(program.jaxpr) if s[-3:] in ((EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH))]
    assert len(banks) > 10
    assert {shape[:-3] for shape in banks} <= {(), (1,)}


def _compiled_gradient(config: Config) -> Any:
    return jax.jit(jax.value_and_grad(_loss(config))).lower(_abstract_params(config)).compile()


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_loop_over_layers_makes_nothing_of_the_banks_size(remat: str) -> None:
    """Outside the entry computation an array of the bank's size is only passed along or updated in place."""
    text = _compiled_gradient(_large_bank(3, f"model.remat={remat}")).as_text()
    body = re.sub(r"^ENTRY .*?^}", "", text, flags=re.MULTILINE | re.DOTALL)
    shape = rf"f32\[(?:1,)?{EXPERTS},(?:{WIDTH},{HIDDEN}|{HIDDEN},{WIDTH})\]\S*"
    operations = set(re.findall(rf"= {shape} ([\w-]+)\(", body))
    assert "dynamic-update-slice" in operations
    assert operations <= {"dynamic-update-slice", "get-tuple-element", "parameter", "bitcast", "fusion", "broadcast"}


def test_temporary_memory_does_not_grow_by_a_bank_per_layer() -> None:
    few, many = (
        _compiled_gradient(_large_bank(layers, "model.remat=full")).memory_analysis().temp_size_in_bytes
        for layers in (2, 8)
    )
    assert many - few < BANK_BYTES / 2
