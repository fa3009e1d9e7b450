"""The GPU kernels: interpreted against the float64 oracle, and lowered to Triton for shapes of real models.

Nothing here runs on a GPU. Interpreting a kernel checks its indices, masks and sums; parsing the Triton modules checks
that what Pallas makes of it is well formed, which lowering alone does not. Where the compiler for GPUs is installed, it
makes machine code of them.
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton

import grouped_oracle as oracle
import test_grouped_ffn as ffn
import test_grouped_matmul as matmul
from planned import needs_gpu_compiler
from unipool_jax.config.chips import parse_topology
from unipool_jax.kernels import gpu_tiles, pallas_gpu
from unipool_jax.kernels.group_plan import GroupPlan, make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn
from unipool_jax.kernels.grouped_matmul import grouped_matmul
from unipool_jax.kernels.implementations import Implementation
from unipool_jax.planner import gpu_compiler
from unipool_jax.planner.collectives import parse

# The shapes of the oracle fit one tile of columns and one step of contraction; this one takes several of both.
SHAPES = (*oracle.SHAPES, oracle.Shape(40, 3, 150, 70))
# Experts, width, expert width of the published models.
SCALES = ((96, 768, 3072), (192, 1024, 4096), (288, 1024, 4096), (384, 1024, 4096), (192, 1536, 6144))
ROWS = 16384


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edge_sizes(shape: oracle.Shape, dtype: str) -> None:
    for sizes in oracle.edge_sizes(shape):
        matmul.check(shape, sizes, dtype, "pallas_gpu")
        ffn.check(shape, sizes, dtype, "pallas_gpu")


@settings(max_examples=20, deadline=None)
@given(data=st.data(), shape=st.sampled_from(SHAPES), dtype=st.sampled_from(["float32", "bfloat16"]))
def test_any_sizes(data: st.DataObject, shape: oracle.Shape, dtype: str) -> None:
    sizes = data.draw(oracle.group_sizes(shape))
    seed = data.draw(st.integers(0, 99))
    matmul.check(shape, sizes, dtype, "pallas_gpu", seed)
    ffn.check(shape, sizes, dtype, "pallas_gpu", seed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_add_to_what_is_there(dtype: str) -> None:
    """Each expert's sum is added to its own; the expert without rows is not touched, even where it holds NaN."""
    shape, sizes = SHAPES[-1], [22, 0, 15]
    pairs = (oracle.rounded(array, dtype) for array in ffn.random_arrays(shape, sizes, 0))
    (grad, rows, *banks), exact = zip(*pairs, strict=True)
    into = [np.random.default_rng(1).standard_normal(bank.shape).astype(np.float32) for bank in banks]
    for there in into:
        there[1] = -0.0  # Adding zero would make it positive.
        there[1, :, ::2] = np.nan

    @jax.jit
    def backward(into: tuple[jax.Array, jax.Array, jax.Array]) -> Any:
        plan = make_group_plan(jnp.array(sizes), shape.rows, implementation="pallas_gpu")
        gate, up, down = banks
        _, (first, second) = pallas_gpu.ffn_forward(rows, gate, up, down, plan, keep_products=True)
        return pallas_gpu.ffn_backward(grad, rows, gate, up, down, plan, (first, second), into)[1]

    wanted, magnitudes = oracle.ffn(sizes, *exact)[2:], oracle.ffn_magnitudes(sizes, *exact)[2:]
    for actual, there, expected, magnitude in zip(backward(tuple(into)), into, wanted, magnitudes, strict=True):
        assert np.asarray(actual[1]).tobytes() == there[1].tobytes()
        total, magnitude = expected + np.nan_to_num(there), magnitude + np.abs(np.nan_to_num(there))
        error = np.abs(np.asarray(actual, np.float64) - total)[[0, 2]].max()
        assert error <= oracle.TOLERANCE[dtype] * magnitude.max()


def test_nan_of_one_expert_stays_with_it() -> None:
    """A diverged expert, or a NaN in one expert's row or cotangent, leaves the other experts' results finite."""
    shape, sizes = oracle.SHAPES[0], [40, 8, 0, 12]
    grad, rows, *banks = (array.astype(np.float32) for array in ffn.random_arrays(shape, sizes, 0))
    rows[45], grad[41] = np.nan, np.nan
    for bank in banks:
        bank[1] = np.nan
    out, rows_grad, *bank_grads = ffn.compiled("pallas_gpu")(jnp.array(sizes), grad, rows, *banks)
    others = np.r_[0:40, 48:64]
    assert np.isfinite(np.asarray(out)[others]).all()
    assert np.isfinite(np.asarray(rows_grad)[others]).all()
    for bank_grad in bank_grads:
        assert np.isfinite(np.asarray(bank_grad)[[0, 2, 3]]).all()


