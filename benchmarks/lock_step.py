"""What a step costs after the lock, beside the ordinary mixture: time in alternating runs, compiled FLOPs and bytes.

python -m benchmarks.lock_step                       # time at demo scale, in one process
python -m benchmarks.lock_step --cost scale=182m     # of the compiled step alone: nothing is run
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import jax
import numpy as np

from benchmarks.contenders import random_tokens
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.training.state import init_state, state_shapes
from unipool_jax.training.step import make_train_step

MODELS = {
    "vanilla": ["method=vanilla"],
    "unipool": ["method=unipool"],
    "locked": ["method=unipool_lock"],
}


def model(name: str, overrides: list[str]) -> Config:
    """The configuration of one contender; `locked` has the structure after the lock."""
    config = compose_config([*MODELS[name], "mode=describe", *overrides])
    return config.after_lock() if name == "locked" else config


def costs(config: Config) -> dict[str, float]:
    """FLOPs and bytes accessed of one compiled step, as the compiler counts them."""
    shape = (config.train.batch_size, config.data.sequence_length)
    arrays: Any = [jax.ShapeDtypeStruct(shape, kind) for kind in (np.int32, np.int32, np.float32)]
    batch = Batch(*arrays)
    compiled = make_train_step(config).lower(state_shapes(config), batch).compile()  # type: ignore[attr-defined]
    analysis: Any = compiled.cost_analysis()
    return {"flops": analysis["flops"], "bytes": analysis["bytes accessed"]}


def measure(configs: dict[str, Config], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each model's step in each round; models take turns."""
    steps, states = {}, {}
    for name, config in configs.items():
        steps[name] = make_train_step(config)
        states[name] = jax.jit(init_state, static_argnums=0)(config, jax.random.key(0))
    inputs, targets = random_tokens(next(iter(configs.values())))
    batch = jax.device_put(Batch(inputs, targets, np.ones(targets.shape, np.float32)))
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    for turn in range(rounds + 2):
        for name in list(configs)[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            states[name], metrics = steps[name](states[name], batch)
            jax.block_until_ready((states[name], metrics))
            if turn >= 2:  # the first compiles, the second settles
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(values) for name, values in seconds.items()}


def main() -> None:
    """Read the command line and print one line for each model, relative to the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cost", action="store_true", help="compile and count instead of running")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("overrides", nargs="*", help="settings for all models, as `unipool train` takes them")
    arguments = parser.parse_args()
    configs = {name: model(name, arguments.overrides) for name in MODELS}
    print(f"jax {jax.__version__} on {jax.local_devices()[0].device_kind}")
    if arguments.cost:
        first: dict[str, float] = {}
        for name, config in configs.items():
            found = costs(config)
            first = first or found
            parts = (f"{found[kind]:.4g} {kind} ({found[kind] / first[kind]:.4f} x vanilla)" for kind in found)
            print(f"{name:10}{', '.join(parts)}", flush=True)
        return
    seconds = measure(configs, arguments.rounds)
    for name, values in seconds.items():
        ratio = values / seconds["vanilla"]
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        print(
            f"{name:10}{np.median(values):8.3f} s a step, over vanilla {middle:.3f} (quartiles {low:.3f} - {high:.3f})"
        )


if __name__ == "__main__":
    main()
