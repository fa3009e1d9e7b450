"""Time of a whole training step of the shared pool, relative to the vanilla mixture of the same budget.

    python -m benchmarks.train_step --case demo
    python -m benchmarks.train_step --case 182m-cut

Contenders take turns within one process, so a slow moment of the machine meets them alike; a ratio is taken in each
round against the first contender, and printed as the median over the rounds with its quartiles. `182m-cut` has the
published layer shape (768 wide, experts of 3072, 8 a layer) in float32 with few layers, a small vocabulary and short
sequences, so that two CPU cores hold it. Tokens are random: routing starts near even, as in a new run.
"""

import argparse
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import jax
import numpy as np

from benchmarks.grouped_matmul import environment
from unipool_jax.compose import compose_config
from unipool_jax.config import Config
from unipool_jax.data.pipeline import Batch
from unipool_jax.training.step import init_state, make_train_step

CASES = {
    "demo": ["scale=demo"],
    "182m-cut": [
        "scale=182m",
        "data=demo",
        "model.num_layers=3",
        "model.vocab_size=8192",
        "model.compute_dtype=float32",
        "data.sequence_length=256",
        "train.batch_size=8",
        "train.microbatch_size=8",
        "loss.switch_group_sequences=8",
    ],
}


@dataclass(frozen=True)
class Contender:
    """Something that trains: `prepare` compiles it and returns a function that makes one step and waits for its end."""

    name: str
    prepare: Callable[[], Callable[[], None]]


def random_batch(config: Config) -> Batch:
    """One batch of random tokens, the same for every contender."""
    shape = (config.train.batch_size, config.data.sequence_length + 1)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], np.ones(tokens[:, 1:].shape, np.float32))


def method(name: str, config: Config) -> Contender:
    """The training step of one of our methods."""

    def prepare() -> Callable[[], None]:
        state = jax.jit(init_state, static_argnums=0)(config, jax.random.key(config.train.seed))
        step, batch = make_train_step(config), jax.device_put(random_batch(config))

        def run() -> None:
            nonlocal state
            state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))

        return run

    return Contender(name, prepare)


def measure(contenders: list[Contender], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round; the order alternates from round to round."""
    steps = {contender.name: contender.prepare() for contender in contenders}
    for step in steps.values():
        step()
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(repeats):
        for name, step in list(steps.items())[:: 1 if turn % 2 == 0 else -1]:
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def report(seconds: Mapping[str, list[float]], tokens: int) -> None:
    """Print one row per contender, relative to the first."""
    base = np.array(next(iter(seconds.values())))
    print(
        f"\n{'':<14}{'step / first':>14}{'quartiles':>16}{'of minima':>11}{'rounds':>8}  tokens/s (this machine only)"
    )
    for name, values in seconds.items():
        low, middle, high = np.quantile(np.array(values) / base, [0.25, 0.5, 0.75])
        minima = min(values) / base.min()
        rate = tokens / np.median(values)
        print(f"{name:<14}{middle:>14.3f}{f'{low:.3f} - {high:.3f}':>16}{minima:>11.3f}{len(values):>8}{rate:>10.0f}")


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="demo")
    parser.add_argument("--methods", nargs="+", default=["vanilla", "unipool"], help="the first is what is divided by")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("overrides", nargs="*", help="settings for all methods, as train.py takes them")
    arguments = parser.parse_args()
    configs = {
        name: compose_config([*CASES[arguments.case], f"method={name}", *arguments.overrides])
        for name in arguments.methods
    }
    first = next(iter(configs.values()))
    tokens = first.train.batch_size * first.data.sequence_length
    print(environment())
    print(
        f"{arguments.case}: {first.model.num_layers} layers, {first.model.hidden_size} wide, experts of "
        f"{first.model.ffn_size}, {first.moe.experts_per_layer} a layer, {tokens} tokens a step, "
        f"{first.model.compute_dtype}, remat {first.model.remat}"
    )
    report(measure([method(name, config) for name, config in configs.items()], arguments.repeats), tokens)


if __name__ == "__main__":
    main()
