"""Growth in depth against training all layers from the start, at equal FLOPs: paired runs on real text.

    python -m benchmarks.growth_study --out results/growth_study
    python -m benchmarks.growth_study --out /tmp/try --seeds 1 --arms scratch apollo --overrides train.steps=40

Arms: `scratch` has 8 layers from the start; `apollo` grows 1, 2, 4, 8 with the published law of depths; `uniform` and
`final` draw other depths; `stacking` grows with whole stacks and without drawn depths. Every arm trains for the steps
that spend the FLOPs of the scratch run, with a schedule over these steps. A seed fixes weights, order of text and
depths, and differences are taken seed by seed. The table says the loss at equal FLOPs, and the share of the FLOPs after
which an arm was as good as the scratch run at its end. Finished runs are not repeated;
of each its curve is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.intervals import Losses, differences_table, kept_runs, markdown_table
from unipool_jax.analysis.history import read_history
from unipool_jax.cli.guard import guarded
from unipool_jax.config.compose import compose_config
from unipool_jax.config.files import write_json
from unipool_jax.config.schema import Config
from unipool_jax.training.entry import run
from unipool_jax.training.flops import flops_spent

GROWTH = ("growth.layers=[1,2,4,8]", "growth.ends=[.05,.1,.25,1]")
ARMS: dict[str, tuple[str, ...]] = {
    "scratch": (),
    "apollo": GROWTH,
    "uniform": (*GROWTH, "growth.depth_law=uniform"),
    "final": (*GROWTH, "growth.depth_law=final"),
    "stacking": (*GROWTH, "growth.depth_law=stage", "growth.map=stack"),
}
BASELINE = "scratch"
Curves = dict[str, dict[int, np.ndarray]]
"""FLOPs and validation losses of each evaluation, `[2, T]`, by arm and seed."""
EVALUATIONS = 40
"""Of each run."""
# Bytes, so that the output head is a small part of the FLOPs, and depth most of them.
SETTINGS = (
    "method=unipool model.num_layers=8 model.hidden_size=64 model.num_heads=4 model.num_kv_heads=2 model.ffn_size=128 "
    "model.vocab_size=257 model.compute_dtype=float32 moe.experts_per_layer=4 data.tokenizer=bytes "
    "data.sequence_length=128 train.steps=500 train.batch_size=8 train.microbatch_size=8 train.eval_batches=8 "
    "train.eval_batch_size=32 train.checkpoint_every=0 train.keep_checkpoints=1 optimizer.beta2=0.999"
)


def configuration(arm: str, seed: int, folder: Path, overrides: Sequence[str]) -> Config:
    """One run of the study, with as many steps as spend the FLOPs of the scratch run."""
    place = [f"run.dir={folder}", f"run.name={arm}-seed{seed}", f"train.seed={seed}", "run.tensorboard=false"]
    whole = compose_config([*SETTINGS.split(), *overrides, *place])
    config = compose_config([*SETTINGS.split(), *overrides, *ARMS[arm], *place])
    steps = equal_steps(config, flops_spent(whole, whole.train.steps))
    train = dataclasses.replace(config.train, steps=steps, eval_every=max(steps // EVALUATIONS, 1))
    return dataclasses.replace(config, train=train)


def equal_steps(config: Config, flops: float) -> int:
    """The fewest steps in which a run of `config` spends so many FLOPs."""
    low, high = 1, 2 * config.train.steps * max(config.growth.layers, default=1)
    while low < high:
        middle = (low + high) // 2
        longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=middle))
        low, high = (low, middle) if flops_spent(longer, middle) >= flops else (middle + 1, high)
    return low


def curve(folder: Path, config: Config) -> np.ndarray:
    """FLOPs spent and validation loss at each evaluation of a run, `[2, evaluations]`."""
    lines = [line for line in read_history(folder) if line["kind"] == "valid"]
    return np.array([[flops_spent(config, line["step"]) for line in lines], [line["loss"] for line in lines]])


def stored(out: Path) -> Curves:
    """The curves that were kept, by arm and seed."""
    return {
        arm: {seed: np.array([one["flops"], one["loss"]]) for seed, one in by_seed.items()}
        for arm, by_seed in kept_runs(out, ARMS, "arm").items()
    }


def flops_to(curve_2T: np.ndarray, loss: float) -> float | None:
    """FLOPs after which a run first had this loss, linear between evaluations; None if it never had."""
    flops_T, losses_T = curve_2T
    reached = np.flatnonzero(losses_T <= loss)
    if not len(reached):
        return None
    at = int(reached[0])
    if at == 0:
        return float(flops_T[0])
    before, after = losses_T[at - 1], losses_T[at]
    return float(flops_T[at - 1] + (flops_T[at] - flops_T[at - 1]) * (before - loss) / (before - after))


def table(curves: Curves) -> str:
    """Markdown: final losses and FLOPs to the final loss of the scratch run of the seed; then paired differences."""
    rows = []
    for arm, by_seed in curves.items():
        shares = []
        for seed, found in by_seed.items():
            if (scratch := curves.get(BASELINE, {}).get(seed)) is None:
                continue
            spent = flops_to(found, float(scratch[1, -1]))
            shares.append(None if spent is None else spent / float(scratch[0, -1]))
        known = [share for share in shares if share is not None]
        each = ", ".join("-" if share is None else f"{share:.1%}" for share in shares)
        loss = np.mean([found[1, -1] for found in by_seed.values()])
        rows.append([arm, f"{loss:.4f}", each, f"{len(known)} of {len(shares)}"])
    losses: Losses = {a: {s: float(c[1, -1]) for s, c in by_seed.items()} for a, by_seed in curves.items()}
    text = markdown_table(["arm", "valid loss", "FLOPs to the loss of scratch, of its FLOPs", "reached"], rows)
    return text + "\n" + differences_table(losses, [BASELINE]) if BASELINE in losses and len(losses) > 1 else text


def main() -> int:
    """Train what is missing, then write the table; returns an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is kept")
    parser.add_argument("--runs", type=Path, default=Path("runs/growth_study"), help="folder of the runs themselves")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 .. N")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    parser.add_argument(
        "--overrides", nargs="*", default=[], help="settings for all runs, as `unipool train` takes them"
    )
    arguments = parser.parse_args()
    for seed in range(1, arguments.seeds + 1):
        # Seed by seed, so that an interrupted study has complete pairs.
        for arm in arguments.arms:
            config = configuration(arm, seed, arguments.runs, arguments.overrides)
            if code := guarded(functools.partial(run, config)):
                return code
            flops, loss = curve(arguments.runs / f"{arm}-seed{seed}", config).tolist()
            kept = {"arm": arm, "seed": seed, "overrides": arguments.overrides, "steps": config.train.steps}
            arguments.out.mkdir(parents=True, exist_ok=True)
            write_json(arguments.out / f"{arm}-seed{seed}.json", kept | {"flops": flops, "loss": loss}, indent=None)
    print(table(stored(arguments.out)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
