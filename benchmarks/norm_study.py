"""Do norms behind blocks and TinyInit give deep models more room for the learning rate? Norms x weights x rate, paired.

    python -m benchmarks.norm_study                      # 54 runs of 32 layers on the demo corpus, bytes
    python -m benchmarks.norm_study --out /tmp/short --layers 2 --steps 60 --seeds 1 --rates 1e-3
    python -m benchmarks.norm_study --report             # the table of what is there

The runs of a cell with all its seeds are lanes of one program. A cell that is there is skipped, so the command can be
repeated until all are. What is kept of a run: its configuration by difference, the loss and the gradient norm of every
step, and the loss on the validation split. Steps that are not finite are not applied; a run with one has diverged.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from unipool_jax.analysis.paired import paired
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import read_json, write_json
from unipool_jax.config.schema import Config
from unipool_jax.data.corpus import Corpus, open_corpus
from unipool_jax.data.pipeline import Batch, WindowSource
from unipool_jax.training.evaluate import Evaluator
from unipool_jax.training.metrics import plain_json
from unipool_jax.training.spikes import Spikes
from unipool_jax.training.state import init_state
from unipool_jax.training.step import train_step

RESULTS = Path(__file__).resolve().parents[1] / "results" / "norm_study"
NORMS = ("pre", "sandwich", "depth_scaled_sandwich")
INITS = ("base", "tiny")
RATES = (1e-3, 3e-3, 1e-2)
SEEDS = (1, 2, 3)
SETTINGS = (
    *("scale=demo", "model.hidden_size=48", "model.num_heads=4", "model.num_kv_heads=2", "model.ffn_size=192"),
    *("model.vocab_size=257", "model.init_std=0.02", "model.compute_dtype=float32", "model.remat=none"),
    *("data.tokenizer=bytes", "data.sequence_length=64", "train.batch_size=8", "train.microbatch_size=8"),
    *("loss.switch_group_sequences=8", "optimizer.beta2=0.95", "optimizer.warmup_fraction=0.05"),
    *("train.eval_batches=8", "train.eval_batch_size=32", "run.tensorboard=false"),
)


class Cell(NamedTuple):
    """What its runs have in common."""

    norm: str
    init: str
    rate: float

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.norm}-{self.init}-{self.rate:g}"

    def config(self, arguments: argparse.Namespace) -> Config:
        """Settings of its runs but for the seed."""
        words = (f"method={arguments.method}", f"model.num_layers={arguments.layers}", f"train.steps={arguments.steps}")
        own = (f"model.norm={self.norm}", f"model.init={self.init}", f"optimizer.learning_rate={self.rate}")
        lowest = f"optimizer.min_learning_rate={0.1 * self.rate}"
        return compose_config([*SETTINGS, *words, *own, lowest, f"data.cache_dir={arguments.cache}"])


def trained(config: Config, corpus: Corpus, seeds: list[int]) -> list[dict[str, Any]]:
    """The runs of one cell, trained side by side."""
    batch_size, length, steps = config.train.batch_size, config.data.sequence_length, config.train.steps
    sources = [WindowSource(corpus.stores, "train", length, steps * batch_size, seed) for seed in seeds]
    tokens_LTBS = np.stack(
        [s.tokens(range(steps * batch_size)).reshape(steps, batch_size, -1) for s in sources], axis=1
    )

    def step(lanes: Any, tokens: jax.Array) -> tuple[Any, dict[str, jax.Array]]:
        batch = Batch(tokens[..., :-1], tokens[..., 1:], jnp.ones(tokens[..., 1:].shape, jnp.float32))  # type: ignore[arg-type]
        lanes, metrics = jax.vmap(functools.partial(train_step, config, None))(lanes, batch)
        return lanes, {name: metrics[name] for name in ("loss/lm", "grad_norm", "finite")}

    init = jax.jit(init_state, static_argnums=0)
    lanes = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(init(config, jax.random.key(seed)) for seed in seeds))
    run = jax.jit(lambda lanes, tokens: jax.lax.scan(step, lanes, tokens), donate_argnums=0)
    lanes, found = jax.device_get(run(lanes, tokens_LTBS))
    evaluator, runs = Evaluator(config, corpus, ["valid"], limited=True), []
    for lane, seed in enumerate(seeds):
        own = jax.tree.map(lambda leaf, lane=lane: leaf[lane], lanes)
        valid = evaluator.evaluate(own.params, own.balance, evaluator.fixed("valid"))
        assert valid is not None
        series = {name: found[name][:, lane].astype(float).tolist() for name in ("loss/lm", "grad_norm")}
        runs.append({"seed": seed, "valid": valid.loss, "diverged": not found["finite"][:, lane].all(), **series})
    return runs


def spike_shares(run: dict[str, Any]) -> dict[str, float | None]:
    """Shares of the steps of a run that are spikes; what was not finite is stored as null."""
    spikes = Spikes()
    for loss, norm in zip(run["loss/lm"], run["grad_norm"], strict=True):
        values = {"loss/lm": loss, "grad_norm": norm}
        spikes.add({name: np.nan if value is None else value for name, value in values.items()})
    return spikes.shares()


def report(out: Path) -> str:
    """A table of the cells that are there; differences are paired with pre-norm and base weights at the same rate."""
    cells = {path.stem: read_json(path) for path in sorted(out.glob("*.json"))}
    lines = [
        "| norm | init | rate | validation loss | minus pre, base | diverged | loss spikes | gradient spikes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for cell in cells.values():
        usual = cells.get(f"pre-base-{cell['rate']:g}", {"runs": []})
        known = {run["seed"]: run["valid"] for run in usual["runs"] if not run["diverged"]}
        runs = cell["runs"]
        pairs = [run["valid"] - known[run["seed"]] for run in runs if run["seed"] in known and not run["diverged"]]
        shares = [spike_shares(run) for run in runs]
        losses = ", ".join("-" if run["valid"] is None else f"{run['valid']:.3f}" for run in runs)
        means = [
            "-" if None in values else f"{np.mean(values):.1%}"  # type: ignore[arg-type]
            for values in ([share[f"spikes/{name}"] for share in shares] for name in ("loss", "grad_norm"))
        ]
        diverged = f"{sum(run['diverged'] for run in runs)} of {len(runs)}"
        apart = _interval(pairs) if pairs and cell is not usual else "-"
        row = (cell["norm"], cell["init"], f"{cell['rate']:g}", losses, apart, diverged, *means)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def _interval(differences: list[float]) -> str:
    found = paired(differences)
    if found.interval is None:
        return f"{found.mean:+.3f} (1 pair)"
    return "{:+.3f} [{:+.3f}, {:+.3f}]".format(found.mean, *found.interval)


def main() -> int:
    """Run the study, or what is missing of it, and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=Path(".cache/tokens"), help="folder of the tokenized corpus")
    parser.add_argument("--method", choices=["dense", "unipool"], default="dense")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(RATES))
    parser.add_argument("--report", action="store_true", help="train nothing")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for cell in itertools.starmap(Cell, itertools.product(NORMS, INITS, arguments.rates)):
        path = arguments.out / f"{cell.name}.json"
        if arguments.report or path.exists():
            continue
        start, config = time.process_time(), cell.config(arguments)
        runs = trained(config, open_corpus(config.data, config.model.vocab_size), arguments.seeds)
        seconds = time.process_time() - start
        sizes = {"method": arguments.method, "layers": arguments.layers, "steps": arguments.steps}
        write_json(
            path, plain_json(cell._asdict() | sizes | {"cpu_seconds": round(seconds), "runs": runs}), indent=None
        )
        print(f"{cell.name}: {len(runs)} runs in {seconds:.0f} CPU-seconds", flush=True)
    print(report(arguments.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
