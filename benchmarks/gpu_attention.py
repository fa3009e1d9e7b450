"""Attention on a GPU: cuDNN's kernels and our query blocks, errors and times beside PyTorch's. Needs a GPU.

    python -m benchmarks.gpu_attention                          # 4 x 1,024 and 1 x 8,192 tokens, 12 heads of 64
    python -m benchmarks.gpu_attention --lengths 4096 --window 256

bfloat16, forward and backward. All variants take turns in one process. Errors are of the output and of the gradients
together, relative to our blocks in float32 at full precision.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu_kernels import Run, error, seconds_each, torch_median
from benchmarks.grouped_matmul import environment
from unipool_jax.kernels.attention import PRODUCTS

HEADS, KV_HEADS, CHANNELS, TOKENS = 12, 4, 64, 8192
Operands = list[jax.Array]


def gradients(
    product: Callable[..., jax.Array], segments_BS: jax.Array | None, window: int | None
) -> Callable[..., Any]:
    """The jitted output and gradients of one attention."""

    def run(query: jax.Array, key: jax.Array, value: jax.Array, grad: jax.Array) -> tuple[jax.Array, ...]:
        mixed, pullback = jax.vjp(lambda *operands: product(*operands, segments_BS, window), query, key, value)
        return mixed, *pullback(grad.astype(mixed.dtype))

    return jax.jit(run)


def torch_seconds(operands: Operands, rounds: int) -> float | None:
    """Forward and backward of PyTorch's fused causal attention; None without PyTorch or its CUDA."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    query, key, value, grad = (
        torch.tensor(np.asarray(array, np.float32)).to("cuda", torch.bfloat16).transpose(1, 2).contiguous()
        for array in operands
    )
    for tensor in (query, key, value):
        tensor.requires_grad_()

    def both() -> None:
        mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(mixed, (query, key, value), grad)

    return torch_median(both, rounds)


def compare(length: int, window: int, rounds: int) -> None:
    """Print milliseconds and errors of every variant at one length."""
    random, batch = np.random.default_rng(0), max(1, TOKENS // length)
    shapes = [(batch, length, heads, CHANNELS) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    operands = [jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in shapes]
    wide = [array.astype(jnp.float32) for array in operands]
    segments_BS = jnp.asarray(np.sort(random.integers(0, 5, (batch, length)), axis=1), jnp.int32)
    kinds = {"full": (None, None), f"window {window}": (None, window), "full, documents": (segments_BS, None)}
    print(f"{batch} x {length}")
    runs: dict[str, Run] = {}
    for kind, options in kinds.items():
        with jax.default_matmul_precision("highest"):
            exact = [np.asarray(a) for a in gradients(PRODUCTS["blocks"], *options)(*wide)]
        for name in ("cudnn", "blocks"):
            run = gradients(PRODUCTS[name], *options)
            found = run(*operands)
            errors = [f"{error(a, jnp.asarray(b)):.1e}" for a, b in zip(found, exact, strict=True)]
            print(f"  {kind:20}{name:8}errors of output, gradients of queries, keys, values: {', '.join(errors)}")
            runs[f"{kind:20}{name}"] = functools.partial(run, *operands)
    times = seconds_each(runs, rounds)
    if (seconds := torch_seconds(operands, rounds)) is not None:
        times[f"{'full':20}torch"] = seconds
    fused = times[f"{'full':20}cudnn"]
    for name, seconds in times.items():
        print(f"  {name:32}{1e3 * seconds:9.3f} ms{seconds / fused:8.2f} of cuDNN's full", flush=True)


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    print(f"{environment()}, {jax.devices()[0].device_kind}")
    for length in arguments.lengths:
        compare(length, arguments.window, arguments.rounds)


if __name__ == "__main__":
    main()
