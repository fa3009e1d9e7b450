"""Time of attention, forward and backward, by kind and length, beside PyTorch's scaled dot-product attention.

    python -m benchmarks.attention_cost
    python -m benchmarks.attention_cost --lengths 1024 4096 --window 512 --rounds 9

One sequence of 4 query heads and 2 key-value heads of 64 channels, float32, on the CPU. All contenders take turns; the
table gives the median of the ratios to PyTorch's full causal attention in the same round, with quartiles: of time, and
of the processor time of all threads, which other work on the machine disturbs less. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from unipool_jax.kernels.causal import causal_attention, causal_attention_of_both

HEADS, KV_HEADS, CHANNELS = 4, 2, 64


def ours(kind: str, window: int, operands: list[np.ndarray]) -> Callable[[], None]:
    """A call of a jitted gradient; returns when it is done."""

    def loss(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        if kind == "switch":
            both = causal_attention_of_both(query, key, value, None, window)
            return jnp.sum(both[0]) + jnp.sum(both[1])
        return jnp.sum(causal_attention(query, key, value, window=window if kind == "window" else None))

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    arrays = [jnp.asarray(array) for array in operands]
    return lambda: jax.block_until_ready(gradient(*arrays))


def pytorch(operands: list[np.ndarray]) -> Callable[[], None]:
    """The same of PyTorch's full causal attention."""
    tensors = [torch.from_numpy(array).transpose(1, 2).contiguous().requires_grad_() for array in operands]

    def run() -> None:
        query, key, value = tensors
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        torch.autograd.grad(mixed.sum(), tensors)

    return run


def measure(length: int, window: int, rounds: int) -> dict[str, Any]:
    """Ratios to PyTorch's time by kind: median and quartiles."""
    random = np.random.default_rng(0)
    operands = [
        random.normal(size=(1, length, heads, CHANNELS)).astype(np.float32) for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    calls = {"pytorch": pytorch(operands)}
    calls |= {kind: ours(kind, window, operands) for kind in ("full", "window", "switch")}
    for call in calls.values():
        call()
    clocks = {"over_pytorch": time.perf_counter, "processor_time_over_pytorch": time.process_time}
    seconds: dict[str, dict[str, list[float]]] = {kind: {name: [] for name in calls} for kind in clocks}
    for _ in range(rounds):
        for name, call in calls.items():
            starts = {kind: clock() for kind, clock in clocks.items()}
            call()
            for kind, clock in clocks.items():
                seconds[kind][name].append(clock() - starts[kind])
    found: dict[str, Any] = {"length": length, "window": window}
    for kind, times in seconds.items():
        ratios = {name: np.divide(each, times["pytorch"]) for name, each in times.items() if name != "pytorch"}
        found[kind] = {name: np.quantile(ratio, (0.5, 0.25, 0.75)).round(3).tolist() for name, ratio in ratios.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    for length in arguments.lengths:
        print(json.dumps(measure(length, min(arguments.window, length - 1), arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
