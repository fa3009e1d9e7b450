"""Time of one token behind a long text, by kind of attention: `python -m benchmarks.decoding_cost`.

A model of demo scale with fresh weights, one row, a full cache; on whatever device JAX finds. The kinds take turns. The
table gives the keys that a token reads in each layer, and the median of the ratios to full attention in the same round,
with quartiles: of time, and of the processor time of all threads, which other work on the machine disturbs less.
`switch to full` and `switch to window` are Switch Attention with its gates forced, the two ends of what a trained
router does.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.model.transformer import empty_cache, forward_cached
from unipool_jax.training.state import init_state

TOKENS = 8
"""Tokens of one round."""


def kinds(length: int, window: int) -> dict[str, tuple[Config, int]]:
    """Settings by name, and the keys that a token reads in a layer."""

    def config(*overrides: str) -> Config:
        return compose_config(["scale=demo", "method=unipool", f"data.sequence_length={length}", *overrides])

    narrow = f"attention.window={window}"
    return {
        "full": (config(), length),
        "window": (config("attention.kind=window", narrow), window),
        "switch to full": (config("attention.kind=switch", narrow, "attention.gate=full"), length),
        "switch to window": (config("attention.kind=switch", narrow, "attention.gate=window"), window),
    }


def decoder(config: Config, length: int) -> Callable[[], None]:
    """Decodes the last `TOKENS` tokens of a row of `length`; returns when they are there."""
    state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(0))
    step = jax.jit(functools.partial(forward_cached, config), donate_argnums=3)
    token, held = jnp.ones((1, 1), jnp.int32), [empty_cache(config, 1, length)]

    def run() -> None:
        for place in range(length - TOKENS, length):
            start = jnp.full((1,), place, jnp.int32)
            logits, held[0] = step(state.params, token, state.balance.expert_bias_GNE, held[0], start)
        jax.block_until_ready(logits)

    return run


def main() -> None:
    """Read the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    print(f"jax {jax.__version__} on {jax.local_devices()[0].device_kind}, window {arguments.window}")
    for length in arguments.lengths:
        contenders = kinds(length, arguments.window)
        runs = {name: decoder(config, length) for name, (config, _) in contenders.items()}
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for run in runs.values():
            run()
        for _ in range(arguments.rounds):
            for name, run in runs.items():
                start, used = time.perf_counter(), time.process_time()
                run()
                seconds[name].append((time.perf_counter() - start, time.process_time() - used))
        for name, (_, keys) in contenders.items():
            spans = np.quantile(np.divide(seconds[name], seconds["full"]), (0.5, 0.25, 0.75), axis=0).T
            times, used_times = (f"{middle:.2f} ({low:.2f} to {high:.2f})" for middle, low, high in spans)
            print(f"{length:6} {name:17}{keys:6} keys  {times} of full, {used_times} of its processor time", flush=True)


if __name__ == "__main__":
    main()
