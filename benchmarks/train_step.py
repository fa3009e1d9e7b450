"""Time and memory of a training step: ours against the PyTorch twin's, or our methods against each other.

    python -m benchmarks.train_step --case demo
    python -m benchmarks.train_step --case 182m-cut --methods vanilla unipool
    python -m benchmarks.train_step --case demo --against vanilla

Contenders take turns, each in its own process that sleeps meanwhile, so a slow moment of the machine meets them
alike. A ratio is taken in each round against the first contender, and printed as the median over the rounds with its
quartiles: beside PyTorch the first is ours, so a ratio is also how many times as fast as that contender we are.
`182m-cut` has the published layer shape (768 wide, experts of 3072, 8 a layer) in float32 with few layers, a small
vocabulary and short sequences, so that two CPU cores hold it. Tokens are random and weights fresh: routing starts near
even, as in a new run. Without PyTorch, ours runs alone. Unless GLIBC_TUNABLES is set already, all contenders keep freed
memory (`contenders.KEEP_MEMORY`).
"""

import argparse
import os
from collections.abc import Iterator

import numpy as np

from benchmarks.contenders import KEEP_MEMORY, Contender, ContenderError, Kind, Worker, has_torch
from unipool_jax.config.compose import compose_config
from unipool_jax.config.schema import Config

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
METHODS = ["dense", "vanilla", "unipool"]


def measure(workers: list[Worker], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contender's step in each round; the order alternates from round to round."""
    seconds: dict[str, list[float]] = {worker.contender.name: [] for worker in workers}
    for turn in range(repeats):
        for worker in workers[:: 1 if turn % 2 == 0 else -1]:
            seconds[worker.contender.name].append(worker.step())
    return seconds


def report(workers: list[Worker], seconds: dict[str, list[float]], tokens: int) -> None:
    """End the workers and print one row for each, relative to the first."""
    base = np.array(seconds[workers[0].contender.name])
    print(
        f"\n{'':<26}{'step / first':>13}{'quartiles':>16}{'of minima':>11}{'rounds':>8}{'compile s':>11}{'peak MB':>9}"
        "  tokens/s (this machine only)"
    )
    for worker in workers:
        values = np.array(seconds[worker.contender.name])
        low, middle, high = np.quantile(values / base, [0.25, 0.5, 0.75])
        compile_seconds = max(0.0, worker.first_seconds - float(np.median(values)))
        print(
            f"{worker.contender.name:<26}{middle:>13.3f}{f'{low:.3f} - {high:.3f}':>16}"
            f"{values.min() / base.min():>11.3f}{len(values):>8}{compile_seconds:>11.1f}{worker.finish() / 1e6:>9.0f}"
            f"{tokens / np.median(values):>10.0f}",
            flush=True,
        )


def rounds(configs: dict[str, Config], against: str) -> Iterator[list[Contender]]:
    """Contenders that take turns with each other: the frameworks of each method, or all our methods."""
    if against != "pytorch":
        names = [against, *(name for name in configs if name != against)]
        yield [Contender(name, "jax", configs[name]) for name in names]
        return
    kinds: list[Kind] = ["jax", "pytorch", "pytorch-compiled"] if has_torch() else ["jax"]
    for name, config in configs.items():
        yield [Contender(f"{name} {kind}", kind, config) for kind in kinds]


def start(contenders: list[Contender]) -> list[Worker]:
    """Workers of those that can run here; the others are named with the reason."""
    workers = []
    for contender in contenders:
        try:
            workers.append(Worker(contender))
        except ContenderError as error:
            print(f"left out: {error}")
    return workers


def environment() -> str:
    """What the numbers depend on besides the arguments."""
    # Imported here: the contenders' processes import this module and are not to hold JAX for it.
    from benchmarks.grouped_matmul import environment

    if not has_torch():
        return f"{environment()}; PyTorch is not installed"
    import importlib.metadata

    return f"{environment()}; torch {importlib.metadata.version('torch')}"


def main() -> None:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, default="demo")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--against", default="pytorch", help="`pytorch`, or the method that others are divided by")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("overrides", nargs="*", help="settings for all methods, as `unipool train` takes them")
    arguments = parser.parse_args()
    names = dict.fromkeys([*arguments.methods, *([arguments.against] if arguments.against != "pytorch" else [])])
    configs = {name: compose_config([*CASES[arguments.case], f"method={name}", *arguments.overrides]) for name in names}
    first = next(iter(configs.values()))
    os.environ.setdefault("GLIBC_TUNABLES", KEEP_MEMORY)
    print(environment())
    print(
        f"{arguments.case}: {first.model.num_layers} layers, {first.model.hidden_size} wide, experts of "
        f"{first.model.ffn_size}, {first.moe.experts_per_layer} a layer, {first.tokens_per_step} tokens a step, "
        f"{first.model.compute_dtype}, remat {first.model.remat}",
        flush=True,
    )
    for contenders in rounds(configs, arguments.against):
        if workers := start(contenders):
            report(workers, measure(workers, arguments.repeats), first.tokens_per_step)


if __name__ == "__main__":
    main()
