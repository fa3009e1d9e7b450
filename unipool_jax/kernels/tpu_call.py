"""How the TPU kernels are run: over tiles of columns, compiled for a TPU or interpreted."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from unipool_jax.kernels import tpu_tiles
from unipool_jax.kernels.implementations import target_device_kind
from unipool_jax.kernels.tpu_visits import Visits

# How kernels are interpreted without a TPU; tests turn on the race detector here.
INTERPRET = pltpu.InterpretParams()


def call(
    kernel: Callable[..., None],
    visits: Visits,
    operands: tuple[Any, ...],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    column_tiles: int,
    scratch: tuple[Any, ...],
    in_place: int,
    stacks: Sequence[jax.Array],
    name: str,
    flops: int,
) -> list[jax.Array]:
    """Run a kernel once for each tile of columns; the cores of a device share them.

    Args:
        kernel: is called with references: the visits in scalar memory; each of the operands, in HBM; a list of the
            outputs, in HBM; the scratch.
        visits: of the tiles of rows.
        operands: arrays, or lists of arrays.
        outputs: their shapes.
        column_tiles: size of the kernel's grid.
        scratch: tree of buffers and semaphores.
        in_place: that many of the last operands are overwritten by as many of the last outputs.
        stacks: operands and outputs of which the kernel accesses one layer only.
        name: of the kernel, in profiles.
        flops: of all tiles, for XLA's scheduler.
    """
    in_hbm = pl.BlockSpec(memory_space=pl.ANY)
    arrays: list[Any] = [*jax.tree.leaves(operands), *outputs]
    bytes_accessed = sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays)
    bytes_accessed -= sum((len(stack) - 1) * stack.size // len(stack) * stack.dtype.itemsize for stack in stacks)
    num_inputs = len(visits) + len(arrays) - len(outputs)
    interpret = False if _on_tpu() else INTERPRET
    with seen_as_tpu():
        (results,) = pl.pallas_call(
            kernel,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=(column_tiles,),
                in_specs=jax.tree.map(lambda _: in_hbm, operands),
                out_specs=([in_hbm] * len(outputs),),
                scratch_shapes=scratch,
            ),
            out_shape=([*outputs],),
            input_output_aliases={num_inputs - last: len(outputs) - last for last in range(in_place, 0, -1)},
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel",), vmem_limit_bytes=pltpu.get_tpu_info().vmem_capacity_bytes * 7 // 8
            ),
            cost_estimate=pl.CostEstimate(flops=flops, bytes_accessed=bytes_accessed, transcendentals=0),
            interpret=interpret,
            name=name,
        )(visits, *operands)
    return results


def tile_columns(key: str, width: int, *, fixed_bytes: int, bytes_per_column: int) -> int:
    """Columns of a tile that fits into vector memory with all that goes with it: see `tpu_tiles.columns`."""
    with seen_as_tpu():
        device = pltpu.get_tpu_info()
        # Of the 7/8 that `call` allows a kernel, 1/8 is left to the compiler's temporaries.
        budget = device.vmem_capacity_bytes * 3 // 4
        return tpu_tiles.columns(
            target_device_kind(), key, width, fixed_bytes, bytes_per_column, budget, device.num_cores
        )


def _on_tpu() -> bool:
    """Whether kernels are compiled for a TPU rather than interpreted."""
    return target_device_kind().startswith("TPU")


def seen_as_tpu() -> contextlib.AbstractContextManager[None]:
    """A context in which Pallas sees a TPU: without one, an abstract device that the interpreter emulates."""
    mesh = jax.sharding.get_abstract_mesh()
    if not _on_tpu():
        if not mesh.empty:
            raise NotImplementedError(
                f"kernels.implementation=pallas_tpu: cannot be interpreted on a mesh of {target_device_kind()} "
                "devices; set kernels.implementation=xla"
            )
        mesh = mesh.update(abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"))
    return jax.sharding.use_abstract_mesh(mesh)


def like(array: jax.Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """Shape of an output that varies over the same mesh axes as `array`."""
    return jax.ShapeDtypeStruct(shape, array.dtype, manual_axis_type=jax.typeof(array).manual_axis_type)


def dot(a: jax.Array, b: jax.Array, contract_a: int, contract_b: int) -> jax.Array:
    """Product over one axis of each matrix, accumulated and returned in float32; exact for float32 operands."""
    dimensions = (((contract_a,), (contract_b,)), ((), ()))
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
