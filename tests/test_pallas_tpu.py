"""The TPU kernels: in the TPU interpreter with its race detector against the oracle, and through the TPU's compiler."""

import functools
import importlib.util
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # the detector's verdict has no public name
from jax.experimental import topologies
from jax.experimental.pallas import tpu as pltpu

import grouped_oracle as oracle
import test_grouped_ffn
import test_grouped_matmul
from unipool_jax.kernels import pallas_tpu, tpu_call, tpu_tiles
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn, grouped_ffn

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is built for Linux on x86 only"
)
# Groups that meet inside a block of 16 rows and groups of several tiles, in two tiles of columns.
WIDE = oracle.Shape(rows=100, experts=6, width=256, hidden=128)


@pytest.fixture(autouse=True)
def race_detector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run with uninitialized memory full of NaN, and fail on two unordered accesses to the same memory."""
    monkeypatch.setattr(tpu_call, "INTERPRET", pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan"))
    interpret_pallas_call.races = None
    yield
    assert interpret_pallas_call.races is None or not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", oracle.SHAPES, ids=str)
def test_product_at_edge_sizes(shape: oracle.Shape, dtype: str) -> None:
    for sizes in oracle.edge_sizes(shape):
        test_grouped_matmul.check(shape, sizes, dtype, "pallas_tpu")


@pytest.mark.parametrize(("shape", "dtype"), [(oracle.SHAPES[0], "bfloat16"), (oracle.SHAPES[1], "float32")], ids=str)
def test_ffn_at_edge_sizes(shape: oracle.Shape, dtype: str) -> None:
    for sizes in oracle.edge_sizes(shape):
        test_grouped_ffn.check(shape, sizes, dtype, "pallas_tpu")


def test_any_sizes_in_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 32 rows, or 16 of them, and 128 columns, so that groups have several of them and share blocks."""
    monkeypatch.setattr(tpu_tiles, "tile_rows", lambda *_: 32)
    monkeypatch.setattr(tpu_tiles, "row_counts", lambda *_: (16, 32))
    monkeypatch.setattr(tpu_tiles, "columns", lambda *_: 128)
    # Compiled within this test only: a cached program would have other tiles.
    for module in (test_grouped_matmul, test_grouped_ffn):
        monkeypatch.setattr(module, "compiled", functools.cache(module.compiled.__wrapped__))

    @settings(max_examples=4, deadline=None)
    @given(sizes=oracle.group_sizes(WIDE), dtype=st.sampled_from(["float32", "bfloat16"]), seed=st.integers(0, 99))
    def check(sizes: list[int], dtype: str, seed: int) -> None:
        test_grouped_matmul.check(WIDE, sizes, dtype, "pallas_tpu", seed)

    check()
    test_grouped_ffn.check(WIDE, [3, 0, 70, 1, 9, 10], "float32", "pallas_tpu")


