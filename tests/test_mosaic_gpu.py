"""The Mosaic GPU kernels: interpreted with the race detector against the oracle, and compiled for an absent H100.

What the interpreter cannot see is listed in docs/kernels.md; the compiler answers for alignment and for registers.
"""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from packaging.version import Version

import grouped_oracle as oracle
import test_grouped_ffn as ffn
import test_grouped_matmul as matmul
from planned import needs_gpu_compiler
from test_pallas_gpu import check_absent_gpu
from unipool_jax.config import mesh_rules
from unipool_jax.config.compose import compose_config
from unipool_jax.kernels import mosaic_gpu, mosaic_shared, mosaic_tiles
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn
from unipool_jax.kernels.implementations import hopper_problem, platform_problem

_JAX = Version(jax.__version__)
needs_interpreter = pytest.mark.skipif(
    Version("0.12") > _JAX,
    reason="Mosaic GPU is interpreted from JAX 0.12 on, which needs Python 3.12: make test-newest",
)


@pytest.fixture(autouse=True)
def race_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail on two unordered accesses to the same memory; two blocks, so that there are such."""
    monkeypatch.setattr(mosaic_tiles, "MULTIPROCESSORS", 1)
    if Version("0.12") <= _JAX:
        monkeypatch.setattr(
            mosaic_gpu, "INTERPRET", mosaic_shared.plgpu.InterpretGPUParams(detect_races=True, on_race="raise")
        )


@needs_interpreter
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        (oracle.Shape(64, 4, 64, 128), [21, 0, 0, 32]),  # no expert has all, and two have none
        (oracle.Shape(64, 4, 64, 128), [0, 0, 0, 0]),
        (oracle.Shape(24, 6, 64, 64), [4] * 6),  # experts meet inside a tile of 8 rows
        (oracle.Shape(200, 2, 64, 192), [7, 185]),  # more than a tile of rows, and half a tile of columns
        (oracle.Shape(7, 12, 64, 64), [*[0] * 11, 6]),  # rows to pad
        (oracle.Shape(1, 1, 64, 64), [1]),
    ],
    ids=str,
)
def test_ffn(shape: oracle.Shape, sizes: list[int]) -> None:
    """All passes: rows of no expert hold NaN, and memory that nothing has written does too."""
    ffn.check(shape, sizes, "bfloat16", "mosaic_gpu")


@needs_interpreter
@pytest.mark.parametrize("sizes", [[11, 0, 9], [0, 0, 24]], ids=str)
def test_product(sizes: list[int]) -> None:
    """Both orientations of a bank, and a gradient that starts from zero."""
    matmul.check(oracle.Shape(24, 3, 64, 128), sizes, "bfloat16", "mosaic_gpu")


@needs_interpreter
def test_gradients_add_to_what_is_there() -> None:
    """Each expert's sum is added to its own; the expert without rows is not touched, even where it holds NaN."""
    sizes, rng = [13, 0, 9], np.random.default_rng(0)
    rows, rows_exact = oracle.rounded(oracle.poisoned(rng.standard_normal((24, 64)), sizes), "bfloat16")
    grad, grad_exact = oracle.rounded(oracle.poisoned(rng.standard_normal((24, 128)), sizes), "bfloat16")
    into = rng.standard_normal((3, 64, 128)).astype(np.float32)
    into[1] = -0.0  # Adding zero would make it positive.
    into[1, :, ::2] = np.nan

    @jax.jit
    def backward(into: jax.Array) -> jax.Array:
        plan = make_group_plan(jnp.array(sizes), 24, implementation="mosaic_gpu")
        return mosaic_gpu.bank_gradient(rows, grad, plan, into)

    found = np.asarray(backward(into))
    assert found[1].tobytes() == into[1].tobytes()
    wanted = oracle.matmul(sizes, grad_exact, rows_exact, np.zeros(into.shape))[2]
    np.testing.assert_allclose(found[[0, 2]], (into + wanted)[[0, 2]], atol=1e-4)


@needs_interpreter
def test_nan_of_one_expert_stays_with_it() -> None:
    """A diverged expert, or a NaN in one expert's row or cotangent, leaves the other experts' results finite."""
    shape, sizes = oracle.Shape(24, 4, 64, 64), [9, 4, 0, 9]
    grad, rows, *banks = (jnp.asarray(array, jnp.bfloat16) for array in ffn.random_arrays(shape, sizes, 0))
    rows, grad = rows.at[10].set(jnp.nan), grad.at[9].set(jnp.nan)
    banks = [bank.at[1].set(jnp.nan) for bank in banks]
    out, rows_grad, *bank_grads = ffn.compiled("mosaic_gpu")(jnp.array(sizes), grad, rows, *banks)
    others = np.r_[0:9, 13:24]
    assert np.isfinite(np.asarray(out, np.float32)[others]).all()
    assert np.isfinite(np.asarray(rows_grad, np.float32)[others]).all()
    for bank_grad in bank_grads:
        assert np.isfinite(np.asarray(bank_grad, np.float32)[[0, 2, 3]]).all()


