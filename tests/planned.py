"""A model small enough to compile for absent TPUs or GPUs in seconds."""

from __future__ import annotations

import importlib.util

import pytest

from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.planner import gpu_compiler

needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is built for Linux on x86 only"
)
_GPU_COMPILER = gpu_compiler.missing(compose_config(["scale=182m"]))
needs_gpu_compiler = pytest.mark.skipif(_GPU_COMPILER is not None, reason=f"{_GPU_COMPILER}")
SMALL = [
    "mode=plan",
    "mesh.topology=v5p:2x2x1",
    "mesh.data=1",
    "mesh.fsdp=2",
    "mesh.expert=2",
    "model.num_layers=4",
    "model.hidden_size=256",
    "model.num_heads=4",
    "model.ffn_size=640",
    "model.vocab_size=1024",
    "model.compute_dtype=bfloat16",
    "model.remat=full",
    "data.sequence_length=256",
    "train.batch_size=16",
    "train.microbatch_size=8",
    "train.eval_batch_size=8",
    "data.tokenizer=bytes",
    # What the compiler makes of arrays is counted; the kernels of attention count for themselves.
    "kernels.attention=blocks",
]


def small(method: str, *more: str) -> Config:
    """Four layers on four v5p chips, two micro-batches."""
    return compose_config([f"method={method}", *SMALL, *more])