def test_last_expert_with_nan_leaves_rows_of_no_group_zero() -> None:
    rows, bank = jnp.ones((64, 8)), jnp.ones((4, 8, 16)).at[3].set(jnp.nan)
    out, rows_grad, _ = matmul.compiled("pallas_gpu")(jnp.array([10, 0, 0, 5]), jnp.ones((64, 16)), rows, bank)
    assert not out[15:].any()
    assert not rows_grad[15:].any()


def test_tiles_may_run_in_any_order() -> None:
    """The interpreter runs one tile after the other; a GPU does not, so none may write what is another's."""
    shape, sizes = oracle.SHAPES[0], [20, 3, 0, 31]
    _, rows, gate, up, down = (jnp.asarray(array, jnp.float32) for array in ffn.random_arrays(shape, sizes, 0))
    plan = make_group_plan(jnp.array(sizes), shape.rows, implementation="pallas_gpu")
    backwards = replace(plan, tile_group=plan.tile_group[::-1], tile_start=plan.tile_start[::-1])
    one, other = (
        pallas_gpu.ffn_forward(rows, gate, up, down, order, keep_products=True) for order in (plan, backwards)
    )
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_bank_gradient_accumulates_in_float32() -> None:
    """A large contribution, then many that are each below half a bfloat16 step of the sum."""
    rows, grad = jnp.ones((2048, 2), jnp.bfloat16), jnp.full((2048, 3), 0.5, jnp.bfloat16).at[0].set(256)
    plan = make_group_plan(jnp.array([0, 2048]), 2048, implementation="pallas_gpu")
    np.testing.assert_array_equal(pallas_gpu.bank_gradient(rows, grad, plan)[1], np.full((2, 3), 256 + 2047 / 2))


def test_no_rows() -> None:
    matmul.test_no_rows("pallas_gpu")


@given(rows=st.sampled_from([16, 32, 64, 128]), tiles=st.integers(1, 3), extents=st.tuples(*[st.integers(1, 9999)] * 2))
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_are_powers_of_two(rows: int, tiles: int, itemsize: int, extents: tuple[int, int]) -> None:
    for tile in (
        gpu_tiles.row_pass_tile(rows, tiles, itemsize, *extents),
        gpu_tiles.bank_tile(itemsize, *extents),
    ):
        assert all(size >= 16 and size.bit_count() == 1 for size in tile[:3])


# JAX 0.12 wants to know what it lowers for.
GPU = jax.sharding.AbstractDevice("NVIDIA H100", None, "gpu")