def test_a_tile_with_few_rows_is_computed_as_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in tiles of 48 rows, of which 48, 16, 32 and 48 hold rows of a group."""
    monkeypatch.setattr(tpu_tiles, "tile_rows", lambda *_: 48)
    sizes, rng = [60, 0, 20, 35], np.random.default_rng(0)
    rows, bank = rng.standard_normal((130, 128), np.float32), rng.standard_normal((4, 128, 128), np.float32)
    rows[sum(sizes) :] = np.nan
    outputs = []
    for counts in ((48,), (16, 32, 48)):
        monkeypatch.setattr(tpu_tiles, "row_counts", lambda *_, counts=counts: counts)
        plan = make_group_plan(jnp.array(sizes), len(rows), implementation="pallas_tpu")
        outputs.append(np.asarray(pallas_tpu.matmul(jnp.asarray(rows), jnp.asarray(bank), plan, transpose_bank=False)))
    wanted = np.zeros((130, 128), np.float32)
    for start, size, matrix in zip(np.cumsum(sizes) - sizes, sizes, bank, strict=True):
        wanted[start : start + size] = rows[start : start + size] @ matrix
    np.testing.assert_allclose(outputs[0], wanted, atol=1e-4)
    np.testing.assert_array_equal(outputs[1], outputs[0])


def accumulate(into: np.ndarray, rows: np.ndarray, grad: np.ndarray, sizes: list[int]) -> np.ndarray:
    plan = make_group_plan(jnp.array(sizes), len(rows), implementation="pallas_tpu")
    return np.asarray(pallas_tpu.bank_gradient(jnp.asarray(rows), jnp.asarray(grad), plan, jnp.asarray(into)))


def test_bank_gradient_is_added_and_idle_experts_are_not_touched() -> None:
    rng = np.random.default_rng(0)
    sizes = [5, 0, 90, 0, 11]
    rows, grad = rng.standard_normal((120, 128), np.float32), rng.standard_normal((120, 256), np.float32)
    rows[sum(sizes) :] = np.nan
    into = rng.standard_normal((5, 128, 256), np.float32)
    into[[1, 3]] = np.nan
    added = accumulate(into, rows, grad, sizes)
    assert np.isnan(added[[1, 3]]).all()
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            wanted = into[expert] + rows[start : start + size].T @ grad[start : start + size]
            np.testing.assert_allclose(added[expert], wanted, atol=1e-4)
        start += size
    np.testing.assert_array_equal(accumulate(into, rows, grad, [0] * 5), into)


def test_nan_of_one_expert_stays_with_it() -> None:
    """Group 1 shares blocks of 16 rows with both its neighbors."""
    sizes, rng = [40, 8, 0, 16], np.random.default_rng(0)
    rows, bank = rng.standard_normal((64, 8), np.float32), rng.standard_normal((4, 8, 16), np.float32)
    grad = rng.standard_normal((64, 16), np.float32)
    rows[45], bank[1] = np.nan, np.nan
    run = oracle.gradients(pallas_product, "pallas_tpu")
    out, rows_grad, bank_grad = map(np.asarray, run(jnp.array(sizes), grad, rows, bank))
    others = np.r_[0:40, 48:64]
    assert np.isfinite(out[others]).all()
    assert np.isfinite(rows_grad[others]).all()
    assert np.isfinite(bank_grad[[0, 2, 3]]).all()


def pallas_product(*operands: Any) -> jax.Array:
    return test_grouped_matmul.grouped_matmul(*operands)


def test_a_mesh_without_tpus_is_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"pallas_tpu: cannot be interpreted on a mesh of cpu devices; set"):
        test_grouped_matmul.test_inside_shard_map("pallas_tpu")


@pytest.mark.parametrize("expected", [1, 10, 21.3, 57, 171, 683, 5000])
def test_rows_of_a_tile_follow_the_groups(expected: float) -> None:
    for kind in ("TPU v5", "TPU v9000"):
        tile_rows = tpu_tiles.tile_rows(kind, expected)
        assert tile_rows % tpu_tiles.ROW_ALIGNMENT == 0
        assert min(256, expected / 4) <= tile_rows <= 512


@pytest.mark.parametrize("tile_rows", [32, 224, 256, 288, 352, 384, 512])
def test_counts_of_rows_are_blocks_up_to_the_whole_tile(tile_rows: int) -> None:
    counts = tpu_tiles.row_counts(tile_rows)
    assert list(counts) == sorted(set(counts))
    assert counts[-1] == tile_rows
    assert all(count % tpu_tiles.ROW_ALIGNMENT == 0 for count in counts)
    assert len(counts) == (3 if tile_rows >= 256 else 1)


def test_columns_divide_the_width_and_fit() -> None:
    def columns(width: int, cores: int, vmem: int) -> int:
        return tpu_tiles.columns("TPU v9000", "kernel", width, 1000, 10, vmem, cores)

    assert columns(3072, 1, 10**6) == 3072
    assert columns(3072, 2, 10**6) == 1536
    assert columns(3072, 1, 20_000) == 1536
    assert columns(128, 2, 10**6) == 128
    with pytest.raises(ValueError, match=r"kernel: a tile of 128 columns takes 2,280 bytes, but tiles may use 2,000"):
        columns(128, 1, 2000)


REPLICATED = jax.sharding.PartitionSpec()


@functools.cache
def mesh_of(topology: str, size: int = 1) -> jax.sharding.Mesh:
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return jax.sharding.Mesh(np.array(devices[:size]), ("data",))


def compile_for(mesh: jax.sharding.Mesh, function: Any, arguments: list[Any], donate: tuple[int, ...] = ()) -> Any:
    place = jax.sharding.NamedSharding(mesh, REPLICATED)
    with jax.set_mesh(mesh):
        shapes = [jax.ShapeDtypeStruct(argument.shape, argument.dtype, sharding=place) for argument in arguments]
        return jax.jit(lambda *operands: function(*operands), donate_argnums=donate).lower(*shapes).compile()


TOPOLOGIES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Experts, width, expert width and rows of the published scales, one for each chip; every chip compiles every scale in
# `python -m benchmarks.tpu_kernels --scales ...`.
PUBLISHED = ((96, 768, 3072, 16384), (192, 1536, 6144, 8192), (288, 1024, 4096, 65536), (384, 1024, 4096, 8192))


@needs_compiler
@pytest.mark.parametrize(
    ("topology", "scale"),
    [
        pytest.param(*pair, marks=pytest.mark.slow if pair[0] == "v6e:2x2" else ())
        for pair in zip(TOPOLOGIES, PUBLISHED, strict=True)
    ],
    ids=str,
)
def test_ffn_compiles_for_tpu(topology: str, scale: tuple[int, int, int, int]) -> None:
    """Forward and backward at a published scale; the gradients are added in place."""
    experts, width, hidden, num_rows = scale

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def step(sizes: jax.Array, grad: jax.Array, rows: jax.Array, bank: Any, totals: Any) -> Any:
        plan = make_group_plan(sizes, num_rows, implementation="pallas_tpu")
        gate, up, down = bank
        out, (first, second) = pallas_tpu.ffn_forward(rows, gate, up, down, plan, keep_products=True)
        return out, pallas_tpu.ffn_backward(grad, rows, gate, up, down, plan, (first, second), totals)

    banks = [(experts, width, hidden), (experts, width, hidden), (experts, hidden, width)]
    program = compile_for(
        mesh_of(topology),
        lambda sizes, grad, rows, *banks: step(sizes, grad, rows, banks[:3], banks[3:]),
        [
            array(experts, dtype=jnp.int32),
            *[array(num_rows, width)] * 2,
            *[array(*bank) for bank in banks],
            *[array(*bank, dtype=jnp.float32) for bank in banks],
        ],
        donate=(6, 7, 8),
    )
    memory = program.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * experts * width * hidden * 4
    # What is held between the kernels grows with rows: the gate, up and hidden products and two of their gradients.
    assert memory.temp_size_in_bytes < 6.5 * num_rows * hidden * 2


@needs_compiler
@pytest.mark.parametrize(("topology", "dtype"), list(zip(TOPOLOGIES, ["float32", "bfloat16"] * 2, strict=True)))
def test_products_of_any_size_compile_for_tpu(topology: str, dtype: str) -> None:
    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def gradients(sizes: jax.Array, grad: jax.Array, rows: jax.Array, bank: jax.Array) -> Any:
        plan = make_group_plan(sizes, 1001, implementation="pallas_tpu")
        _, pullback = jax.vjp(lambda rows, bank: pallas_product(rows, bank, plan), rows, bank)
        return pullback(grad)

    sizes = jax.ShapeDtypeStruct((7,), jnp.int32)
    arguments = [sizes, array(1001, 200), array(1001, 100), array(7, 100, 200)]
    compile_for(mesh_of(topology), gradients, arguments)


@needs_compiler
def test_inside_shard_map_compiles_for_tpu() -> None:
    """A replicated bank with sharded rows: the derivative must vary over the mesh as JAX's checks demand."""
    mesh = mesh_of("v5e:2x2", 4)

    def loss(sizes: jax.Array, rows: jax.Array, bank: jax.Array) -> jax.Array:
        plan = make_group_plan(sizes, rows.shape[0], implementation="pallas_tpu")
        return jax.lax.psum((pallas_product(rows, bank, plan) ** 2).sum(), "data")

    sharded = jax.shard_map(
        loss,
        mesh=mesh,
        in_specs=(jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec("data"), REPLICATED),
        out_specs=REPLICATED,
    )
    shapes = [
        jax.ShapeDtypeStruct((12,), jnp.int32),
        *(jax.ShapeDtypeStruct(s, jnp.float32) for s in ((64, 8), (3, 8, 16))),
    ]
    compile_for(mesh, jax.grad(sharded, (1, 2)), shapes)


