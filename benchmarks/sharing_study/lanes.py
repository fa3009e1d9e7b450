"""Trains one case with several seeds at once: the runs are lanes of one program, batched by `jax.vmap`.

A run this small leaves most of a GPU idle, and five of them take hardly longer than one. A lane computes what a run by
itself computes (`tests/test_sharing_study.py`); on one CPU core lanes save nothing, and `--lanes 1` does the same work.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.sharing_study.cases import EVALUATIONS, LOG_EVERY, Case
from unipool_jax.config.compose import save_config
from unipool_jax.config.files import write_json
from unipool_jax.config.schema import Config
from unipool_jax.data.corpus import Corpus
from unipool_jax.data.pipeline import Batch, WindowSource
from unipool_jax.training.evaluate import EvalResult, Evaluator
from unipool_jax.training.flops import flops_per_token
from unipool_jax.training.metrics import MetricsWriter, load_metrics
from unipool_jax.training.run_folder import CONFIG, SUMMARY
from unipool_jax.training.state import TrainState, init_state
from unipool_jax.training.step import train_step

KEPT = ("loss/lm", "loss/balance", "grad_norm", "finite", "zero_gates_L", "counts_LE")
"""Metrics of a step that are logged, averaged or summed over the steps between two lines."""


def initial_lanes(case: Case, config: Config, seeds: Sequence[int]) -> TrainState:
    """The states in which runs with these seeds begin, stacked along a first axis."""
    init = jax.jit(init_state, static_argnums=0)
    states = [init(config, jax.random.key(seed)) for seed in seeds]
    scaled = [s._replace(params=jax.tree.map(lambda x: x * case.initial_scale, s.params)) for s in states]
    stacked: TrainState = jax.tree.map(lambda *leaves: jnp.stack(leaves), *scaled)
    return stacked


def make_block(config: Config) -> Callable[[TrainState, np.ndarray], tuple[TrainState, dict[str, jax.Array]]]:
    """The jitted function `(lanes, tokens [steps, lanes, B, S + 1]) -> (lanes, KEPT of every step and lane)`."""

    def step(lanes: TrainState, tokens: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        arrays: Any = tokens[..., :-1], tokens[..., 1:], jnp.ones(tokens[..., 1:].shape, jnp.float32)
        batch = Batch(*arrays)
        lanes, metrics = jax.vmap(functools.partial(train_step, config, None))(lanes, batch)
        return lanes, {name: metrics[name] for name in KEPT}

    return jax.jit(lambda lanes, tokens: jax.lax.scan(step, lanes, tokens), donate_argnums=0)


def block_tokens(sources: Sequence[WindowSource], batch_size: int, start: int, stop: int) -> np.ndarray:
    """Tokens of steps `start` to `stop - 1` of every lane, int32 `[steps, lanes, B, S + 1]`."""
    indices = range(start * batch_size, stop * batch_size)
    lanes = [source.tokens(indices).reshape(stop - start, batch_size, -1) for source in sources]
    return np.stack(lanes, axis=1)


def train_values(config: Config, found: dict[str, np.ndarray], lane: int) -> dict[str, Any]:
    """One line of metrics of one lane: of all steps since the line before.

    Raises:
      FloatingPointError: a loss or a gradient was not finite.
    """
    if not found["finite"][:, lane].all():
        raise FloatingPointError(f"seed {config.train.seed}, lane {lane}: a loss or gradient is not finite")
    values: dict[str, Any] = {
        key: float(found[key][:, lane].mean()) for key in ("loss/lm", "loss/balance", "grad_norm")
    }
    if config.moe.router == "none":
        return values
    tokens = len(found["finite"]) * config.train.batch_size * config.data.sequence_length
    counts_LE = found["counts_LE"][:, lane].sum(axis=0)
    values["routing/zero_gates"] = (found["zero_gates_L"][:, lane].sum(axis=0) / tokens).tolist()
    return values | load_metrics(counts_LE, config.pool.groups, config.visible)


def without_folders(config: Config) -> Config:
    """The configuration without the folder that its text happens to be in."""
    store, tokenizer = (Path(name).name for name in (config.data.stores[0], config.data.tokenizer))
    data = dataclasses.replace(config.data, stores=(store,), tokenizer=tokenizer)
    return dataclasses.replace(config, data=data)


def eval_values(config: Config, result: EvalResult) -> dict[str, Any]:
    """Loss and routing of an evaluation, for the metrics and the summary."""
    values: dict[str, Any] = result.as_json()
    if config.moe.router != "none":
        values["routing/zero_gates"] = result.zero_gates_L.tolist()
        values |= load_metrics(result.counts_LE, config.pool.groups, config.visible)
    return values


def summary(step: int, seen: dict[str, Any], valid: dict[str, Any], held_out: dict[str, Any]) -> dict[str, Any]:
    """What an ordinary run leaves, without its speed and the unigram model, with the text held out."""
    loads = {key: valid.get(key, 0) for key in ("load/busiest_over_mean", "experts/used", "experts/dead")}
    return {
        "step": step,
        **seen,
        "results": {"valid": valid, "held_out": held_out},
        "unigram": None,
        "tokens_per_second": None,
        "experts_used": loads["experts/used"],
        "experts_total": loads["experts/used"] + loads["experts/dead"],
        "busiest_over_mean": float(loads["load/busiest_over_mean"]),
    }


def train(case: Case, configs: Sequence[Config], corpus: Corpus, held_out: Corpus, folders: Sequence[Path]) -> None:
    """Train and evaluate; leaves configuration, metrics and, last, the summary of each lane in its folder.

    Args:
      case: the line of the study.
      configs: one a lane; they differ in the seed alone.
      corpus: text to train and validate on.
      held_out: text of another source, of which all is validated on.
      folders: of the runs, one a lane. What is in them of an interrupted run is replaced.
    """
    config, lanes_of = configs[0], range(len(configs))
    batch_size, length, steps = config.train.batch_size, config.data.sequence_length, config.train.steps
    windows = steps * batch_size
    sources = [WindowSource(corpus.stores, "train", length, windows, c.train.seed) for c in configs]
    evaluator = Evaluator(config, corpus, ["valid"], limited=False)
    foreign = Evaluator(config, held_out, ["valid"], limited=False)
    for one, folder in zip(configs, folders, strict=True):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / SUMMARY).unlink(missing_ok=True)
        save_config(without_folders(one), folder / CONFIG)
    writers = [MetricsWriter(folder, 0, tensorboard=False) for folder in folders]

    def evaluate(found: Evaluator, lanes: TrainState, lane: int) -> EvalResult:
        params, balance = jax.tree.map(lambda x: x[lane], (lanes.params, lanes.balance))
        result = found.evaluate(params, balance, found.fixed("valid"))
        assert result is not None
        return result

    lanes, block = initial_lanes(case, config, [c.train.seed for c in configs]), make_block(config)
    tokens = block_tokens(sources, batch_size, 0, LOG_EVERY)
    for done in range(LOG_EVERY, steps + 1, LOG_EVERY):
        lanes, metrics = block(lanes, tokens)
        if done < steps:  # read while the device computes
            tokens = block_tokens(sources, batch_size, done, done + LOG_EVERY)
        found = {key: np.asarray(value) for key, value in jax.device_get(metrics).items()}
        for lane in lanes_of:
            seen = {"tokens": done * batch_size * length, "flops": done * batch_size * length * flops_per_token(config)}
            writers[lane].write("train", done, seen | train_values(config, found, lane))
            if done % (steps // EVALUATIONS) == 0:
                valid = eval_values(config, evaluate(evaluator, lanes, lane))
                writers[lane].write("valid", done, valid)
                if done == steps:
                    other = eval_values(config, evaluate(foreign, lanes, lane))
                    write_json(folders[lane] / SUMMARY, summary(done, seen, valid, other), indent=2)
    for writer in writers:
        writer.close()