def triton_modules(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """Text of the Triton modules in `function` lowered for CUDA, each parsed, which verifies it."""
    modules: list[str] = []

    def visit(operation: ir.Operation) -> ir.WalkResult:
        if operation.name == "stablehlo.custom_call" and "triton" in str(operation.attributes["call_target_name"]):
            with ir.Context() as context:
                triton.register_dialect(context)
                context.load_all_available_dialects()
                source: Any = ir.DictAttr(operation.attributes["mhlo.backend_config"])["ir"]
                module = ir.Module.parse(source.value_bytes)
                modules.append(f"{operation.attributes['output_operand_aliases']}\n{module}")
        return ir.WalkResult.ADVANCE

    with jax.sharding.use_abstract_mesh(jax.sharding.get_abstract_mesh().update(abstract_device=GPU)):
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
    lowered.compiler_ir("stablehlo").operation.walk(visit)
    return modules


def abstract_ffn(
    experts: int, width: int, hidden: int, dtype: str, implementation: Implementation = "pallas_gpu", rows: int = ROWS
) -> tuple[Callable[..., Any], list[Any]]:
    """Forward and backward pass of `accumulating_ffn`, and its arguments."""

    def both_passes(
        sizes: jax.Array, rows: jax.Array, bank: Bank, accumulator: Bank, cotangents: tuple[jax.Array, Bank]
    ) -> Any:
        plan = make_group_plan(sizes, len(rows), implementation=implementation)
        out, pullback = jax.vjp(
            lambda rows, accumulator: accumulating_ffn(rows, bank, accumulator, plan), rows, accumulator
        )
        return out, pullback(cotangents)

    like = jax.ShapeDtypeStruct((rows, width), dtype)
    shapes = ((experts, width, hidden), (experts, width, hidden), (experts, hidden, width))
    bank, accumulator = (
        Bank._make(jax.ShapeDtypeStruct(shape, kind) for shape in shapes) for kind in (dtype, jnp.float32)
    )
    return both_passes, [jax.ShapeDtypeStruct((experts,), jnp.int32), like, bank, accumulator, (like, accumulator)]


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_ffn_lowers_to_triton_at_the_published_scales(scale: tuple[int, int, int]) -> None:
    function, arguments = abstract_ffn(*scale, "bfloat16")
    modules = triton_modules(function, *arguments)
    # Forward: gate and up, down. Backward: hidden and its gradients, rows, three banks, which are updated in place.
    assert len(modules) == 7
    assert sum("output_operand_alias<" in module for module in modules) == 3
    for module in modules:
        assert "tt.dot" in module
        # The interpreter forgives a tile that sticks out of its array; a GPU would read and write the next row.
        for operands in re.findall(r"tt\.(?:load|store) ([^:]*) : tensor", module):
            assert operands.count(",") == 2, f"no mask: {operands}"


def check_absent_gpu(gpu: str, implementation: Implementation, rows: int) -> None:
    """The FFN of 182M compiles; its gradients are updated in place, and nothing of a bank's size is copied."""
    experts, width, hidden = SCALES[0]
    function, arguments = abstract_ffn(experts, width, hidden, "bfloat16", implementation, rows)
    mesh = Mesh(np.array(gpu_compiler.devices(parse_topology(f"{gpu}:1"))), ("one",))
    arguments = jax.tree.map(lambda like: like.update(sharding=NamedSharding(mesh, PartitionSpec())), arguments)
    with jax.set_mesh(mesh):
        compiled = jax.jit(function, donate_argnums=(3, 4)).lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    # The accumulator, and the float32 gradients of gate, up and down, which the kernels add to in place; the rows' too.
    assert memory.alias_size_in_bytes == 2 * 4 * 3 * experts * width * hidden + 2 * rows * width
    # Both products, what the gate makes of them, and the gradients of the two, all `[R, F]`, and one `[R, D]`.
    assert memory.temp_size_in_bytes < 2 * rows * (5 * hidden + width) + 2**20
    assert text is not None
    banks = [f"[{experts},{width},{hidden}]", f"[{experts},{hidden},{width}]"]
    made = [line for line in parse(text).instructions() if any(bank in line[0].type for bank in banks)]
    assert {line.opcode for line, *_ in made} <= {"parameter", "custom-call", "tuple", "get-tuple-element", "bitcast"}


@needs_gpu_compiler
@pytest.mark.parametrize("gpu", ["h100", "b200"])
def test_ffn_compiles_for_absent_gpus_without_copies_of_a_bank(gpu: str) -> None:
    check_absent_gpu(gpu, "pallas_gpu", ROWS)


@pytest.mark.parametrize("scale", SCALES, ids=str)
def test_matmul_lowers_to_triton_at_the_published_scales(scale: tuple[int, int, int]) -> None:
    experts, width, hidden = scale

    def product(rows: jax.Array, bank: jax.Array, plan: GroupPlan) -> jax.Array:
        return grouped_matmul(rows, bank, plan)

    shapes = ((ROWS, hidden), (ROWS, width), (experts, width, hidden))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    function = oracle.gradients(product, "pallas_gpu")
    assert len(triton_modules(function, jax.ShapeDtypeStruct((experts,), jnp.int32), *arguments)) == 3


def test_float32_products_do_not_use_tf32() -> None:
    function, arguments = abstract_ffn(96, 768, 3072, "float32")
    modules = triton_modules(function, *arguments)
    assert len(modules) == 7
    assert not any("tf32" in module for module in modules)


def test_lowers_inside_shard_map() -> None:
    """A replicated bank with sharded rows: results must vary over the mesh as JAX's checks demand."""
    sizes, rows, bank = jnp.array([10, 2]), jnp.ones((16, 3)), jnp.ones((2, 3, 4))

    def loss(rows: jax.Array, bank: jax.Array) -> jax.Array:
        out = grouped_matmul(rows, bank, make_group_plan(sizes, 16, implementation="pallas_gpu"))
        return jax.lax.psum((out**2).sum(), "data")

    mesh = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,), abstract_device=GPU)
    spec, replicated = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    sharded = jax.shard_map(loss, mesh=mesh, in_specs=(spec, replicated), out_specs=replicated)
    assert len(triton_modules(jax.grad(sharded, (0, 1)), rows, bank)) == 3
