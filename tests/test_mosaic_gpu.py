"""The Mosaic GPU kernels: interpreted with the race detector against the oracle, and compiled for an absent H100.

What the interpreter cannot see is listed in docs/kernels.md; the compiler answers for alignment and for registers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from packaging.version import Version

import grouped_oracle as oracle
import test_grouped_ffn as ffn
import test_grouped_matmul as matmul
from planned import needs_gpu_compiler
from test_pallas_gpu import abstract_ffn
from unipool_jax.config.chips import parse_topology
from unipool_jax.kernels import mosaic_gpu, mosaic_tiles
from unipool_jax.kernels.group_plan import make_group_plan
from unipool_jax.kernels.grouped_ffn import Bank, accumulating_ffn
from unipool_jax.planner import gpu_compiler
from unipool_jax.planner.collectives import parse

_JAX = Version(jax.__version__)
needs_interpreter = pytest.mark.skipif(
    _JAX < Version("0.12"), reason="Mosaic GPU is interpreted from JAX 0.12 on, which needs Python 3.12: make test-newest"
)
# Several tiles to a group and columns that fill half a tile; fewer rows than experts, and no multiple of 8; one expert.
SHAPES = (
    oracle.Shape(64, 4, 64, 128),
    oracle.Shape(96, 12, 128, 64),
    oracle.Shape(304, 2, 64, 192),
    oracle.Shape(7, 12, 64, 64),
    oracle.Shape(1, 1, 64, 64),
)


@pytest.fixture(autouse=True)
def race_detector(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail on two unordered accesses to the same memory; two blocks, so that there are such."""
    monkeypatch.setattr(mosaic_tiles, "MULTIPROCESSORS", 1)
    if _JAX >= Version("0.12"):
        monkeypatch.setattr(mosaic_gpu, "INTERPRET", plgpu.InterpretGPUParams(detect_races=True, on_race="raise"))
    yield


@needs_interpreter
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_edge_sizes(shape: oracle.Shape) -> None:
    uneven = [shape.rows // 3, *[0] * (shape.experts - 2), shape.rows // 2][-shape.experts :]
    for sizes in (*oracle.edge_sizes(shape), uneven):
        matmul.check(shape, sizes, "bfloat16", "mosaic_gpu")
        ffn.check(shape, sizes, "bfloat16", "mosaic_gpu")