def scanned_ffn_gradient(num_layers: int, *, shared: bool) -> Any:
    """Compiled for a TPU: the gradient of a bank shared by a scan over layers, carried (`shared`) or by autodiff."""
    rows, experts, width, hidden = 1024, 64, 256, 512

    def loss(accumulator: Bank, sizes_LE: jax.Array, rows_RD: jax.Array) -> jax.Array:
        bank = accumulator.astype(jnp.bfloat16)

        def layer(carry: tuple[jax.Array, Bank], sizes_E: jax.Array) -> tuple[tuple[jax.Array, Bank], None]:
            rows_RD, accumulator = carry
            plan = make_group_plan(sizes_E, rows, implementation="pallas_tpu")
            if shared:
                out_RD, accumulator = accumulating_ffn(rows_RD, bank, accumulator, plan)
            else:
                out_RD = grouped_ffn(rows_RD, bank, plan)
            return (rows_RD + out_RD, accumulator), None

        (rows_RD, _), _ = jax.lax.scan(layer, (rows_RD, accumulator), sizes_LE)
        return jnp.sum(rows_RD.astype(jnp.float32) ** 2)

    wide, narrow = (experts, width, hidden), (experts, hidden, width)
    accumulator = Bank._make(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (wide, wide, narrow))
    sizes = jax.ShapeDtypeStruct((num_layers, experts), jnp.int32)
    mesh = mesh_of("v5e:2x2")
    place = jax.sharding.NamedSharding(mesh, REPLICATED)
    with jax.set_mesh(mesh):
        arguments = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=place),
            (accumulator, sizes, jax.ShapeDtypeStruct((rows, width), jnp.bfloat16)),
        )
        return jax.jit(jax.grad(loss)).lower(*arguments).compile()


def bank_sized_values(program: Any) -> set[str]:
    """Operations in loops whose result is a float32 array of a bank's size, but for those that only name one."""
    entry_from = program.as_text().index("ENTRY")
    found = re.findall(r"= f32\[64,(?:256,512|512,256)\]\S* ([\w-]+)\(", program.as_text()[:entry_from])
    return set(found) - {"parameter", "get-tuple-element", "bitcast"}


@needs_compiler
def test_a_scan_on_tpu_adds_every_layers_gradient_in_place() -> None:
    few, many = (scanned_ffn_gradient(layers, shared=True) for layers in (2, 8))
    assert bank_sized_values(many) == {"custom-call"}
    one_bank = 64 * 3 * 256 * 512 * 4
    growth = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    # Six more layers keep their rows and products, 2.5 KiB per row, and nothing of the bank.
    assert growth < 6 * 1024 * 3 * 1024 < one_bank
    # What the test would see without the shared gradient:
    assert bank_sized_values(scanned_ffn_gradient(2, shared=False)) > {"custom-call"}