@needs_interpreter
def test_a_scan_over_layers_adds_to_one_gradient() -> None:
    """Two layers with the same experts, and a layer of each expert's own rows: as XLA's products."""
    shape = oracle.Shape(24, 3, 64, 64)
    arrays = ffn.random_arrays(shape, [24, 0, 0], 0)
    grad, rows = (jnp.asarray(array, jnp.bfloat16) for array in arrays[:2])
    bank = Bank(*(jnp.asarray(array, jnp.bfloat16) for array in arrays[2:]))
    sizes = jnp.array([[8, 7, 9], [20, 0, 3]])

    def gradients(implementation: Any) -> Any:
        def layers(rows: jax.Array, sums: Bank) -> tuple[jax.Array, Bank]:
            def layer(carry: tuple[jax.Array, Bank], sizes: jax.Array) -> tuple[tuple[jax.Array, Bank], None]:
                plan = make_group_plan(sizes, 24, implementation=implementation)
                out, sums = accumulating_ffn(carry[0], bank, carry[1], plan)
                return (carry[0] + out, sums), None

            return jax.lax.scan(layer, (rows, sums), sizes)[0]

        zeros = jax.tree.map(lambda weights: jnp.zeros(weights.shape), bank)
        return jax.jit(lambda rows: jax.vjp(layers, rows, zeros)[1]((grad, zeros)))(rows)

    for found, wanted in zip(*(jax.tree.leaves(gradients(name)) for name in ("mosaic_gpu", "xla")), strict=True):
        assert float(jnp.linalg.norm(found - wanted) / jnp.linalg.norm(wanted)) < 1e-2


@pytest.mark.parametrize(("dtype", "width"), [("float32", 64), ("bfloat16", 40)])
def test_other_products_are_those_of_xla(dtype: str, width: int) -> None:
    shape, sizes = oracle.Shape(24, 3, width, 64), [9, 0, 13]
    operands = [jnp.asarray(array, dtype) for array in ffn.random_arrays(shape, sizes, 0)]
    both = (ffn.compiled(name)(jnp.array(sizes), *operands) for name in ("mosaic_gpu", "xla"))
    jax.tree.map(np.testing.assert_array_equal, *both)


def test_where_they_do_not_run_is_said() -> None:
    config = compose_config(["scale=demo", "mesh=single", "kernels.implementation=mosaic_gpu"])
    assert list(mesh_rules.problems(config)) == []
    over = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, expert=2))
    assert list(mesh_rules.problems(over)) == [
        "kernels.implementation=mosaic_gpu: runs on one device, not with mesh.expert=2; set it to auto"
    ]
    assert "made for gpu; on cpu these kernels are interpreted" in str(platform_problem("mosaic_gpu"))
    assert platform_problem("auto") is None
    for kind in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA GH200 480GB", "NVIDIA B200", "NVIDIA A100-SXM4-40GB"):
        said = hopper_problem(kind)
        if Version("0.11") > _JAX:
            assert "needs JAX 0.11" in str(said)
        elif "H" in kind:
            assert said is None
        else:
            assert f"made for Hopper (H100, H200), not {kind}; set kernels.implementation=auto" in str(said)


def test_products_that_go_to_xla_are_said() -> None:
    assert mosaic_gpu.notice("bfloat16", 768, 3072) is None
    for dtype, width in (("float32", 768), ("bfloat16", 800)):
        said = mosaic_gpu.notice(dtype, width, 3072)
        assert f"products of {width} x 3072 in {dtype} are those of kernels.implementation=xla" in str(said)


# The compiler for GPUs, where it is installed: `pip install "unipool_jax[gpu-plan]"`


@needs_gpu_compiler
@pytest.mark.skipif(Version("0.11") > _JAX, reason="these kernels need JAX 0.11")
@pytest.mark.parametrize("rows", [4096, *(pytest.param(rows, marks=pytest.mark.slow) for rows in (16384, 65536))])
def test_ffn_compiles_for_an_absent_h100(
    rows: int, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """No registers are spilled, the gradients are updated in place, and nothing of a bank's size is copied."""
    folder = tmp_path_factory.mktemp("kernels")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
    monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(folder))
    check_absent_gpu("h100", "mosaic_gpu", rows)
    files = [Path(folder, name) for name in os.listdir(folder) if name.endswith(".ptxas")]
    # Equal kernels are compiled once: JAX 0.12 makes one of the gradients of gate and up.
    assert len({file.name.rpartition("_")[0] for file in files}) == 5
    assert {spilled for file in files for spilled in re.findall(r"(\d+) bytes spill", file.read_text())} == {"0"}
